"""What has to stay and fell is raised again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cir.config import CIRConfig
from cir.forgetting import mending
from cir.forgetting.doses import told_apart
from cir.forgetting.forgetter import Forgetter, Step
from cir.forgetting.mending import Kept
from cir.forgetting.questions import Questions
from cir.forgetting.update import snapshot
from cir.measures import mean_recall, recall
from cir.model.sites import names_of, sites_of
from tests.forgetting.test_forgetter import FACTS, NOTHING, asked, told

CONFIG = CIRConfig(floor=-6.0, max_change=1.0, relearning_steps=0, check_every=40)


def odds(parts, tape):
    return torch.cat([part.odds(tape) for part in parts])


@pytest.mark.parametrize("at_once", [16, 512])
def test_what_fell_is_told_by_how_far(opened, at_once):
    _, tokenizer, targets, tape = opened
    parts, names = asked(tape, tokenizer, FACTS[6:], at_once), names_of(sites_of(targets))
    before, kept = odds(parts, tape), Kept(tape, told(tape, tokenizer, FACTS[6:]), at_once, seed=0)
    assert kept.fallen(names, 100) is None
    forgetter = Forgetter(tape, targets, tokenizer, FACTS[:6], NOTHING, CONFIG)
    while not (before - odds(parts, tape) > mending.GONE).any():
        forgetter.apply(forgetter.step())  # nothing is spared: others fall with these
    down = before - odds(parts, tape)
    expected = down[(down > mending.LOST) & (down < mending.GONE)].sort(descending=True).values
    assert 3 < len(expected) < int((down > mending.LOST).sum()) < len(down)
    rows, lost = kept.fallen(names, 100)
    torch.testing.assert_close(lost, expected)
    assert rows.owners.tolist() == list(range(len(lost)))
    assert rows.tokens.keys() == set(names)
    for place, fell in zip(rows.odds, lost, strict=True):  # the rows are those of these answers
        near = (before - down - place).abs().argmin()
        torch.testing.assert_close(down[near], fell)
    rows, lost = kept.fallen(names, 2)
    torch.testing.assert_close(lost, expected[:2])
    assert all(len(tensor) == 2 for tensor in (rows.odds, rows.owners, *rows.tokens.values()))


def test_few_that_fell_are_let_be(opened, monkeypatch):
    _, tokenizer, targets, tape = opened
    parts, names = asked(tape, tokenizer, FACTS[6:]), names_of(sites_of(targets))
    kept, before = Kept(tape, told(tape, tokenizer, FACTS[6:]), 512, seed=0), odds(parts, tape)
    forgetter = Forgetter(tape, targets, tokenizer, FACTS[:6], NOTHING, CONFIG)
    while not (fell := before - odds(parts, tape) > mending.LOST).any():
        forgetter.apply(forgetter.step())
    share = float(fell.float().mean())
    monkeypatch.setattr(mending, "FEW_LOST", share + 0.01)
    assert kept.fallen(names, 100) is None
    monkeypatch.setattr(mending, "FEW_LOST", share - 0.01)
    assert kept.fallen(names, 100) is not None


def test_no_more_is_asked_than_said_and_all_of_it_in_time(opened, monkeypatch):
    _, tokenizer, targets, tape = opened
    names = names_of(sites_of(targets))
    monkeypatch.setattr(mending, "ASKED", 3 * 16)
    kept, seen, turns = Kept(tape, told(tape, tokenizer, FACTS), 16, seed=0), [], []
    monkeypatch.setattr(Questions, "odds", lambda part, *_: seen.append(id(part)) or torch.zeros(len(part.at)))
    for _ in range(40):
        seen.clear()
        kept.fallen(names, 100)
        turns.append(set(seen))
    assert {len(turn) for turn in turns} == {3}
    assert len(set().union(*turns)) >= 10


def test_what_fell_comes_back_and_the_facts_go_all_the_same(opened):
    model, tokenizer, targets, tape = opened
    before, untouched = mean_recall(recall(model, tokenizer, FACTS[6:])), snapshot(targets)
    found = {}
    for mends in (False, True):
        kept = told(tape, tokenizer, FACTS[6:]) if mends else []
        forgetter = Forgetter(tape, targets, tokenizer, FACTS[:6], NOTHING, replace(CONFIG, floor=-4.0), kept=kept)
        assert forgetter.epoch().gone
        found[mends] = mean_recall(recall(model, tokenizer, FACTS[6:]))
        assert mean_recall(recall(model, tokenizer, FACTS[:6])) < 0.05
        with torch.no_grad():
            for target, weight in zip(targets, untouched, strict=True):
                target.linear.weight.copy_(weight)
    assert found[True] > 0.95 * before
    assert found[False] < 0.8 * before


def test_what_is_one_with_a_fact_is_not_raised(opened):
    _, tokenizer, targets, tape = opened
    kept = told(tape, tokenizer, FACTS[:2])
    config = replace(CONFIG, dose=0.7)
    forgetter = Forgetter(tape, targets, tokenizer, FACTS[:2], NOTHING, config, kept=kept)
    for _ in range(2):
        step = forgetter.step()
        forgetter.apply(step)
    low, weights = odds(asked(tape, tokenizer, FACTS[:2]), tape), snapshot(targets)
    forgetter.mend(step)
    assert all(torch.equal(t.linear.weight, w) for t, w in zip(targets, weights, strict=True))
    forgetter.mend(Step({}))  # after a step of other facts they are
    assert float((odds(asked(tape, tokenizer, FACTS[:2]), tape) - low).mean()) > 0.5


def test_rows_are_told_apart_by_their_cosine():
    parts = torch.eye(3, dtype=torch.float64)
    parts[2] = torch.tensor([0.8, 0.6, 0.0])
    lowered = -2.0 * torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.1, 0.0]], dtype=torch.float64)
    lengths = 2.0 * parts.norm(dim=1)
    found = told_apart(2.0 * parts @ lowered.T, lengths, lowered.norm(dim=1))
    assert found.tolist() == [False, True, True]
    assert told_apart(-2.0 * parts @ lowered.T, lengths, lowered.norm(dim=1)).all()  # it raises them
