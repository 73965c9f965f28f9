from __future__ import annotations

import re
import subprocess
import sys

import pytest

import cir
from cir import cli
from cir.cli import output
from cir.cli.parser import parser

COMMANDS = sorted(parser().commands)


def refused(words, capsys) -> str:
    """What is said of ``words``, in one line, which are wrong usage."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    out, error = capsys.readouterr()
    assert stopped.value.code == output.WRONG_USAGE == 2
    assert out == ""
    assert re.fullmatch(r"cir: .*\n", error)
    return error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "the following arguments are required: command (`cir --help`)"),
        (["--vresion"], "expected an option, got '--vresion'; did you mean --version? (`cir --help`)"),
        (["unlern"], "expected a command, got 'unlern'; did you mean unlearn? (`cir --help`)"),
        (["zzz\x1b"], "expected a command, got 'zzz\\x1b' (`cir --help`)"),
        (["unlearn", "--bugdet=1"], "got '--bugdet'; did you mean --budget? (`cir unlearn --help`)"),
        (["unlearn", "--out", "o"], "expected a model, with --model or in the file of --config, got none"),
        (["unlearn", "--model", "m"], "the following arguments are required: --out"),
        (
            ["unlearn", "--model", "m", "--out", "o", "--require-recall", "50"],
            "expected a number from 0 to 1, got '50'",
        ),
        (["unlearn", "--model", "m", "--out", "o", "--config"], "argument --config: expected one argument"),
        (["forget", "--model", "m", "--journal", "j"], "one of the arguments --fact --facts is required"),
        (
            ["forget", "--model", "m", "--journal", "j", "--fact", "f", "--contrast", "c", "--subspaces", "s"],
            "argument --subspaces: not allowed with argument --contrast",
        ),
        (["forget", "--model", "m", "--fact", "f"], "the following arguments are required: --journal"),
        (["undo", "--model", "m", "--journal", "j", "--edit", "0"], "expected a whole number of at least 1, got '0'"),
        (["edits", "journal"], "the following arguments are required: --journal"),
        (["eval", "--model", "m", "--atacks"], "got '--atacks'; did you mean --attacks?"),
        (["attack", "--model", "m", "--relearn", "f"], "the following arguments are required: --probe"),
        (["verify"], "the following arguments are required: folder"),
        (["profile", "--model", "m", "--epochs", "x"], "expected a whole number of at least 1, got 'x'"),
        (["plan", "--model", "m", "--facts", "1", "--gpu", "h1000"], "argument --gpu: invalid choice: 'h1000'"),
        (["doctor", "now"], "unrecognized arguments: now"),
        (["fit", "--model", "m", "--out", "o"], "the following arguments are required: --contrast"),
        (["apply", "--model", "m", "--out", "o", "-edit", "e"], "got '-edit'; did you mean --edit?"),
        (["revert", "--model", "m", "--edit", "e"], "the following arguments are required: --out"),
        (["journal", "chek", "j"], "argument what: invalid choice: 'chek' (choose from"),
        (["demo", "--modle", "m"], "got '--modle'; did you mean --model?"),
    ],
)
def test_a_mistake_is_told_in_a_line_that_says_what_to_do(capsys, words, said):
    assert said in refused(words, capsys)


@pytest.mark.parametrize("command", COMMANDS)
def test_no_option_is_abbreviated(capsys, command):
    for option in parser().commands[command]._option_string_actions:
        if len(option) > 3 and option[:-1] not in parser().commands[command]._option_string_actions:
            assert f"expected an option, got '{option[:-1]}'; did you mean --" in refused(
                [command, option[:-1]], capsys
            )


def test_words_that_are_no_options_are_taken_as_they_are():
    words = ["--model", "m", "--journal", "j", "--fact", "-Rome is --there"]
    assert parser().parse_args(["forget", *words]).fact == "-Rome is --there"
    assert cli.commands.read(["forget", *words]).fact == "-Rome is --there"
    assert cli.commands.read(["unlearn", "--model", "m", "--out", "o", "--floor", "-6"]).floor == -6


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_what_all_have(capsys, command):
    known = set(parser().commands[command]._option_string_actions)
    assert {"--quiet", "--verbose", "--debug", "--help"} <= known
    assert ("--json" in known) == (command not in ("demo", "completion"))
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0


def test_help_needs_no_torch_and_tells_the_exit_statuses():
    code = "import sys; from cir.cli import main\ntry: main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    told = {int(number) for number in re.findall(r"^  (\d+) +\w", done.stdout.split("exit status:")[1], re.MULTILINE)}
    assert told == {output.DONE, output.FAILED, output.WRONG_USAGE, output.PARTLY, output.INTERRUPTED}


def test_the_package_can_be_run():
    done = subprocess.run([sys.executable, "-m", "cir", "--version"], check=True, capture_output=True, text=True)
    assert done.stdout == f"cir {cir.__version__}\n"
    wrong = subprocess.run([sys.executable, "-m", "cir", "evil"], check=False, capture_output=True, text=True)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "cir: expected a command, got 'evil'; did you mean eval? (`cir --help`)\n"


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_what_completes_commands_knows_all_of_them(capsys, shell):
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(command in script for command in COMMANDS)
    assert "--subspaces" in script


def test_completion_without_its_package_is_told(capsys, monkeypatch):
    monkeypatch.setattr(cli.commands, "find_spec", lambda name: None)
    assert cli.main(["completion", "bash"]) == 1
    assert "pip install 'cir[completion]'" in capsys.readouterr().err
