"""The benchmark of the step, on a model small enough for a test."""

from __future__ import annotations

import json
import sys
import time

import pytest

from bench import device, step

TINY = step.WORKLOADS["tiny"]


@pytest.mark.parametrize("form", ["ours", "saving", "eager", "trimmed", "ascent"])
def test_each_form_does_the_work_of_w1(form):
    run = step.Run(TINY, 2)
    before = [target.linear.weight.detach().clone() for target in run.targets]
    run.batch(form)
    changed = [bool((t.linear.weight != w).any()) for t, w in zip(run.targets, before, strict=True)]
    assert all(changed)
    assert not any(target.linear.weight.requires_grad for target in run.targets)


def test_the_default_takes_all_its_steps_of_all_facts():
    report = step.Run(TINY, 12).unlearn()
    assert report.stopped == "all epochs done"
    assert len(report.epochs) == 2
    assert len(report.unforgotten) == TINY.facts
    assert report.epochs[0].forget_loss > report.epochs[1].forget_loss


def test_one_fact_after_the_other_is_edited_out():
    call = step.Run(TINY, 12).edit()
    for name in ("f0", "f1"):
        edit = call()
        assert edit.id == name
        assert edit.before.recall > 0.1
        assert edit.after.recall < 0.2 * edit.before.recall


def test_what_a_row_says():
    row = json.loads(json.dumps(step.measured("tiny", "unlearn", "ours", 10)))
    assert row["facts"] == TINY.facts
    assert row["seconds"] > 0
    assert set(row["phases"]) == {"measure", "fit", "epochs", "total"}
    assert row["total_bytes"] >= row["peak_bytes"]
    assert row["weight_bytes"] > 45100 * 64 * 2


def rehearsed(tmp_path, monkeypatch, *parts: device.Part) -> tuple[dict[str, dict], int]:
    """The rows of device.jsonl by part, and the exit status."""
    monkeypatch.setattr(device, "PARTS", list(parts))
    monkeypatch.setattr(sys, "argv", ["device", "--out", str(tmp_path), "--rehearse"])
    with pytest.raises(SystemExit) as ended:
        device.main()
    rows = [json.loads(line) for line in (tmp_path / "device.jsonl").read_text().splitlines()]
    return {row["part"]: row for row in rows}, ended.value.code


def test_a_rehearsal_brings_the_rows_of_users_calls(tmp_path, monkeypatch):
    (default,) = (part for part in device.PARTS if part.name == "default")
    found, code = rehearsed(tmp_path, monkeypatch, default)
    assert code == 0, (tmp_path / "default.log").read_text()[-2000:]
    assert found["default"]["exit"] == 0
    rows = [json.loads(line) for line in (tmp_path / "step.jsonl").read_text().splitlines()]
    assert [row["task"] for row in rows] == ["unlearn", "edit"]
    assert all(row["seconds"] > 0 for row in rows)


def test_a_part_that_hangs_or_fails_costs_the_others_nothing(tmp_path, monkeypatch):
    code = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', %r]); print('there', flush=True)"
    child = f"import time; time.sleep(3); open({str(tmp_path / 'survived')!r}, 'w')"
    hangs = tmp_path / "hangs.py"
    hangs.write_text(code % child + "; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found, failed = rehearsed(
        tmp_path,
        monkeypatch,
        device.Part("hangs", 1, ("hangs",)),
        device.Part("fails", 60, ("no_such_module",)),
        device.Part("works", 60, ("this",)),
    )
    assert [found[name]["exit"] for name in ("hangs", "fails", "works")] == [None, 1, 0]
    assert failed
    assert "beautiful" in (tmp_path / "works.log").read_text().lower()
    time.sleep(3)
    assert not (tmp_path / "survived").exists()  # what it started is gone with it
