"""Argument checks shared by the public operations. They read shapes and dtypes only, never values."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_rows(name: str, x: Tensor, width: int | None = None) -> None:
    """``x`` must be a floating (T, D) matrix, with D == ``width`` where that is given."""
    if x.ndim != 2:
        raise ValueError(f"{name}: expected a matrix (tokens, width), got shape {tuple(x.shape)}")
    if x.dtype not in FLOATING:
        raise ValueError(f"{name}: expected a floating dtype, got {x.dtype}")
    if width is not None and x.shape[1] != width:
        raise ValueError(f"{name}: expected width {width}, got {x.shape[1]}")


def check_mask(mask: Tensor | None, rows: int) -> None:
    """``mask``, where given, must be a bool vector with one entry for each row."""
    if mask is None:
        return
    if mask.dtype != torch.bool or mask.shape != (rows,):
        raise ValueError(f"mask: expected a bool vector of {rows} rows, got {mask.dtype} {tuple(mask.shape)}")


def check_device(**tensors: Tensor | None) -> None:
    """All tensors given must live on one device."""
    devices = {name: str(t.device) for name, t in tensors.items() if t is not None}
    if len(set(devices.values())) > 1:
        raise ValueError(f"expected all tensors on one device, got {devices}")
