"""The weight gradient G^T A of a linear layer, used without being kept."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from cir_kernels import reference
from cir_kernels._checks import check_device, check_rows


def outer_norm_sq(grads: Sequence[Tensor], a: Tensor) -> Tensor:
    """Sum over ``grads`` of ||G^T A||_F^2, for the linears that read one input.

    Taken from T x T Gram matrices, or from the products themselves where that is fewer operations.

    Args:
        grads: the linears' output gradients G (T, D_out), at least one. a: their input (T, D_in).

    Returns:
        A float64 scalar tensor on the device of ``a``; zero for T = 0.

    Raises:
        ValueError: if there are no gradients, or row counts, dtypes or devices differ.
    """
    if not grads:
        raise ValueError("grads: expected at least one gradient, got none")
    for g in grads:
        _check_pair(g, a)
    rows, d_in, d_out = len(a), a.shape[1], sum(g.shape[1] for g in grads)
    if rows * (d_out + d_in) <= d_out * d_in:
        return reference.outer_norm_sq_gram(grads, a)
    return reference.outer_norm_sq_direct(grads, a)


def outer_update_(w: Tensor, g: Tensor, a: Tensor, scale: float) -> Tensor:
    """W <- W + scale * G^T A in place; the product is never stored beside W.

    Args:
        w: (D_out, D_in) weight; half precision is summed in float32 and rounded once to nearest.
        g: (T, D_out), a: (T, D_in), one floating dtype. scale: finite.

    Raises:
        ValueError: on a shape, dtype or device that does not fit, or a scale that is not finite.
    """
    _check_pair(g, a)
    if w.shape != (g.shape[1], a.shape[1]):
        raise ValueError(f"w: expected ({g.shape[1]}, {a.shape[1]}), got {tuple(w.shape)}")
    check_rows("w", w)
    check_device(w=w, g=g)
    if not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")
    return reference.outer_update_(w, g, a, scale)


def _check_pair(g: Tensor, a: Tensor) -> None:
    check_rows("g", g)
    check_rows("a", a)
    if len(g) != len(a) or g.dtype != a.dtype:
        raise ValueError(
            f"g and a: expected one row count and dtype, got {tuple(g.shape)} {g.dtype} "
            f"and {tuple(a.shape)} {a.dtype}"
        )
    check_device(g=g, a=a)
