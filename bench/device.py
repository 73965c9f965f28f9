"""Every GPU test and benchmark, in under nine minutes.

    python -m bench.device --out DIR

Parts run one after the other, each in a process and with a deadline of its own, so that none can lose what the
others measured. ``DIR/device.jsonl`` tells how each ended; its output is in ``DIR/NAME.log``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench.records import ROOT, write_rows

PARTS: list[tuple[str, int, list[str]]] = [
    ("test_triton", 120, ["-m", "pytest", "-q", "tests/kernels/test_triton.py", "--durations=5"]),
    (
        "test_engine",
        60,
        [
            "-m",
            "pytest",
            "-q",
            "tests/kernels/test_kernels.py",
            "tests/forgetting/test_update.py",
            "tests/forgetting/test_memory.py",
            "tests/test_cuda.py",
        ],
    ),
    ("step", 160, ["-m", "bench.step", "--model", "8b"]),
    ("kernels", 90, ["-m", "bench.kernels", "--seconds", "75"]),
    ("growth", 60, ["-m", "bench.growth", "--model", "8b"]),
    ("resources", 40, ["-m", "bench.resources"]),
]
"""Name, seconds at most, and what Python is to run."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    if not torch.cuda.is_available():
        sys.exit("expected a CUDA device, found none")
    out.mkdir(parents=True, exist_ok=True)
    for name, limit, command in PARTS:
        if command[1].startswith("bench."):
            command = [*command, "--out", str(out)]
        start = time.perf_counter()
        with (out / f"{name}.log").open("w") as log:
            try:
                done = subprocess.run(
                    [sys.executable, *command],
                    cwd=ROOT,
                    env={**os.environ, "TRITON_INTERPRET": "0"},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    timeout=limit,
                    check=False,
                )
                code: int | None = done.returncode
            except subprocess.TimeoutExpired:
                code = None
        seconds = time.perf_counter() - start
        write_rows(out / "device.jsonl", [{"bench": "device", "part": name, "exit": code, "seconds": seconds}])
        print(f"{name:<14}{'out of time' if code is None else f'exit {code}':<14}{seconds:>6.0f} s", flush=True)
        print("".join((out / f"{name}.log").read_text().splitlines(keepends=True)[-25:]), flush=True)


if __name__ == "__main__":
    main()
