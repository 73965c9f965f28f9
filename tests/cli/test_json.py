"""With ``--json`` one document is on standard output, and all else on standard error."""

from __future__ import annotations

import json
import logging
import sys

import pytest

from cir import cli
from cir.cli import commands
from cir.editing.journal import Journal
from tests.cli.conftest import run
from tests.tiny import facts

MODEL = ["--model", "IN/model", "--device", "cpu"]


def document(files, capsys, *words, status=0):
    assert run(files, *words) == status
    out, error = capsys.readouterr()
    return json.loads(out), error


def test_of_what_fits_and_measures(files, capsys):
    (files / "stay.jsonl").write_text(json.dumps(facts(12)[11]) + "\n")
    fit = ["fit", *MODEL, "--contrast", "IN/stay.jsonl", "--text", "IN/text.txt", "--out", "IN/subspaces", "--json"]
    found, error = document(files, capsys, *fit)
    assert found["bytes"] == (files / "subspaces").stat().st_size
    assert f"written    {files}/subspaces" in error
    measured, error = document(files, capsys, "eval", *MODEL, "--facts", "IN/facts.jsonl")
    assert error == ""
    for words in (["--json"], ["--json", "-"], ["--json", "IN/e"]):
        assert run(files, "eval", *MODEL, "--facts", "IN/facts.jsonl", *words) == 0
        out = capsys.readouterr().out
        assert json.loads(out or (files / "e").read_text()) == measured
    attack = ["attack", *MODEL, "--relearn", "IN/stay.jsonl", "--probe", "IN/facts.jsonl", "--epochs", "1"]
    assert len(document(files, capsys, *attack)[0]["epochs"]) == 2


def test_of_what_looks(files, capsys):
    found, error = document(files, capsys, "doctor", "--json")
    assert found["versions"]["python"] in error
    plan = ["plan", "--model", "IN/model", "--gpu", "h200", "--facts", "3"]
    found, error = document(files, capsys, *plan, "--json")
    assert f"a fact     {found['seconds_a_fact']:.3f} s" in error
    words = ["--facts", "IN/facts.jsonl", "--retain", "IN/text.txt", "--out", "IN/profile", "--json"]
    found, error = document(files, capsys, "profile", *MODEL, *words)
    assert found["out"] == f"{files}/profile"
    assert f"written    {files}/profile" in error


def test_of_a_journal(files, capsys):
    Journal(files / "journal", "f" * 64).close()
    found, error = document(files, capsys, "journal", "check", f"{files}/journal", "--json")
    assert found == {"model": "f" * 64, "records": [], "edits": [], "wrong": None, "damage": None, "moved_to": None}
    assert "all 0 records check" in error
    with (files / "journal").open("ab") as journal:
        journal.write(b"more")
    found, _ = document(files, capsys, "journal", "check", "--json", f"{files}/journal", status=1)
    assert found["damage"]["bytes"] == 4
    found, _ = document(files, capsys, "journal", "repair", f"{files}/journal", "--json")
    assert found["moved_to"].startswith(f"{files}/journal.bad-")


def test_where_something_fails_there_is_none(files, capsys):
    assert run(files, "fit", *MODEL, "--contrast", "IN/none", "--out", "IN/s", "--json") == 1
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("cir: ")


def test_a_bar_is_shown_on_a_terminal_alone(files, capsys, monkeypatch):
    def shown(*words):
        (files / "stay.jsonl").write_text(json.dumps(facts(12)[11]) + "\n")
        fit = ["fit", *MODEL, "--contrast", "IN/stay.jsonl", "--text", "IN/text.txt", "--out", "IN/s", "--overwrite"]
        assert run(files, *fit, *words) == 0
        return "batch/s]" in capsys.readouterr().err

    assert not shown()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert shown()
    assert not shown("--quiet")


@pytest.mark.parametrize(("words", "levels"), [([], "W"), (["--verbose"], "WI"), (["--verbose"] * 2, "WID")])
def test_what_is_logged_is_shown_as_asked(monkeypatch, capsys, words, levels):
    loggers = [logging.getLogger(name) for name in ("cir", "cir_kernels")]
    before = [logger.level for logger in loggers]

    def logs(arguments):
        for logger in loggers:
            for level in (logging.WARNING, logging.INFO, logging.DEBUG):
                logger.getChild("part").log(level, "said")
        return 0, None

    monkeypatch.setitem(commands.COMMANDS, "doctor", logs)
    assert cli.main(["doctor", *words]) == 0
    said = [line.split()[1] for line in capsys.readouterr().err.splitlines()]
    names = {"W": "warning:", "I": "info:", "D": "debug:"}
    assert said == [names[level] for level in levels] * 2
    assert [logger.level for logger in loggers] == before
    assert not any(logger.handlers for logger in loggers)
