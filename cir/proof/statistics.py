"""Statistics that can be quoted: intervals, each fact as its own control, likeness to a gold standard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

from cir.data.facts import Fact
from cir.measures import Estimate, by_fact, estimate, score
from cir.proof.metrics import ks_pvalue

SHARES = ("accuracy", "generation_extraction", "linear_probe", "sampled", "token_extraction")
"""Measures of which a unit is mostly 0 or 1: where all are 0, their spread says nothing of what the next would be."""
UNBOUNDED = ("kl", "kl_worst_window", "loss")
"""Measures in nats. All others are rates, from 0 to 1."""
NORMAL = 1.959963984540054
STUDENT = (12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157)
"""Of 1 to 9 degrees of freedom."""


def interval(name: str, outcome: Mapping[str, float]) -> tuple[float, float] | None:
    """The 95 % interval of the measure ``name``, an :class:`Estimate` as a mapping; None for a single unit, and for a
    maximum.

    Wilson's for :data:`SHARES`, which is no narrower than it should be where a unit lies between 0 and 1; else
    Student's, which rests on the spread between units. That of a rate ends at 0 and 1.
    """
    if outcome["count"] < 2 or name == "kl_worst_window":
        return None
    if name in SHARES:
        return wilson(outcome["value"], int(outcome["count"]))
    half = student(int(outcome["count"]) - 1) * outcome["stderr"]
    low, high = outcome["value"] - half, outcome["value"] + half
    return (low, high) if name in UNBOUNDED else (max(0.0, low), min(1.0, high))


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share of ``count`` (E. B. Wilson, JASA 22, 1927)."""
    share, z2 = min(max(share, 0.0), 1.0), NORMAL**2
    middle = share + z2 / (2 * count)
    half = NORMAL * sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    scale = 1 + z2 / count
    # At 0 and 1 an end is the share itself, but for rounding.
    return min(share, max(0.0, (middle - half) / scale)), max(share, min(1.0, (middle + half) / scale))


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t to four digits, from ten degrees of ``freedom`` on by its expansion in their
    inverse (Abramowitz and Stegun 26.7.5).
    """
    if freedom <= len(STUDENT):
        return STUDENT[freedom - 1]
    z = NORMAL
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


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
        ValueError: with no ratios.
    """
    if not ratios or not gold:
        raise ValueError(f"expected ratios of both models, got {len(ratios)} and {len(gold)}")
    return ks_pvalue(ratios.values(), gold.values())
