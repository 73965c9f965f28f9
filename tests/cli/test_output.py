from __future__ import annotations

import json
import logging

import pytest

from cir import cli
from cir.cli import commands
from cir.cli.output import complain, escaped, say, write_json

STRANGE = "a\x1b[31mred\x07\u202eb\x9b\ud800\nc"
SAFE = "a\\x1b[31mred\\x07\\u202eb\\x9b\\ud800"


def test_nothing_that_a_terminal_acts_on_is_shown(capsys):
    assert escaped(STRANGE) == f"{SAFE}\nc"
    assert escaped(STRANGE, lines=False) == f"{SAFE}\\nc"
    say(STRANGE)
    complain(f"{STRANGE}\n   and {'x' * 999}")
    out, err = capsys.readouterr()
    assert out == f"{SAFE}\nc\n"
    assert err.startswith(f"cir: {SAFE} c and xxx")
    assert err.endswith("x ...\n")
    assert err.count("\n") == 1


def test_json_is_strict(tmp_path, capsys):
    write_json("-", {"a": 1.5})
    assert json.loads(capsys.readouterr().out) == {"a": 1.5}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(str(tmp_path / "out"), {"a": float("nan")})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "said", "status"),
    [
        (ValueError("expected x,\n got y"), "cir: expected x, got y\n", 1),
        (KeyError("x"), "cir: KeyError: 'x'; --debug shows where\n", 1),
        (RuntimeError("CUDA\nerror"), "cir: RuntimeError: CUDA error; --debug shows where\n", 1),
        (KeyboardInterrupt(), "cir: interrupted\n", 130),
    ],
)
def test_whatever_fails_is_one_line(monkeypatch, capsys, error, said, status):
    def fails(arguments):
        logging.getLogger("cir.data").warning("strange \x1b name")
        raise error

    monkeypatch.setitem(commands.COMMANDS, "doctor", fails)
    assert cli.main(["doctor"]) == status
    assert capsys.readouterr().err == f"cir: warning: strange \\x1b name\n{said}"
    with pytest.raises(type(error)) if status == 1 else pytest.MonkeyPatch.context():
        cli.main(["doctor", "--debug"])
    assert not logging.getLogger("cir").handlers


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["attack", "--epochs", "0"], "argument --epochs: expected a whole number of at least 1, got '0'"),
        (["attack", "--epochs", "1.5"], "argument --epochs: expected a whole number of at least 1, got '1.5'"),
        (["attack", "--epochs", "9" * 400], "argument --epochs: expected a whole number of at least 1, got '999"),
        (["attack", "--lr", "nan"], "argument --lr: expected a positive number, got 'nan'"),
        (["eval", "--generate", "-1"], "argument --generate: expected a whole number of at least 0, got '-1'"),
    ],
)
def test_numbers_that_are_none_are_told_at_once(capsys, arguments, said):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
