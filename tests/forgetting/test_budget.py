from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import cir
from cir.data.tokens import windows
from cir.forgetting import budget as budget_of
from cir.forgetting.budget import is_inside, retreat, share_inside
from cir.forgetting.report import Measure
from cir.forgetting.update import restore, snapshot
from cir.measures import text_loss
from cir.model.finding import find_stack
from tests.forgetting.test_paper import change, run
from tests.tiny import TEXT, facts


@pytest.mark.parametrize("budget", [1e-9, 3e-4, 1e-2])
def test_the_budget_is_kept_on_the_model_returned(model, tokenizer, budget):
    text = "gamma of now then1 some3 " * 200
    teach(model, tokenizer, text)
    start = [p.detach().clone() for p in model.parameters()]
    before = text_loss(model, tokenizer, text)
    report = run(model, tokenizer, disruption=text, config=change(budget=budget, max_epochs=6))
    rise = text_loss(model, tokenizer, text) / before - 1
    assert rise <= budget
    assert rise == pytest.approx(report.after.rise, abs=1e-6)
    assert any(epoch.measure.rise_bound > budget for epoch in report.epochs)
    if report.after is report.before:
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), start, strict=True))
    else:
        assert report.after.mean_recall < report.before.mean_recall


def teach(model, tokenizer, text: str) -> None:
    """Fit the random model to ``text``, so that what disturbs it raises the loss."""
    rows = windows(tokenizer, text, 64)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(20):
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def test_the_way_back_aims_inside_the_budget():
    # From nothing, harm grows as the square of the way; from there on nearly in proportion.
    assert share_inside(Measure({}, 1.0), Measure({}, 1.0, 0.004), budget=0.001) == pytest.approx(0.475)
    best = Measure({}, 1.0, 0.001)
    assert 0.5 < share_inside(best, Measure({}, 1.0, 0.005), budget=0.003) < 0.6
    assert share_inside(Measure({}, 1.0, 0.005), Measure({}, 1.0, 0.006), budget=0.005) == 0
    for over in (Measure({}, 1.0, 0.005, 0.004), Measure({}, 1.0, 0.001, 0.004), Measure({}, 1.0, 0.0, 0.004)):
        share = share_inside(best, over, budget=0.003)  # an error above the budget is no reason to give up
        assert 0.2 < share < 1
        assert best.rise + share**2 * (over.rise - best.rise) + share * over.rise_stderr <= 0.003


def test_the_worst_window_has_a_bound_of_its_own():
    start, over = Measure({}, 1.0), Measure({}, 1.0, rise=0.0005, worst=0.2)
    assert is_inside(over, 0.001)
    assert not is_inside(over, 0.001, worst=0.05)
    assert share_inside(start, over, 0.001) == pytest.approx(0.95)
    assert share_inside(start, over, 0.001, worst=0.05) == pytest.approx(0.475)
    tried = []

    def go(part, share):
        tried.append(share)
        return replace(over, worst=0.2 * share**2)

    assert retreat(start, over, 0.001, go, worst=0.05).worst <= 0.05
    assert tried == [pytest.approx(0.475)]


def test_an_epoch_that_oversteps_is_taken_back_in_part(model, tokenizer):
    text = "gamma of now then1 some3 " * 200
    teach(model, tokenizer, text)
    targets = find_stack(model).targets(0)
    before = snapshot(targets)

    def forget(budget: float):
        sentences = [s for fact in facts() for s in fact["sentences"]]
        config = change(rate=1.0, budget=budget)
        return cir.unlearn(model, tokenizer, sentences, retain=TEXT, disruption=text, config=config, progress=False)

    first = forget(9.0).epochs[0].measure.rise_bound
    restore(targets, before)
    report = forget(first / 2)
    whole, *parts = report.epochs
    assert parts
    assert all(0 < epoch.rate < whole.rate for epoch in parts)
    assert [epoch.number for epoch in report.epochs] == [1] * len(report.epochs)
    assert first / 8 < report.after.rise_bound <= first / 2
    assert report.stopped == "budget spent"


def test_a_full_check_takes_back_what_the_sample_missed(model, tokenizer, monkeypatch):
    text = "gamma of now then1 some3 " * 400  # more windows than are sampled
    teach(model, tokenizer, text)
    targets = find_stack(model).targets(0)
    before = snapshot(targets)
    rise_of = budget_of.loss_rise

    def blind(losses, original, of):
        return (0.0, 0.0) if len(of.rows) < of.count else rise_of(losses, original, of)

    monkeypatch.setattr(budget_of, "loss_rise", blind)

    def forget(budget, full_check):
        restore(targets, before)
        sentences = [s for fact in facts() for s in fact["sentences"]]
        config = change(rate=1.0, budget=budget, max_epochs=1, full_check=full_check, disruption_tokens=255)
        options = {"retain": TEXT, "disruption": text, "config": config, "progress": False}
        return cir.unlearn(model, tokenizer, sentences, **options), snapshot(targets)

    free, far = forget(9.0, True)
    budget = free.after.rise / 2
    missed, there = forget(budget, False)
    assert missed.epochs[0].kept
    assert all(map(torch.equal, far, there))
    held, near = forget(budget, True)
    assert budget / 4 < held.after.rise <= budget
    assert held.after.loss / held.before.loss - 1 == pytest.approx(held.after.rise, rel=1e-4)
    for weight, start, end in zip(near, before, far, strict=True):
        assert 0 < float((weight - start).norm()) < float((end - start).norm())
