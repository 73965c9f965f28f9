"""Rounding of an updated weight to the 16 bits it is stored in.

A selective step changes most weights by less than half a unit in the last place of bfloat16, so that rounding to
nearest drops most of it. ``stochastic`` keeps it in expectation, ``compensated`` in 16 further bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cir_kernels._dispatch import tl, triton

ROUNDINGS = ("nearest", "stochastic", "compensated")
_MASK = 0xFFFFFFFF


def random_bits(rows: Tensor, columns: Tensor, seed: int) -> Tensor:
    """32 random bits for each element (row, column) of a matrix, as int64: a hash of the two and of ``seed``.

    They depend on nothing else, so that neither launch shapes nor devices change a result.
    """
    return _mix((_mix(rows ^ (hashed(seed) & _MASK))[:, None] + columns[None, :]) & _MASK)


def _mix(x: Tensor) -> Tensor:
    """The lowbias32 hash (Wellons 2018): each bit of the input flips each of the output half the time."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def dither(w: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 ``w`` plus noise, uniform over one unit in the last place of ``dtype``; rounded, it is unbiased."""
    ulp = (w.view(torch.int32) & 0x7F800000).view(torch.float32) * torch.finfo(dtype).eps
    ulp = ulp.clamp_min(_smallest(dtype))
    return w + ((bits >> 8).to(torch.float32) * 2.0**-24 - 0.5) * ulp


def _smallest(dtype: torch.dtype) -> float:
    """Spacing of the subnormal numbers; for bfloat16, at a scale where the product stays normal in float32."""
    return 2.0**-24 if dtype == torch.float16 else 2.0**-126


def join(w: Tensor, remainder: Tensor) -> Tensor:
    """bfloat16 ``w`` and its int16 remainder as the float32 they stand for."""
    return ((w.view(torch.int16).to(torch.int32) << 16) + remainder.to(torch.int32)).view(torch.float32)


def split(w: Tensor) -> tuple[Tensor, Tensor]:
    """float32 ``w`` as bfloat16, rounded to nearest, and an int16 remainder; :func:`join` gives it back exactly."""
    bits = w.view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


@triton.jit
def _mix_bits(x):
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def dithered(b_w, o_m, o_n, key, EPS: tl.constexpr, SMALLEST: tl.constexpr):
    """:func:`dither` of a tile, with ``key`` the hashed seed."""
    rows = _mix_bits(o_m.to(tl.uint32) ^ key.to(tl.uint32))
    bits = _mix_bits(rows[:, None] + o_n.to(tl.uint32)[None, :])
    ulp = (b_w.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True) * EPS
    ulp = tl.maximum(ulp, SMALLEST)
    return b_w + ((bits >> 8).to(tl.float32) * 5.9604644775390625e-08 - 0.5) * ulp


@triton.jit
def joined(b_w, b_r):
    """:func:`join` of a tile."""
    bits = (b_w.to(tl.int16, bitcast=True).to(tl.int32) << 16) + b_r.to(tl.int32)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def divided(b_w):
    """:func:`split` of a tile: the bfloat16 weight and the int16 remainder."""
    bits = b_w.to(tl.int32, bitcast=True)
    high = (bits + 0x8000) >> 16
    return high.to(tl.int16).to(tl.bfloat16, bitcast=True), (bits - (high << 16)).to(tl.int16)


def hashed(seed: int) -> int:
    """The key that ``seed`` stands for, as a signed 32-bit integer."""
    key = int(_mix(torch.tensor(seed & _MASK) ^ _mix(torch.tensor((seed >> 32) & _MASK))))
    return key - (1 << 32) if key >> 31 else key
