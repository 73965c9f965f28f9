from __future__ import annotations

from math import gamma, pi, sqrt

import pytest
import torch

from cir.data.facts import load_facts
from cir.measures import score
from cir.proof.statistics import SHARES, forget_quality, interval, paired, student, truth_ratios, wilson
from tests.tiny import facts, knowing_llama


def test_differences_are_by_fact():
    found = paired({"a": 0.5, "b": 0.1, "c": 0.9}, {"a": 0.4, "b": 0.2, "d": 0.3})
    assert (found.value, found.count) == (pytest.approx(0.0), 2)
    assert found.stderr == pytest.approx(0.1)
    assert paired({"a": 1.0}, {"b": 1.0}) is None


@pytest.mark.parametrize("freedom", [1, 2, 5, 9, 10, 11, 30, 200])
def test_95_of_100_lie_within_the_quantiles_of_student(freedom):
    x = torch.linspace(-student(freedom), student(freedom), 200_001, dtype=torch.float64)
    scale = gamma((freedom + 1) / 2) / (sqrt(freedom * pi) * gamma(freedom / 2))
    density = scale * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    assert float(torch.trapezoid(density, x)) == pytest.approx(0.95, abs=1e-4)


@pytest.mark.parametrize(("hits", "count"), [(0, 10), (1, 10), (5, 10), (10, 10), (3, 200)])
def test_the_ends_of_wilson_are_as_far_from_the_share_as_their_own_error_allows(hits, count):
    share, ends = hits / count, wilson(hits / count, count)
    for end in ends:
        if 1e-9 < end < 1 - 1e-9:
            assert abs(share - end) == pytest.approx(1.959964 * sqrt(end * (1 - end) / count), rel=1e-6)
    assert 0 <= ends[0] <= share <= ends[1] <= 1
    assert wilson(0.0, 10) == (0.0, pytest.approx(0.2775, abs=1e-4))


def test_the_interval_is_of_the_kind_that_the_measure_needs():
    none_of_ten = {"value": 0.0, "stderr": 0.0, "count": 10}
    assert all(interval(name, none_of_ten) == wilson(0.0, 10) for name in SHARES)
    assert interval("recall", none_of_ten) == (0.0, 0.0)
    few = {"value": 0.9, "stderr": 0.1, "count": 3}
    assert interval("few_shot", few) == (pytest.approx(0.9 - 4.302653 * 0.1), 1.0)
    assert interval("loss", few)[1] == pytest.approx(0.9 + 4.302653 * 0.1)
    assert interval("recall", {**few, "count": 1}) is None
    assert interval("sampled", {**few, "count": 1}) is None
    assert interval("kl_worst_window", few) is None


def test_the_truth_ratio_is_that_of_tofu(tokenizer):
    model, items = knowing_llama(), load_facts(facts(3))
    wrong = {"f0": [" delta1", " delta2 now"], "f1": [" delta0"], "f2": [" delta0"]}
    prompt = items[0].probes[0].prompt
    scores = score(model, tokenizer, [(prompt, " delta0"), (prompt, " delta1"), (prompt, " delta2 now")])
    right, *others = (s.probability ** (1 / s.tokens) for s in scores)
    assert [s.tokens for s in scores] == [1, 1, 2]
    found = truth_ratios(model, tokenizer, items, wrong)
    assert found["f0"] == pytest.approx(sum(others) / 2 / right, rel=1e-5)
    assert found.keys() == wrong.keys()
    with pytest.raises(ValueError, match="expected wrong answers for every fact, got none for f1"):
        truth_ratios(model, tokenizer, items[:2], {"f0": [" delta1"]})


def test_forget_quality_tells_distributions_apart():
    low, high = ({str(i): i / 40 + shift for i in range(20)} for shift in (0.0, 1.0))
    assert forget_quality(low, low) == pytest.approx(1.0)
    assert forget_quality(low, high) < 1e-6
    # Of two and two that are apart there are six orders, of which two are as extreme.
    assert forget_quality({"a": 1.0, "b": 2.0}, {"a": 3.0, "b": 4.0}) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="expected ratios of both models, got 20 and 0"):
        forget_quality(low, {})
