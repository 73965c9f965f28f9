"""Checks of numbers that people give."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any


def is_number(value: Any, whole: bool = True) -> bool:
    """Whether it is finite, and ``whole`` where that is asked; a truth value is no number."""
    if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
        return False
    return isinstance(value, Integral) or math.isfinite(value)  # which does not take a whole number beyond all floats


def check_number(name: str, value: Any, least: float, whole: bool = True) -> None:
    """Raise ValueError unless ``value`` is a number of at least ``least``."""
    if not (is_number(value, whole) and value >= least):
        what = "a whole number" if whole else "a number"
        raise ValueError(f"{name}: expected {what} of at least {least}, got {value!r:.80}")
