"""The exact symmetric scatter of token rows, lower triangle only."""

from __future__ import annotations

import torch
from torch import Tensor

from cir_kernels import reference
from cir_kernels._checks import check_device, check_mask, check_rows
from cir_kernels._dispatch import dot, register, resolve, tl, triangle, triton


def accumulate_scatter(
    c: Tensor, x: Tensor, mean: Tensor | None = None, mask: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """C <- C + (X - mu)^T (X - mu) in place, in the lower triangle of C, half the arithmetic of X^T X.

    Args:
        c: the sum so far: (D, D), of which the entries above the diagonal are neither read nor written, or
            packed (D (D + 1) / 2,), the rows of the lower triangle end to end. float32; or float64, which also
            multiplies in float64 and so keeps small components beside a row 1e5 times the others.
        x: (T, D) rows, any floating dtype. mean: (D,), taken from each row; None for zero.
        mask: (T,) bool; rows that are False contribute nothing.

    Raises:
        TypeError: if ``x`` is not a floating tensor, or ``c`` is neither float32 nor float64.
        ValueError: on a shape or device that does not fit.
        RuntimeError: if the backend asked for cannot run.
    """
    check_rows("x", x)
    width = x.shape[1]
    shapes = ((width, width), (width * (width + 1) // 2,))
    if c.shape not in shapes:
        raise ValueError(f"c: expected shape {shapes[0]}, or packed {shapes[1]}, got {tuple(c.shape)}")
    if c.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"c: expected float32 or float64, got {c.dtype}")
    if not c.is_contiguous():
        raise ValueError(f"c: expected contiguous memory, got strides {c.stride()}")
    if mean is not None and mean.shape != (width,):
        raise ValueError(f"mean: expected ({width},), got {tuple(mean.shape)}")
    check_mask(mask, len(x))
    check_device(c=c, x=x, mean=mean, mask=mask)
    _accumulate_scatter(c, x, mean, mask, resolve(backend, x, "accumulate_scatter"))
    return c


def symmetric(c: Tensor, width: int) -> Tensor:
    """The full (D, D) matrix of what :func:`accumulate_scatter` left in ``c``, packed or not."""
    if c.ndim == 1:
        lower = torch.ones(width, width, dtype=torch.bool, device=c.device).tril_()
        c = c.new_zeros(width, width).masked_scatter_(lower, c)
    return c.tril() + c.tril(-1).T


@register("accumulate_scatter(Tensor(a!) c, Tensor x, Tensor? mean, Tensor? mask, str backend) -> ()")
def _accumulate_scatter(c: Tensor, x: Tensor, mean: Tensor | None, mask: Tensor | None, backend: str) -> None:
    rows, width = x.shape
    if backend == "torch":
        reference.accumulate_scatter(c, x, mean, mask)
        return
    if not x.numel():
        return
    exact = c.dtype == torch.float64
    plain = not exact and x.dtype != torch.float32 and mean is None  # half-precision products: larger tiles fit
    block = 128 if plain else 64
    tiles = triton.cdiv(width, block)
    _scatter_kernel[(tiles * (tiles + 1) // 2,)](
        c,
        x,
        mean,
        mask,
        rows,
        width,
        *x.stride(),
        PACKED=c.ndim == 1,
        BLOCK_T=1 if exact else 64 if plain else 32,
        BLOCK=block,
        num_warps=8,
        num_stages=3,
    )


@triton.jit
def _scatter_kernel(
    c_ptr,
    x_ptr,
    mean_ptr,
    mask_ptr,
    n_tokens,
    width,
    stride_xt,
    stride_xd,
    PACKED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i, j = triangle(tl.program_id(0))
    o_i = (i * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    o_j = (j * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    m_i, m_j = o_i < width, o_j < width
    acc = tl.zeros((BLOCK, BLOCK), c_ptr.dtype.element_ty)
    for t in range(0, n_tokens, BLOCK_T):
        o_t = (t + tl.arange(0, BLOCK_T)).to(tl.int64)
        m_t = o_t < n_tokens
        if mask_ptr is not None:
            m_t &= tl.load(mask_ptr + o_t, mask=m_t, other=0) != 0
        b_i = _centred(x_ptr, mean_ptr, o_t, o_i, m_t, m_i, stride_xt, stride_xd, acc.dtype)
        b_j = _centred(x_ptr, mean_ptr, o_t, o_j, m_t, m_j, stride_xt, stride_xd, acc.dtype)
        if BLOCK_T == 1:  # float64 by vector arithmetic, row by row: not every target has float64 tensor cores
            acc += tl.trans(b_i).to(acc.dtype) * b_j.to(acc.dtype)
        else:
            acc = dot(tl.trans(b_i), b_j, acc)
    if PACKED:
        p_c = c_ptr + (o_i * (o_i + 1) // 2)[:, None] + o_j[None, :]
    else:
        p_c = c_ptr + o_i[:, None] * width + o_j[None, :]
    m_c = m_i[:, None] & m_j[None, :] & (o_j[None, :] <= o_i[:, None])
    tl.store(p_c, tl.load(p_c, mask=m_c, other=0.0) + acc, mask=m_c)


@triton.jit
def _centred(x_ptr, mean_ptr, o_t, o_d, m_t, m_d, stride_xt, stride_xd, DTYPE: tl.constexpr):
    """Tile of X, less the mean where there is one (in DTYPE then); zero where masked."""
    m_x = m_t[:, None] & m_d[None, :]
    b_x = tl.load(x_ptr + o_t[:, None] * stride_xt + o_d[None, :] * stride_xd, mask=m_x, other=0.0)
    if mean_ptr is not None:
        b_mean = tl.load(mean_ptr + o_d, mask=m_d, other=0.0).to(DTYPE)
        b_x = tl.where(m_x, b_x.to(DTYPE) - b_mean[None, :], 0.0)
    return b_x
