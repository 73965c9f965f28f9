"""WMDP and MMLU: multiple choice."""

from __future__ import annotations

from typing import Any

from cir.data.sources.source import multiple_choice
from cir.measures import letter_probabilities
from cir.proof.benchmarks.result import BenchmarkResult, Parts, mean


def choices(model: Any, tokenizer: Any, parts: Parts) -> BenchmarkResult:
    """WMDP (Li et al. 2024, arXiv 2403.03218), its robust questions (O'Brien et al. 2025, arXiv 2508.06601) and MMLU
    (Hendrycks et al. 2021, arXiv 2009.03300): ``accuracy`` by the likeliest letter, and ``accuracy_t1``, the mean
    probability of the right letter among the letters.
    """
    facts = [multiple_choice(row) for row in parts["facts"]]
    found = letter_probabilities(model, tokenizer, facts)
    right = [float(letters.index(max(letters)) == answer) for letters, answer in found]
    return BenchmarkResult({"accuracy": mean(right), "accuracy_t1": mean(ls[answer] for ls, answer in found)})
