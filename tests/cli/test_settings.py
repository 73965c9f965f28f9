from __future__ import annotations

import argparse
import json

import pytest

from cir import CIRConfig
from cir.cli.parser import read
from cir.cli.settings import used

GIVEN = """
model: some/model
facts: facts.jsonl
max-steps: 3
worst_window: 1e-2
full_check: true
certify: false
"""


def options(path, *words):
    return vars(read(["unlearn", "--out", "out", "--config", str(path), *words]))


def test_a_file_gives_options_and_the_command_line_goes_first(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(GIVEN)
    flags = ["--model", "some/model", "--facts", "facts.jsonl", "--max-steps", "3", "--worst-window", "1e-2"]
    expected = vars(read(["unlearn", "--out", "out", *flags, "--full-check"]))
    assert options(path) == {**expected, "config": str(path)}
    over = options(path, "--max-steps", "7", "--no-full-check", "--certify", "--model=other")
    assert [over[name] for name in ("max_steps", "full_check", "certify", "model")] == [7, False, True, "other"]
    assert over["worst_window"] == 0.01
    (tmp_path / "c.json").write_text(json.dumps({"model": "some/model", "seed": 0, "floor": -6}))
    found = options(tmp_path / "c.json")
    assert [found[name] for name in ("model", "seed", "floor")] == ["some/model", 0, -6.0]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("c.yaml", "max_step: 3", "expected an option, got 'max_step'; did you mean max_steps?"),
        ("c.yaml", "config: other.yaml", "expected an option, got 'config'"),
        ("c.yaml", "help: true", "expected an option, got 'help'"),
        ("c.yaml", "1: 2", "expected an option, got 1"),
        ("c.yaml", "seed: 1\nseed: 1", "expected 'seed' once, got it 2 times"),
        ("c.yaml", "max-steps: 1\nmax_steps: 2", "expected max_steps once, got it twice"),
        ("c.json", '{"seed": 1, "seed": 2}', "expected JSON, got an object with 'seed' twice"),
        ("c.yaml", "- seed", "expected options by name, got ['seed']"),
        ("c.yaml", "", "expected options by name, got None"),
        ("c.yaml", "seed: [", "expected YAML, got"),
        ("c.yaml", "seed: !!python/name:os.system", "expected YAML, got could not determine a constructor"),
        ("c.yaml", "[" * 5000, "expected YAML, got"),
        ("c.json", "seed: 1", "expected JSON, got"),
        ("c.yaml", "seed: one", "seed: expected a whole number of at least 0, got 'one'"),
        ("c.yaml", "seed: 1.5", "seed: expected a whole number of at least 0, got '1.5'"),
        ("c.yaml", "seed: true", "seed: expected a number, got True"),
        ("c.yaml", "budget: .nan", "budget: expected a number, got 'nan'"),
        ("c.yaml", "budget: [1]", "budget: expected a number, got [1]"),
        ("c.yaml", "budget:", "budget: expected a number, got None"),
        ("c.yaml", "facts: 2024-01-01", "facts: expected text, got datetime.date"),
        ("c.yaml", "full_check: 1", "full_check: expected true or false, got 1"),
        ("c.yaml", "preset: papers", "preset: expected one of default, paper, repselect, got 'papers'"),
        ("c.yaml", "rounding: up", "rounding: expected one of nearest, stochastic, compensated, got 'up'"),
        ("none.yaml", None, "No such file or directory"),
    ],
)
def test_what_is_not_right_is_told_by_name(tmp_path, capsys, name, text, said):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as stopped:
        options(tmp_path / name)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said in error
    assert name in error
    assert error.startswith("cir: ")
    assert error.count("\n") == 1


def test_what_a_run_used_is_written_as_it_is_read(tmp_path):
    words = ["--model", "some/mödel", "--floor", "-6", "--no-relearning", "--quiet", "--overwrite", "--seed", "0"]
    given = read(["unlearn", "--out", "out", *words])
    path = tmp_path / "config.yaml"
    path.write_text(used(given, CIRConfig(floor=-6.0)), encoding="utf-8")
    again = options(path)
    settings = vars(CIRConfig(floor=-6.0))
    assert {name: value for name, value in again.items() if name in settings and value is not None} == {
        name: value for name, value in settings.items() if name in again and value is not None and value is not False
    }
    assert [again[name] for name in ("model", "no_relearning", "seed")] == ["some/mödel", True, 0]
    assert [again[name] for name in ("quiet", "overwrite")] == [False, False]
    assert used(argparse.Namespace(**again), CIRConfig(floor=-6.0)) == path.read_text(encoding="utf-8")
