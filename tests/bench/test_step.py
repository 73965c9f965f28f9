"""The benchmark of the step, on a model small enough for a test."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from bench import step


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


@pytest.mark.parametrize("form", ["ours", "saving"])
def test_one_fact_and_what_a_row_says(form):
    row = json.loads(json.dumps(step.measured("small", "W2", form, epochs=1)))
    assert row["facts"] == 1
    assert row["seconds"] > 0
    assert row["total_bytes"] >= row["peak_bytes"]
    assert row["weight_bytes"] > 45100 * 64 * 4
