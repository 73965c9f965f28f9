"""CounterFact and zsRE, the benchmarks of editing, read for forgetting."""

from __future__ import annotations

from typing import Any

from cir.data.sources.source import Row
from cir.measures import score
from cir.proof.benchmarks.result import BenchmarkResult, Measures, Parts, after, mean
from cir.proof.metrics import harmonic_mean


def counterfact(model: Any, tokenizer: Any, parts: Parts) -> BenchmarkResult:
    """CounterFact (Meng et al. 2022, arXiv 2202.05262, section 3.3), read for forgetting.

    No new object is written: the record's ``target_new`` only stands beside the true one. P is the geometric mean
    over the tokens of an object, as in the authors' code. A score is a share of prompts, a magnitude the mean
    difference; each is first the mean over the prompts of a record.

    - ``efficacy_score``, ``efficacy_magnitude``: P[new] > P[true], and P[new] - P[true], on the rewrite prompt: how
      often, and by how much, the true object is no longer above the other. One that knows nothing has about 0.5.
    - ``paraphrase_score``, ``paraphrase_magnitude``: the same on paraphrases.
    - ``neighborhood_score``, ``neighborhood_magnitude``: P[true] > P[new], and P[true] - P[new], on subjects of the
      same true object, which must stay.
    - ``score``: the harmonic mean of the three scores.
    - ``rewrite_accuracy``, ``paraphrase_accuracy``, ``neighborhood_accuracy``: share of the true object's tokens that
      are the likeliest: what is left of the fact, which should fall, and of its neighbours, which should not.
    """
    records = [_record(row) for row in parts["facts"]]
    pairs = [(prompt, f" {text}") for prompts, *targets in records for _, prompt in prompts for text in targets]
    scores = iter(score(model, tokenizer, pairs))
    found: dict[str, list[float]] = {}
    for prompts, *_ in records:
        own: dict[str, list[float]] = {}
        for kind, _ in prompts:
            true, new = next(scores), next(scores)
            gain = new.probability_a_token - true.probability_a_token
            gain = -gain if kind == "neighborhood" else gain
            name = "rewrite" if kind == "efficacy" else kind
            for key, value in (
                (f"{kind}_score", float(gain > 0)),
                (f"{kind}_magnitude", gain),
                (f"{name}_accuracy", true.greedy),
            ):
                own.setdefault(key, []).append(value)
        for key, values in own.items():
            found.setdefault(key, []).append(sum(values) / len(values))
    means = {key: mean(values) for key, values in found.items()}
    kinds = ("efficacy", "paraphrase", "neighborhood")
    return BenchmarkResult({**means, "score": harmonic_mean(means[f"{kind}_score"].value for kind in kinds)})


def _record(row: Row) -> tuple[list[tuple[str, str]], str, str]:
    """Prompts with their kinds, the true object and the other."""
    rewrite = row.inner("requested_rewrite")
    prompt = rewrite.text("prompt").replace("{}", rewrite.text("subject"))
    prompts = [("efficacy", prompt)]
    prompts += [("paraphrase", text) for text in row.texts("paraphrase_prompts")]
    prompts += [("neighborhood", text) for text in row.texts("neighborhood_prompts")]
    true, new = (rewrite.inner(target).text("str") for target in ("target_true", "target_new"))
    return prompts, true, new


def zsre(model: Any, tokenizer: Any, parts: Parts, prompt: str | None = None) -> BenchmarkResult:
    """zsRE as Meng et al. 2022 measure it (arXiv 2202.05262, section 3.2), read for forgetting: share of the true
    answer's tokens that are the likeliest, each given those before.

    ``rewrite_accuracy`` and ``paraphrase_accuracy`` are of the fact, asked as in the record and otherwise, and should
    fall; ``neighborhood_accuracy`` is of an unrelated question, and should not. The records have no second object
    that the field compares with, so there are no scores by probability.
    """
    asked = {
        "rewrite": [(row.text("src"), row.texts("answers")[0]) for row in parts["facts"]],
        "paraphrase": [(row.text("rephrase"), row.texts("answers")[0]) for row in parts["facts"]],
        "neighborhood": [(row.text("loc").rstrip("?") + "?", row.text("loc_ans")) for row in parts["facts"]],
    }
    prompt = prompt or "{}"
    measures: Measures = {}
    for kind, pairs in asked.items():
        framed = [(prompt.replace("{}", question), answer) for question, answer in pairs]
        scores = score(model, tokenizer, [(question, after(question, answer)) for question, answer in framed])
        measures[f"{kind}_accuracy"] = mean(of_answer.greedy for of_answer in scores)
    return BenchmarkResult(measures)
