"""Where the time of unlearning goes, phase by phase, beside what it cannot do without."""

from __future__ import annotations

import bisect
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from cir.config import BreakingConfig, CIRConfig
from cir.data.facts import Fact, load_facts
from cir.data.tokens import statements
from cir.forgetting.batches import fact_batches
from cir.forgetting.locate import located
from cir.forgetting.memory import experts_of_a_token
from cir.forgetting.report import peak_memory
from cir.forgetting.unlearn import unlearn
from cir.forgetting.update import PHASE, restore, running, snapshot
from cir.model.finding import find_stack, unwrapped
from cir.system.checks import check_number

UNNAMED = "other"
STEPS = 3
"""Of an epoch of the default method, in which all steps are alike: what is recorded takes memory by the operation."""


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
        peak_bytes: as :attr:`cir.Report.peak_memory`. device: of the model, "cuda" or "cpu": whose seconds these are.
    """

    phases: tuple[Phase, ...]
    seconds: float
    facts: int
    epochs: int
    floor_flop: int
    floor_bytes: int
    peak_bytes: int
    device: str

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    def table(self) -> str:
        total = sum(phase.seconds for phase in self.phases)
        kind = "GPU" if self.device == "cuda" else "host"
        lines = [
            f"{total / self.facts:.3f} {kind}-seconds a fact of what is below; the paper reports under 3 GPU-seconds",
            f"{'phase':<22}{'seconds':>9}{'ms a fact':>11}{'share':>8}{'GFLOP':>9}{'GFLOP/s':>9}",
        ]
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

    An epoch of the default method has :data:`STEPS` steps. The weights are put back. The same goes before, to
    count FLOPs, and so that compiling kernels is not counted.

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
        config = replace(config, check_every=min(config.check_every, STEPS))
        config = located(model, tokenizer, facts, config)
        targets = stack.writers(config.first_layer(len(stack.mlps)))
    before = snapshot(targets)
    texts: dict[str, Any] = {"retain": retain, "disruption": disruption, "progress": False}
    activities = [ProfilerActivity.CPU]
    try:
        with _Flops() as flops:
            unlearn(model, tokenizer, facts, config=_bounded(config, epochs), **texts)
        restore(targets, before)
        if model.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.reset_peak_memory_stats(model.device)
        with torch_profile(activities=activities) as profiler:
            report = unlearn(model, tokenizer, facts, config=_bounded(config, epochs), **texts)
    finally:
        restore(targets, before)
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    flop, moved = _floor(model, tokenizer, facts, config)
    return Profile(
        _phases(_recorded(profiler), flops.by_phase),
        report.seconds["total"],
        len(facts),
        epochs,
        epochs * flop,
        epochs * moved,
        peak_memory(model.device),
        model.device.type,
    )


def _recorded(profiler: Any) -> Sequence[Any]:
    """The events as they were recorded: as torch parses them they take several times the memory and minutes."""
    return profiler.profiler.kineto_results.events()


class _Flops(TorchDispatchMode):
    """FLOPs of matrix products by phase; torch's profiler keeps 30 kB an operation to count them."""

    def __init__(self) -> None:
        super().__init__()
        self.by_phase: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            name = running[0] if running else UNNAMED
            heads = _of_as_many_heads(args) if "attention" in func._schema.name else args
            self.by_phase[name] = self.by_phase.get(name, 0) + count(*heads, **(kwargs or {}), out_val=out)
        return out


def _of_as_many_heads(args: Sequence[Any]) -> list[Any]:
    """Attention's arguments as torch's formulas take them, which refuse keys (B, H, N, D) of fewer heads."""
    heads = [x.shape[1] if isinstance(x, Tensor) and x.ndim == 4 else 0 for x in args]
    most = max(heads, default=0)
    return [
        x.new_empty(()).expand(len(x), most, *x.shape[2:]) if 0 < own < most else x
        for x, own in zip(args, heads, strict=True)
    ]


def _phases(events: Sequence[Any], flop: Mapping[str, int]) -> tuple[Phase, ...]:
    """Each operation counts for the phase whose time on the host it began in: backward has a thread of its own."""
    on_device: dict[int, int] = {}
    named = []
    for event in events:
        if event.device_type().name != "CPU":
            if event.name().startswith(PHASE):
                continue  # a phase once more, from its first kernel to its last
            launched_by = event.linked_correlation_id()
            on_device[launched_by] = on_device.get(launched_by, 0) + event.duration_ns()
        elif event.name().startswith(PHASE):
            named.append((event.start_ns(), -event.duration_ns(), event.name().removeprefix(PHASE)))
    outer: list[tuple[int, int, str]] = []
    for start, minus, name in sorted(named):
        if not outer or start >= outer[-1][1]:
            outer.append((start, start - minus, name))
    starts = [start for start, _, _ in outer]
    spent: dict[str, int] = {}
    for start, end, name in outer:
        spent[name] = spent.get(name, 0) + (0 if on_device else end - start)
    for event in events if on_device else ():
        if event.device_type().name == "CPU" and (kernels := on_device.get(event.correlation_id(), 0)):
            i = bisect.bisect(starts, event.start_ns()) - 1
            name = outer[i][2] if i >= 0 and event.start_ns() < outer[i][1] else UNNAMED
            spent[name] = spent.get(name, 0) + kernels
    return tuple(Phase(name, spent.get(name, 0) / 1e9, flop.get(name, 0)) for name in {**spent, **flop})


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
    experts = {target.parameter for mlp in stack.mlps for target in mlp.targets if target.experts}
    run = [p for layer in layers for p in layer.parameters() if p.ndim == 2 or p in experts]
    # Of experts those that a token is routed to: at least these are read.
    size, size_updated = (
        sum(p.numel() * experts_of_a_token(model, len(p)) // len(p) if p in experts else p.numel() for p in of)
        for of in (run, [target.parameter for target in targets])
    )
    moved = 2 * count * (size + size_updated) * run[0].element_size()
    return steps * 2 * (2 * tokens * size + counted * size_updated), steps * moved
