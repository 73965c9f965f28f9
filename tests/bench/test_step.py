"""The benchmark of the step, on a model small enough for a test."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from bench import step
from cir.forgetting.forgetter import Forgetter


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    llama = {**step.SMOLLM2, "vocab_size": 45100, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
    config = replace(step.PAPER, rank_activation=4, rank_gradient=4, loss_layers=(1, 3), retain_tokens=512)
    config = replace(config, retain_batch_size=2)
    llama = {**llama, "num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setitem(step.WORKLOADS, "small", step.Workload(llama, torch.float32, 3, config, 512))


@pytest.mark.parametrize("form", ["ours", "saving", "eager", "trimmed", "ascent"])
def test_each_form_does_the_work_of_w1(form):
    run = step.Run(step.WORKLOADS["small"], epochs=2)
    before = [target.linear.weight.detach().clone() for target in run.targets]
    run.batch(form)
    assert all(not torch.equal(t.linear.weight, w) for t, w in zip(run.targets, before, strict=True))
    assert not any(target.linear.weight.requires_grad for target in run.targets)


def test_one_fact_takes_all_its_steps_in_the_late_layers():
    run = step.Run(step.WORKLOADS["small"], epochs=1)
    before = {name: weight.detach().clone() for name, weight in run.model.named_parameters()}
    with patch.object(Forgetter, "apply", autospec=True, side_effect=Forgetter.apply) as applied:
        run.one_fact()()
    odds = [call.args[1].odds for call in applied.call_args_list]
    assert len(odds) == step.ONE_FACT_STEPS
    assert all(after < before for before, after in itertools.pairwise(odds))
    changed = {name for name, weight in run.model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == {f"model.layers.3.{name}.weight" for name in ("self_attn.o_proj", "mlp.down_proj")}


def test_what_a_row_says():
    row = json.loads(json.dumps(step.measured("small", "W2", "ours", epochs=1)))
    assert row["facts"] == 1
    assert row["seconds"] > 0
    assert row["total_bytes"] >= row["peak_bytes"]
    assert row["weight_bytes"] > 45100 * 64 * 4
