"""The same work of a device again and again, whose launches cost the host more than the work: as a CUDA graph."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Values = dict[str, Tensor]
CAPTURED_AT = 2
"""The call that is captured, so that what is called once costs no capture, and all is compiled and warm."""
CLOSE, RELATIVE = 0.1, 0.05
"""How far a replay may be from the call before it was captured: it may run other attention kernels, in bfloat16."""
LEAST_PLACES = 16
"""Of a vector, which costs next to nothing: so that few lengths differ."""
MOST = 64
"""Graphs kept, each of some MiB; the oldest goes."""


class Replays:
    """Calls of functions of ``weights`` and of inputs; on a GPU replayed, from the third call of one shape on.

    A graph reads the memory that it was captured with. Inputs are copied there, and one graph serves all that are
    somewhat shorter in their first dimension, with zeros beyond; so a function's rows must not depend on others, and
    those that are beyond must not count. Once ``weights`` lie elsewhere, or on several devices, no graph is used.
    Where a function cannot be captured, as it waits for the device say, or its replay does not give what it gave, all
    are called as they are, and a warning says so.
    """

    def __init__(self) -> None:
        self._refused = False
        self._on: torch.device | None = None
        self._weights: tuple[int, ...] = ()
        self._calls: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Values, Values]] = {}
        self._room: Values = {}

    def follow(self, weights: Iterable[Tensor]) -> Replays:
        """Let go of all graphs if ``weights``, all that the functions read, lie elsewhere than before."""
        weights = list(weights)
        devices = {weight.device for weight in weights}
        places = tuple(weight.data_ptr() for weight in weights)
        if places != self._weights:
            self._calls.clear()
            self._graphs.clear()
            self._room.clear()
            self._weights = places
            self._on = devices.pop() if len(devices) == 1 else None
        return self

    @property
    def active(self) -> bool:
        return not self._refused and self._on is not None and self._on.type == "cuda"

    def __call__(self, name: str, function: Callable[[Values], Values], given: Values, rows: int) -> Values:
        """What ``function``, the one of that ``name``, gives of the inputs ``given``: the first ``rows`` rows."""
        if not self.active:
            return _first(rows, function(given))
        shapes = ((key, _places(tensor), tensor.dtype) for key, tensor in sorted(given.items()))
        key = name, *shapes
        if key in self._graphs:
            graph, inputs, values = self._graphs[key]
            _put(given, inputs)
            graph.replay()
            return {name: value.clone() for name, value in _first(rows, values).items()}
        found = _first(rows, function(given))
        self._calls[key] += 1
        if self._calls[key] == CAPTURED_AT:
            self._capture(key, function, given, found)
        return found

    def _capture(self, key: Hashable, function: Callable[[Values], Values], given: Values, found: Values) -> None:
        graph = torch.cuda.CUDAGraph()
        pool = next((other.pool() for other, _, _ in self._graphs.values()), None)
        inputs = {name: tensor.new_empty(_places(tensor)) for name, tensor in given.items()}
        _put(given, inputs)
        values: Values = {}
        try:
            with _capturing(graph, pool, _stream(self._on)):
                for name, value in function(inputs).items():
                    values[name] = self._room_for(name, value)
                    values[name].copy_(value)
            graph.replay()
            for name, value in found.items():
                apart = (values[name][: len(value)].float() - value.float()).norm()
                if not apart <= CLOSE + RELATIVE * value.float().norm():
                    raise RuntimeError(f"its {name} differ by {float(apart):.3g}")
        except RuntimeError as error:
            torch.cuda.synchronize()
            self._refused = True
            self._graphs.clear()
            logger.warning("no CUDA graph could be made, and steps take longer: %s", str(error).split("\n")[0])
        else:
            if len(self._graphs) == MOST:
                del self._graphs[next(iter(self._graphs))]
            self._graphs[key] = graph, inputs, values

    def _room_for(self, name: str, value: Tensor) -> Tensor:
        """Where a graph leaves a value: one place for all graphs, however many, as it is copied at once."""
        room = self._room.get(name)
        if room is None or room.numel() < value.numel() or room.dtype != value.dtype:
            room = self._room[name] = torch.empty_like(value, memory_format=torch.contiguous_format).flatten()
        return room[: value.numel()].view(value.shape)


def _places(tensor: Tensor) -> tuple[int, ...]:
    """The shape that inputs of that of ``tensor`` share: within an eighth of its rows, and of a vector twofold."""
    rows = len(tensor)
    if tensor.dim() == 1:
        return (max(LEAST_PLACES, 1 << max(rows - 1, 0).bit_length()),)
    step = 1 << max(rows.bit_length() - 4, 0)
    return -(-rows // step) * step, *tensor.shape[1:]


def _put(given: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> None:
    for name, tensor in given.items():
        inputs[name][: len(tensor)].copy_(tensor)
        inputs[name][len(tensor) :].zero_()


def _first(rows: int, values: Values) -> Values:
    return {name: value[:rows] for name, value in values.items()}


@cache
def _stream(device: torch.device) -> Any:
    """One for all captures: memory is kept by stream, and workspaces of cuBLAS are never given back."""
    return torch.cuda.Stream(device)


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
