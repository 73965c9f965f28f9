"""How many examples a fuzz test tries: few by default, more where CIR_FUZZ says by what factor."""

from __future__ import annotations

import os


def examples(n: int) -> int:
    """``n``, times the whole number in the environment variable CIR_FUZZ."""
    return n * max(1, int(os.environ.get("CIR_FUZZ", "1")))
