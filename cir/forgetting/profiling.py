"""Where the time of unlearning goes, phase by phase, beside what it cannot do without."""

from __future__ import annotations

import bisect
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from cir.config import BreakingConfig, CIRConfig
from cir.data.checks import check_number
from cir.data.facts import Fact, load_facts
from cir.data.tokens import statements
from cir.forgetting.batches import fact_batches
from cir.forgetting.locate import located
from cir.forgetting.report import peak_memory
from cir.forgetting.unlearn import unlearn
from cir.forgetting.update import PHASE, restore, snapshot
from cir.model.sites import find_stack, unwrapped

UNNAMED = "other"


@dataclass(frozen=True)
class Phase:
    """``seconds``: of kernels on a GPU, else of the host. ``flop``: of matrix products."""

    name: str
    seconds: float
    flop: int


@dataclass(frozen=True)
class Profile:
    """What :func:`profile` found.

    Attributes:
        phases: in the order in which they first ran; ``other`` is what none of them holds.
        seconds: of the whole run on the clock. facts, epochs: it had.
        floor_flop: multiply-adds, twice, that its forget steps cannot do without: forward, input gradients, update.
        floor_bytes: of weights that these have to move: read for each of the two passes, read and written by the
            update.
        peak_bytes: as :attr:`cir.Report.peak_memory`.
    """

    phases: tuple[Phase, ...]
    seconds: float
    facts: int
    epochs: int
    floor_flop: int
    floor_bytes: int
    peak_bytes: int

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    def table(self) -> str:
        lines = [f"{'phase':<22}{'seconds':>9}{'ms a fact':>11}{'share':>8}{'GFLOP':>9}{'GFLOP/s':>9}"]
        total = sum(phase.seconds for phase in self.phases)
        for phase in (*self.phases, Phase("all", total, sum(phase.flop for phase in self.phases))):
            rate = phase.flop / phase.seconds / 1e9 if phase.seconds else 0.0
            lines.append(
                f"{phase.name:<22}{phase.seconds:>9.3f}{1e3 * phase.seconds / self.facts:>11.2f}"
                f"{phase.seconds / total:>8.1%}{phase.flop / 1e9:>9.1f}{rate:>9.0f}"
            )
        lines.append(
            f"{self.facts} facts, {self.epochs} epochs, {self.seconds:.2f} s on the clock; the forget steps need "
            f"{self.floor_flop / 1e9:.1f} GFLOP and {self.floor_bytes / 1e9:.2f} GB of weights; "
            f"peak memory {self.peak_bytes / 2**30:.2f} GiB"
        )
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Seconds by phase as a PNG (needs matplotlib)."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 0.5 + 0.4 * len(self.phases)), layout="constrained")
        axes = figure.subplots()
        bars = axes.barh([phase.name for phase in self.phases], [phase.seconds for phase in self.phases])
        axes.bar_label(bars, [f"{phase.flop / 1e9:.0f} GFLOP" for phase in self.phases], padding=3, fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.set(xlabel=f"seconds, {self.facts} facts in {self.epochs} epochs")
        figure.savefig(path, dpi=120)


def profile(
    model: Any,
    tokenizer: Any,
    facts: str | Path | Sequence[Any],
    *,
    retain: str | None = None,
    disruption: str | None = None,
    config: CIRConfig | BreakingConfig | None = None,
    epochs: int = 1,
    trace: str | Path | None = None,
) -> Profile:
    """Run :func:`cir.unlearn` for ``epochs`` epochs, whatever the budget, under torch's profiler.

    The weights are put back. On a GPU an epoch goes before it, so that compiling kernels is not counted.

    Args:
        model, tokenizer, facts, retain, disruption, config: as for :func:`cir.unlearn`.
        trace: where to write the timeline, which chrome://tracing and Perfetto read; gzipped if it ends in .gz.

    Raises:
        ValueError, NonFiniteError: as :func:`cir.unlearn`.
    """
    check_number("epochs", epochs, 1)
    config, facts, model = config or CIRConfig(), load_facts(facts), unwrapped(model)
    stack = find_stack(model)
    if isinstance(config, BreakingConfig):
        targets = stack.targets(config.last_updated(len(stack.mlps)))
    else:
        config = located(model, tokenizer, facts, config)
        targets = stack.writers(config.first_layer(len(stack.mlps)))
    before = snapshot(targets)
    texts: dict[str, Any] = {"retain": retain, "disruption": disruption, "progress": False}
    activities = [ProfilerActivity.CPU]
    try:
        if model.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            unlearn(model, tokenizer, facts, config=_bounded(config, 1), **texts)
            restore(targets, before)
            torch.cuda.reset_peak_memory_stats(model.device)
        with torch_profile(activities=activities, with_flops=True) as profiler:
            report = unlearn(model, tokenizer, facts, config=_bounded(config, epochs), **texts)
    finally:
        restore(targets, before)
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    flop, moved = _floor(model, tokenizer, facts, config)
    return Profile(
        _phases(profiler.events() or []),
        report.seconds["total"],
        len(facts),
        epochs,
        epochs * flop,
        epochs * moved,
        peak_memory(model.device),
    )


def _phases(events: Sequence[Any]) -> tuple[Phase, ...]:
    """Each operation counts for the phase whose time on the host it began in: backward has a thread of its own."""
    named = sorted(
        ((e.time_range.start, e.time_range.end, e.name) for e in events if e.name.startswith(PHASE)),
        key=lambda span: (span[0], -span[1]),
    )
    outer: list[tuple[float, float, str]] = []
    for span in named:
        if not outer or span[0] >= outer[-1][1]:
            outer.append(span)
    starts = [start for start, _, _ in outer]
    on_device = any(event.kernels for event in events)
    seconds: dict[str, float] = {}
    flop: dict[str, int] = {}
    for start, end, name in outer:
        seconds[name] = seconds.get(name, 0.0) + (0.0 if on_device else (end - start) / 1e6)
    for event in events:
        if not event.kernels and not event.flops:
            continue
        i = bisect.bisect(starts, event.time_range.start) - 1
        name = outer[i][2] if i >= 0 and event.time_range.start < outer[i][1] else PHASE + UNNAMED
        flop[name] = flop.get(name, 0) + int(event.flops or 0)
        seconds[name] = seconds.get(name, 0.0) + sum(kernel.duration for kernel in event.kernels) / 1e6
    return tuple(Phase(name.removeprefix(PHASE), spent, flop.get(name, 0)) for name, spent in seconds.items())


def _bounded(config: CIRConfig | BreakingConfig, epochs: int) -> CIRConfig | BreakingConfig:
    """The same for so many epochs, whatever the harm; the floor is not reached either."""
    if isinstance(config, BreakingConfig):
        return replace(config, budget=1e9, max_epochs=epochs, target_recall=None)
    steps = epochs * config.check_every
    return replace(config, budget=1e9, worst_window=1e9, max_steps=steps, floor=-1e9, target_recall=None)


def _floor(model: Any, tokenizer: Any, facts: Sequence[Fact], config: CIRConfig | BreakingConfig) -> tuple[int, int]:
    """FLOPs and bytes of an epoch's forget steps; those that ask what would be relearned are left out."""
    stack = find_stack(model)
    if isinstance(config, BreakingConfig):
        layers = stack.layers[: config.layers(len(stack.mlps))[-1] + 1]
        targets = stack.targets(config.last_updated(len(stack.mlps)))
        batches = fact_batches(tokenizer, facts, config, torch.device("cpu"))
        steps, count = 1, len(batches)
        tokens = sum(int(batch.attention_mask.sum()) for batch in batches)
        counted = sum(int(batch.predicting(config.skip_first).sum()) for batch in batches)
    else:
        first = config.first_layer(len(stack.mlps))
        layers, targets = stack.layers[first:], stack.writers(first)
        told = [s for fact in facts for s in statements(tokenizer, fact, config.max_length)]
        steps, count = config.check_every, -(-len(facts) // config.batch_size)
        tokens, counted = sum(s.told[-1] for s in told), len(told)
    run = [p for layer in layers for p in layer.parameters() if p.ndim == 2]
    updated = [target.weight for target in targets]
    size, size_updated = sum(p.numel() for p in run), sum(p.numel() for p in updated)
    moved = 2 * count * (size + size_updated) * run[0].element_size()
    return steps * 2 * (2 * tokens * size + counted * size_updated), steps * moved
