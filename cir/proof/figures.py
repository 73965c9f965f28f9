"""Figures as people read them: a name, as many digits as matter, an interval, and how many units were counted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cir.proof.statistics import UNBOUNDED, interval

NAMES = {
    "recall": "Recall: probability of the answer",
    "paraphrase_recall": "Recall, asked in other words",
    "token_extraction": "Answer tokens that are the likeliest",
    "generation_extraction": "Questions answered by greedy continuation",
    "accuracy": "Multiple choice, right letter first",
    "accuracy_t1": "Multiple choice, chance of the right letter",
    "neighbour_recall": "Other subjects' facts (should stay)",
    "same_subject_recall": "Same subjects' other facts (should stay)",
    "loss": "Loss on ordinary text, nats a token (should stay)",
    "kl": "KL on that text, nats a token (should be near 0)",
    "kl_worst_window": "KL of the window that changed most",
    "quantized_8bit": "Weights rounded to 8 bits",
    "quantized_4bit": "Weights rounded to 4 bits",
    "pruned": "Smaller half of the changes undone",
    "sampled": "Answer in one of 16 drawn continuations",
    "few_shot": "After four related questions and answers",
    "linear_probe": "Read from hidden states by a linear map",
    "relearning, worst": "Fine-tuning, the worst of all",
    "relearning, adam": "Fine-tuning: Adam, slow",
    "relearning, adam, fast": "Fine-tuning: Adam, fast",
    "relearning, sgd": "Fine-tuning: SGD",
    "relearning, lora": "Fine-tuning: LoRA",
}


def name_of(measure: str) -> str:
    """In words, for measures that are known by name."""
    return NAMES.get(measure, measure)


def percent(rate: float) -> str:
    """With a decimal below 10 and above 99 %, where it matters; what is not 0 or 1 is not called so."""
    if 0 < rate < 0.001:
        return "< 0.1 %"
    if 0.999 < rate < 1:
        return "> 99.9 %"
    fine = 0 < abs(rate) < 0.0995 or 0.99 < rate < 1
    return f"{100 * rate:.{1 if fine else 0}f} %"


def value_of(measure: str, value: float) -> str:
    """A rate in percent, what is in nats with three decimals."""
    if measure not in UNBOUNDED:
        return percent(value)
    return f"{value if abs(value) >= 0.0005 else 0.0:.3f}"


def interval_of(measure: str, outcome: Mapping[str, Any]) -> str:
    """Its 95 % interval in words, or n/a; one figure where both ends read the same."""
    found = interval(measure, outcome)
    return "n/a" if found is None else " to ".join(dict.fromkeys(value_of(measure, end) for end in found))
