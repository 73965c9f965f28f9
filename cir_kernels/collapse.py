"""Collapse: take a subspace out of the rows of a matrix."""

from __future__ import annotations

from torch import Tensor

from cir_kernels import reference
from cir_kernels._checks import check_device, check_mask, check_rows


def collapse(
    x: Tensor,
    basis: Tensor,
    mixer: Tensor | None = None,
    mask: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Collapse the rows of ``x`` against a basis: X - (X P) M^T P^T (arXiv 2509.11816, section 3).

    Args:
        x: (T, D) rows, float64, float32, float16 or bfloat16. Half precision is computed in float32.
        basis: P, (D, k), 0 <= k <= D. For the orthogonal collapse its columns are orthonormal.
        mixer: M, (k, k); None stands for the identity.
        mask: (T,) bool; rows that are False come back as zero.
        out: where to write, shape and dtype of ``x``; may be ``x`` itself.

    Returns:
        (T, D) in the dtype of ``x``; ``out`` where given.

    Raises:
        ValueError: on a shape, dtype or device that does not fit.
    """
    check_rows("x", x)
    if basis.ndim != 2 or basis.shape[0] != x.shape[1] or basis.shape[1] > basis.shape[0]:
        raise ValueError(f"basis: expected ({x.shape[1]}, k) with k <= {x.shape[1]}, got {tuple(basis.shape)}")
    rank = basis.shape[1]
    if mixer is not None and mixer.shape != (rank, rank):
        raise ValueError(f"mixer: expected ({rank}, {rank}), got {tuple(mixer.shape)}")
    check_mask(mask, len(x))
    check_device(x=x, basis=basis, mixer=mixer, mask=mask, out=out)
    if out is not None and (out.shape != x.shape or out.dtype != x.dtype):
        raise ValueError(f"out: expected {tuple(x.shape)} {x.dtype}, got {tuple(out.shape)} {out.dtype}")
    return reference.collapse(x, basis, mixer, mask, out)
