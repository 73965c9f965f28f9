"""What a run will need and take on a GPU, from a model's configuration alone: nothing is loaded, nothing is run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch._subclasses import FakeTensorMode

from cir.config import CIRConfig, EditConfig, rank_at
from cir.forgetting.counterfactuals import NEAREST, PLACES, SENTENCES, TEMPLATES, TRIED
from cir.forgetting.fitting import GRADIENTS_EVERY
from cir.forgetting.memory import ROOMY, STEP_ON_GPU, TOKENS_AT_ONCE, needed_to_forget, tokens_at_once
from cir.forgetting.mending import ASKED
from cir.forgetting.questions import PEERS
from cir.forgetting.subspace import columns_at
from cir.model.finding import find_stack
from cir.model.sites import sites_of


@dataclass(frozen=True)
class GPU:
    """Bytes of memory; bytes/s to and from it; FLOP/s of dense bfloat16 and of float64 products, by datasheet."""

    memory: float
    bandwidth: float
    matmul: float
    double: float


GPUS = {
    "a100-40": GPU(40e9, 1.56e12, 312e12, 19.5e12),
    "a100-80": GPU(80e9, 2.04e12, 312e12, 19.5e12),
    "l40s": GPU(48e9, 0.86e12, 362e12, 1.4e12),
    "rtx4090": GPU(24e9, 1.01e12, 165e12, 1.3e12),
    "rtx5090": GPU(32e9, 1.79e12, 210e12, 1.6e12),
    "rtx-pro-6000": GPU(96e9, 1.79e12, 252e12, 2.0e12),
    "h100": GPU(80e9, 3.35e12, 989e12, 67e12),
    "h200": GPU(141e9, 4.8e12, 989e12, 67e12),
    "b200": GPU(180e9, 8.0e12, 2250e12, 40e12),
}
ARITHMETIC, REPLAYED, MEMORY, DOUBLE = 0.41, 0.34, 0.8, 0.4
"""Of the datasheet's rates, what layers of 2048 tokens, replayed ones of a thousand, copies and solves reach. These
and the times of the host are fitted to runs on H100s and an H200, docs/gpu.md; for other GPUs they are guesses.
"""
HOST_FORWARD, HOST_BACKWARD = 1.2e-3, 1.5e-3
"""Seconds in which the host launches a layer, where no CUDA graph does."""
HOST_STEP, HOST_CAPTURE, HOST_EDIT, HOST_FIT = 0.02, 0.1, 0.35, 2.1
"""Seconds of the host for a step beside its reads, to capture a graph, and once for an edit and a fit."""
STEPS, EDIT_STEPS = 12, 12
"""Of a batch of facts, and of one by the Editor: what SmolLM2 took, docs/method.md."""


@dataclass
class Phase:
    """Seconds, and what they are made of: FLOPs in products, bytes moved, and seconds of the host's launches.

    ``bound`` is what most of the seconds wait for.
    """

    flops: float = 0.0
    bytes: float = 0.0
    host: float = 0.0
    seconds: float = 0.0
    by_bound: dict[str, float] = field(default_factory=dict)

    @property
    def bound(self) -> str:
        return max(self.by_bound, key=lambda name: self.by_bound[name], default="nothing")

    def add(
        self, gpu: GPU, count: float, flops: float, moved: float, host: float = 0.0, rate: float | None = None
    ) -> None:
        """``count`` pieces of work, one after the other: each takes as long as what holds it up longest."""
        rate = ARITHMETIC * gpu.matmul if rate is None else rate
        waits = {"arithmetic": flops / rate, "memory": moved / (MEMORY * gpu.bandwidth), "host": host}
        name = max(waits, key=lambda wait: waits[wait])
        self.flops, self.bytes, self.host = (
            self.flops + count * flops,
            self.bytes + count * moved,
            self.host + count * host,
        )
        self.seconds += count * waits[name]
        self.by_bound[name] = self.by_bound.get(name, 0.0) + count * waits[name]


@dataclass(frozen=True)
class Forecast:
    """What :func:`plan` foresees.

    Attributes:
        gpu: by name. facts: how many. layers: first and last that are updated.
        weight_bytes: of the model. peak_bytes: with all that is needed, but for copies beside the weights and more
            tokens at once where there is room for twice as much (``optional_bytes``). fits: whether the GPU has it.
        phases: of :func:`cir.unlearn`, by name. edit: of :meth:`cir.Editor.forget`.
        assumed: in words.
    """

    gpu: str
    facts: int
    layers: tuple[int, int]
    weight_bytes: int
    peak_bytes: int
    optional_bytes: int
    fits: bool
    phases: dict[str, Phase]
    edit: Phase
    assumed: tuple[str, ...]

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases.values())

    @property
    def seconds_a_fact(self) -> float:
        return self.seconds / self.facts

    def to_json(self) -> str:
        totals = {"seconds": self.seconds, "seconds_a_fact": self.seconds_a_fact, "edit_seconds": self.edit.seconds}
        return json.dumps({**totals, **asdict(self)}, indent=2) + "\n"

    def table(self) -> str:
        lines = [f"{'phase':<10}{'seconds':>9}{'TFLOP':>9}{'GB moved':>10}{'host s':>8}  bound by"]
        for name, phase in [*self.phases.items(), ("one edit", self.edit)]:
            lines.append(
                f"{name:<10}{phase.seconds:>9.2f}{phase.flops / 1e12:>9.0f}{phase.bytes / 1e9:>10.0f}"
                f"{phase.host:>8.2f}  {phase.bound}"
            )
        lines += [
            "",
            f"a fact     {self.seconds_a_fact:.3f} s of {self.facts} on {self.gpu}; one by the Editor "
            f"{self.edit.seconds:.2f} s",
            f"memory     {self.peak_bytes / 1e9:.1f} GB at most, {self.weight_bytes / 1e9:.1f} of them the weights; "
            f"{self.optional_bytes / 1e9:.1f} more where it has room{'' if self.fits else ': MORE THAN IT HAS'}",
            *(f"assumed    {line}" for line in self.assumed),
        ]
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Draw the seconds of each phase, by what they wait for, as a PNG."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 2.5), layout="tight")
        axes = figure.subplots()
        phases = {**self.phases, "one edit": self.edit}
        left = [0.0] * len(phases)
        for bound in ("arithmetic", "memory", "host"):
            own = [phase.by_bound.get(bound, 0.0) for phase in phases.values()]
            axes.barh(list(phases), own, left=left, label=bound)
            left = [a + b for a, b in zip(left, own, strict=True)]
        axes.invert_yaxis()
        axes.set(xlabel="seconds", title=f"{self.facts} facts on {self.gpu}, planned")
        axes.legend(fontsize=8)
        figure.savefig(path, dpi=120)


def plan(
    model: Any,
    facts: int,
    *,
    gpu: str,
    sentences: int = 3,
    tokens: int = 20,
    contrast: int = 48,
    config: CIRConfig | None = None,
    edit: EditConfig | None = None,
    steps: int = STEPS,
) -> Forecast:
    """What :func:`cir.unlearn` of ``facts`` facts, and an edit of one, need and take on a named GPU.

    Args:
        model: a configuration of transformers, or where one is: a folder, a ``config.json``, a hub id.
        gpu: one of :data:`GPUS`.
        sentences: of a fact. tokens: of a sentence, up to the end of its answer.
        contrast: facts that are told to stay. config, edit: as for the calls.
        steps: of each batch of facts.

    Raises:
        ValueError: on an unknown GPU, no facts, or a model that cannot be edited.
    """
    if gpu not in GPUS:
        raise ValueError(f"gpu: expected one of {', '.join(GPUS)}, got {gpu!r}")
    for name, value in (("facts", facts), ("sentences", sentences), ("tokens", tokens), ("steps", steps)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    config, edit = config or CIRConfig(), edit or EditConfig()
    shape = _Shape(_fake(model), config)
    card, cuda = GPUS[gpu], torch.device("cuda")
    # Text is not limited by what is there: as much as the configuration reads.
    need = needed_to_forget(shape.model, shape.stack, shape.targets, config.disruption_tokens or 0, config, cuda)
    peak = shape.weights + need.peak
    exchanged = min(SENTENCES, facts * sentences)
    kept = tokens * (contrast * sentences + _near(exchanged, contrast * sentences))
    return Forecast(
        gpu=gpu,
        facts=facts,
        layers=(shape.first, len(shape.stack.mlps) - 1),
        weight_bytes=shape.weights,
        peak_bytes=peak,
        optional_bytes=shape.relearned + (ROOMY - 1) * need.tokens * need.token,
        fits=peak < 0.97 * card.memory,
        phases={
            "measure": shape.measure(card, config, facts, tokens, steps),
            "fit": shape.fit(card, config, contrast * sentences, exchanged, tokens),
            "steps": shape.steps(
                card, config, facts * sentences * tokens, -(-facts // config.batch_size), steps, kept
            ),
        },
        edit=shape.edit(card, edit, config, sentences * tokens, tokens),
        assumed=(
            f"{steps} steps of each batch, {EDIT_STEPS} of an edit; {sentences} sentences of {tokens} tokens a fact",
            f"{len(shape.stack.mlps) - shape.first} of {len(shape.stack.mlps)} layers are updated",
            f"layers run at {ARITHMETIC:.0%} of the datasheet's FLOP/s, in graphs of 1,000 tokens at {REPLAYED:.0%}",
            f"copies at {MEMORY:.0%} of its bandwidth, solves at {DOUBLE:.0%} of its float64 FLOP/s",
            f"the host launches a layer in {1e3 * HOST_FORWARD:.1f} ms, its backward in {1e3 * HOST_BACKWARD:.1f} ms",
            f"and takes {1e3 * HOST_STEP:.0f} ms of a step; fitted to runs on H100s and an H200",
        ),
    )


def _fake(model: Any) -> Any:
    """The model that a configuration describes, with shapes and no data."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if isinstance(model, str | Path):
        try:
            model = AutoConfig.from_pretrained(model)
        except (OSError, ValueError) as error:
            reason = str(error).split("\n")[0]
            raise ValueError(
                f"model: expected a folder with config.json, that file, or a hub id, got {str(model)!r}: {reason}"
            ) from error
    dtype = model.dtype or torch.bfloat16
    with FakeTensorMode():
        return AutoModelForCausalLM.from_config(model, dtype=dtype)


