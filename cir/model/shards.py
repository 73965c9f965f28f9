"""Weights that are divided over processes: which part of each is here, and how the whole is had.

Two kinds: by FSDP2 (``fully_shard``), whose modules gather their weights for as long as their forwards and backwards
take; and tensor parallel by the plan of transformers, where each process multiplies with its own part.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cir.system.processes import Processes

if dist.is_available():
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor, Shard
else:  # nothing is divided
    FSDPModule = FullyShardedDataParallel = DTensor = Shard = ()  # type: ignore[assignment, misc]

PLANS = {"colwise": 0, "rowwise": 1}
"""Ways of transformers to divide a linear, and the dimension of its matrix (D_out, D_in) that is divided."""


@dataclass(frozen=True)
class Split:
    """The part of a parameter that is here: ``start`` to ``stop`` of the dimension ``dim``."""

    dim: int
    start: int
    stop: int

    @classmethod
    def of(cls, parameter: Tensor) -> Split | None:
        """None if it is whole.

        Raises:
            ValueError: if it is divided along two dimensions, or in turns.
        """
        if not is_sharded(parameter):
            return None
        parameter = cast(DTensor, parameter)
        (placement, *more), mesh = parameter.placements, parameter.device_mesh
        if more or type(placement) is not Shard:
            raise ValueError(
                f"expected a weight sharded along one dimension, by FSDP2 or a tp_plan, got {parameter.placements}"
            )
        dim = placement.dim % parameter.ndim
        size = parameter.shape[dim]
        each = -(-size // mesh.size())
        start = min(each * mesh.get_local_rank(), size)
        return cls(dim, start, min(start + each, size))


def is_sharded(parameter: Tensor) -> bool:
    return isinstance(parameter, DTensor)


@torch.no_grad()
def local(parameter: Tensor) -> Tensor:
    """The part that is here, which when written to changes the parameter; the parameter itself where it is whole."""
    return cast(DTensor, parameter).to_local() if is_sharded(parameter) else parameter


@torch.no_grad()
def whole(parameter: Tensor) -> Tensor:
    """All of it, which every process must ask for."""
    return cast(DTensor, parameter).full_tensor() if is_sharded(parameter) else parameter


def group_of(parameter: Tensor) -> dist.ProcessGroup:
    """The processes over which it is divided."""
    return cast(DTensor, parameter).device_mesh.get_group()


@torch.no_grad()
def gathered(rows: Tensor, parameter: Tensor, width: int) -> Tensor:
    """Rows (T, width), of whose columns each process has those of its part of a ``parameter``."""
    mesh = cast(DTensor, parameter).device_mesh
    shape = (len(rows), width)
    return DTensor.from_local(
        rows.contiguous(), mesh, [Shard(1)], run_check=False, shape=torch.Size(shape), stride=(width, 1)
    ).full_tensor()


def processes_of(model: Any) -> Processes | None:
    """Those over which a model is divided; None if it is whole.

    Raises:
        ValueError: if it is divided in a way that is not supported.
    """
    if not isinstance(model, nn.Module):
        return None
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(
            "expected a model sharded by FSDP2 (torch.distributed.fsdp.fully_shard), got FullyShardedDataParallel"
        )
    reshard(model)
    meshes = {parameter.device_mesh for parameter in model.parameters() if isinstance(parameter, DTensor)}
    if not meshes:
        return None
    if len(meshes) > 1 or next(iter(meshes)).ndim > 1:
        raise ValueError(
            f"expected a model sharded over processes in one dimension, got {len(meshes)} meshes of "
            f"{max(mesh.ndim for mesh in meshes)}"
        )
    (mesh,) = meshes
    device = torch.device(mesh.device_type)
    waiting = next((p for p in model.parameters() if p.device.type != device.type), None)
    if waiting is not None:
        raise ValueError(f"expected shards on {device}, which computes, got some that wait on {waiting.device}")
    return Processes(mesh.get_group(), device)


def check_whole(model: Any) -> None:
    """Raise ValueError if a model is divided over processes."""
    if processes_of(model) is not None:
        raise ValueError(
            "expected a whole model, got a model sharded over processes, which cir.unlearn (not in the paper's way), "
            "cir.Subspaces.fit and cir.evaluate alone take"
        )


def reshard(model: nn.Module) -> None:
    """Let go of what FSDP has gathered; parameters are those that are kept."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def owners_of(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """By module, the one of FSDP that gathers its weights."""
    found: dict[nn.Module, nn.Module] = {}

    def visit(module: nn.Module, owner: nn.Module | None) -> None:
        owner = module if isinstance(module, FSDPModule) else owner
        if owner is not None:
            found[module] = owner
        for child in module.children():
            visit(child, owner)

    visit(model, None)
    return found


def gathered_bytes(owners: Mapping[nn.Module, nn.Module]) -> int:
    """Bytes that FSDP has gathered at once beside the parts: two of its modules, and what it keeps of a third, the
    embeddings say.
    """
    sizes: Counter[nn.Module] = Counter()
    for module, owner in owners.items():
        sizes[owner] += sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))
    return sum(size for _, size in sizes.most_common(3))


def check_plan(model: nn.Module, name: str, split: Split) -> None:
    """That a linear, which no FSDP gathers, is divided as :data:`PLANS` say.

    Raises:
        ValueError: if it is not, by the plan of the model.
    """
    carried_out = (getattr(model, "tp_size", None) or 1) > 1
    plan: dict[str, str] = getattr(model, "tp_plan", None) or {} if carried_out else {}
    way = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name), "none")
    if PLANS.get(way) != split.dim:
        raise ValueError(
            f"{name}: expected a weight sharded by FSDP2, or as {' or '.join(PLANS)} by the tp_plan of transformers, "
            f"got one sharded along dimension {split.dim} whose plan is {way}"
        )


@contextmanager
def ungathered(module: nn.Module) -> Iterator[None]:
    """Its forwards, which read no weight, gather none."""
    if not isinstance(module, FSDPModule):
        yield
        return
    before = {name: getattr(module, name) for name in ("_forward_pre_hooks", "_forward_hooks")}
    try:
        for name, hooks in before.items():
            setattr(module, name, type(hooks)())
        yield
    finally:
        for name, hooks in before.items():
            setattr(module, name, hooks)
