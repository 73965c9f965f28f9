"""A small random input for each operation, on which its kernel has to give what PyTorch gives before it is used."""

from __future__ import annotations

import torch
from torch import Tensor

from cir_kernels._dispatch import TRIALS
from cir_kernels.collapse import collapse
from cir_kernels.moments import accumulate_moments, new_moments
from cir_kernels.outer import outer_update_
from cir_kernels.scatter import accumulate_scatter

ROWS, WIDTH = 256, 4096
"""Enough iterations for a pipeline to be in full swing, and programs to fill a GPU."""
Pair = tuple[Tensor, Tensor]


def _random(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device, generator=torch.Generator(device).manual_seed(sum(shape)))


def _collapse(device: torch.device, dtype: torch.dtype) -> Pair:
    x, basis = _random(device, ROWS, WIDTH).to(dtype), torch.linalg.qr(_random(device, WIDTH, 24))[0]
    return collapse(x, basis, backend="triton"), collapse(x, basis, backend="torch")


def _moments(device: torch.device, dtype: torch.dtype) -> Pair:
    x, omega = _random(device, ROWS, WIDTH).to(dtype), _random(device, WIDTH, 80)
    kernel, plain = new_moments(WIDTH, omega, device), new_moments(WIDTH, omega, device)
    accumulate_moments(kernel, x, backend="triton")
    accumulate_moments(plain, x, backend="torch")
    return kernel.action, plain.action


def _scatter(device: torch.device, dtype: torch.dtype) -> Pair:
    x = _random(device, WIDTH, ROWS).to(dtype)
    kernel, plain = (torch.zeros(ROWS, ROWS, device=device) for _ in range(2))
    return accumulate_scatter(kernel, x, backend="triton"), accumulate_scatter(plain, x, backend="torch")


def _update(device: torch.device, dtype: torch.dtype) -> Pair:
    """What is added to weights of the dtype, and the signs: of odd numbers, so that none is decided by rounding."""
    g, a = (_random(device, WIDTH - 1, n).sign().to(dtype) for n in (512, 1024))
    results = []
    for backend in ("triton", "torch"):
        weights = [torch.zeros(512, 1024, device=device, dtype=dtype) for _ in range(2)]
        for weight, sign in zip(weights, (False, True), strict=True):
            outer_update_(weight, g, a, 1.0, sign=sign, backend=backend)
        results.append(torch.cat([weights[0] / WIDTH**0.5, weights[1]]))
    return results[0], results[1]


TRIALS.update(
    collapse=_collapse,
    accumulate_moments=_moments,
    accumulate_scatter=_scatter,
    outer_update_=_update,
)
