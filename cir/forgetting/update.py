"""The update: the only file that changes weights."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor, nn

from cir.measures import NonFiniteError
from cir.model.capture import at_least_float32
from cir.model.offload import free_memory
from cir.model.shards import local, whole
from cir.model.sites import Part, Target
from cir_kernels import outer_norm_sq, outer_update_

PHASE = "cir::"
"""Before the names of what :func:`phase` marks."""

Factors = dict[str, tuple[Tensor, Tensor]]
"""By linear: B (r, D_out) and A (r, D_in), of which B^T A is added to its weight."""

running: list[str] = []
"""The phases that have begun, the outermost first."""


class Weighted(Protocol):
    """What has a weight of the model: a :class:`Target`, or less."""

    @property
    def parameter(self) -> nn.Parameter: ...


@contextmanager
def phase(name: str) -> Iterator[None]:
    """A context that a profiler shows by this name."""
    running.append(name)
    try:
        with torch.profiler.record_function(PHASE + name):
            yield
    finally:
        running.pop()


def selective_step(
    targets: Sequence[Target],
    tokens: Mapping[str, Tensor],
    rate: float,
    rounding: str = "nearest",
    seed: int = 0,
    remainders: dict[str, Tensor] | None = None,
    loss: Tensor | None = None,
) -> float:
    """W <- W - rate * dW / ||dW||, with dW = G'^T A' and the norm of all targets together.

    Args:
        targets: the linears to update.
        tokens: collapsed rows A' (T, D_in) and G' (T, D_out) at each of their sites.
        rate: r, the Frobenius norm of the whole change.
        rounding, seed: of 16-bit weights, see :func:`cir_kernels.outer_update_`.
        remainders: by target name, what "compensated" keeps from step to step; empty at first.
        loss: a scalar that has to be finite too. It and the norm reach the host together, the step's only wait.

    Returns:
        ||dW|| before scaling. Where it is 0 nothing is changed.

    Raises:
        NonFiniteError: before any weight is changed.
    """
    with phase("norm"):
        value, squared = _on_host(loss, outer_norm_sq(_groups(targets, tokens)))
    if not math.isfinite(value + squared):
        raise NonFiniteError(
            f"expected a finite loss and update, got loss {value} and norm {squared**0.5}; no weight was changed"
        )
    norm = math.sqrt(squared)
    if norm > 0:
        with phase("update"):
            add_outer(targets, tokens, -rate / norm, rounding, seed, remainders)
    return norm


def plain_step(
    targets: Sequence[Target],
    tokens: Mapping[str, Tensor],
    rate: float,
    rounding: str = "nearest",
    seed: int = 0,
    remainders: dict[str, Tensor] | None = None,
    loss: Tensor | None = None,
) -> None:
    """W <- W - rate * G^T A: plain SGD with the ordinary weight gradient, which is never stored.

    Arguments are those of :func:`selective_step`.

    Raises:
        NonFiniteError: before any weight is changed.
    """
    device = targets[0].weight.device
    total = torch.zeros((), dtype=torch.float64, device=device)
    for rows in tokens.values():
        if rows.numel():  # the sum of the extremes is finite only where all rows are
            total += torch.stack(torch.aminmax(rows)).double().sum().to(device)
    value, summed = _on_host(loss, total)
    if not math.isfinite(value + summed):
        raise NonFiniteError(f"expected a finite loss and finite rows, got loss {value}; no weight was changed")
    add_outer(targets, tokens, -rate, rounding, seed, remainders)


@torch.no_grad()
def sizes(targets: Sequence[Target]) -> list[Tensor]:
    """Root mean square of each weight that the model came with, as scalars on their devices."""
    weights = [target.parameter for target in targets]
    norms = [t.norm(at_least_float32(w[:0]).dtype) for t, w in zip(targets, weights, strict=True)]
    return [norm / weight.numel() ** 0.5 for norm, weight in zip(norms, weights, strict=True)]


@torch.no_grad()
def norm_of(targets: Sequence[Target]) -> float:
    """The norm of all weights together, as the model came with them."""
    return sum(float(target.norm(torch.float64)) ** 2 for target in targets) ** 0.5


@torch.no_grad()
def sign_step(targets: Sequence[Target], tokens: Mapping[str, Tensor], lengths: Sequence[Tensor], seed: int) -> None:
    """W <- W + length * sign(G^T A) for each target: a first step of Adam.

    Args:
        targets, tokens: as for :func:`selective_step`, rows as they are. lengths: scalars on the weights' devices.
        seed: of the rounding of 16-bit weights.
    """
    of = {target.name: length for target, length in zip(targets, lengths, strict=True)}
    for target, part, number in _numbered(targets, tokens, seed):
        outer_update_(
            part.weight,
            part.gradient,
            part.activation,
            of[target.name],
            rounding="stochastic",  # to nearest, most of so small a step would be dropped from 16 bits
            seed=number,
            sign=True,
        )


def _on_host(loss: Tensor | None, value: Tensor) -> list[float]:
    """``loss`` (0 where there is none) and ``value``, in one transfer."""
    first = torch.zeros_like(value) if loss is None else loss.detach().to(value)
    return torch.stack([first, value]).tolist()


@torch.no_grad()
def snapshot(targets: Sequence[Weighted], into: Sequence[Tensor] | None = None, near: bool = False) -> list[Tensor]:
    """Copies of the target weights, on the host; in the memory of an earlier snapshot, ``into``, where given. With
    ``near``, beside the weights where their device has twice the room, from where they are back much faster.
    """
    weights = [local(target.parameter) for target in targets]
    if into is None and near and _roomy(weights):
        into = [torch.empty_like(weight) for weight in weights]
    if into is None:
        # Pinned, a GPU writes them several times as fast.
        into = [torch.empty(w.shape, dtype=w.dtype, pin_memory=w.is_cuda) for w in weights]
    for weight, copy in zip(weights, into, strict=True):
        copy.copy_(weight, non_blocking=True)
    for device in {weight.device for weight, copy in zip(weights, into, strict=True) if weight.device != copy.device}:
        torch.cuda.synchronize(device)
    return list(into)


def _roomy(weights: Sequence[Tensor]) -> bool:
    """Whether each device has free memory for twice the ``weights`` that it has."""
    sizes: dict[torch.device, int] = {}
    for weight in weights:
        sizes[weight.device] = sizes.get(weight.device, 0) + weight.nbytes
    return all(2 * size < (free_memory(device) or 0) for device, size in sizes.items())


@torch.no_grad()
def restore(targets: Sequence[Weighted], weights: Sequence[Tensor]) -> None:
    """Put weights taken by :func:`snapshot` back in place, bit for bit."""
    for target, weight in zip(targets, weights, strict=True):
        local(target.parameter).copy_(weight)


@torch.no_grad()
def interpolate(targets: Sequence[Target], weights: Sequence[Tensor], share: float) -> None:
    """Leave ``share`` of the way from ``weights``, taken by :func:`snapshot`, to those that are in place."""
    for target, weight in zip(targets, weights, strict=True):
        now = local(target.parameter)
        now.lerp_(weight.to(now.device), 1 - share)


def fingerprint(targets: Sequence[Target]) -> str:
    """SHA-256 over the names, types, shapes and bits of the target weights, of which no two are gathered at once."""
    return fingerprint_of((target.name, whole(target.parameter.detach())) for target in targets)


def fingerprint_of(weights: Iterable[tuple[str, Tensor]]) -> str:
    """As :func:`fingerprint`, of weights by the names of their linears, from a checkpoint say."""
    digest = hashlib.sha256()
    for name, weight in weights:
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _groups(targets: Sequence[Target], tokens: Mapping[str, Tensor]) -> list[tuple[list[Tensor], Tensor]]:
    """The gradients of targets that read one site, beside what they read; of experts each alone."""
    linears = groupby((target for target in targets if not target.experts), lambda target: target.activation.name)
    found = [([tokens[target.gradient.name] for target in group], tokens[name]) for name, group in linears]
    experts = (part for target in targets if target.experts for part in target.parts(tokens))
    return [*found, *(([part.gradient], part.activation) for part in experts)]


def _numbered(
    targets: Sequence[Target], tokens: Mapping[str, Tensor], seed: int
) -> Iterator[tuple[Target, Part, int]]:
    """Every matrix that ``tokens`` change, with a seed of its own."""
    count, place = sum(max(1, target.experts) for target in targets), 0
    for target in targets:
        for part in target.parts(tokens):
            # Rounding is seeded by place, which within each part starts anew.
            yield target, part, seed * count + place + part.number ^ (part.start << 40)
        place += max(1, target.experts)


@torch.no_grad()
def add_outer(
    targets: Sequence[Target],
    tokens: Mapping[str, Tensor],
    scale: float,
    rounding: str = "nearest",
    seed: int = 0,
    remainders: dict[str, Tensor] | None = None,
) -> None:
    """W <- W + scale * G^T A for each target, from the rows at its sites."""
    for _, part, number in _numbered(targets, tokens, seed):
        weight, remainder = part.weight, None
        how = rounding if weight.dtype.itemsize == 2 else "nearest"
        if how == "compensated" and remainders is not None:
            if part.name not in remainders:
                remainders[part.name] = torch.zeros_like(weight, dtype=torch.int16)
            remainder = remainders[part.name]
        outer_update_(weight, part.gradient, part.activation, scale, rounding=how, seed=number, remainder=remainder)


@torch.no_grad()
def add_factors(
    targets: Sequence[Target], edits: Sequence[Factors], *, sign: int = 1, rounding: str = "nearest"
) -> None:
    """W <- W + sign * the sum of the edits' B^T A for each target, rounded once: the same bits each time."""
    matrices = ((target, name) for target in targets for name in target.names)
    for place, (target, name) in enumerate(matrices):
        pairs = [factors[name] for factors in edits if name in factors or not target.experts]
        if not pairs:
            continue
        weight = target.part(name)
        b, a = (torch.cat(rows).to(weight.device) for rows in zip(*pairs, strict=True))
        how = rounding if weight.dtype.itemsize == 2 else "nearest"
        outer_update_(weight, b, a, float(sign), rounding=how, seed=place)
