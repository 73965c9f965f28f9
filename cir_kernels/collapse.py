"""Collapse: take a subspace out of the rows of a matrix.

Two launches, project and subtract. One program cannot hold a row of 14,336 beside the (D, k) basis, and a
row-blocked single kernel would read the basis once for each 16 rows, several times the bytes of X.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cir_kernels import reference
from cir_kernels._checks import check_basis, check_device, check_mask, check_out, check_rows
from cir_kernels._dispatch import dot, dot_split, halves, narrow, register, resolve, tl, triton

BLOCK_D = 64
WIDEST_OMEGA, WIDEST_BASIS = 128, 64
"""Columns of a test matrix and of a basis that one program holds without spilling registers."""
LIBRARY_FROM = 128
"""Columns of a basis from which on two matrix products of the library are faster than a kernel's trips over X."""
PROGRAMS = 256
"""Programs that fill a large GPU. Fixed, so that sums are ordered alike on every device."""


def collapse(
    x: Tensor,
    basis: Tensor,
    mixer: Tensor | None = None,
    mask: Tensor | None = None,
    out: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Collapse the rows of ``x`` against a basis: X - (X P) M^T P^T (arXiv 2509.11816, section 3).

    Args:
        x: (T, D) rows, float64, float32, float16 or bfloat16, of any strides. Sums are float32 (float64 for
            float64), and the basis is not rounded to half precision.
        basis: P, (D, k), 0 <= k <= D. For the orthogonal collapse its columns are orthonormal.
        mixer: M, (k, k); None stands for the identity.
        mask: (T,) bool; rows that are False come back as zero.
        out: where to write, shape and dtype of ``x``; may be ``x`` itself.
        backend: "torch" or "triton"; None for the one of CIR_KERNELS_BACKEND, or else by device.

    Returns:
        (T, D) in the dtype of ``x``; ``out`` where given.

    Raises:
        TypeError: if ``x`` is not a floating tensor.
        ValueError: on a shape or device that does not fit, or an ``out`` that overlaps ``x`` in part.
        RuntimeError: if the backend asked for cannot run.
    """
    check_rows("x", x)
    check_basis(basis, mixer, x.shape[1])
    check_mask(mask, len(x))
    check_device(x=x, basis=basis, mixer=mixer, mask=mask, out=out)
    if out is None:
        out = torch.empty_like(x)
    else:
        check_out(out, x)
    _collapse(x, basis, mixer, mask, out, resolve(backend, x, "collapse"))
    return out


@register("collapse(Tensor x, Tensor basis, Tensor? mixer, Tensor? mask, Tensor(a!) out, str backend) -> ()")
def _collapse(x: Tensor, basis: Tensor, mixer: Tensor | None, mask: Tensor | None, out: Tensor, backend: str) -> None:
    if backend == "torch" or basis.shape[1] >= LIBRARY_FROM:
        reference.collapse(x, basis, mixer, mask, out)
    elif x.numel():
        left = basis.float()
        right = left if mixer is None else left @ mixer.float()
        subtract(x, project(x, left, mask), right, mask, out)


def columns_block(columns: int, widest: int) -> int:
    """Columns a program holds: a power of two, 16 at least; 0 of none."""
    return min(widest, max(16, triton.next_power_of_2(columns))) if columns else 0


def project(x: Tensor, columns: Tensor, mask: Tensor | None) -> Tensor:
    """X against a float32 basis or a bfloat16 test matrix (D, k), from one trip over X for each block of columns.

    Returns:
        (splits, T, k) float32 by splits of the width, to be summed by who reads it. Masked rows are zero.
    """
    rows, width = x.shape
    half = x.dtype == torch.bfloat16
    if half and columns.dtype == torch.bfloat16:
        # Each block of rows reads all of Omega, which is more than X itself in small ones.
        widest, (block_rows, block_d) = WIDEST_OMEGA, (128, 32) if rows > 2048 else (64, 64)
    else:
        widest, (block_rows, block_d) = WIDEST_BASIS, (32, 64 if half else 32) if rows <= 256 else (64, 32)
    row_blocks, n_blocks = triton.cdiv(rows, block_rows), triton.cdiv(columns.shape[1], widest) or 1
    splits = max(1, min(16, PROGRAMS // (row_blocks * n_blocks), triton.cdiv(width, 4 * BLOCK_D)))
    split_width = triton.cdiv(triton.cdiv(width, splits), BLOCK_D) * BLOCK_D
    parts = x.new_empty(splits, rows, columns.shape[1], dtype=torch.float32)
    _project_kernel[(row_blocks, splits, n_blocks)](
        x,
        columns,
        mask,
        parts,
        rows,
        width,
        split_width,
        columns.shape[1],
        *x.stride(),
        *columns.stride(),
        BLOCK_T=block_rows,
        BLOCK_D=block_d,
        BLOCK_K=columns_block(max(1, columns.shape[1]), widest),
        num_warps=8,
        num_stages=3,
    )
    return parts


# X is read for the product alone: beside another use, Triton 3.6 pipelines it through one buffer fewer than an
# asynchronous product reads from, which then overtakes it; tests/kernels/test_resources.py looks for that.
@triton.jit
def _project_kernel(
    x_ptr,
    columns_ptr,
    mask_ptr,
    parts_ptr,
    n_tokens,
    width,
    split_width,
    n_columns,
    stride_xt,
    stride_xd,
    stride_cd,
    stride_ck,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    o_t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    o_k = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_t = o_t < n_tokens
    kept = m_t
    if mask_ptr is not None:
        kept &= tl.load(mask_ptr + o_t, mask=m_t, other=0) != 0
    acc = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    start = tl.program_id(1) * split_width
    for d in range(start, min(start + split_width, width), BLOCK_D):
        o_d = (d + tl.arange(0, BLOCK_D)).to(tl.int64)
        m_d = o_d < width
        p_x = x_ptr + o_t[:, None] * stride_xt + o_d[None, :] * stride_xd
        p_c = columns_ptr + o_d[:, None] * stride_cd + o_k[None, :] * stride_ck
        b_x = tl.load(p_x, mask=kept[:, None] & m_d[None, :], other=0.0)
        b_c = tl.load(p_c, mask=m_d[:, None] & (o_k < n_columns)[None, :], other=0.0)
        acc = dot_split(b_x, b_c, acc)
    p_row = tl.program_id(1) * tl.cast(n_tokens, tl.int64) + o_t
    p_out = parts_ptr + p_row[:, None] * n_columns + o_k[None, :]
    tl.store(p_out, acc, mask=m_t[:, None] & (o_k < n_columns)[None, :])


def subtract(x: Tensor, parts: Tensor, right: Tensor, mask: Tensor | None, out: Tensor) -> None:
    """out = X - C R^T, with C (T, k) the sum of ``parts`` (splits, T, k); masked rows become zero."""
    rows, width = x.shape
    rank = right.shape[1]
    block_rows = 32 if rows <= 256 else 64
    row_blocks = triton.cdiv(rows, block_rows)
    splits = max(1, min(2 * PROGRAMS // row_blocks, triton.cdiv(width, 2 * BLOCK_D)))
    _subtract_kernel[(row_blocks, splits)](
        x,
        parts,
        right,
        mask,
        out,
        rows,
        width,
        triton.cdiv(triton.cdiv(width, splits), BLOCK_D) * BLOCK_D,
        rank,
        len(parts),
        *x.stride(),
        *right.stride(),
        *out.stride(),
        N_BLOCKS=1 if rank <= WIDEST_BASIS else triton.cdiv(rank, 32),
        BLOCK_T=block_rows,
        BLOCK_D=32 if x.dtype != torch.bfloat16 and block_rows == 64 else 64,
        BLOCK_K=columns_block(max(1, rank), WIDEST_BASIS) if rank <= WIDEST_BASIS else 32,
        num_warps=8,
        num_stages=3,
    )


@triton.jit
def load_parts(parts_ptr, o_t, o_k, n_tokens, rank, n_parts):
    """C[o_t, o_k], summed over the splits in their order."""
    m_c = (o_t < n_tokens)[:, None] & (o_k < rank)[None, :]
    p_c = parts_ptr + o_t[:, None] * rank + o_k[None, :]
    b_c = tl.load(p_c, mask=m_c, other=0.0)
    for i in range(1, n_parts):
        b_c += tl.load(p_c + i * tl.cast(n_tokens, tl.int64) * rank, mask=m_c, other=0.0)
    return b_c


@triton.jit
def less_projection(b_x, b_c, b_r):
    """X - C R^T of a tile, in float32; products as exact as the dtype of X can tell."""
    acc = tl.zeros((b_c.shape[0], b_r.shape[0]), tl.float32)
    if b_x.dtype == tl.bfloat16:
        c_high, c_low = halves(b_c)
        r_high, r_low = halves(tl.trans(b_r))
        acc = dot(c_high, r_low, dot(c_low, r_high, acc))
        return b_x.to(tl.float32) - dot(c_high, r_high, acc)
    return b_x.to(tl.float32) - dot(b_c, tl.trans(b_r), acc)


@triton.jit
def _subtract_kernel(
    x_ptr,
    parts_ptr,
    right_ptr,
    mask_ptr,
    out_ptr,
    n_tokens,
    width,
    split_width,
    rank,
    n_parts,
    stride_xt,
    stride_xd,
    stride_rd,
    stride_rk,
    stride_ot,
    stride_od,
    N_BLOCKS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    o_t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    m_t = o_t < n_tokens
    kept = m_t
    if mask_ptr is not None:
        kept &= tl.load(mask_ptr + o_t, mask=m_t, other=0) != 0
    o_k = tl.arange(0, BLOCK_K)
    if N_BLOCKS == 1:  # small enough to stay in registers over the whole width
        b_c = load_parts(parts_ptr, o_t, o_k, n_tokens, rank, n_parts)
    start = tl.program_id(1) * split_width
    for d in range(start, min(start + split_width, width), BLOCK_D):
        o_d = (d + tl.arange(0, BLOCK_D)).to(tl.int64)
        m_d = o_d < width
        p_x = x_ptr + o_t[:, None] * stride_xt + o_d[None, :] * stride_xd
        b_x = tl.load(p_x, mask=kept[:, None] & m_d[None, :], other=0.0)
        if N_BLOCKS == 1:
            p_r = right_ptr + o_d[:, None] * stride_rd + o_k[None, :] * stride_rk
            b_r = tl.load(p_r, mask=m_d[:, None] & (o_k < rank)[None, :], other=0.0)
            b_out = less_projection(b_x, b_c, b_r)
        else:
            b_out = b_x.to(tl.float32)
            for i in range(N_BLOCKS):
                o_i = i * BLOCK_K + o_k
                b_i = load_parts(parts_ptr, o_t, o_i, n_tokens, rank, n_parts)
                p_r = right_ptr + o_d[:, None] * stride_rd + o_i[None, :] * stride_rk
                b_r = tl.load(p_r, mask=m_d[:, None] & (o_i < rank)[None, :], other=0.0)
                b_out = less_projection(b_out, b_i, b_r)
        p_out = out_ptr + o_t[:, None] * stride_ot + o_d[None, :] * stride_od
        tl.store(p_out, narrow(b_out, out_ptr.dtype.element_ty), mask=m_t[:, None] & m_d[None, :])
