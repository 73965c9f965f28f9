"""What ships with the package: neutral prose, and the demo's facts."""

from __future__ import annotations

from pathlib import Path

DATA = Path(__file__).parent
"""Holds ``neutral.txt`` and the demo's facts, ``demo_{forget,related,contrast,neighbours}.jsonl``."""


def builtin_text() -> str:
    """The neutral prose that ships with the package: about 2,800 words on many subjects."""
    return (DATA / "neutral.txt").read_text(encoding="utf-8")
