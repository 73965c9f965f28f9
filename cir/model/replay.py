"""The same work of a device again and again, whose launches cost the host more than the work: as a CUDA graph."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Values = dict[str, Tensor]
CAPTURED_AT = 2
"""The call that is captured, so that what is called once costs no capture, and all is compiled and warm."""
CLOSE, RELATIVE = 0.1, 0.05
"""How far a replay may be from the call before it was captured: it may run other attention kernels, in bfloat16."""


class Replays:
    """Calls of functions of the weights in place, each by a key; on a GPU replayed from the third call on.

    ``devices``: those that the functions run on; over several, nothing is captured.
    Where a function cannot be captured, as it waits for the device say, or its replay does not give what it gave, all
    are called as they are, and a warning says so. A function must read and write the same memory at each call.
    """

    def __init__(self, devices: Collection[torch.device]) -> None:
        self._active = len(devices) == 1 and all(device.type == "cuda" for device in devices)
        self._calls: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Values]] = {}
        self._room: Values = {}
        # One for all captures, as memory is kept by stream.
        self._stream = torch.cuda.Stream(*devices) if self._active else None

    @property
    def active(self) -> bool:
        return self._active

    def __call__(self, key: Hashable, function: Callable[[], Values]) -> Values:
        if not self._active:
            return function()
        if key in self._graphs:
            graph, values = self._graphs[key]
            graph.replay()
            return {name: value.clone() for name, value in values.items()}
        found = function()
        self._calls[key] += 1
        if self._calls[key] == CAPTURED_AT:
            self._capture(key, function, found)
        return found

    def _capture(self, key: Hashable, function: Callable[[], Values], found: Values) -> None:
        graph = torch.cuda.CUDAGraph()
        pool = next((other.pool() for other, _ in self._graphs.values()), None)
        values = {name: self._room_for(name, value) for name, value in found.items()}
        try:
            with _capturing(graph, pool, self._stream):
                for name, value in function().items():
                    values[name].copy_(value)
            graph.replay()
            for name, value in values.items():
                apart = (value.float() - found[name].float()).norm()
                if not apart <= CLOSE + RELATIVE * found[name].float().norm():
                    raise RuntimeError(f"its {name} differ by {float(apart):.3g}")
        except RuntimeError as error:
            torch.cuda.synchronize()
            self._active = False
            self._graphs.clear()
            logger.warning("no CUDA graph could be made, and steps take longer: %s", str(error).split("\n")[0])
        else:
            self._graphs[key] = graph, values

    def _room_for(self, name: str, value: Tensor) -> Tensor:
        """Where a graph leaves a value: one place for all graphs, however many, as it is copied at once."""
        room = self._room.get(name)
        if room is None or room.numel() < value.numel() or room.dtype != value.dtype:
            room = self._room[name] = torch.empty_like(value, memory_format=torch.contiguous_format).flatten()
        return room[: value.numel()].view(value.shape)


@contextmanager
def _capturing(graph: torch.cuda.CUDAGraph, pool: Any, apart: Any) -> Iterator[None]:
    """As :class:`torch.cuda.graph`, which gives all memory that is unused back to the driver first: half a second."""
    current = torch.cuda.current_stream(apart.device)
    apart.wait_stream(current)
    with torch.cuda.stream(apart):
        # Of this thread alone: what others run on the device goes on undisturbed.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            yield
        finally:
            graph.capture_end()
    current.wait_stream(apart)
