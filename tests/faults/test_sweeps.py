"""A few of each sweep, and that each finds what it is there to find."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cir.editing import journal
from cir.system.signals import Held
from tests.faults import interrupts, journals
from tests.faults.__main__ import main


def test_interrupts_leave_weights_history_and_journal_in_agreement():
    assert interrupts.sweep(0.02)[1] == []


def test_interrupts_that_are_not_held_are_found(monkeypatch):
    monkeypatch.setattr(Held, "__enter__", lambda self: self)
    monkeypatch.setattr(Held, "__exit__", lambda self, *_: None)
    assert interrupts.sweep(0.05)[1]


def test_no_damage_to_a_journal_loses_anything_in_silence():
    assert journals.sweep(90) == (90, [])


def test_a_journal_that_drops_what_does_not_check_is_found(monkeypatch):
    monkeypatch.setattr(journal.Contents, "cut", property(lambda _: True))
    monkeypatch.setattr(journal.logger, "warning", lambda *_: None)
    assert journals.sweep(18)[1]


# In a process of its own: a fork must have no other threads.
KILLS = """
from cir.system import writing
from tests.faults import kills
{change}
print(kills.sweep({count}, {runs}, {seed}))
"""


def swept(count: int, runs: int, change: str = "", seed: int = 0) -> str:
    code = KILLS.format(count=count, runs=runs, change=change, seed=seed)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_kills_leave_nothing_half_written():
    assert swept(60, 2) == "(62, [])\n"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ("writing._clear = lambda out: None", "the next start"),
        (
            "kills.write_folder = lambda out, fill, overwrite=False: (out.mkdir(exist_ok=True), fill(out), out)[2]",
            "half",
        ),
    ],
)
def test_what_kills_leave_is_found(change, found):
    assert any(found in swept(60, 0, change, seed) for seed in range(5))  # when a kill comes, is chance


def test_only_names_of_sweeps_are_taken(capsys):
    assert main(["nothing"]) == 1
    told = capsys.readouterr().err
    assert told == "expected some of certificates, interrupts, journals, kills, requests, got nothing\n"
