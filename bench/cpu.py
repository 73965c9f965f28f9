"""One epoch of the paper's way on SmolLM2-135M, ours against the eager form, side by side in one process.

    python -m bench.cpu [--facts F.jsonl ...] [--repeats 5] [--out bench/results]

An epoch is every forget step and the basis solve, with neither budget check nor retain step. ``eager`` runs the
full forward; ``trimmed``, as the authors' code does, no layer above the loss layers. The forms take turns, A B C A B
C ..., on the same batches, layers, ranks and rate, each from the original weights. Peak memory is measured in a
process for each form, beyond the loaded model, over fitting bases and one epoch.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from bench.eager import EagerCIR
from bench.records import ROOT, mark_memory, process_memory, write_rows
from cir import load_facts
from cir.config import BreakingConfig
from cir.data.shipped import DATA
from cir.forgetting.batches import fact_batches
from cir.forgetting.breaking import Breaker
from cir.forgetting.update import restore, snapshot
from cir.model.capture import capture
from cir.model.checkpoints import demo_model, load_model
from cir.model.sites import Target, find_stack

FORMS = ("eager", "trimmed", "ours")
BUILT_IN = [str(DATA / f"demo_{name}.jsonl") for name in ("forget", "related")]
Epoch = Callable[[], object]


class Workload:
    """The model, the batches, and an epoch of each form, ready to run from the original weights."""

    def __init__(self, fact_files: list[str]) -> None:
        # The forget step alone.
        self.config = BreakingConfig(mode="orthogonal", rank_activation=12, rank_gradient=12, retain_rate=0.0)
        self.model, tokenizer = load_model(demo_model(), device="cpu")
        self.stack = find_stack(self.model)
        self.layers = self.config.layers(len(self.stack.mlps))
        self.targets: list[Target] = self.stack.targets(self.layers[-1])
        facts = [fact for file in fact_files for fact in load_facts(file)]
        self.batches = fact_batches(tokenizer, facts, self.config, self.model.device)
        self.weights = snapshot(self.targets)
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)

    def prepare(self, form: str, undo: ExitStack) -> Epoch:
        """Everything up to the first update epoch of ``form``, which the function returned then runs."""
        undo.callback(restore, self.targets, self.weights)
        if form != "ours":
            return self._eager(undo, trims=form == "trimmed")
        tape = undo.enter_context(capture(self.model, self.stack, self.layers[-1]))
        breaker = Breaker(tape, self.targets, self.layers, self.batches, [], self.config)
        breaker.fit()
        return lambda: breaker.epoch(self.config.rate)

    def _eager(self, undo: ExitStack, trims: bool) -> Epoch:
        config = self.config
        for target in self.targets:
            target.linear.weight.requires_grad_(True)
            undo.callback(target.linear.weight.requires_grad_, False)
        eager = EagerCIR(self.model, self.stack, self.layers, config, trims=trims)
        eager.record(self.batches)
        eager.epoch(self.batches)
        return lambda: eager.epoch(self.batches)

    def flops(self) -> int:
        """Multiply-adds, twice, that an epoch cannot do without: forward, input gradients, weight update."""
        layers = self.stack.layers[: self.layers[-1] + 1]
        per_token = sum(p.numel() for layer in layers for p in layer.parameters() if p.ndim == 2)
        per_counted = sum(target.linear.weight.numel() for target in self.targets)
        tokens = sum(int(batch.attention_mask.sum()) for batch in self.batches)
        counted = sum(int(batch.predicting(self.config.skip_first).sum()) for batch in self.batches)
        return 2 * (2 * tokens * per_token + counted * per_counted)


def seconds(epoch: Epoch) -> float:
    start = time.perf_counter()
    epoch()
    return time.perf_counter() - start


def matmul_rate() -> float:
    """float32 FLOP/s of a square matrix product: the ceiling."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    torch.mm(a, b)
    return 2 * 2048**3 / min(seconds(lambda: torch.mm(a, b)) for _ in range(5))


def peak_bytes(form: str, fact_files: list[str]) -> int:
    """Peak resident bytes, beyond the loaded model, of fitting bases and one epoch (Linux: VmHWM)."""
    workload = Workload(fact_files)
    with ExitStack() as undo:
        before = mark_memory()
        workload.prepare(form, undo)()
        return process_memory("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--facts", nargs="+", default=BUILT_IN, help="default: the demo's 28 capitals")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    arguments = parser.parse_args()

    spawn = multiprocessing.get_context("spawn")
    memory = {}
    for form in FORMS:
        with spawn.Pool(1) as pool:
            memory[form] = pool.apply(peak_bytes, (form, arguments.facts))
    workload = Workload(arguments.facts)
    times: dict[str, list[float]] = {form: [] for form in FORMS}
    for _ in range(arguments.repeats):
        for form in FORMS:
            with ExitStack() as undo:
                times[form].append(seconds(workload.prepare(form, undo)))
    floor = workload.flops() / matmul_rate()
    rows = [row(form, times, memory, workload.flops(), floor) for form in FORMS]
    print(f"{len(workload.batches)} batches; floor {workload.flops() / 1e9:.0f} GFLOP = {floor:.2f} s")
    print(f"{'form':<9}{'seconds':>9}{'min..max':>14}{'speed-up':>10}{'MiB':>7}{'of floor':>10}")
    for r in rows:
        span = f"{r['min_s']:.2f}..{r['max_s']:.2f}"
        print(
            f"{r['form']:<9}{r['median_s']:>9.2f}{span:>14}{r['speedup']:>9.2f}x{r['peak_bytes'] / 2**20:>7.0f}"
            f"{r['median_s'] / floor:>9.1f}x"
        )
    write_rows(arguments.out / "cpu.jsonl", rows)


def row(form: str, times: dict[str, list[float]], memory: dict[str, int], flops: int, floor: float) -> dict[str, Any]:
    """One result. The speed-up is the median of the ratios, turn by turn, so that the machine's drift cancels."""
    own = times[form]
    return {
        "bench": "cpu.epoch",
        "form": form,
        "median_s": statistics.median(own),
        "min_s": min(own),
        "max_s": max(own),
        "repeats": len(own),
        "speedup": statistics.median(a / b for a, b in zip(times["eager"], own, strict=True)),
        "peak_bytes": memory[form],
        "floor_flop": flops,
        "floor_s": floor,
    }


if __name__ == "__main__":
    main()
