"""What a benchmark returns, and what several need."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from cir.data.sources.source import Row
from cir.measures import Estimate, estimate
from cir.system.files import shown

Measures = dict[str, Estimate | float]
Parts = Mapping[str, Sequence[Row]]
"""Rows by the name of their part, as :func:`cir.data.datasets.benchmark_rows` reads them."""


@dataclass(frozen=True)
class BenchmarkResult:
    """What :func:`cir.proof.benchmarks.benchmark` measured.

    Attributes:
        measures: by the benchmark's names; means over its questions, records or texts with their standard errors, and
            as plain numbers what is no mean.
        absent: metrics that were not measured, and why.
        reference: what another run takes as its ``reference``, if this was of a model that never knew: of TOFU the
            truth ratios of the questions to forget, of MUSE the AUC.
    """

    measures: Measures
    absent: dict[str, str] = field(default_factory=dict)
    reference: tuple[float, ...] = ()


def mean(values: Iterable[float]) -> Estimate:
    """As :func:`cir.measures.estimate`, of values that are at least one, as no part is empty."""
    found = estimate(values)
    assert found is not None
    return found


def numbers(reference: Any, count: int, what: str, most: float = sys.float_info.max) -> list[float]:
    """``reference`` as numbers; none where it is a model, or there is none.

    Raises:
        ValueError: if it is neither, or they are not ``count`` from 0 to ``most``.
    """
    if isinstance(reference, Real) and not isinstance(reference, bool):
        reference = [reference]
    if reference is None or callable(reference):
        return []
    fits = isinstance(reference, Sequence) and all(isinstance(value, Real) for value in reference)
    if not fits or len(reference) != count or not all(0 <= value <= most for value in reference):
        raise ValueError(f"reference: expected a model or {count} {what}, got {shown(reference)}")
    return [float(value) for value in reference]


def after(prompt: str, answer: str) -> str:
    """``answer`` as it follows ``prompt``, which may end in white space."""
    return answer if prompt[-1:].isspace() else f" {answer}"
