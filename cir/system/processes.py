"""Several processes that run one program on parts of one model: what they have to decide alike."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """Those that have one model: their ``group``, and the ``device`` on which this one can tell the others."""

    group: dist.ProcessGroup
    device: torch.device


@contextmanager
def joined_group() -> Iterator[int]:
    """This process as one of those that ``torchrun`` has started, with a GPU each where there are: its number. Where
    they have a group already, it is left as it is.
    """
    if dist.is_initialized():
        yield dist.get_rank()
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield dist.get_rank()
    finally:  # after an exception too, so that others that wait for this one fail
        dist.destroy_process_group()


def all_here() -> None:
    """Wait until every process has come here."""
    dist.barrier()


_together: ContextVar[Processes | None] = ContextVar("together", default=None)


@contextmanager
def together(processes: Processes | None) -> Iterator[None]:
    """Within, the functions below are of these processes, each of which must call them in the same order; of None,
    which is one process alone, they give back what they are given.
    """
    token = _together.set(processes)
    try:
        yield
    finally:
        _together.reset(token)


def summed(x: Tensor) -> Tensor:
    """The sum of all processes' ``x``."""
    processes = _together.get()
    if processes is None:
        return x
    shared = x.to(processes.device, copy=True)
    dist.all_reduce(shared, group=processes.group)
    return shared.to(x.device)


def agreed(x: Tensor) -> Tensor:
    """``x`` of the first process: computed alike by all it may differ by rounding, and so what is decided by it."""
    processes = _together.get()
    if processes is None:
        return x
    shared = x.to(processes.device, copy=True).contiguous()
    dist.broadcast(shared, dist.get_global_rank(processes.group, 0), processes.group)
    return shared.to(x.device)


def least(value: int) -> int:
    """The lowest of all processes."""
    processes = _together.get()
    if processes is None:
        return value
    shared = torch.tensor(value, device=processes.device)
    dist.all_reduce(shared, dist.ReduceOp.MIN, processes.group)
    return int(shared)


def anywhere(value: bool) -> bool:
    """Whether it is so in one process at least."""
    return bool(-least(-int(value)))


def everywhere(value: bool) -> bool:
    """Whether it is so in all processes."""
    return bool(least(int(value)))
