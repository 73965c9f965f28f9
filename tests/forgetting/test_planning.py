from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

import cir
from bench import step
from cir.cli.parser import GPUS as NAMES
from cir.forgetting.memory import needed_to_forget
from cir.forgetting.mending import ASKED
from cir.forgetting.planning import GPUS, plan
from cir.model.finding import find_stack
from tests.tiny import TEXT, tiny_llama

LLAMA = LlamaConfig(**step.LLAMA_8B, dtype=torch.bfloat16)


def test_weights_and_layers_are_those_of_the_configuration_and_none_is_loaded():
    found = plan(LLAMA, 112, gpu="h200")
    assert found.weight_bytes == 2 * 8_030_261_248
    assert found.layers == (22, 31)
    assert found.peak_bytes > found.weight_bytes
    copies, kept = 2 * 10 * 3 * 4096 * 14336, 2 * 10 * 4 * 14336  # of ten layers' MLPs, and for a token
    assert copies + 768 * kept < found.optional_bytes < copies + 3 * 768 * kept
    assert found.fits


def test_the_floor_of_the_steps_is_counted():
    # Four reads of all sentences, forward and backward to the activations, over ten layers, 14 times; and each time
    # some of what has to stay, forward.
    found = plan(LLAMA, 64, gpu="h200", sentences=3, tokens=20, steps=14)
    layer = 2 * 4096 * (4096 + 1024) + 3 * 4096 * 14336
    assert found.phases["steps"].flops == pytest.approx(14 * 10 * layer * (4 * 4 * 64 * 3 * 20 + 2 * ASKED), rel=1e-3)


def test_more_facts_cost_less_each_and_a_better_gpu_less_time():
    few, many = (plan(LLAMA, n, gpu="h200") for n in (1, 112))
    assert many.seconds_a_fact < few.seconds_a_fact / 4
    seconds = [plan(LLAMA, 112, gpu=name).seconds for name in ("a100-80", "h100", "b200")]
    assert seconds == sorted(seconds, reverse=True)
    larger = LlamaConfig(**{**LLAMA.to_dict(), "num_hidden_layers": 40})
    assert [plan(model, 112, gpu="rtx4090").fits for model in (LLAMA, larger)] == [True, False]


def test_what_is_planned_is_what_a_run_says_it_needs(tokenizer):
    model, facts = tiny_llama(torch.bfloat16), [{"id": "f", "sentences": ["the alpha of beta1 is gamma1"]}]
    config = cir.CIRConfig(layers=0.5, max_steps=1, disruption_tokens=256, retain_tokens=256)
    report = cir.unlearn(model, tokenizer, facts, contrast=(), retain=TEXT, config=config, progress=False)
    planned = plan(model.config, 1, gpu="h100", config=config)
    assert planned.layers == report.layers
    stack = find_stack(model)
    on_gpu = needed_to_forget(model, stack, stack.writers(2), 256, config, torch.device("cuda"))
    assert planned.peak_bytes - planned.weight_bytes == on_gpu.peak
    # Without a GPU, copies of the weights are on the same device, and fewer tokens are run at once.
    on_cpu = needed_to_forget(model, stack, stack.writers(2), 256, config)
    assert report.predicted_memory == on_cpu.peak
    assert on_gpu.held < on_cpu.held


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gpu": "h1000"}, "gpu: expected one of a100-40, .*, got 'h1000'"),
        ({"facts": 0}, "facts: expected at least 1, got 0"),
        (
            {"model": "/no/such/model"},
            "expected a folder with config.json, that file, or a hub id, got '/no/such/model'",
        ),
        ({"sentences": 0}, "sentences: expected at least 1, got 0"),
        ({"model": LlamaConfig(hidden_act="silu", mlp_bias=True, num_hidden_layers=0)}, "expected decoder layers"),
    ],
)
def test_what_cannot_be_planned_is_refused(change, message):
    arguments = {"model": LLAMA, "facts": 1, "gpu": "h200", **change}
    with pytest.raises(ValueError, match=message):
        plan(arguments.pop("model"), arguments.pop("facts"), **arguments)


def test_the_command_reads_a_configuration_and_prints_json(tmp_path, capsys):
    from cir.cli import main

    assert tuple(GPUS) == NAMES
    LLAMA.save_pretrained(tmp_path)
    command = ["plan", "--model", str(tmp_path), "--gpu", "h200", "--facts", "112", "--sentences", "3"]
    assert main([*command, "--json", "--plot", str(tmp_path / "plan.png")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["weight_bytes"] == 2 * 8_030_261_248
    assert found["seconds_a_fact"] == pytest.approx(found["seconds"] / 112)
    assert set(found["phases"]) == {"measure", "fit", "steps"}
    assert (tmp_path / "plan.png").stat().st_size > 1000
    assert main(command) == 0
    assert "one by the Editor" in capsys.readouterr().out
    assert main([*command[:2], str(tmp_path / "config.json"), *command[3:]]) == 0


def test_a_lower_rank_takes_less_memory():
    small, large = (plan(LLAMA, 1, gpu="h200", config=replace(cir.CIRConfig(), rank=r)) for r in (0.125, 1.0))
    assert small.peak_bytes < large.peak_bytes
