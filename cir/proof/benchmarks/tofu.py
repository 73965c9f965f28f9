"""TOFU: forget quality and model utility."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cir.data.sources.source import Row
from cir.measures import Estimate, score
from cir.proof.benchmarks.result import BenchmarkResult, Measures, Parts, after, mean, numbers
from cir.proof.metrics import harmonic_mean, ks_pvalue, rouge_l, written

PROMPT = "Question: {}\nAnswer:"
TOKENS = 200
"""New tokens of a greedy answer at most."""


@dataclass(frozen=True)
class _Question:
    """``right`` is what the truth ratio holds ``wrong`` answers against."""

    prompt: str
    answer: str
    right: str
    wrong: tuple[str, ...]


def tofu(
    model: Any, tokenizer: Any, parts: Parts, reference: Any = None, prompt: str | None = None
) -> BenchmarkResult:
    """TOFU (Maini et al. 2024, arXiv 2401.06121, section 2.2), on forget, retain, real_authors and world_facts.

    - ``*_probability``: P(a | q)^(1 / |a|); of real_authors and world_facts over the sum of that of all choices.
    - ``*_rouge``: ROUGE-L recall of the greedy answer.
    - ``*_truth_ratio``: R_truth (equation 1) is the mean over the wrong answers of P(a | q)^(1 / |a|), over that of
      the paraphrased answer (of real_authors and world_facts the answer). Of it max(0, 1 - R), and of forget
      min(R, 1 / R), as the authors' code has it; that code takes the geometric mean over the wrong answers instead.
    - ``model_utility``: the harmonic mean of the nine that are not of forget.
    - ``forget_quality``: the p-value of the two-sample Kolmogorov-Smirnov test between the R of forget and those of a
      ``reference`` fine-tuned on the retain set alone. Below 0.05 the two can be told apart.
    """
    prompt = prompt or PROMPT
    asked = {part: _tofu_questions(rows, prompt, part in ("forget", "retain")) for part, rows in parts.items()}
    gold = numbers(reference, len(asked["forget"]), "truth ratios of the same questions")
    measures: Measures = {}
    ratios: dict[str, list[float]] = {}
    for part, questions in asked.items():
        probabilities, ratios[part] = _tofu_scores(
            model, tokenizer, questions, part in ("real_authors", "world_facts")
        )
        said = written(model, tokenizer, [question.prompt for question in questions], TOKENS)
        measures[f"{part}_probability"] = mean(probabilities)
        measures[f"{part}_rouge"] = mean(
            rouge_l(text, question.answer).recall for text, question in zip(said, questions, strict=True)
        )
        measures[f"{part}_truth_ratio"] = mean(
            min(ratio, 1 / max(ratio, 1)) if part == "forget" else max(0.0, 1 - ratio) for ratio in ratios[part]
        )
    measures["model_utility"] = harmonic_mean(
        found.value
        for name, found in measures.items()
        if not name.startswith("forget") and isinstance(found, Estimate)
    )
    own = tuple(ratios["forget"])
    if reference is None:
        reason = "expected a reference: a model fine-tuned on the retain set alone, or its truth ratios; got none"
        return BenchmarkResult(measures, {"forget_quality": reason}, own)
    gold = gold or _tofu_scores(reference, tokenizer, asked["forget"], False)[1]
    measures["forget_quality"] = ks_pvalue(own, gold)
    return BenchmarkResult(measures, {}, own)


def _tofu_questions(rows: Sequence[Row], prompt: str, paraphrased: bool) -> list[_Question]:
    return [
        _Question(
            prompt.replace("{}", row.text("question")),
            row.text("answer"),
            row.text("paraphrased_answer" if paraphrased else "answer"),
            row.texts("perturbed_answer"),
        )
        for row in rows
    ]


def _tofu_scores(
    model: Any, tokenizer: Any, questions: Sequence[_Question], among_choices: bool
) -> tuple[list[float], list[float]]:
    """Probabilities of the answers, and truth ratios."""
    pairs = [(q.prompt, after(q.prompt, text)) for q in questions for text in (q.answer, q.right, *q.wrong)]
    scores = iter(score(model, tokenizer, pairs))
    probabilities, ratios = [], []
    for question in questions:
        answer, right = next(scores), next(scores)
        wrong = [next(scores) for _ in question.wrong]
        probability = answer.probability_a_token
        if among_choices:
            probability /= probability + sum(other.probability_a_token for other in wrong)
        probabilities.append(probability)
        likelier = (math.exp(other.logprob / other.tokens - right.logprob / right.tokens) for other in wrong)
        ratios.append(sum(likelier) / len(wrong))
    mean(ratios)  # raises where they are not finite
    return probabilities, ratios
