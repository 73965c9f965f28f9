"""What a run takes of the device's memory, and what can wait on the host meanwhile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cir.config import CIRConfig
from cir.evaluation import TOKENS_PER_FORWARD, WINDOW
from cir.facts import Batch
from cir.sites import Site, Stack, sites_of
from cir.subspace import columns_at, rank_at

OFFLOAD = ("auto", "always", "never")
TOKENS_AT_ONCE = 512
"""Of a step, in one forward and backward: enough to fill a GPU, and what autograd keeps of them stays small."""
LEAST_AT_ONCE = 32
"""A sentence: no step is made smaller."""
HIDDEN_KEPT, INNER_KEPT = 12, 4
"""Vectors of a layer's hidden and MLP sizes that autograd keeps of a token: norms, attention, residuals; the MLP."""


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on a GPU or, on Linux, on the host; None if unknown."""
    if device.type == "cuda":
        # What PyTorch's allocator holds unused is to be had as well.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), None)


@dataclass(frozen=True)
class Need:
    """Bytes of the device's memory that a run takes beyond the weights.

    Attributes:
        held: throughout: bases, the moments of the next ones and, without a GPU, copies of the updated weights.
        rows: of the largest step, at every site. token: that autograd keeps for one of the ``tokens`` run at once.
        check: the logits of a budget check.
    """

    held: int
    rows: int
    token: int
    check: int
    tokens: int = TOKENS_AT_ONCE

    @property
    def peak(self) -> int:
        return self.held + max(self.rows + self.token * self.tokens, self.check)

    def within(self, have: int) -> Need:
        """The same with as few tokens at once as ``have`` bytes take.

        Raises:
            MemoryError: if they do not take it with the least.
        """
        room = (have - self.held - self.rows) // self.token
        need = replace(self, tokens=max(LEAST_AT_ONCE, min(self.tokens, room)))
        if need.peak > have:
            raise MemoryError(
                f"expected {need.peak / 2**30:.2f} GiB of free memory beyond the weights, got {have / 2**30:.2f} GiB"
            )
        return need


def needed(model: Any, stack: Stack, batches: Sequence[Batch], retain: Sequence[Batch], config: CIRConfig) -> Need:
    """What :func:`cir.unlearn` takes, by counting."""
    layers, last = config.layers(len(stack.mlps)), config.last_updated(len(stack.mlps))
    targets = stack.targets(last)
    sites = sites_of(targets)
    size = targets[0].linear.weight.element_size()
    ranks = {"activation": config.rank_activation, "gradient": config.rank_gradient}
    common = {site: rank_at(site, ranks[site.kind]) for site in sites}
    background = {site: rank_at(site, config.rank_background) for site in sites if site.kind == "activation"}
    held = sum(4 * site.width * (common[site] + background.get(site, 0)) for site in sites)
    held += max(_moments(common, config.exact), _moments(background))
    if model.device.type != "cuda":
        held += (3 if config.full_check else 2) * sum(target.linear.weight.nbytes for target in targets)
    forget = max(int(batch.counted(config.skip_first).sum()) for batch in batches)
    keep = max((int(batch.attention_mask.sum()) for batch in retain if config.retain_rate), default=0)
    window = max(WINDOW, config.retain_length)
    hidden, inner = sorted(targets[0].linear.weight.shape)
    return Need(
        held=held,
        rows=max(forget, keep) * size * sum(site.width for site in sites),
        token=len(stack.layers[: layers[-1] + 1]) * size * (HIDDEN_KEPT * hidden + INNER_KEPT * inner),
        # As they come, and of a window in float32 and as log-probabilities.
        check=model.config.get_text_config().vocab_size * (TOKENS_PER_FORWARD * size + window * 8),
    )


def upper_modules(model: Any, stack: Stack, last_layer: int) -> list[nn.Module]:
    """Those whose weights a forward of the layers 0..last_layer does not read: layers, and a head with its own."""
    head = model.get_output_embeddings()
    own = head is not None and head.weight is not model.get_input_embeddings().weight
    return [*stack.layers[last_layer + 1 :], *([head] if own else [])]


def settle(model: Any, stack: Stack, last_layer: int, need: Need, offloading: str) -> tuple[Need, bool]:
    """What will be taken of the memory that is free, and whether the upper weights are to wait on the host.

    Raises:
        ValueError: if ``offloading`` is none of :data:`OFFLOAD`.
        MemoryError: if it does not suffice even so.
    """
    if offloading not in OFFLOAD:
        raise ValueError(f"offload: expected one of {', '.join(OFFLOAD)}, got {offloading!r}")
    device, have = model.device, free_memory(model.device)
    sizes, on_device = [], 0
    for module in upper_modules(model, stack, last_layer):
        sizes.append(sum(parameter.nbytes for parameter in module.parameters()))
        on_device += sum(parameter.nbytes for parameter in module.parameters() if parameter.device == device)
    if have is None:
        return need, offloading == "always"
    # A model spread over several devices stays as it is.
    movable = device.type == "cuda" and on_device == sum(sizes)
    moves = offloading == "always" or (offloading == "auto" and movable and need.peak > have)
    if device.type == "cuda" and (moves or on_device < sum(sizes)):
        # Those on the host come back one module at a time.
        have += (on_device if moves else 0) - max(sizes, default=0)
    return need.within(have), moves


def _moments(ranks: Mapping[Site, int], exact: bool = False) -> int:
    """Bytes of X^T X Omega in float64 and of Omega in bfloat16, or of half X^T X."""
    columns = {site: columns_at(site, rank, exact) for site, rank in ranks.items() if rank}
    return sum(site.width * (10 * n if n < site.width else 4 * n + 4) for site, n in columns.items())


def offloaded(model: Any, stack: Stack, last_layer: int, device: torch.device) -> ExitStack:
    """Have all weights on ``device`` but those that a forward of the layers 0..last_layer does not read.

    Those wait on the host. A module that runs all the same, for a budget check say, fetches its own for as long as
    that takes. Close what is returned, and all weights are where they were, bit for bit.
    """
    upper = upper_modules(model, stack, last_layer)
    waiting = {parameter for module in upper for parameter in module.parameters()}
    with ExitStack() as undo:
        for tensor in [*model.parameters(), *model.buffers()]:
            undo.callback(_move, tensor, tensor.device)
            _move(tensor, torch.device("cpu") if tensor in waiting else device, pin=tensor in waiting)
        for module in upper:
            for handle in _visiting(module, device):
                undo.callback(handle.remove)
        return undo.pop_all()


def _visiting(module: nn.Module, device: torch.device) -> list[RemovableHandle]:
    """Hooks by which the weights of ``module`` are on ``device`` while it runs."""
    home = [(parameter, parameter.data) for parameter in module.parameters()]

    def fetch(module: nn.Module, args: Any) -> None:
        for parameter, data in home:
            parameter.data = data.to(device, non_blocking=True)

    def drop(module: nn.Module, args: Any, output: Any) -> None:
        for parameter, data in home:
            parameter.data = data

    return [module.register_forward_pre_hook(fetch), module.register_forward_hook(drop, always_call=True)]


def _move(tensor: Tensor, device: torch.device, pin: bool = False) -> None:
    data = tensor.data.to(device)
    # Pinned, a GPU reads it several times as fast.
    tensor.data = data.pin_memory() if pin and torch.cuda.is_available() else data
