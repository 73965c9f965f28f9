from __future__ import annotations

import importlib.machinery
import sys
from types import ModuleType, SimpleNamespace

import pytest

from cir.measures import Estimate
from cir.proof.harness import harness


@pytest.fixture
def lm_eval(monkeypatch):
    """A stand-in for the package that keeps what it was asked, and answers in its layout."""
    package, models, huggingface = (ModuleType(f"lm_eval{name}") for name in ("", ".models", ".models.huggingface"))
    package.__spec__ = importlib.machinery.ModuleSpec("lm_eval", None)
    package.asked = {}
    huggingface.HFLM = lambda **given: SimpleNamespace(**given)

    def simple_evaluate(**given):
        package.asked.update(given)
        return {
            "results": {
                "mmlu": {"alias": "mmlu", "acc,none": 0.31, "acc_stderr,none": 0.004},
                "piqa": {"acc,none": 0.5, "acc_stderr,none": "N/A"},
                "triviaqa": {"exact_match,remove_whitespace": 0.2},
            },
            "group_subtasks": {"mmlu": ["mmlu_law", "mmlu_art"], "piqa": []},
            "n-samples": {
                "mmlu_law": {"original": 9, "effective": 4},
                "mmlu_art": {"original": 9, "effective": 3},
                "piqa": {"original": 5, "effective": 5},
            },
        }

    package.simple_evaluate = simple_evaluate
    for module in (package, models, huggingface):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return package


def test_scores_have_the_errors_and_counts_of_lm_eval(lm_eval):
    found = harness("model", "tokenizer", ["mmlu", "piqa"], limit=4)
    assert found == {"mmlu": Estimate(0.31, 0.004, 7), "piqa": Estimate(0.5, 0.0, 5)}
    assert lm_eval.asked["model"].pretrained == "model"
    assert (lm_eval.asked["tasks"], lm_eval.asked["limit"]) == (["mmlu", "piqa"], 4)


def test_a_task_without_accuracy_and_a_missing_package_are_named(lm_eval, monkeypatch):
    with pytest.raises(ValueError, match="expected one that measures accuracy, got triviaqa"):
        harness("model", "tokenizer", ["triviaqa"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install 'cir\\[eval\\]'"):
        harness("model", "tokenizer", ["mmlu"])
