"""Streaming first and second moments of token rows, from which principal subspaces are solved.

One token's row can be 1e5 times the median's, and its square hides, in float32, every component but that
token's. Rows more than 16 times the geometric mean of all rows' largest entries are therefore multiplied and
summed in float64, and only those: float64 throughout would take several times as long as reading X does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cir_kernels import reference
from cir_kernels._checks import check_basis, check_device, check_mask, check_out, check_rows
from cir_kernels._dispatch import dot_split, narrow, register, resolve, tl, triton
from cir_kernels.collapse import (
    WIDEST_BASIS,
    WIDEST_OMEGA,
    collapse,
    columns_block,
    less_projection,
    load_parts,
    project,
    sides,
)

BLOCK_T = 32
"""Rows of a block that is told to have huge rows or none; all kernels here must agree on it."""


@dataclass
class Moments:
    """What a stream of rows x_t of width D leaves behind.

    Attributes:
        count: () int64, rows seen.
        total: (D,) float64, the sum of the rows.
        action: (D, s) float64 X^T X Omega, the action of the uncentred scatter on the test matrix.
        omega: (D, s) float32 the test matrix Omega; None for the identity, where ``action`` is the full scatter.
    """

    count: Tensor
    total: Tensor
    action: Tensor
    omega: Tensor | None


def new_moments(width: int, omega: Tensor | None, device: torch.device | str = "cpu") -> Moments:
    """Moments of no rows at all. ``omega`` (width, s) is rounded to float32 on ``device``.

    Raises:
        ValueError: if ``omega`` is not a (width, s) matrix with s <= width.
    """
    if omega is not None:
        check_basis(omega, None, width, "omega")
        omega = omega.to(device, torch.float32).contiguous()
    columns = width if omega is None else omega.shape[1]
    return Moments(
        torch.zeros((), dtype=torch.int64, device=device),
        torch.zeros(width, dtype=torch.float64, device=device),
        torch.zeros(width, columns, dtype=torch.float64, device=device),
        omega,
    )


def accumulate_moments(
    state: Moments, x: Tensor, mask: Tensor | None = None, *, backend: str | None = None
) -> Moments:
    """Add rows ``x`` (T, D), any floating dtype and strides, to ``state`` in place and return it.

    Rows where ``mask`` (T,) is False contribute nothing. Products are float32 but for rows beside which the others
    would be lost, which are float64; sums over calls are float64. Memory beyond the state is O(T s); the PyTorch
    form's is O(T (D + s)). Without a test matrix it is that form that runs, in float64 throughout.

    Raises:
        TypeError: if ``x`` is not a floating tensor.
        ValueError: on a width, mask or device that does not fit the state.
        RuntimeError: if the backend asked for cannot run.
    """
    _check(state, x, mask)
    chosen = resolve(backend, x) if state.omega is not None else "torch"
    _accumulate(x, state.omega, None, None, mask, state.count, state.total, state.action, None, chosen)
    return state


def collapse_and_accumulate(
    state: Moments,
    x: Tensor,
    basis: Tensor,
    mixer: Tensor | None = None,
    mask: Tensor | None = None,
    out: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """:func:`accumulate_moments` of ``x`` as it is and :func:`cir_kernels.collapse` of it, in one trip over X.

    Arguments, results and errors are those of the two. It is two calls where one program cannot hold the columns of
    both in its registers: beyond 128 of Omega or 64 of the basis, and for rows that are not bfloat16.
    """
    _check(state, x, mask)
    check_basis(basis, mixer, x.shape[1])
    check_device(x=x, basis=basis, mixer=mixer, out=out)
    fits = state.omega is not None and state.omega.shape[1] <= WIDEST_OMEGA and 0 < basis.shape[1] <= WIDEST_BASIS
    if not fits or x.dtype != torch.bfloat16:
        accumulate_moments(state, x, mask, backend=backend)
        return collapse(x, basis, mixer, mask, out, backend=backend)
    if out is None:
        out = torch.empty_like(x)
    else:
        check_out(out, x)
    chosen = resolve(backend, x)
    _accumulate(x, state.omega, basis, mixer, mask, state.count, state.total, state.action, out, chosen)
    return out


def _check(state: Moments, x: Tensor, mask: Tensor | None) -> None:
    check_rows("x", x, len(state.total))
    check_mask(mask, len(x))
    check_device(x=x, mask=mask, state=state.total)


@register(
    "accumulate_moments(Tensor x, Tensor? omega, Tensor? basis, Tensor? mixer, Tensor? mask, Tensor(a!) count,"
    " Tensor(b!) total, Tensor(c!) action, Tensor(d!)? out, str backend) -> ()"
)
def _accumulate(
    x: Tensor,
    omega: Tensor | None,
    basis: Tensor | None,
    mixer: Tensor | None,
    mask: Tensor | None,
    count: Tensor,
    total: Tensor,
    action: Tensor,
    out: Tensor | None,
    backend: str,
) -> None:
    count += len(x) if mask is None else mask.sum()
    if backend == "torch":
        reference.accumulate_moments(x, omega, mask, total, action)
        if out is not None and basis is not None:
            reference.collapse(x, basis, mixer, mask, out)
    elif x.numel() and omega is not None:
        _launch(x, omega, basis, mixer, mask, total, action, out)


def _launch(
    x: Tensor,
    omega: Tensor,
    basis: Tensor | None,
    mixer: Tensor | None,
    mask: Tensor | None,
    total: Tensor,
    action: Tensor,
    out: Tensor | None,
) -> None:
    rows, width = x.shape
    n_omega, rank = omega.shape[1], 0 if basis is None else basis.shape[1]
    left, right = (None, omega) if basis is None else sides(basis, mixer)
    parts, largest = project(x, omega, left, mask)
    row_blocks = triton.cdiv(rows, BLOCK_T)
    coefficients = x.new_empty(rows, n_omega + rank, dtype=torch.float32)
    exact = x.new_empty(rows, n_omega, dtype=torch.float64)
    wide = x.new_empty(row_blocks, dtype=torch.int32)
    huge = x.new_empty(rows, dtype=torch.int32)
    _separate_kernel[(row_blocks,)](
        parts,
        largest,
        coefficients,
        wide,
        huge,
        rows,
        n_omega,
        rank,
        len(parts),
        BLOCK_T=BLOCK_T,
        BLOCK_S=32,
        num_warps=4,
    )
    columns = columns_block(n_omega, 64)
    _exact_kernel[(rows, triton.cdiv(n_omega, columns))](
        x,
        omega,
        exact,
        huge,
        width,
        n_omega,
        *x.stride(),
        *omega.stride(),
        BLOCK_D=32,
        BLOCK_S=columns,
        num_warps=4,
    )
    _huge_kernel[(triton.cdiv(width, 32), triton.cdiv(n_omega, columns))](
        x,
        exact,
        wide,
        huge,
        action,
        rows,
        width,
        n_omega,
        *x.stride(),
        BLOCK_T=BLOCK_T,
        BLOCK_D=32,
        BLOCK_S=columns,
        num_warps=8,
    )
    out_or_x = x if out is None else out
    columns = columns_block(n_omega, WIDEST_OMEGA)
    block = 64 if rank else 32
    _moments_kernel[(triton.cdiv(width, block), triton.cdiv(n_omega, columns))](
        x,
        coefficients,
        right,
        mask,
        total,
        action,
        out_or_x,
        rows,
        width,
        n_omega,
        rank,
        *x.stride(),
        *right.stride(),
        *out_or_x.stride(),
        BLOCK_T=BLOCK_T,
        BLOCK_D=block,
        BLOCK_S=columns,
        BLOCK_K=columns_block(rank, WIDEST_BASIS),
        num_warps=8,
        num_stages=2,
    )


@triton.jit
def _separate_kernel(
    parts_ptr,
    largest_ptr,
    coefficients_ptr,
    wide_ptr,
    huge_ptr,
    n_tokens,
    n_omega,
    rank,
    n_parts,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Sum the parts of X [Omega, P], but zero X Omega of the few huge rows, to be taken anew in float64.

    ``huge`` tells which rows these are, ``wide`` which blocks of rows have any.
    """
    i_t = tl.program_id(0)
    bits = tl.zeros((1024,), tl.float32)
    counted = tl.zeros((1024,), tl.float32)
    for t in range(0, n_tokens, 1024):
        o_all = t + tl.arange(0, 1024)
        b_all = _largest(largest_ptr, o_all, n_tokens, n_parts)
        bits += tl.where(b_all > 0, tl.log2(tl.maximum(b_all, 2e-38)), 0.0)
        counted += tl.where(b_all > 0, 1.0, 0.0)
    limit = tl.exp2(tl.sum(bits) / tl.maximum(tl.sum(counted), 1.0) + 4.0)

    o_t = (i_t * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    m_t = o_t < n_tokens
    huge = _largest(largest_ptr, o_t, n_tokens, n_parts) > limit
    tl.store(huge_ptr + o_t, huge.to(tl.int32), mask=m_t)
    tl.store(wide_ptr + i_t, tl.max(huge.to(tl.int32)))
    columns = n_omega + rank
    for j in range(0, columns, BLOCK_S):
        o_j = j + tl.arange(0, BLOCK_S)
        m_j = m_t[:, None] & (o_j < columns)[None, :]
        b_c = load_parts(parts_ptr, o_t, o_j, n_tokens, columns, n_parts)
        b_c = tl.where(huge[:, None] & (o_j < n_omega)[None, :], 0.0, b_c)
        tl.store(coefficients_ptr + o_t[:, None] * columns + o_j[None, :], b_c, mask=m_j)


@triton.jit
def _exact_kernel(
    x_ptr,
    omega_ptr,
    exact_ptr,
    huge_ptr,
    width,
    n_omega,
    stride_xt,
    stride_xd,
    stride_od,
    stride_os,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """x Omega of one huge row in float64. Vector arithmetic: not every target has float64 matrix units."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(huge_ptr + row):
        o_s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
        acc = tl.zeros((BLOCK_S,), tl.float64)
        for d in range(0, width, BLOCK_D):
            o_d = (d + tl.arange(0, BLOCK_D)).to(tl.int64)
            m_d = o_d < width
            b_x = tl.load(x_ptr + row * stride_xt + o_d * stride_xd, mask=m_d, other=0.0).to(tl.float64)
            p_o = omega_ptr + o_d[:, None] * stride_od + o_s[None, :] * stride_os
            b_o = tl.load(p_o, mask=m_d[:, None] & (o_s < n_omega)[None, :], other=0.0).to(tl.float64)
            acc += tl.sum(b_x[:, None] * b_o, axis=0)
        tl.store(exact_ptr + row * n_omega + o_s, acc, mask=o_s < n_omega)


@triton.jit
def _largest(largest_ptr, o_t, n_tokens, n_parts):
    """Largest entry of rows ``o_t``, over the splits of their width."""
    b_l = tl.load(largest_ptr + o_t, mask=o_t < n_tokens, other=0.0)
    for i in range(1, n_parts):
        b_l = tl.maximum(
            b_l, tl.load(largest_ptr + i * tl.cast(n_tokens, tl.int64) + o_t, mask=o_t < n_tokens, other=0.0)
        )
    return b_l


@triton.jit
def _huge_kernel(
    x_ptr,
    exact_ptr,
    wide_ptr,
    huge_ptr,
    action_ptr,
    n_tokens,
    width,
    n_omega,
    stride_xt,
    stride_xd,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """action += x^T (x Omega) of the huge rows, in float64."""
    o_d = (tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    o_s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    m_d, m_s = o_d < width, o_s < n_omega
    acc = tl.zeros((BLOCK_D, BLOCK_S), tl.float64)
    found = 0
    for t in range(0, n_tokens, BLOCK_T):
        if tl.load(wide_ptr + t // BLOCK_T):
            found = 1
            for r in range(t, min(t + BLOCK_T, n_tokens)):
                if tl.load(huge_ptr + r):
                    row = tl.cast(r, tl.int64)
                    b_x = tl.load(x_ptr + row * stride_xt + o_d * stride_xd, mask=m_d, other=0.0).to(tl.float64)
                    b_e = tl.load(exact_ptr + row * n_omega + o_s, mask=m_s, other=0.0)
                    acc += b_x[:, None] * b_e[None, :]
    if found:
        p_a = action_ptr + o_d[:, None] * n_omega + o_s[None, :]
        m_a = m_d[:, None] & m_s[None, :]
        tl.store(p_a, tl.load(p_a, mask=m_a, other=0.0) + acc, mask=m_a)


@triton.jit
def _moments_kernel(
    x_ptr,
    coefficients_ptr,
    right_ptr,
    mask_ptr,
    total_ptr,
    action_ptr,
    out_ptr,
    n_tokens,
    width,
    n_omega,
    rank,
    stride_xt,
    stride_xd,
    stride_rd,
    stride_rk,
    stride_ot,
    stride_od,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """action += X^T C, total += sum of X, over all rows in order; out = X - C' R^T in passing where BLOCK_K > 0."""
    i_s = tl.program_id(1)
    o_d = (tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    o_s = i_s * BLOCK_S + tl.arange(0, BLOCK_S)
    m_d, m_s = o_d < width, o_s < n_omega
    columns = n_omega + rank
    acc = tl.zeros((BLOCK_D, BLOCK_S), tl.float32)
    acc_total = tl.zeros((BLOCK_D,), tl.float64)
    if BLOCK_K:
        o_k = tl.arange(0, BLOCK_K)
        p_r = right_ptr + o_d[:, None] * stride_rd + o_k[None, :] * stride_rk
        b_r = tl.load(p_r, mask=m_d[:, None] & (o_k < rank)[None, :], other=0.0)
    for t in range(0, n_tokens, BLOCK_T):
        o_t = (t + tl.arange(0, BLOCK_T)).to(tl.int64)
        m_t = o_t < n_tokens
        kept = m_t
        if mask_ptr is not None:
            kept &= tl.load(mask_ptr + o_t, mask=m_t, other=0) != 0
        p_x = x_ptr + o_t[:, None] * stride_xt + o_d[None, :] * stride_xd
        b_x = tl.load(p_x, mask=kept[:, None] & m_d[None, :], other=0.0)
        p_c = coefficients_ptr + o_t[:, None] * columns
        b_c = tl.load(p_c + o_s[None, :], mask=m_t[:, None] & m_s[None, :], other=0.0)
        acc = dot_split(tl.trans(b_x), b_c, acc)
        acc_total += tl.sum(b_x.to(tl.float64), axis=0)
        if BLOCK_K:
            m_k = m_t[:, None] & (o_k < rank)[None, :]
            b_k = tl.load(p_c + n_omega + o_k[None, :], mask=m_k, other=0.0)
            b_out = less_projection(b_x, b_k, b_r)
            p_out = out_ptr + o_t[:, None] * stride_ot + o_d[None, :] * stride_od
            tl.store(p_out, narrow(b_out, out_ptr.dtype.element_ty), mask=m_t[:, None] & m_d[None, :])
    p_a = action_ptr + o_d[:, None] * n_omega + o_s[None, :]
    m_a = m_d[:, None] & m_s[None, :]
    tl.store(p_a, tl.load(p_a, mask=m_a, other=0.0) + acc.to(tl.float64), mask=m_a)
    if i_s == 0:
        tl.store(total_ptr + o_d, tl.load(total_ptr + o_d, mask=m_d, other=0.0) + acc_total, mask=m_d)
