"""What callbacks are told of a run, and what they can do to it."""

from __future__ import annotations

import copy
import json
import os
import signal
from dataclasses import FrozenInstanceError, asdict, replace

import pytest
import torch

from cir.forgetting.update import snapshot
from tests.forgetting.test_paper import CONFIG as PAPER
from tests.forgetting.test_paper import run as run_paper
from tests.forgetting.test_unlearn import CONFIG, GO, run, same_weights
from tests.tiny import TEXT, knowing_llama, tiny_llama

ONE_BY_ONE = replace(CONFIG, check_every=1, max_steps=4)
ASKED = "stopped by a callback"


@pytest.fixture(scope="module")
def knowing():
    return knowing_llama()


@pytest.fixture
def model(knowing):
    return copy.deepcopy(knowing)


def kill(number):
    return lambda event: os.kill(os.getpid(), number)


def fail_at(count):
    """A callback that raises when it is called for the ``count``-th time."""
    calls = []

    def callback(event):
        calls.append(event)
        if len(calls) == count:
            raise ZeroDivisionError("of the callback")

    return callback


def test_each_step_and_each_round_is_told_and_changes_nothing(model, tokenizer, knowing):
    steps, rounds = [], []
    config = replace(CONFIG, batch_size=2, check_every=3)
    report = run(model, tokenizer, config=config, on_step=steps.append, on_round=rounds.append)
    assert [event.step for event in steps] == list(range(1, len(steps) + 1))
    assert [event.batch for event in steps] == [0, 1] * (len(steps) // 2)
    assert steps[0].log_odds > 0 > steps[-1].log_odds
    left = [event.facts_left for event in steps]
    assert (left[0], left[-1]) == (4, 0)  # half of them are not read at the first step
    assert [event.epoch for event in rounds] == [epoch.number for epoch in report.epochs]
    assert [event.recall for event in rounds] == [epoch.measure.mean_recall for epoch in report.epochs]
    assert [event.kept for event in rounds] == [epoch.kept for epoch in report.epochs]
    last, measure = rounds[-1], report.epochs[-1].measure
    assert (last.facts_left, last.worst, last.loss) == (0, measure.worst, measure.loss)
    assert last.budget_spent == pytest.approx((measure.rise + measure.rise_stderr) / config.budget)
    seconds = [event.seconds for event in steps + rounds[-1:]]
    assert seconds == sorted(seconds)
    lines = [json.dumps(asdict(event), allow_nan=False) for event in steps + rounds]
    assert json.loads(lines[0])["step"] == 1
    with pytest.raises(FrozenInstanceError):
        last.kept = False
    other = copy.deepcopy(knowing)
    run(other, tokenizer, config=config)
    assert same_weights(model, other)


def test_what_overstepped_the_budget_is_told_with_each_way_back(model, tokenizer):
    rounds = []
    config = replace(CONFIG, worst_window=1e-4)
    report = run(model, tokenizer, contrast=None, disruption=TEXT, config=config, on_round=rounds.append)
    assert [event.worst for event in rounds] == [epoch.measure.worst for epoch in report.epochs]
    assert len(rounds) > 1
    assert [event.epoch for event in rounds[:2]] == [1, 1]
    assert rounds[0].worst > 1e-4
    assert [event.kept for event in rounds] == [epoch.kept for epoch in report.epochs]
    assert not rounds[0].kept


def test_a_step_that_asks_for_the_end_is_measured_and_kept(model, tokenizer, knowing):
    other = copy.deepcopy(knowing)
    report = run(model, tokenizer, on_step=lambda event: event.step == 3)
    assert (report.stopped, len(report.epochs), report.epochs[0].kept) == (ASKED, 1, True)
    run(other, tokenizer, config=replace(CONFIG, max_steps=3))
    assert same_weights(model, other)
    assert not same_weights(model, knowing)


def test_facts_that_were_never_read_are_not_called_forgotten(model, tokenizer):
    report = run(model, tokenizer, config=replace(CONFIG, batch_size=1), on_step=lambda event: True)
    assert report.unforgotten == [fact.id for fact in GO]


def test_a_round_that_asks_for_the_end_is_the_last(model, tokenizer):
    report = run(model, tokenizer, config=ONE_BY_ONE, on_round=lambda event: event.epoch == 2)
    assert (report.stopped, len(report.epochs)) == (ASKED, 2)
    assert report.after == report.epochs[-1].measure


@pytest.mark.parametrize(
    "callbacks", [{"on_step": fail_at(4)}, {"on_round": fail_at(4)}], ids=["on_step", "on_round"]
)
def test_an_exception_of_a_callback_leaves_the_model_as_it_came(model, tokenizer, unchanged, callbacks):
    unchanged(model)
    with pytest.raises(ZeroDivisionError, match="of the callback"):
        run(model, tokenizer, config=ONE_BY_ONE, **callbacks)  # three rounds have been kept
    unchanged(model)


@pytest.mark.parametrize(("number", "answer"), [(signal.SIGINT, None), (signal.SIGTERM, True)])
def test_a_signal_is_returned_or_raised_in_the_best_state_so_far(tokenizer, knowing, number, answer):
    def third(event):
        if event.step == 3:
            os.kill(os.getpid(), number)
            return answer
        return None

    first, second, expected = (copy.deepcopy(knowing) for _ in range(3))
    config = replace(ONE_BY_ONE, check_every=2)
    report = run(first, tokenizer, config=config, on_step=third)
    assert (report.stopped, len(report.epochs)) == ("interrupted", 1)
    handler = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt, match="a signal ended the run; the model is in its best state so far"):
        run(second, tokenizer, config=config, on_step=third, on_signal="raise")
    assert signal.getsignal(number) is handler
    run(expected, tokenizer, config=replace(config, max_steps=2))
    assert same_weights(first, expected)
    assert same_weights(second, expected)