def _near(exchanged: int, contrast: int) -> int:
    """Sentences near so many that are exchanged, and put into so many of contrast facts, at most."""
    return (PLACES * exchanged + min(TEMPLATES, contrast)) * NEAREST


class _Shape:
    """Sizes of a model, and the work of each phase."""

    def __init__(self, model: Any, config: CIRConfig) -> None:
        self.model, self.stack = model, find_stack(model)
        self.first = config.first_layer(len(self.stack.mlps))
        self.targets = self.stack.writers(self.first)
        if any(target.experts for target in self.stack.targets(len(self.stack.mlps) - 1)):
            raise ValueError("expected a dense model to plan for, got a mixture of experts: none has been timed")
        unique = {id(p): p for p in model.parameters()}
        self.weights = sum(p.nbytes for p in unique.values())
        layers = [sum(p.nbytes for p in layer.parameters()) for layer in self.stack.layers]
        self.size = self.targets[0].weight.element_size()
        self.upper, self.lower = sum(layers[self.first :]), sum(layers[: self.first])
        self.head = model.get_output_embeddings().weight.nbytes
        self.relearned = sum(t.weight.nbytes for mlp in self.stack.mlps[self.first :] for t in mlp.targets)
        self.written = sum(target.weight.nbytes for target in self.targets)
        self.count = len(layers) - self.first

    def _flops(self, stored: float, tokens: float) -> float:
        return 2 * stored / self.size * tokens

    def _forward(self, phase: Phase, gpu: GPU, count: float, stored: float, layers: int, tokens: float) -> None:
        phase.add(gpu, count, self._flops(stored, tokens), stored, layers * HOST_FORWARD)

    def _read(self, phase: Phase, gpu: GPU, count: float, tokens: float, replayed: bool = True) -> None:
        """Forward and backward of the upper layers; a graph of one or two thousand tokens costs the host nothing."""
        host = 0.0 if replayed else self.count * (HOST_FORWARD + HOST_BACKWARD)
        rate = (REPLAYED if replayed else ARITHMETIC) * gpu.matmul
        phase.add(gpu, count, 2 * self._flops(self.upper, tokens), 2 * self.upper + self.head, host, rate)

    def measure(self, gpu: GPU, config: CIRConfig, facts: int, tokens: int, steps: int) -> Phase:
        found, text, at_once = Phase(), config.disruption_tokens or 0, tokens_at_once(torch.device("cuda"))
        checks = 1 + -(-steps // config.check_every)
        self._forward(found, gpu, text / at_once, self.lower, self.first, at_once)
        self._forward(found, gpu, checks * text / at_once, self.upper + self.head, self.count, at_once)
        asked = max(1, facts * tokens / 1024)
        depth = len(self.stack.mlps)
        self._forward(found, gpu, (checks + 1) * asked, self.lower + self.upper, depth, min(1024, facts * tokens))
        return found

    def fit(self, gpu: GPU, config: CIRConfig, contrast: int, exchanged: int, tokens: int) -> Phase:
        """With ``contrast`` sentences, and ``exchanged`` ones of the facts, of so many ``tokens``."""
        found, depth = Phase(), len(self.stack.mlps)
        alone, both = STEP_ON_GPU, TOKENS_AT_ONCE / 2
        with_gradients = config.retain_tokens / GRADIENTS_EVERY
        self._forward(
            found, gpu, (config.retain_tokens - with_gradients) / alone, self.lower + self.upper, depth, alone
        )
        self._forward(found, gpu, with_gradients / both, self.lower, self.first, both)
        self._read(found, gpu, with_gradients / both, both, replayed=False)
        near = _near(exchanged, contrast) * tokens
        tried = near + min(TRIED, tokens) * exchanged * tokens
        self._forward(found, gpu, max(1, tried / alone), self.lower + self.upper, depth, min(tried, alone))
        spared = contrast * tokens + near
        self._read(found, gpu, max(1, spared / 2048), min(spared, 2048), replayed=False)
        for site in sites_of(self.targets):
            columns = columns_at(site, rank_at(site, config.rank))
            rows = config.retain_tokens if site.kind == "activation" else with_gradients
            found.add(gpu, 1, 4 * rows * site.width * columns, 16 * site.width * columns)
            solve = 8 * site.width * columns**2
            found.add(gpu, 1, solve, 8 * 8 * site.width * columns, rate=DOUBLE * gpu.double)
        found.add(gpu, 1, 0.0, 0.0, HOST_FIT)
        return found

    def steps(self, gpu: GPU, config: CIRConfig, tokens: int, batches: int, steps: int, kept: int) -> Phase:
        """Of facts of so many ``tokens``, where what has to stay is ``kept`` tokens long."""
        found, each = Phase(), tokens / batches
        parts = max(1.0, each / 1024)
        # As they are, relearned but for the first step, which starts from that, and then.
        self._read(found, gpu, batches * steps * parts * (1 + config.relearning_steps), each / parts)
        self._change(found, gpu, batches * steps, 2 * config.relearning_steps, 3)
        asked = min(kept, ASKED)
        parts_asked = max(1.0, asked / 1024)
        flops = self._flops(self.upper, asked / parts_asked)
        found.add(gpu, batches * steps * parts_asked, flops, self.upper + self.head, 0.0, REPLAYED * gpu.matmul)
        found.add(gpu, batches * parts, 0.0, 0.0, HOST_CAPTURE)
        return found

    def _change(self, found: Phase, gpu: GPU, steps: float, relearned: int, copies: int) -> None:
        """Weights read and written as others are relearned, put back and stepped."""
        moved = 2 * (relearned + copies) * self.relearned + 2 * self.written
        found.add(gpu, steps, 0.0, moved)
        found.add(gpu, steps, 0.0, 0.0, HOST_STEP)

    def edit(self, gpu: GPU, edit: EditConfig, config: CIRConfig, own: int, tokens: int) -> Phase:
        found = Phase()
        steps = min(EDIT_STEPS, edit.max_steps)
        self._read(found, gpu, 2 * steps, own)
        self._read(found, gpu, 2 * config.relearning_steps, PEERS * tokens)  # once, and again in the end
        self._change(found, gpu, steps, config.relearning_steps, 2)
        found.add(gpu, 1, 0.0, 0.0, HOST_EDIT)
        looks = steps / edit.check_every + 2
        found.add(gpu, looks, self._flops(self.upper, own), self.upper + self.head)
        at_once = tokens_at_once(torch.device("cuda"))
        self._forward(found, gpu, edit.text_tokens / at_once, self.lower, self.first, at_once)
        self._forward(found, gpu, 2 * edit.text_tokens / at_once, self.upper + self.head, self.count, at_once)
        return found
