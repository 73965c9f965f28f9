"""Where a model's weights are: what memory is free, and the upper layers waiting on the host."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cir.model.sites import Stack


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


def upper_modules(model: Any, stack: Stack, last_layer: int) -> list[nn.Module]:
    """Those whose weights a forward of the layers 0..last_layer does not read: layers, and a head with its own."""
    head = model.get_output_embeddings()
    own = head is not None and head.weight is not model.get_input_embeddings().weight
    return [*stack.layers[last_layer + 1 :], *([head] if own else [])]


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