def test_no_signal_is_raised_where_a_callback_asked_for_the_end(model, tokenizer):
    report = run(model, tokenizer, on_step=lambda event: True, on_signal="raise")
    assert report.stopped == ASKED


def test_a_signal_after_the_last_step_is_raised_all_the_same(model, tokenizer):
    config = replace(CONFIG, max_steps=1)
    with pytest.raises(KeyboardInterrupt):
        run(model, tokenizer, config=config, on_round=kill(signal.SIGINT), on_signal="raise")


def test_the_papers_way_is_told_what_the_host_has(model, tokenizer, unchanged):
    steps, rounds = [], []
    model = tiny_llama()
    report = run_paper(model, tokenizer, on_step=steps.append, on_round=rounds.append)
    assert [(event.step, event.batch) for event in steps[:4]] == [(1, 0), (2, 1), (3, 2), (4, 0)]
    assert {(event.log_odds, event.facts_left) for event in steps} == {(None, None)}
    assert len(steps) == 3 * PAPER.max_epochs  # those that only fit change nothing
    assert [event.retain_loss for event in rounds] == [epoch.retain_loss for epoch in report.epochs]
    assert {event.facts_left for event in rounds} == {None}
    asked = run_paper(tiny_llama(), tokenizer, on_step=lambda event: event.step == 4)
    assert (asked.stopped, len(asked.epochs)) == (ASKED, 2)
    other = tiny_llama()
    unchanged(other)
    with pytest.raises(ZeroDivisionError):
        run_paper(other, tokenizer, on_step=fail_at(8))
    unchanged(other)
    assert not all(map(torch.equal, other.parameters(), model.parameters()))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"on_step": 3}, "on_step: expected a function or None, got 3"),
        ({"on_round": "print"}, "on_round: expected a function or None, got 'print'"),
        ({"on_signal": "ignore"}, "on_signal: expected one of return, raise, got 'ignore'"),
        ({"offload": "sometimes"}, "offload: expected one of auto, always, never, got 'sometimes'"),
    ],
)
def test_what_is_no_callback_or_no_choice_is_refused_before_anything_changes(
    model, tokenizer, unchanged, options, expected
):
    unchanged(model)
    with pytest.raises(ValueError, match=expected):
        run(model, tokenizer, **options)
    unchanged(model)


def test_without_callbacks_no_further_copy_of_the_weights_is_taken(model, tokenizer, monkeypatch):
    taken = []
    monkeypatch.setattr("cir.forgetting.unlearn.snapshot", lambda targets: taken.append(1) or snapshot(targets))
    run(model, tokenizer, config=replace(CONFIG, max_steps=1))
    assert not taken
    run(model, tokenizer, config=replace(CONFIG, max_steps=1), on_round=lambda event: None)
    assert taken == [1]
