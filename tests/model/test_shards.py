"""What one process can tell of models that are sharded; tests/distributed has two."""

from __future__ import annotations

import pytest
import torch

from cir.model.shards import Split, check_plan, gathered_bytes, local, owners_of, processes_of, whole
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
