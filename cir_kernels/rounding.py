"""Rounding of an updated weight to the 16 bits it is stored in.

A selective step changes most weights by less than half a unit in the last place of bfloat16, so that rounding to
nearest drops most of it. ``stochastic`` keeps it in expectation, ``compensated`` in 16 further bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cir_kernels._dispatch import constant, tl, triton

ROUNDINGS = ("nearest", "stochastic", "compensated")
_MASK = 0xFFFFFFFF
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B  # factors of the hash
_EXPONENT = 0x7F800000  # of a float32
_NOISE = 2.0**-24  # spacing of 24 random bits in [0, 1)
# The same, as kernels read them.
_FIRST_K, _SECOND_K, _EXPONENT_K, _NOISE_K = map(constant, (_FIRST, _SECOND, _EXPONENT, _NOISE))


def random_bits(rows: Tensor, columns: Tensor, seed: int) -> Tensor:
    """32 random bits for each element (row, column) of a matrix, as int64: a hash of the two and of ``seed``.

    They depend on nothing else, so that neither launch shapes nor devices change a result.
    """
    return _mix((_mix(rows ^ (hashed(seed) & _MASK))[:, None] + columns[None, :]) & _MASK)


def _mix(x: Any) -> Any:
    """The lowbias32 hash of integers (Wellons 2018): each bit of the input flips each of the output half the time."""
    x = x ^ (x >> 16)
    x = (x * _FIRST) & _MASK
    x = x ^ (x >> 15)
    x = (x * _SECOND) & _MASK
    return x ^ (x >> 16)


def dither(w: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 ``w`` plus noise, uniform over one unit in the last place of ``dtype``; rounded, it is unbiased."""
    eps, smallest = last_places(dtype)
    ulp = (w.view(torch.int32) & _EXPONENT).view(torch.float32) * eps
    return w + ((bits >> 8).to(torch.float32) * _NOISE - 0.5) * ulp.clamp_min(smallest)


def last_places(dtype: torch.dtype) -> tuple[float, float]:
    """A unit in the last place of 1 in ``dtype``, and the least of any number.

    That is the spacing of the subnormal numbers; for bfloat16, at a scale where the product stays normal in float32.
    """
    return torch.finfo(dtype).eps, 2.0**-24 if dtype == torch.float16 else 2.0**-126


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
    x *= _FIRST_K
    x ^= x >> 15
    x *= _SECOND_K
    return x ^ (x >> 16)


@triton.jit
def dithered(b_w, o_m, o_n, key, EPS: tl.constexpr, SMALLEST: tl.constexpr):
    """:func:`dither` of a tile, with ``key`` the hashed seed, and :func:`last_places` of the dtype."""
    rows = _mix_bits(o_m.to(tl.uint32) ^ key.to(tl.uint32))
    bits = _mix_bits(rows[:, None] + o_n.to(tl.uint32)[None, :])
    ulp = (b_w.to(tl.int32, bitcast=True) & _EXPONENT_K).to(tl.float32, bitcast=True) * EPS
    ulp = tl.maximum(ulp, SMALLEST)
    return b_w + ((bits >> 8).to(tl.float32) * _NOISE_K - 0.5) * ulp


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
    key = _mix((seed & _MASK) ^ _mix((seed >> 32) & _MASK))
    return key - (1 << 32) if key >> 31 else key
