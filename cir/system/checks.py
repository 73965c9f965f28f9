"""Checks of numbers that people give."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any


def is_number(value: Any, whole: bool = True) -> bool:
    """Whether it is finite, and ``whole`` where that is asked; a truth value is no number."""
    return isinstance(value, Integral if whole else Real) and not isinstance(value, bool) and math.isfinite(value)


def check_number(name: str, value: Any, least: float, whole: bool = True) -> None:
    """Raise ValueError unless ``value`` is a number of at least ``least``."""
    if not (is_number(value, whole) and value >= least):
        what = "a whole number" if whole else "a number"
        raise ValueError(f"{name}: expected {what} of at least {least}, got {value!r:.80}")
