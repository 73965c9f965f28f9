from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cir.model.finding import find_stack
from cir.model.offload import _visiting, free_memory, offloaded, upper_modules

CPU = torch.device("cpu")
LAST = 2


def test_only_what_no_forget_step_reads_waits_on_the_host(model):
    upper = upper_modules(model, find_stack(model), LAST)
    assert upper == [*model.model.layers[LAST + 1 :], model.lm_head]
    model.lm_head.weight = model.model.embed_tokens.weight
    assert upper_modules(model, find_stack(model), LAST) == [*model.model.layers[LAST + 1 :]]


def test_offloaded_the_model_says_the_same_and_comes_back_as_it_was(model, unchanged):
    unchanged(model)
    stack, ids = find_stack(model), torch.arange(12).view(1, -1)
    expected = model(input_ids=ids).logits
    with offloaded(model, stack, LAST, CPU):
        hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in upper_modules(model, stack, LAST)]
        assert hooks == [(1, 1)] * 2
        assert torch.equal(model(input_ids=ids).logits, expected)
    unchanged(model)


def test_a_module_fetches_its_weights_to_run_and_drops_them_whatever_happens(monkeypatch):
    monkeypatch.setattr(Tensor, "to", lambda tensor, *a, **k: tensor + 1)  # as if the device had other bits
    module = torch.nn.Linear(2, 2)
    before = module.weight.detach().clone()
    _visiting(module, CPU)
    assert torch.allclose(module(torch.zeros(2)), module.bias + 1)
    assert torch.equal(module.weight, before)
    with pytest.raises(RuntimeError):
        module(torch.ones(3))
    assert torch.equal(module.weight, before)


def test_free_memory_is_told_where_the_system_tells_it():
    free = free_memory(CPU)
    assert free is None or free > 2**20
