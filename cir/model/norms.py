"""RMS norms as one kernel of PyTorch's, in place of the several that a module of transformers launches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from inspect import signature
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cir.model.shards import is_sharded

ON = ("cuda",)
"""Kinds of devices on which launches are what a norm costs."""
_FUSABLE: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def fused_norms(model: nn.Module) -> Iterator[tuple[nn.Module, Callable[[Tensor], Tensor]]]:
    """The norms of ``model`` that are on a GPU, each with a forward that says the same to rounding, which is tried on
    each, once: some scale by 1 + weight, or with a gate.
    """
    for module in model.modules():
        weight = getattr(module, "weight", None)
        # What another library hung on an instance may move its input from another device: it stays.
        if not isinstance(weight, Tensor) or is_sharded(weight):
            continue
        if weight.device.type in ON and "forward" not in module.__dict__:
            if module not in _FUSABLE:
                _FUSABLE[module] = is_rms_norm(module)
            if _FUSABLE[module]:
                yield module, _fused(module)


@torch.no_grad()
def is_rms_norm(module: nn.Module) -> bool:
    """Whether what ``module`` makes of x is x / sqrt(mean(x^2) + eps) * weight, to the rounding of its weight."""
    weight, eps = getattr(module, "weight", None), _eps(module)
    if "RMSNorm" not in type(module).__name__ or eps is None or not isinstance(weight, Tensor) or weight.ndim != 1:
        return False
    if len(signature(module.forward).parameters) != 1:
        return False
    x = torch.linspace(-2, 3, 4 * len(weight), device=weight.device).view(1, 4, -1).to(weight)
    near = 4 * torch.finfo(weight.dtype).eps
    return torch.allclose(module(x).float(), F.rms_norm(x, weight.shape, weight, eps).float(), rtol=near, atol=near)


def _fused(module: nn.Module) -> Callable[[Tensor], Tensor]:
    forward, eps = module.forward, _eps(module)

    def fused(x: Tensor) -> Tensor:
        weight = module.weight
        if not isinstance(weight, Tensor) or x.dtype != weight.dtype:
            return forward(x)
        return F.rms_norm(x, weight.shape, weight, eps)

    return fused


def _eps(module: nn.Module) -> float | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return eps if isinstance(eps, float) else None
