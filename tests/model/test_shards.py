"""What one process can tell of models that are sharded; tests/distributed has two."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor

from cir.model.finding import find_stack
from cir.model.shards import (
    Split,
    check_plan,
    gathered_bytes,
    is_sharded,
    local,
    owners_of,
    processes_of,
    whole,
)
from tests.tiny import tiny_llama


def test_a_whole_model_is_of_one_process():
    model = tiny_llama()
    weight = model.lm_head.weight
    assert processes_of(model) is None
    assert owners_of(model) == {}
    assert Split.of(weight) is None
    assert local(weight) is whole(weight) is weight


def test_what_is_gathered_at_once_is_the_largest_of_three():
    modules = [torch.nn.Linear(4, count, bias=False) for count in (1, 2, 3, 4)]
    assert gathered_bytes({module: module for module in modules}) == 4 * 4 * (2 + 3 + 4)
    assert gathered_bytes(dict.fromkeys(modules, modules[0])) == 4 * 4 * 10
    assert gathered_bytes({}) == 0


def test_a_plan_that_was_not_carried_out_is_none():
    model, name = tiny_llama(), "model.layers.3.mlp.down_proj"
    with pytest.raises(ValueError, match=f"{name}: .* got one sharded along dimension 1 whose plan is none"):
        check_plan(model, name, Split(1, 0, 20))
    model._tp_size = 2
    check_plan(model, name, Split(1, 0, 20))
    with pytest.raises(ValueError, match="got one sharded along dimension 0 whose plan is rowwise"):
        check_plan(model, name, Split(0, 0, 20))


@pytest.fixture
def mesh(tmp_path):
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_other_ways_to_shard_are_refused(mesh):
    model = tiny_llama()
    linear = model.model.layers[0].mlp.up_proj
    linear.weight = torch.nn.Parameter(distribute_tensor(linear.weight.data, mesh, [Replicate()]))
    with pytest.raises(ValueError, match=r"expected a weight sharded along one dimension, .* got .*Replicate"):
        find_stack(model, sharded=True)
    with pytest.raises(ValueError, match=r"expected a model sharded by FSDP2 .* got FullyShardedDataParallel"):
        find_stack(FullyShardedDataParallel(tiny_llama(), device_id=torch.device("cpu")), sharded=True)


def test_weights_that_another_wrote_are_not_kept_from_before(mesh):
    """What FSDP has gathered in a forward is let go before weights are read."""
    model = fully_shard(tiny_llama())
    target = find_stack(model, sharded=True).targets(0)[0]
    model(input_ids=torch.arange(4)[None])
    assert not is_sharded(target.linear.weight)  # the root stays gathered
    assert is_sharded(target.parameter)
    target.weight.fill_(0.25)
    model(input_ids=torch.arange(4)[None])
    assert torch.equal(target.linear.weight, torch.full_like(target.linear.weight, 0.25))
