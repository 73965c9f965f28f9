"""The weight gradient G^T A of a linear layer, used without being kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cir_kernels import reference
from cir_kernels._checks import check_device, check_rows
from cir_kernels._dispatch import dot, narrow, register, resolve, tl, triton
from cir_kernels.rounding import ROUNDINGS, dithered, divided, hashed, joined, last_places

FEW_ROWS = 512
"""Of which Gram matrices in float32 take a GPU less time than reading and writing the product in bfloat16."""
MANY_ENTRIES = 2**18
"""Of a product, over which its rounding to bfloat16 averages out: their sum of squares is off by 1e-5 and less."""
Group = tuple[Sequence[Tensor], Tensor]
"""Output gradients G (T, D_out) of the linears that read one input, and that input A (T, D_in)."""


def outer_norm_sq(groups: Sequence[Group]) -> Tensor:
    """Sum over ``groups`` and their gradients of ||G^T A||_F^2, by products of the library, with little memory.

    ||G^T A||^2 = sum((G G^T) * (A A^T)) costs two T x T Gram matrices; where T is so large that the products G^T A
    themselves are fewer operations, or a GPU forms them in bfloat16 in less time, these are formed, by blocks. They
    are rounded to bfloat16 only where they have so many entries that it does not show.

    Returns:
        A float64 scalar tensor on the device of the first input; zero for T = 0. Sums are ordered.

    Raises:
        TypeError: if a matrix is not a floating tensor.
        ValueError: if a group has no gradients, or row counts, dtypes or devices differ within it.
    """
    totals = []
    for grads, a in groups:
        if not grads:
            raise ValueError("groups: expected at least one gradient beside each input, got none")
        for g in grads:
            _check_pair(g, a)
        d_in, d_out = a.shape[1], sum(g.shape[1] for g in grads)
        tensor_cores = a.is_cuda and a.dtype == torch.bfloat16
        rounded = tensor_cores and len(a) > FEW_ROWS and d_in * d_out >= MANY_ENTRIES
        if uses_gram(len(a), d_in, d_out) and not rounded:
            totals.append(reference.outer_norm_sq_gram(grads, a))
        else:
            totals.append(reference.outer_norm_sq_direct(grads, a, rounded))
    if not totals:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack([total.to(totals[0].device) for total in totals]).sum()


def uses_gram(n_tokens: int, d_in: int, d_out: int) -> bool:
    """Whether Gram matrices, of which little more than half is formed, take less than the products G^T A."""
    return n_tokens * (d_in + d_out) <= 1.5 * d_in * d_out


def _check_pair(g: Tensor, a: Tensor) -> None:
    check_rows("g", g)
    check_rows("a", a)
    if len(g) != len(a) or g.dtype != a.dtype:
        raise ValueError(
            f"g and a: expected one row count and dtype, got {tuple(g.shape)} {g.dtype} "
            f"and {tuple(a.shape)} {a.dtype}"
        )
    check_device(g=g, a=a)


def _product_blocks(dtype: torch.dtype) -> tuple[int, int, int, int]:
    """BLOCK_M, BLOCK_N, BLOCK_T and warps of a G^T A tile: half precision fills 128 x 128 of wgmma."""
    return (64, 64, 32, 4) if dtype == torch.float32 else (128, 128, 64, 8)


@triton.jit
def _outer_tile(
    g_ptr,
    a_ptr,
    o_m,
    o_n,
    n_tokens,
    d_out,
    d_in,
    stride_gt,
    stride_gd,
    stride_at,
    stride_ad,
    BLOCK_T: tl.constexpr,
):
    """Tile (o_m, o_n) of G^T A in float32, summed over the tokens in order."""
    acc = tl.zeros((o_m.shape[0], o_n.shape[0]), tl.float32)
    for t in range(0, n_tokens, BLOCK_T):
        o_t = (t + tl.arange(0, BLOCK_T)).to(tl.int64)
        m_t = (o_t < n_tokens)[:, None]
        p_g = g_ptr + o_t[:, None] * stride_gt + o_m[None, :] * stride_gd
        p_a = a_ptr + o_t[:, None] * stride_at + o_n[None, :] * stride_ad
        b_g = tl.load(p_g, mask=m_t & (o_m < d_out)[None, :], other=0.0)
        b_a = tl.load(p_a, mask=m_t & (o_n < d_in)[None, :], other=0.0)
        acc = dot(tl.trans(b_g), b_a, acc)
    return acc


def outer_update_(
    w: Tensor,
    g: Tensor,
    a: Tensor,
    scale: float | Tensor,
    *,
    rounding: str = "nearest",
    seed: int = 0,
    remainder: Tensor | None = None,
    sign: bool = False,
    backend: str | None = None,
) -> Tensor:
    """W <- W + scale * G^T A in place; W is read and written once, the product never stored beside it.

    A and G come collapsed. Folding their collapse into the loads here would repeat it for each of the D_out / 128
    (D_in / 128) tiles that read the same rows: at D = 4096 and k = 24, 32 times 4 T D k operations, 0.75 of the
    update's own, against 4 T D bytes saved.

    Args:
        w: (D_out, D_in) weight. 16-bit weights are summed in float32 and rounded once.
        g: (T, D_out), a: (T, D_in), one floating dtype.
        scale: a number, or a float tensor () on the device of ``w``, which is then not waited for.
        rounding: of 16-bit weights, "nearest"; "stochastic", unbiased; or, for bfloat16, "compensated", in which
            ``remainder`` keeps what rounding takes away. Weights of 32 bits and more are stored as summed.
        seed: of "stochastic": it and an element's place alone decide how the element is rounded.
        remainder: (D_out, D_in) int16, zeros at first, updated in place; given with "compensated" and only then.
        sign: add ``scale`` times the signs of G^T A instead, 0 where it is 0.

    Raises:
        TypeError: if a matrix is not a floating tensor.
        ValueError: on a shape, dtype, device or rounding that does not fit, or a number ``scale`` not finite.
        RuntimeError: if the backend asked for cannot run.
    """
    _check_pair(g, a)
    check_rows("w", w)
    if w.shape != (g.shape[1], a.shape[1]):
        raise ValueError(f"w: expected ({g.shape[1]}, {a.shape[1]}), got {tuple(w.shape)}")
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding: expected one of {', '.join(ROUNDINGS)}, got {rounding!r}")
    if (rounding == "compensated") != (remainder is not None):
        raise ValueError(f"remainder: expected a tensor with, and only with, 'compensated', got {rounding!r}")
    if remainder is not None and (remainder.shape != w.shape or remainder.dtype != torch.int16):
        raise ValueError(
            f"remainder: expected {tuple(w.shape)} torch.int16, got {tuple(remainder.shape)} {remainder.dtype}"
        )
    if rounding == "compensated" and w.dtype != torch.bfloat16:
        raise ValueError(f"rounding: expected bfloat16 weights with 'compensated', got {w.dtype}")
    if not isinstance(scale, Tensor):
        if not math.isfinite(scale):
            raise ValueError(f"scale: expected a finite number, got {scale}")
        scale = torch.full((), scale, dtype=torch.float64, device=w.device)  # a kernel's argument: no transfer
    if scale.numel() != 1:
        raise ValueError(f"scale: expected one number, got shape {tuple(scale.shape)}")
    check_device(w=w, g=g, scale=scale, remainder=remainder)
    chosen = resolve(backend, w if w.dtype == torch.float64 else g, "outer_update_")
    _outer_update(w, g, a, scale, rounding, seed, remainder, sign, chosen)
    return w


@register(
    "outer_update(Tensor(a!) w, Tensor g, Tensor a, Tensor scale, str rounding, int seed, Tensor(b!)? remainder,"
    " bool sign, str backend) -> ()"
)
def _outer_update(
    w: Tensor, g: Tensor, a: Tensor, scale: Tensor, rounding: str, seed: int, remainder: Tensor | None, *how: Any
) -> None:
    sign, backend = how
    if backend == "torch":
        reference.outer_update_(w, g, a, scale, rounding, seed, remainder, sign)
        return
    if not w.numel():
        return
    block_m, block_n, block_t, warps = _product_blocks(g.dtype)
    half = w.dtype in (torch.bfloat16, torch.float16)
    eps, smallest = last_places(w.dtype)
    _update_kernel[(triton.cdiv(w.shape[0], block_m) * triton.cdiv(w.shape[1], block_n),)](
        w,
        g,
        a,
        scale,
        remainder,
        hashed(seed),
        len(g),
        *w.shape,
        *w.stride(),
        *g.stride(),
        *a.stride(),
        *((0, 0) if remainder is None else remainder.stride()),
        ROUNDING=ROUNDINGS.index(rounding) if half else 0,
        SIGN=sign,
        EPS=eps,
        SMALLEST=smallest,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_T=block_t,
        num_warps=warps,
        num_stages=3,
    )


@triton.jit(do_not_specialize=["key", "n_tokens"])  # which differ from launch to launch
def _update_kernel(
    w_ptr,
    g_ptr,
    a_ptr,
    scale_ptr,
    remainder_ptr,
    key,
    n_tokens,
    d_out,
    d_in,
    stride_wm,
    stride_wn,
    stride_gt,
    stride_gd,
    stride_at,
    stride_ad,
    stride_rm,
    stride_rn,
    ROUNDING: tl.constexpr,
    SIGN: tl.constexpr,
    EPS: tl.constexpr,
    SMALLEST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    # Eight rows of tiles at a time, so that neighbouring programs find G and A in the L2 cache.
    i_m, i_n = tl.swizzle2d(
        tl.program_id(0) // tl.cdiv(d_in, BLOCK_N),
        tl.program_id(0) % tl.cdiv(d_in, BLOCK_N),
        tl.cdiv(d_out, BLOCK_M),
        tl.cdiv(d_in, BLOCK_N),
        8,
    )
    o_m = (i_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    o_n = (i_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    tile = _outer_tile(
        g_ptr, a_ptr, o_m, o_n, n_tokens, d_out, d_in, stride_gt, stride_gd, stride_at, stride_ad, BLOCK_T
    )
    if SIGN:
        tile = (tile > 0).to(tl.float32) - (tile < 0).to(tl.float32)
    m_w = (o_m < d_out)[:, None] & (o_n < d_in)[None, :]
    p_w = w_ptr + o_m[:, None] * stride_wm + o_n[None, :] * stride_wn
    b_w = tl.load(p_w, mask=m_w, other=0.0)
    scale = tl.load(scale_ptr).to(tl.float32)
    if ROUNDING == 2:
        p_r = remainder_ptr + o_m[:, None] * stride_rm + o_n[None, :] * stride_rn
        b_new = joined(b_w, tl.load(p_r, mask=m_w, other=0)) + scale * tile
        b_high, b_low = divided(b_new)
        tl.store(p_w, b_high, mask=m_w)
        tl.store(p_r, b_low, mask=m_w)
    else:
        b_new = b_w.to(tl.float32) + scale * tile
        if ROUNDING == 1:
            b_new = dithered(b_new, o_m, o_n, key, EPS, SMALLEST)
        tl.store(p_w, narrow(b_new, w_ptr.dtype.element_ty), mask=m_w)
