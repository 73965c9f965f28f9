"""What a way to forget tells the loop that carries it out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from cir.data.facts import Fact
from cir.model.sites import Target


@dataclass(frozen=True)
class EpochLosses:
    """Means over the steps of an epoch.

    Attributes:
        forget: of what is lowered: the log-odds of the answers in nats, or the paper's breaking loss.
        retain: of the retain steps' loss; None where none was taken.
        gone: whether nothing is left to forget.
        left: numbers of the facts of which something was left before the last step of each.
    """

    forget: float
    retain: float | None = None
    gone: bool = False
    left: tuple[int, ...] = ()


Epoch = Callable[[int], EpochLosses]
"""Runs the epoch of a number, from 1 on."""
Losses = Callable[[], Tensor]
"""The loss in nats of each predicted token of windows of text, as the model is now."""
Recalls = Callable[[], dict[str, float]]
"""What :func:`cir.measures.recall` is of facts, as the model is now."""


@dataclass(frozen=True)
class Run:
    """A captured model.

    Attributes:
        start: fits what has to be fitted before the first epoch.
        read, ask: given windows of text, their losses, and given facts, their recall, for less than whole forwards;
            None where nothing is saved.
        chosen: what the run has chosen by itself, see :class:`cir.forgetting.report.Report`.
    """

    start: Callable[[], Epoch]
    read: Callable[[Tensor], Losses] | None = None
    ask: Callable[[Sequence[Fact]], Recalls] | None = None
    chosen: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """Epochs of steps on one model, all that could be checked beforehand checked.

    Attributes:
        targets: linears whose weights change. layers: those that have them.
        disruption: windows (N, L) of text on which harm is measured.
        epochs: at most. rate: of an epoch's steps, for the report. steps: in all, with those that only fit.
        memory: bytes of the device needed beyond the weights. waiting: what to say of weights that are not there.
        opened: given what to call after each step and when to stop, captures the model.
    """

    targets: Sequence[Target]
    layers: range
    disruption: Tensor
    epochs: int
    rate: float
    steps: int
    memory: int
    waiting: str
    opened: Callable[[Callable[[], object], threading.Event], AbstractContextManager[Run]]
