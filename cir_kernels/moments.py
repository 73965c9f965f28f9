"""Streaming first and second moments of token rows, from which principal subspaces are solved.

One token's row can be 1e5 times the median's, and its square hides, in float32, every component but that
token's. Rows more than 16 times the geometric mean of all rows' largest entries are therefore multiplied and
summed in float64, and only those: float64 throughout would take several times as long as reading X does.

Four launches: X Omega by splits of the width; the largest entry of each row; the sums of the splits, with the huge
rows set apart; X^T (X Omega). The second product needs all of a row's first, so that X is read again: a row does not
fit on a multiprocessor beside a (D, s) accumulator; partial accumulators by row block would move more than X does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cir_kernels import reference
from cir_kernels._checks import check_basis, check_device, check_mask, check_rows
from cir_kernels._dispatch import dot_split, narrow, register, resolve, tl, triton
from cir_kernels.collapse import WIDEST_OMEGA, columns_block, load_parts, project
from cir_kernels.scatter import accumulate_scatter


@dataclass
class Moments:
    """What a stream of rows x_t of width D leaves behind.

    Attributes:
        count: () int64, rows seen.
        total: (D,) float64, the sum of the rows.
        action: (D, s) float64 X^T X Omega, the action of the uncentred scatter on the test matrix; without one the
            scatter itself, its lower triangle packed as :func:`cir_kernels.accumulate_scatter` has it.
        omega: (D, s) bfloat16 the test matrix Omega; None for the identity. Any test matrix serves; this one is
            exact in the type that tensor cores multiply.
    """

    count: Tensor
    total: Tensor
    action: Tensor
    omega: Tensor | None


def new_moments(width: int, omega: Tensor | None, device: torch.device | str = "cpu") -> Moments:
    """Moments of no rows at all. ``omega`` (width, s) is rounded to bfloat16 on ``device``.

    Raises:
        ValueError: if ``omega`` is not a (width, s) matrix with s <= width.
    """
    if omega is not None:
        check_basis(omega, None, width, "omega")
        omega = omega.to(device, torch.bfloat16).contiguous()
    shape = (width * (width + 1) // 2,) if omega is None else omega.shape
    return Moments(
        torch.zeros((), dtype=torch.int64, device=device),
        torch.zeros(width, dtype=torch.float64, device=device),
        torch.zeros(shape, dtype=torch.float64, device=device),
        omega,
    )


def accumulate_moments(
    state: Moments, x: Tensor, mask: Tensor | None = None, *, backend: str | None = None
) -> Moments:
    """Add rows ``x`` (T, D), any floating dtype and strides, to ``state`` in place and return it.

    Rows where ``mask`` (T,) is False contribute nothing. Sums are float32 but for rows beside which the others
    would be lost, which are float64; sums over calls are float64. The kernels round X Omega of a bfloat16 X to
    bfloat16 in between, as PyTorch does. Memory beyond the state is O(T s); the PyTorch form's is O(T (D + s)).
    Without a test matrix all is float64.

    Raises:
        TypeError: if ``x`` is not a floating tensor.
        ValueError: on a width, mask or device that does not fit the state.
        RuntimeError: if the backend asked for cannot run.
    """
    _check(state, x, mask)
    chosen = resolve(backend, x, "accumulate_moments")
    if state.omega is None:
        rows = x if mask is None else x.masked_fill(~mask[:, None], 0)
        state.count.add_(len(x) if mask is None else mask.sum())
        state.total.add_(rows.double().sum(0))
        accumulate_scatter(state.action, x, None, mask, backend=chosen)
        return state
    _accumulate(x, state.omega, mask, state.count, state.total, state.action, chosen)
    return state


def _check(state: Moments, x: Tensor, mask: Tensor | None) -> None:
    check_rows("x", x, len(state.total))
    check_mask(mask, len(x))
    check_device(x=x, mask=mask, state=state.total)


@register(
    "accumulate_moments(Tensor x, Tensor omega, Tensor? mask, Tensor(a!) count, Tensor(b!) total, Tensor(c!) action,"
    " str backend) -> ()"
)
def _accumulate(
    x: Tensor, omega: Tensor, mask: Tensor | None, count: Tensor, total: Tensor, action: Tensor, backend: str
) -> None:
    count += len(x) if mask is None else mask.sum()
    if backend == "torch":
        reference.accumulate_moments(x, omega, mask, total, action)
    elif x.numel():
        _launch(x, omega, mask, total, action)


def _launch(x: Tensor, omega: Tensor, mask: Tensor | None, total: Tensor, action: Tensor) -> None:
    rows, width = x.shape
    n_omega = omega.shape[1]
    parts = project(x, omega, mask)
    largest = torch.linalg.vector_norm(x, torch.inf, dim=1, dtype=torch.float32)
    if mask is not None:
        largest.masked_fill_(~mask, 0)
    half = x.dtype == torch.bfloat16
    # The column after the last of X Omega is one, so that the sum of the rows comes out of the same product.
    n_columns = 16 * triton.cdiv(n_omega + 1, 16)
    coefficients = x.new_empty(rows, n_columns, dtype=torch.bfloat16 if half else torch.float32)
    exact = x.new_empty(rows, n_omega, dtype=torch.float64)
    huge = x.new_empty(1 + rows, dtype=torch.int32)
    _separate_kernel[(triton.cdiv(rows, 32), triton.cdiv(n_omega + 1, 32))](
        x,
        omega,
        parts,
        largest,
        coefficients,
        exact,
        huge,
        rows,
        width,
        n_omega,
        len(parts),
        n_columns,
        *x.stride(),
        BLOCK_T=32,
        BLOCK_S=32,
        BLOCK_D=64,
        num_warps=4,
    )
    block_s = columns_block(n_omega + 1, WIDEST_OMEGA if half else 64)
    block_d = 64 if half else 32
    _moments_kernel[(triton.cdiv(width, block_d), triton.cdiv(n_omega + 1, block_s))](
        x,
        coefficients,
        exact,
        huge,
        mask,
        total,
        action,
        rows,
        width,
        n_omega,
        n_columns,
        *x.stride(),
        BLOCK_T=64 if half else 32,
        BLOCK_D=block_d,
        BLOCK_S=block_s,
        num_warps=8 if half else 4,
        num_stages=4 if half else 2,
    )


@triton.jit
def _separate_kernel(
    x_ptr,
    omega_ptr,
    parts_ptr,
    largest_ptr,
    coefficients_ptr,
    exact_ptr,
    huge_ptr,
    n_tokens,
    width,
    n_omega,
    n_parts,
    n_columns,
    stride_xt,
    stride_xd,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum the parts of X Omega; the few huge rows' becomes zero here, and float64 in ``exact``.

    ``huge`` is the number of those rows and then which they are, in order.
    """
    i_t, i_s = tl.program_id(0), tl.program_id(1)
    bits = tl.zeros((1024,), tl.float32)
    counted = tl.zeros((1024,), tl.float32)
    for t in range(0, n_tokens, 1024):
        b_all = _largest(largest_ptr, t + tl.arange(0, 1024), n_tokens)
        bits += tl.where(b_all > 0, tl.log2(tl.maximum(b_all, 2e-38)), 0.0)
        counted += tl.where(b_all > 0, 1.0, 0.0)
    limit = tl.exp2(tl.sum(bits) / tl.maximum(tl.sum(counted), 1.0) + 4.0)

    o_t = (i_t * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    o_s = i_s * BLOCK_S + tl.arange(0, BLOCK_S)
    m_t = o_t < n_tokens
    b_l = _largest(largest_ptr, o_t, n_tokens)
    huge = b_l > limit
    b_c = load_parts(parts_ptr, o_t, o_s, n_tokens, n_omega, n_parts)
    b_c = tl.where((o_s == n_omega)[None, :], 1.0, b_c)
    b_c = tl.where((huge | (b_l == 0))[:, None] | (o_s > n_omega)[None, :], 0.0, b_c)
    p_c = coefficients_ptr + o_t[:, None] * n_columns + o_s[None, :]
    tl.store(p_c, narrow(b_c, coefficients_ptr.dtype.element_ty), mask=m_t[:, None] & (o_s < n_columns)[None, :])

    before = 0
    for t in range(0, i_t * BLOCK_T, 1024):
        o_all = t + tl.arange(0, 1024)
        b_all = _largest(largest_ptr, o_all, i_t * BLOCK_T)
        before += tl.sum((b_all > limit).to(tl.int32))
    place = before + tl.cumsum(huge.to(tl.int32)) - 1
    found = tl.sum(huge.to(tl.int32))
    if i_s == 0:
        tl.store(huge_ptr + 1 + place, o_t.to(tl.int32), mask=huge)
        if i_t == tl.num_programs(0) - 1:
            tl.store(huge_ptr, before + found)
    for i in range(before, before + found):
        row = tl.sum(tl.where(huge & (place == i), o_t, 0))
        acc = tl.zeros((BLOCK_S,), tl.float64)  # vector arithmetic: not every target has float64 matrix units
        for d in range(0, width, BLOCK_D):
            o_d = (d + tl.arange(0, BLOCK_D)).to(tl.int64)
            m_d = o_d < width
            b_x = tl.load(x_ptr + row * stride_xt + o_d * stride_xd, mask=m_d, other=0.0).to(tl.float64)
            p_o = omega_ptr + o_d[:, None] * n_omega + o_s[None, :]
            b_o = tl.load(p_o, mask=m_d[:, None] & (o_s < n_omega)[None, :], other=0.0).to(tl.float64)
            acc += tl.sum(b_x[:, None] * b_o, axis=0)
        tl.store(exact_ptr + tl.cast(i, tl.int64) * n_omega + o_s, acc, mask=o_s < n_omega)


@triton.jit
def _largest(largest_ptr, o_t, end):
    """Largest entry of rows ``o_t``; 0 from row ``end`` on."""
    return tl.load(largest_ptr + o_t, mask=o_t < end, other=0.0)


@triton.jit
def _moments_kernel(
    x_ptr,
    coefficients_ptr,
    exact_ptr,
    huge_ptr,
    mask_ptr,
    total_ptr,
    action_ptr,
    n_tokens,
    width,
    n_omega,
    n_columns,
    stride_xt,
    stride_xd,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """[action, total] += X^T [C, 1], over all rows in order."""
    o_d = (tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    o_s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    m_d = o_d < width
    n_huge = tl.load(huge_ptr)
    if n_huge > 0:  # a few columns at a time, as registers are short
        for j in range(0, BLOCK_S, 16):
            o_j = tl.program_id(1) * BLOCK_S + j + tl.arange(0, 16)
            acc_huge = tl.zeros((BLOCK_D, 16), tl.float64)
            for i in range(n_huge):
                row = tl.load(huge_ptr + 1 + i).to(tl.int64)
                b_h = tl.load(x_ptr + row * stride_xt + o_d * stride_xd, mask=m_d, other=0.0).to(tl.float64)
                b_e = tl.load(exact_ptr + tl.cast(i, tl.int64) * n_omega + o_j, mask=o_j < n_omega, other=0.0)
                acc_huge += b_h[:, None] * tl.where(o_j == n_omega, 1.0, b_e)[None, :]
            _add_sums(action_ptr, total_ptr, acc_huge, o_d, o_j, width, n_omega)
        tl.debug_barrier()  # other threads of this program add to the same sums below
    acc = tl.zeros((BLOCK_D, BLOCK_S), tl.float32)
    for t in range(0, n_tokens, BLOCK_T):
        o_t = (t + tl.arange(0, BLOCK_T)).to(tl.int64)
        m_t = o_t < n_tokens
        kept = m_t
        if mask_ptr is not None:
            kept &= tl.load(mask_ptr + o_t, mask=m_t, other=0) != 0
        p_x = x_ptr + o_t[:, None] * stride_xt + o_d[None, :] * stride_xd
        b_x = tl.load(p_x, mask=kept[:, None] & m_d[None, :], other=0.0)
        p_c = coefficients_ptr + o_t[:, None] * n_columns + o_s[None, :]
        b_c = tl.load(p_c, mask=m_t[:, None] & (o_s < n_columns)[None, :], other=0.0)
        acc = dot_split(tl.trans(b_x), b_c, acc)
    _add_sums(action_ptr, total_ptr, acc.to(tl.float64), o_d, o_s, width, n_omega)


@triton.jit
def _add_sums(action_ptr, total_ptr, b_sums, o_d, o_s, width, n_omega):
    """Add columns below ``n_omega`` to the action, and column ``n_omega`` to the total."""
    m_d = o_d < width
    p_a = action_ptr + o_d[:, None] * n_omega + o_s[None, :]
    m_a = m_d[:, None] & (o_s < n_omega)[None, :]
    tl.store(p_a, tl.load(p_a, mask=m_a, other=0.0) + b_sums, mask=m_a)
    b_total = tl.sum(tl.where((o_s == n_omega)[None, :], b_sums, 0.0), axis=1)
    if tl.max((o_s == n_omega).to(tl.int32)) > 0:
        tl.store(total_ptr + o_d, tl.load(total_ptr + o_d, mask=m_d, other=0.0) + b_total, mask=m_d)
