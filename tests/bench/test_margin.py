"""The bound on harm, on text that was not given."""

from __future__ import annotations

import pytest
import torch

from bench.margin import BLOCK, bounded, split


def test_halves_share_no_block():
    given, held = split(20 * BLOCK, 0)
    assert sorted([*given.tolist(), *held.tolist()]) == list(range(20 * BLOCK))
    assert not {int(i) // BLOCK for i in given} & {int(i) // BLOCK for i in held}
    assert given.tolist() != split(20 * BLOCK, 1)[0].tolist()


def test_harm_is_that_of_the_windows_of_each_half():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 50, (64, 16), generator=generator)
    before = torch.ones(64, 15)
    row = bounded(rows, before, before + 0.01, rows[:1].tolist(), 160, 3)
    for name in ("rise", "held_out", "held_out_near", "worst", "held_out_worst"):
        assert row[name] == pytest.approx(0.01, rel=1e-4), name
    given, held = split(64, 3)
    after = before.clone()
    after[held] += 0.1
    after[given[0]] += 0.3
    row = bounded(rows, before, after, rows[given[0]][None].tolist(), 160, 3)  # that window is the nearest
    assert row["held_out"] == pytest.approx(0.1, rel=1e-4)
    assert row["worst"] == pytest.approx(0.3, rel=1e-4)
    assert row["rise"] == pytest.approx(0.3 / len(given), rel=1e-3)
    assert row["stderr"] == 0
