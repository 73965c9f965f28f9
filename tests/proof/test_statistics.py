from __future__ import annotations

import sys

import pytest

from cir.data.facts import load_facts
from cir.measures import score
from cir.proof.statistics import forget_quality, paired, truth_ratios
from tests.tiny import facts, knowing_llama


def test_differences_are_by_fact():
    found = paired({"a": 0.5, "b": 0.1, "c": 0.9}, {"a": 0.4, "b": 0.2, "d": 0.3})
    assert (found.value, found.count) == (pytest.approx(0.0), 2)
    assert found.stderr == pytest.approx(0.1)
    assert paired({"a": 1.0}, {"b": 1.0}) is None


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


def test_forget_quality_tells_distributions_apart(monkeypatch):
    low, high = ({str(i): i / 40 + shift for i in range(20)} for shift in (0.0, 1.0))
    assert forget_quality(low, low) == pytest.approx(1.0)
    assert forget_quality(low, high) < 1e-6
    # Of two and two that are apart there are six orders, of which two are as extreme.
    assert forget_quality({"a": 1.0, "b": 2.0}, {"a": 3.0, "b": 4.0}) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="expected ratios of both models, got 20 and 0"):
        forget_quality(low, {})
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ValueError, match="expected the package scipy, which is not installed: pip install scipy"):
        forget_quality(low, high)
