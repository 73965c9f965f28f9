"""The budget of harm: what is measured against it, the best state inside it, and the way back there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from cir.data.facts import Fact
from cir.data.sampling import sample
from cir.forgetting.plan import EpochLosses, Losses, Recalls
from cir.forgetting.report import Epoch, Measure, Report
from cir.forgetting.update import NonFiniteError, interpolate, phase, restore, snapshot
from cir.measures import loss_rise, recall, token_losses
from cir.model.sites import Target
from cir.system.processes import agreed

logger = logging.getLogger(__name__)

RETREATS = 3
"""States tried, at most, on the line back from an epoch that overstepped the budget."""


class Meter:
    """Measures the model against its state ``before``, when the meter was made, on at most ``tokens`` of ``rows``
    (N, L), half of them where the text is nearest the facts. ``read``, ``ask``: of :class:`cir.forgetting.plan.Run`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        facts: Sequence[Fact],
        rows: torch.Tensor,
        tokens: int | None,
        read: Callable[[torch.Tensor], Losses] | None = None,
        ask: Callable[[Sequence[Fact]], Recalls] | None = None,
    ) -> None:
        self._recalls: Recalls = partial(recall, model, tokenizer, facts) if ask is None else ask(facts)
        near = tokenizer([sentence for fact in facts for sentence in fact.sentences])["input_ids"]
        self._sample = sample(rows, tokens, near)
        with phase("budget check"):
            # Hidden states of a whole text may be many; of a part they are kept.
            if read is None or tokens is None:
                read = partial(partial, token_losses, model)
            self._losses = read(self._sample.rows)
            self._original = agreed(self._losses())
        if not torch.isfinite(self._original).all():
            raise NonFiniteError(
                "expected a finite loss on the disruption text before any update, got NaN or infinity"
            )
        self.before = self._measured(self._original)

    @property
    def partial(self) -> bool:
        """Whether windows were left out."""
        return len(self._sample.rows) < self._sample.count

    def measure(self) -> Measure:
        """The loss, and what is recalled of the facts."""
        with phase("budget check"):
            losses = agreed(self._losses())
        return self._measured(losses)

    def _measured(self, losses: torch.Tensor) -> Measure:
        rise, stderr = loss_rise(losses, self._original, self._sample)
        with phase("recall"):
            recalls = self._recalls()
            shared = agreed(torch.tensor(list(recalls.values()), dtype=torch.float64))
        worst = float((losses - self._original).mean(1).max())
        return Measure(
            dict(zip(recalls, shared.tolist(), strict=True)),
            self._sample.mean(losses.mean(1))[0],
            rise,
            stderr,
            worst,
        )


class Best:
    """The best state so far inside the budget: its ``weights``, and its measure in the report's ``after``."""

    def __init__(self, targets: Sequence[Target], meter: Meter, report: Report, rate: float) -> None:
        self._targets, self._meter, self._report, self._rate = targets, meter, report, rate
        self.weights = snapshot(targets)
        self._untouched = snapshot(targets) if report.config.full_check else self.weights
        self._spare: list[torch.Tensor] | None = None

    def consider(self, number: int, losses: EpochLosses, share: float = 1.0) -> bool:
        """Measure the model after ``share`` of an epoch's change, and report it; whether it is inside the budget."""
        now, config = self._meter.measure(), self._report.config
        inside = is_inside(now, config.budget, config.worst_window)
        kept = inside and _better(now, self._report.after)
        self._report.epochs.append(Epoch(number, share * self._rate, losses.forget, losses.retain, now, kept))
        if kept:
            # Into the second of two, so that one is whole whatever happens meanwhile.
            taken = snapshot(self._targets, into=self._spare)
            self.weights, self._spare, self._report.after = taken, self.weights, now
        return inside

    def retreat(self, number: int, losses: EpochLosses) -> None:
        """Back from an epoch that overstepped the budget, on the line to the best state, until inside."""
        weights, report = self.weights, self._report

        def go(part: float, share: float) -> Measure:
            interpolate(self._targets, weights, part)
            self.consider(number, losses, share)
            return report.epochs[-1].measure

        config = report.config
        retreat(report.after, report.epochs[-1].measure, config.budget, go, worst=config.worst_window)

    def confirm(self, whole: Meter) -> None:
        """Measure the best state on the ``whole`` text, and go back to the model as it came until inside."""

        def go(part: float, share: float) -> Measure:
            interpolate(self._targets, self._untouched, part)
            return whole.measure()

        restore(self._targets, self.weights)
        config, now = self._report.config, whole.measure()
        found: Measure | None = now
        if not is_inside(now, config.budget, config.worst_window):
            logger.warning("the whole text's loss rose by %.3f %%: going back", 100 * now.rise)
            found = retreat(whole.before, now, config.budget, go, worst=config.worst_window)
        self._report.before, self._report.after = whole.before, found or whole.before
        self.weights = snapshot(self._targets, into=self._spare) if found else self._untouched


def _better(now: Measure, best: Measure) -> bool:
    """Without probes, later is better."""
    return now.mean_recall is None or best.mean_recall is None or now.mean_recall < best.mean_recall


def reached(measure: Measure, target: float | None) -> bool:
    """Whether the mean recall is at ``target`` or below."""
    return target is not None and measure.mean_recall is not None and measure.mean_recall <= target


def is_inside(now: Measure, budget: float, worst: float | None = None) -> bool:
    """Whether harm is within the ``budget`` of the mean and, where there is one, the bound ``worst`` of a window."""
    return now.rise_bound <= budget and (worst is None or now.worst <= worst)


def retreat(
    best: Measure,
    over: Measure,
    budget: float,
    go: Callable[[float, float], Measure],
    *,
    worst: float | None = None,
    tries: int = RETREATS,
) -> Measure | None:
    """Back from a model that was measured ``over`` the budget, on the line to where ``best`` was, until inside.

    Args:
        go: leaves the model a part of the way that it is from there, and measures it; it is told that part, and the
            share of the whole way that this makes.
        worst: bound of the worst window, if any. tries: at most.

    Returns:
        What was measured inside; None where no try was.
    """
    share = 1.0
    for _ in range(tries):
        part = share_inside(best, over, budget, worst)
        share *= part
        over = go(part, share)
        if is_inside(over, budget, worst):
            return over
    return None


def share_inside(best: Measure, over: Measure, budget: float, worst: float | None = None) -> float:
    """The share of the way from ``best`` to ``over`` that should end just inside: harm is as the square of a length
    that grows in proportion to the way, and so does the standard error.
    """
    room, slope = budget - best.rise_bound, over.rise_stderr - best.rise_stderr
    start = max(best.rise, 0.0) ** 0.5
    growth = max(max(over.rise - min(best.rise, 0.0), 0.0) ** 0.5 - start, 0.0)
    # The larger root of growth^2 x^2 + linear x = room, in the form that loses no digits where the curve is flat.
    linear = 2 * start * growth + slope
    root = (linear**2 + 4 * growth**2 * max(room, 0.0)) ** 0.5
    share = 2 * max(room, 0.0) / max(linear + root, 1e-30)
    if worst is not None and over.worst > worst:
        share = min(share, (max(worst - best.worst, 0.0) / (over.worst - best.worst)) ** 0.5)
    return 0.95 * min(1.0, share)
