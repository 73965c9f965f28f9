"""``python -m tests.faults [NAME ...]``: every sweep whole, or those named, in minutes; 1 where one finds a fault."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from tests.faults import certificates, interrupts, journals, kills, requests

SWEEPS: dict[str, Callable[[], tuple[int, list[str]]]] = {
    "certificates": certificates.sweep,
    "interrupts": interrupts.sweep,
    "journals": lambda: journals.sweep(430),
    "kills": lambda: kills.sweep(400, 100),
    "requests": lambda: (825, requests.sweep(825)),
}


def main(names: list[str]) -> int:
    if unknown := [name for name in names if name not in SWEEPS]:
        print(f"expected some of {', '.join(SWEEPS)}, got {', '.join(unknown)}", file=sys.stderr)
        return 1
    faults = 0
    for name in names or SWEEPS:
        started = time.perf_counter()
        count, wrong = SWEEPS[name]()
        faults += len(wrong)
        print(f"{name:<14}{count:>5} tried {len(wrong):>4} wrong {time.perf_counter() - started:>6.0f} s", flush=True)
        for line in wrong:
            print(f"  {line}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
