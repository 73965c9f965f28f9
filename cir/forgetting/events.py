"""What a run tells those who follow it, as it goes: plain values that the host has already."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cir.forgetting.report import Report


@dataclass(frozen=True)
class StepEvent:
    """A step was taken.

    Attributes:
        step: its number in the run, from 1 on. batch: number of its batch of facts, from 0 on.
        log_odds: mean over the answers of the batch before the step, in nats. facts_left: how many of all facts have
            something left, as they were last read, or have not been read yet. Both are None in the paper's way, where
            the host would have to wait for them.
        seconds: since the call.
    """

    step: int
    batch: int
    log_odds: float | None
    facts_left: int | None
    seconds: float


@dataclass(frozen=True)
class RoundEvent:
    """The budget was checked: after the steps of an epoch, or after a part of them was taken back.

    Attributes:
        epoch: its number, from 1 on: the same again for each part that was tried.
        forget_loss, retain_loss: of :class:`cir.forgetting.report.Epoch`.
        recall: mean over the facts; None where none has probes. loss: nats a token on the disruption text.
        rise, rise_stderr, worst: of :class:`cir.forgetting.report.Measure`.
        budget_spent: share of the budget that the rise and its standard error take.
        kept: whether this is the best state so far; one that is not was taken back or surpassed.
        facts_left: as of a step; None in the paper's way.
        seconds: since the call.
    """

    epoch: int
    forget_loss: float
    retain_loss: float | None
    recall: float | None
    loss: float
    rise: float
    rise_stderr: float
    worst: float
    budget_spent: float
    kept: bool
    facts_left: int | None
    seconds: float


OnStep = Callable[[StepEvent], object]
OnRound = Callable[[RoundEvent], object]
"""A callback: what it returns asks for the end where it is true."""


def check_callback(name: str, callback: object) -> None:
    """Raise ValueError unless ``callback`` is None or can be called."""
    if callback is not None and not callable(callback):
        raise ValueError(f"{name}: expected a function or None, got {callback!r}")


@dataclass
class Followers:
    """The callbacks of one run.

    Attributes:
        on_step, on_round: the callbacks, if any. stop: set where a step's callback asks for the end.
        asked: whether one has asked for the end. failed: whether one raised an exception.
    """

    on_step: OnStep | None = None
    on_round: OnRound | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    asked: bool = False
    failed: bool = False
    _started: float = field(default_factory=time.perf_counter)
    _steps: int = 0
    _rounds: int = 0

    def __post_init__(self) -> None:
        check_callback("on_step", self.on_step)
        check_callback("on_round", self.on_round)

    @property
    def any(self) -> bool:
        """Whether there is a callback."""
        return self.on_step is not None or self.on_round is not None

    def step(self, batch: int, log_odds: float | None = None, facts_left: int | None = None) -> None:
        """Tell of a step; of none that a signal has ended the run at, as it will be taken back."""
        self._steps += 1
        if self.on_step is None or self.stop.is_set():
            return
        event = StepEvent(self._steps, batch, log_odds, facts_left, self._seconds())
        if self._call(self.on_step, event) and not self.stop.is_set():  # a signal may have come meanwhile
            self.asked = True
            self.stop.set()

    def rounds(self, report: Report, facts_left: int | None) -> None:
        """Tell of each budget check that the ``report`` has and that has not been told of."""
        new, self._rounds = report.epochs[self._rounds :], len(report.epochs)
        if self.on_round is None:
            return
        for epoch in new:
            now = epoch.measure
            event = RoundEvent(
                epoch=epoch.number,
                forget_loss=epoch.forget_loss,
                retain_loss=epoch.retain_loss,
                recall=now.mean_recall,
                loss=now.loss,
                rise=now.rise,
                rise_stderr=now.rise_stderr,
                worst=now.worst,
                budget_spent=now.rise_bound / report.config.budget,
                kept=epoch.kept,
                facts_left=facts_left,
                seconds=self._seconds(),
            )
            self.asked = self._call(self.on_round, event) or self.asked

    def _seconds(self) -> float:
        return time.perf_counter() - self._started

    def _call(self, callback: Callable[[Any], object], event: StepEvent | RoundEvent) -> bool:
        try:
            return bool(callback(event))
        except BaseException:
            self.failed = True
            raise
