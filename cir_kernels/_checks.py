"""Argument checks shared by the public operations. Shapes, dtypes, devices and overlap; values only on request."""

from __future__ import annotations

import os

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
CHECK_FINITE = "CIR_KERNELS_CHECK_FINITE"
"""Environment variable; "1" makes the operations look for NaN and infinity in bases. Costs a synchronisation."""


def check_rows(name: str, x: Tensor, width: int | None = None) -> None:
    """``x`` must be a floating (T, D) matrix, with D == ``width`` where that is given."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.ndim != 2:
        raise ValueError(f"{name}: expected a matrix (tokens, width), got shape {tuple(x.shape)}")
    if x.dtype not in FLOATING:
        raise TypeError(f"{name}: expected a floating dtype, got {x.dtype}")
    if width is not None and x.shape[1] != width:
        raise ValueError(f"{name}: expected width {width}, got {x.shape[1]}")


def check_basis(basis: Tensor, mixer: Tensor | None, width: int, name: str = "basis") -> None:
    """``basis`` must be (width, k) with k <= width, and ``mixer``, where given, (k, k)."""
    check_rows(name, basis)
    if basis.shape[0] != width or basis.shape[1] > width:
        raise ValueError(f"{name}: expected ({width}, k) with k <= {width}, got {tuple(basis.shape)}")
    rank = basis.shape[1]
    if mixer is not None and mixer.shape != (rank, rank):
        raise ValueError(f"mixer: expected ({rank}, {rank}), got {tuple(mixer.shape)}")
    if os.environ.get(CHECK_FINITE) == "1":
        for what, tensor in ((name, basis), ("mixer", mixer)):
            if tensor is not None and not torch.isfinite(tensor).all():
                raise ValueError(f"{what}: expected finite entries, got NaN or infinity")


def check_mask(mask: Tensor | None, rows: int) -> None:
    """``mask``, where given, must be a bool vector with one entry for each row."""
    if mask is None:
        return
    if mask.dtype != torch.bool or mask.shape != (rows,):
        raise ValueError(f"mask: expected a bool vector of {rows} rows, got {mask.dtype} {tuple(mask.shape)}")


def check_device(**tensors: Tensor | None) -> None:
    """All tensors given must live on one device."""
    given = {name: t for name, t in tensors.items() if t is not None}
    if len({t.device for t in given.values()}) > 1:
        raise ValueError(f"expected all tensors on one device, got { {n: str(t.device) for n, t in given.items()} }")


def check_out(out: Tensor, x: Tensor) -> None:
    """``out`` must be shaped like ``x``, its entries apart, and be ``x`` itself or share no memory with it."""
    if out.shape != x.shape or out.dtype != x.dtype:
        raise ValueError(f"out: expected {tuple(x.shape)} {x.dtype}, got {tuple(out.shape)} {out.dtype}")
    if any(stride == 0 and size > 1 for stride, size in zip(out.stride(), out.shape, strict=True)):
        raise ValueError(f"out: expected an entry of memory for each element, got strides {out.stride()}")
    same = out.data_ptr() == x.data_ptr() and out.stride() == x.stride()
    if x.numel() and not same and _span(out)[0] < _span(x)[1] and _span(x)[0] < _span(out)[1]:
        raise ValueError("out: expected x itself or memory apart from it, got memory that overlaps x in part")


def _span(x: Tensor) -> tuple[int, int]:
    """First and one past the last byte that ``x`` may touch."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()
