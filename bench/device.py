"""Every GPU test and benchmark, in under nine minutes, the ones that matter most first.

    python -m bench.device --out DIR [--parts NAME ...] [--rehearse]

Parts run one after the other, each with a deadline and in a process group of its own, which is killed whole, so that
none can lose what the others measured or hold the GPU. Rows are written as they come; ``DIR/device.jsonl`` tells how
each part ended, and its output is in ``DIR/NAME.log``. ``--rehearse`` runs the same parts on a CPU, on a tiny model.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.records import ROOT, write_rows


@dataclass(frozen=True)
class Part:
    """What Python is to run, for so many ``seconds`` at most; a benchmark is told the model and where rows go."""

    name: str
    seconds: int
    command: tuple[str, ...]

    def arguments(self, out: Path, rehearse: bool) -> list[str]:
        model = ["--model", "tiny" if rehearse else "8b"] if self.command[0] == "bench.step" else []
        where = ["--out", str(out)] if self.command[0].startswith("bench.") else []
        return [sys.executable, "-m", *self.command, *model, *where]


PARTS = [
    Part(
        "tests",
        110,
        (
            *("pytest", "-q", "-p", "no:cacheprovider", "--numprocesses", "8", "--dist", "worksteal"),
            *("tests/test_cuda.py", "tests/forgetting/test_update.py", "tests/kernels/test_kernels.py"),
            "tests/kernels/test_triton.py",
        ),
    ),
    Part("default", 130, ("bench.step", "--tasks", "unlearn:ours", "edit:ours")),
    Part("kernels", 35, ("bench.kernels", "--seconds", "25")),
    Part("paper", 150, ("bench.step", "--tasks", "W1:eager", "W1:ours")),
    Part("saving", 110, ("bench.step", "--tasks", "W1:saving")),
]


def run(part: Part, out: Path, rehearse: bool) -> int | None:
    """The exit status of ``part``; None where it ran out of time."""
    with (out / f"{part.name}.log").open("w") as log:
        process = subprocess.Popen(
            part.arguments(out, rehearse),
            cwd=ROOT,
            env={**os.environ, **({} if rehearse else {"TRITON_INTERPRET": "0"})},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(part.seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    names = [part.name for part in PARTS]
    parser.add_argument("--parts", nargs="+", choices=names, default=names)
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, on a tiny model")
    arguments = parser.parse_args()
    out: Path = arguments.out
    if not (arguments.rehearse or torch.cuda.is_available()):
        sys.exit("expected a CUDA device, found none; --rehearse needs none")
    out.mkdir(parents=True, exist_ok=True)
    failed = False
    for part in (part for part in PARTS if part.name in arguments.parts):
        start = time.perf_counter()
        code = run(part, out, arguments.rehearse)
        seconds = time.perf_counter() - start
        failed |= code != 0
        write_rows(out / "device.jsonl", [{"bench": "device", "part": part.name, "exit": code, "seconds": seconds}])
        print(f"{part.name:<14}{'out of time' if code is None else f'exit {code}':<14}{seconds:>6.0f} s", flush=True)
        print("".join((out / f"{part.name}.log").read_text().splitlines(keepends=True)[-25:]), flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
