"""A step of the default method on SmolLM2-135M, ours against the plain form, side by side in one process.

    python -m bench.cpu [--facts F.jsonl ...] [--repeats 5] [--out bench/results]

Both take the first step of forgetting the same facts, from the original weights, with the same subspaces and the same
outcome to rounding: ours, and :class:`bench.eager.EagerForgetter`. The forms take turns, A B A B ..., and neither the
fit nor a budget check is part of it. Peak memory is measured in a process for each form, beyond the loaded model and
the subspaces.
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

from bench.eager import EagerForgetter
from bench.records import ROOT, mark_memory, process_memory, write_rows
from cir import CIRConfig, Subspaces, load_facts
from cir.data.shipped import DATA, builtin_contrast, builtin_text
from cir.forgetting.forgetter import RELEARNING_RATES, Forgetter
from cir.forgetting.questions import sentences
from cir.forgetting.update import restore, sizes, snapshot
from cir.model.capture import answering
from cir.model.checkpoints import demo_model, load_model
from cir.model.finding import find_stack

FORMS = ("eager", "ours")
BUILT_IN = [str(DATA / f"demo_{name}.jsonl") for name in ("forget", "related")]
Step = Callable[[], object]


class Workload:
    """The model, the facts and what is collapsed, and a step of each form from the original weights."""

    def __init__(self, fact_files: list[str]) -> None:
        self.model, self.tokenizer = load_model(demo_model(), device="cpu")
        self.stack = find_stack(self.model)
        self.facts = [fact for file in fact_files for fact in load_facts(file)]
        contrast = builtin_contrast(self.facts)
        self.common = Subspaces.fit(self.model, self.tokenizer, builtin_text(), contrast, progress=False)
        self.first = self.common.fitted_on["layers"][0]
        self.targets = self.stack.writers(self.first)
        self.config = CIRConfig(batch_size=len(self.facts))
        self.weights = snapshot(self.targets)
        self.model.requires_grad_(False)
        with answering(self.model, self.stack, self.first) as tape:
            self.relearned = tape.mlps
            told = sentences(tape, self.tokenizer, self.facts, max_length=self.config.max_length, at_once=512)
        self.told = [
            [(s.statement.ids[: s.statement.told[-1] + 1], s.statement.told) for s in told if s.owner == fact]
            for fact in range(len(self.facts))
        ]

    def prepare(self, form: str, undo: ExitStack) -> Step:
        """The first step of ``form``, ready to be taken."""
        undo.callback(restore, self.targets, self.weights)
        if form == "eager":
            lengths = [RELEARNING_RATES[0] * float(size) for size in sizes(self.relearned)]
            about = self.targets, self.relearned, self.told, self.common, self.config, lengths
            eager, everyone = EagerForgetter(self.model, *about), range(len(self.told))
            before = [eager.odds(fact)[0].detach() for fact in everyone]
            return lambda: eager.step(before, (everyone[::2], everyone[1::2]))
        tape = undo.enter_context(answering(self.model, self.stack, self.first))
        forgetter = Forgetter(tape, self.targets, self.tokenizer, self.facts, self.common, self.config)
        return lambda: forgetter.apply(forgetter.step())

    def flops(self) -> int:
        """Multiply-adds, twice, of the four reads that a step is made of, where relearning takes three: forwards and
        backwards of the layers from the first that changes on, and of the LM head at the answers.
        """
        layers = sum(
            p.numel() for layer in self.stack.layers[self.first :] for p in layer.parameters() if p.ndim == 2
        )
        tokens = sum(places[-1] for of in self.told for _, places in of)
        answers = sum(len(places) for of in self.told for _, places in of)
        read = 4 * (tokens * layers + answers * self.model.get_output_embeddings().weight.numel())
        return read * (1 + self.config.relearning_steps)


def seconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def matmul_rate() -> float:
    """float32 FLOP/s of a square matrix product: the ceiling."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    torch.mm(a, b)
    return 2 * 2048**3 / min(seconds(lambda: torch.mm(a, b)) for _ in range(5))


def peak_bytes(form: str, fact_files: list[str]) -> int:
    """Peak resident bytes of a step, beyond the loaded model and the subspaces (Linux: VmHWM)."""
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
    print(f"{len(workload.facts)} facts; floor {workload.flops() / 1e9:.0f} GFLOP = {floor:.2f} s")
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
        "bench": "cpu.step",
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
