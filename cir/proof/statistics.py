"""Statistics that can be quoted: differences with each fact as its own control, and likeness to a gold standard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cir.data.facts import Fact
from cir.measures import Estimate, by_fact, estimate, score


def paired(now: Mapping[str, float], before: Mapping[str, float]) -> Estimate | None:
    """The mean of ``now`` less ``before`` over the facts that both have, by id. As each fact is its own control, its
    standard error is that of the differences; None where they share none.
    """
    return estimate(value - before[name] for name, value in now.items() if name in before)


def truth_ratios(
    model: Any, tokenizer: Any, facts: Sequence[Fact], wrong: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """By fact id, how much likelier wrong answers are than the right one (TOFU, arXiv 2401.06121, equation 1).

    R = mean over wrong answers a of P(a | q)^(1 / |a|), over that of the right one; the mean over a fact's probes.

    Args:
        wrong: by fact id, answers that are wrong, each with its leading space.

    Raises:
        ValueError: if a fact with probes has no wrong answers.
    """
    if missing := [fact.id for fact in facts if fact.probes and not wrong.get(fact.id)]:
        raise ValueError(f"wrong: expected wrong answers for every fact, got none for {', '.join(missing[:5])}")
    asked = [(fact.id, probe, [probe.target, *wrong[fact.id]]) for fact in facts for probe in fact.probes]
    pairs = [(probe.prompt, target) for _, probe, targets in asked for target in targets]
    scores = iter(score(model, tokenizer, pairs))
    ratios = []
    for name, _, (_, *others) in asked:
        right = next(scores).probability_a_token
        ratios.append((name, sum(next(scores).probability_a_token for _ in others) / len(others) / right))
    return by_fact(ratios)


def forget_quality(ratios: Mapping[str, float], gold: Mapping[str, float]) -> float:
    """TOFU's forget quality: the p-value of the two-sample Kolmogorov-Smirnov test between the :func:`truth_ratios`
    of a model that forgot and of one that never knew. Below 0.05 they can be told apart.

    Raises:
        ValueError: without the package scipy, or with no ratios.
    """
    try:
        from scipy.stats import ks_2samp
    except ImportError:
        raise ValueError(
            "forget_quality: expected the package scipy, which is not installed: pip install scipy"
        ) from None
    if not ratios or not gold:
        raise ValueError(f"expected ratios of both models, got {len(ratios)} and {len(gold)}")
    return float(ks_2samp(list(ratios.values()), list(gold.values())).pvalue)
