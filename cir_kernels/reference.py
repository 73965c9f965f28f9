"""The PyTorch form of every operation: any device, any floating dtype, float64 included.

These are what the operations run where no kernel serves, and what kernels are tested and timed against.
They check nothing; the public functions do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cir_kernels.rounding import dither, join, random_bits, split

BLOCK = 128
"""Rows of a symmetric product formed at once."""


def _blocks(size: int) -> list[tuple[int, int]]:
    """Ranges of rows by which the lower triangle of a symmetric product costs little more than half of it."""
    return [(start, min(start + BLOCK, size)) for start in range(0, size, BLOCK)]


def _sum(x: Tensor) -> Tensor:
    """float64 sum of a matrix. A copy of all of it in float64 would take longer than what it is the sum of."""
    return x.sum(1).double().sum()


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


def accumulate_moments(x: Tensor, omega: Tensor, mask: Tensor | None, total: Tensor, action: Tensor) -> None:
    """Add column sums (D,) and X^T X Omega (D, s) to float64 sums in place.

    One token's gradient can be 1e5 times the median's: squared, float32 would lose every component but that
    token's. Such rows are multiplied in float64, and so is all where X is float64.
    """
    rows = x if mask is None else x[mask]
    if x.dtype != torch.float64:
        rows = rows.float()
        huge = huge_rows(rows)
        action += rows.T @ (rows @ omega.float()).masked_fill_(huge[:, None], 0)
        total += (~huge).float() @ rows
        rows = rows[huge]
    rows = rows.double()
    total += rows.sum(0)
    action.addmm_(rows.T, rows @ omega.double())


def huge_rows(x: Tensor) -> Tensor:
    """(T,) bool: the largest entry is more than 16 times the geometric mean of all rows' largest entries."""
    largest = torch.maximum(x.amax(1), -x.amin(1)) if x.numel() else x.new_zeros(len(x))
    logs = largest[largest > 0].log2()
    return largest > torch.exp2(logs.mean() + 4) if len(logs) else largest > 0


def accumulate_scatter(c: Tensor, x: Tensor, mean: Tensor | None, mask: Tensor | None) -> None:
    """Add (X - mu)^T (X - mu) to the lower triangle ``c``, (D, D) or packed, in the dtype of ``c``."""
    rows = (x if mask is None else x[mask]).to(c.dtype)
    if mean is not None:
        rows = rows - mean.to(c.dtype)
    for start, stop in _blocks(rows.shape[1]):
        product = rows[:, start:stop].T @ rows[:, :stop]
        if c.ndim == 2:
            c[start:stop, :stop] += product.tril(start)
        else:
            lower = torch.tril_indices(stop - start, stop, start, device=c.device)
            c[start * (start + 1) // 2 : stop * (stop + 1) // 2] += product[lower[0], lower[1]]


def outer_norm_sq_gram(grads: Sequence[Tensor], a: Tensor) -> Tensor:
    """Sum over G of ||G^T A||_F^2 as sum((G G^T) * (A A^T)): T x T matrices, for T below the widths."""
    dtype = _compute_dtype(a.dtype)
    a, grads = a.to(dtype), [g.to(dtype) for g in grads]
    total = a.new_zeros((), dtype=torch.float64)
    for start, stop in _blocks(len(a)):
        products = a[start:stop] @ a[:stop].T
        products *= sum(g[start:stop] @ g[:stop].T for g in grads)
        # What lies left of the block on the diagonal counts for its mirror image too.
        total += 2 * _sum(products) - _sum(products[:, start:])
    return total.clamp_min(0)


def outer_norm_sq_direct(grads: Sequence[Tensor], a: Tensor, rounded: bool = False) -> Tensor:
    """Sum over G of ||G^T A||_F^2 from the D_out x D_in products, for T above the widths.

    ``rounded``: to the dtype of the inputs, of bfloat16 by 2^-9 of each entry, which is 2^-18 of the norm of many.
    """
    dtype = a.dtype if rounded else _compute_dtype(a.dtype)
    a, total = a.to(dtype), a.new_zeros((), dtype=torch.float64)
    for g in grads:
        for start in range(0, g.shape[1], 1024):
            product = g[:, start : start + 1024].to(dtype).T @ a
            total += _sum(product.to(_compute_dtype(dtype)).square_())
    return total


def outer_update_(
    w: Tensor,
    g: Tensor,
    a: Tensor,
    scale: Tensor,
    rounding: str = "nearest",
    seed: int = 0,
    remainder: Tensor | None = None,
    sign: bool = False,
) -> Tensor:
    """W <- W + scale * G^T A in place, or its signs; half-precision W is summed in float32 and rounded once."""
    dtype = _compute_dtype(w.dtype)
    alpha = scale.item()
    a = a.to(dtype)

    def moved(before: Tensor, g: Tensor) -> Tensor:
        if sign:
            return before.add((g.to(dtype).T @ a).sign_(), alpha=alpha)
        return torch.addmm(before, g.to(dtype).T, a, alpha=alpha)

    if dtype == w.dtype and not sign and w.stride(1) == 1:
        return w.addmm_(g.to(dtype).T, a, alpha=alpha)
    if dtype == w.dtype:  # cuBLAS refuses some strides in place
        return w.copy_(moved(w, g))
    columns = torch.arange(w.shape[1], device=w.device)
    # Row blocks keep the float32 copy of a half-precision weight small.
    for start in range(0, len(w), 1024):
        rows = slice(start, start + 1024)
        block = w[rows]
        before = block.float() if remainder is None else join(block.contiguous(), remainder[rows])
        after = moved(before, g[:, rows])
        if remainder is not None:
            high, remainder[rows] = split(after)
            block.copy_(high)
            continue
        if rounding == "stochastic":
            places = torch.arange(start, start + len(block), device=w.device)
            after = dither(after, random_bits(places, columns, seed), w.dtype)
        block.copy_(after)
    return w
