"""Which backend runs, and how operations are registered. The only place where the two backends meet."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # not Linux: kernels are defined but never run

    class triton:  # type: ignore[no-redef]
        jit = staticmethod(lambda function=None, **_: function or (lambda other: other))

    tl: Any = None  # type: ignore[no-redef]
    HAS_TRITON = False

logger = logging.getLogger(__name__)

BACKEND = "CIR_KERNELS_BACKEND"
"""Environment variable that names the backend where the caller does not: "torch" or "triton"."""
LEAST_CAPABILITY = (8, 0)
"""Of a GPU that kernels are for."""
_LIBRARY = torch.library.Library("cir_kernels", "DEF")


INTERPRETING = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
"""Do kernels run in Triton's interpreter, on any device? Decided by TRITON_INTERPRET at import."""


def constant(value: Any) -> Any:
    """``value`` as kernels read it from the module they are in."""
    return tl.constexpr(value) if HAS_TRITON else value


INTERPRETED = constant(INTERPRETING)


TRIALS: dict[str, Callable[[torch.device, torch.dtype], tuple[Tensor, Tensor]]] = {}
"""By operation, what gives the results of the kernel and of the PyTorch form of a small random input."""
CLOSE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}
"""Relative distance of the two, at most."""


@functools.cache
def disagreement(operation: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel of ``operation`` is not to be used on ``device``; None where it gives what PyTorch gives.

    A compiler for a GPU that nobody here has seen may be wrong in silence: one was (docs/gpu.md).
    """
    try:
        got, want = (result.double() for result in TRIALS[operation](device, dtype))
        apart = float((got - want).norm() / want.norm())
        return None if apart <= CLOSE[dtype] else f"its result is {apart:.2g} of its length from PyTorch's"
    except Exception as error:  # of whatever kind: it does not compile, or does not launch
        return f"{type(error).__name__}: {error}".split("\n")[0]


def resolve(backend: str | None, x: Tensor, operation: str) -> str:
    """The backend for work on ``x``: the one asked for, by argument or else environment, or the best that runs.

    The first time that a kernel is chosen on a GPU it has to show on a small input that it is right there.

    Raises:
        ValueError: if the name is unknown. RuntimeError: if the backend asked for cannot run on ``x``.
    """
    backend = backend or os.environ.get(BACKEND)
    if backend not in (None, "torch", "triton"):
        raise ValueError(f"backend: expected 'torch' or 'triton', got {backend!r}")
    if backend == "torch":
        return backend
    obstacle = _obstacle(x)
    if backend is None:
        return "torch" if obstacle or not x.is_cuda or not _trusted(operation, x) else "triton"
    if obstacle:
        raise RuntimeError(f"backend: expected one that can run here, got 'triton', but {obstacle}")
    return backend


def _trusted(operation: str, x: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return True  # it was tried when it ran before, to warm up
    known = disagreement.cache_info().currsize
    reason = disagreement(operation, x.device, x.dtype)
    if reason is not None and disagreement.cache_info().currsize > known:
        logger.warning(
            "%s: PyTorch is used for it, as its kernel is not right on %s: %s; `cir doctor` shows more",
            operation,
            torch.cuda.get_device_name(x.device),
            reason,
        )
    return reason is None


def _obstacle(x: Tensor) -> str | None:
    if not HAS_TRITON:
        return "triton is not installed"
    if x.dtype == torch.float64:
        return "its kernels take float32, float16 and bfloat16, not float64"
    if INTERPRETING:
        return None
    if not x.is_cuda:
        return f"x is on {x.device} and not on a CUDA device (TRITON_INTERPRET=1 runs kernels anywhere, slowly)"
    if torch.cuda.get_device_capability(x.device) < LEAST_CAPABILITY:
        return f"it needs compute capability 8.0, and {x.device} has less"
    return None


def register(schema: str) -> Callable[[Callable[..., Any]], Any]:
    """Register a function that writes into its arguments as the operator ``cir_kernels::`` ``schema``.

    Its fake implementation does nothing, as all outputs are arguments, so that ``torch.compile`` sees one node.
    """
    name = schema.partition("(")[0]

    def decorate(function: Callable[..., Any]) -> Any:
        @functools.wraps(function)
        def on_its_device(*arguments: Any) -> None:
            first = arguments[0] if isinstance(arguments[0], Tensor) else arguments[0][0]
            with torch.cuda.device_of(first):  # triton launches on the current device, whatever its arguments'
                function(*arguments)

        _LIBRARY.define(schema)
        _LIBRARY.impl(name, on_its_device, "CompositeExplicitAutograd")
        torch.library.register_fake(f"cir_kernels::{name}", lambda *arguments: None, lib=_LIBRARY)
        return getattr(torch.ops.cir_kernels, name)

    return decorate


@triton.jit
def narrow(b, DTYPE: tl.constexpr):
    """float32 ``b`` rounded to nearest."""
    if INTERPRETED and tl.bfloat16 == DTYPE:  # it would truncate
        bits = b.to(tl.uint32, bitcast=True)
        b = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return b.to(DTYPE)


@triton.jit
def halves(b):
    """float32 ``b`` as the sum of two bfloat16, exact to 16 bits."""
    high = narrow(b, tl.bfloat16)
    return high, narrow(b - high.to(tl.float32), tl.bfloat16)


@triton.jit
def dot_split(a, b, acc):
    """acc + a b with all of a half-precision ``a``, and float32 ``b`` to 16 bits beside bfloat16, 21 else."""
    if a.dtype == tl.bfloat16:
        if b.dtype == tl.bfloat16:
            return dot(a, b, acc)
        high, low = halves(b)
        return dot(a, high, dot(a, low, acc))
    return dot(a.to(tl.float32), b.to(tl.float32), acc)


@triton.jit
def dot(a, b, acc):
    """acc + a b; float32 operands as three tf32 products, about as exact as float32."""
    if INTERPRETED:  # whose products of bfloat16 are those of its bit patterns
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    if a.dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision="tf32x3")
    return tl.dot(a, b, acc)


@triton.jit
def triangle(i_tile):
    """Row and column, column <= row, of the i-th tile of a lower triangle. The square root may be off by one."""
    i = ((tl.sqrt(8.0 * i_tile + 1.0) - 1.0) / 2.0).to(tl.int32)
    i = tl.where((i + 1) * (i + 2) // 2 <= i_tile, i + 1, i)
    i = tl.where(i * (i + 1) // 2 > i_tile, i - 1, i)
    return i, i_tile - i * (i + 1) // 2
