"""The PyTorch form of every operation: any device, any floating dtype, float64 included.

These are what the operations run where no kernel serves, and what kernels are tested and timed against.
They check nothing; the public functions do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half-precision operands are multiplied and summed in float32."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def collapse(
    x: Tensor, basis: Tensor, mixer: Tensor | None = None, mask: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """X - (X P) M^T P^T, rows where ``mask`` is False set to zero, to ``out``, which may be X, if given."""
    dtype = _compute_dtype(x.dtype)
    basis = basis.to(dtype)
    rows = x.to(dtype)
    coefficients = rows @ basis
    if mixer is not None:
        coefficients = coefficients @ mixer.to(dtype).T
    direct = out if dtype == x.dtype else None
    result = torch.addmm(rows, coefficients, basis.T, alpha=-1, out=direct)
    if mask is not None:
        result.masked_fill_(~mask[:, None], 0)
    return result.to(x.dtype) if out is None or out is result else out.copy_(result)


def moments(x: Tensor, omega: Tensor | None, mask: Tensor | None) -> tuple[int, Tensor, Tensor]:
    """Row count, column sums (D,) and X^T X Omega (D, s) in float64; Omega = I where None.

    float64 because one token's gradient can be 1e5 times the median's: squared, float32 would lose every
    component but that token's.
    """
    rows = (x if mask is None else x[mask]).double()
    return len(rows), rows.sum(0), rows.T @ (rows if omega is None else rows @ omega)


def outer_norm_sq_gram(grads: Sequence[Tensor], a: Tensor) -> Tensor:
    """Sum over G of ||G^T A||_F^2 as sum((G G^T) * (A A^T)): T x T matrices, for T below the widths."""
    dtype = _compute_dtype(a.dtype)
    gram = a.new_zeros(len(a), len(a), dtype=dtype)
    for g in grads:
        g = g.to(dtype)
        gram.addmm_(g, g.T)
    a = a.to(dtype)
    return torch.sum(gram.mul_(a @ a.T), dtype=torch.float64).clamp_min(0)


def outer_norm_sq_direct(grads: Sequence[Tensor], a: Tensor) -> Tensor:
    """Sum over G of ||G^T A||_F^2 from the D_out x D_in products, for T above the widths."""
    dtype = _compute_dtype(a.dtype)
    a = a.to(dtype)
    return torch.stack([torch.sum((g.to(dtype).T @ a) ** 2, dtype=torch.float64) for g in grads]).sum()


def outer_update_(w: Tensor, g: Tensor, a: Tensor, scale: float) -> Tensor:
    """W <- W + scale * G^T A in place; half-precision W is rounded once, to nearest."""
    dtype = _compute_dtype(w.dtype)
    if dtype == w.dtype:
        return w.addmm_(g.to(dtype).T, a.to(dtype), alpha=scale)
    a = a.to(dtype)
    # Row blocks keep the float32 copy of a half-precision weight small.
    for block, columns in zip(w.split(1024), g.split(1024, dim=1), strict=True):
        block.copy_(torch.addmm(block.to(dtype), columns.to(dtype).T, a, alpha=scale))
    return w
