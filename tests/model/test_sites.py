from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING as CONFIGS
from transformers import AutoModelForCausalLM

from cir.model.sites import find_stack, sites_of
from tests.tiny import tiny_llama


def build(family: str, **changes):
    config = CONFIGS[family](
        **{
            "vocab_size": 50,
            "hidden_size": 16,
            "intermediate_size": 40,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 4,
            "pad_token_id": 0,
            **changes,
        }
    )
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2"])
def test_finds_the_gated_mlps_of_a_family(family):
    stack = find_stack(build(family))
    assert len(stack.mlps) == len(stack.layers) == 3
    shapes = [(t.linear.in_features, t.linear.out_features) for t in stack.mlps[1].targets]
    assert shapes == [(16, 40), (16, 40), (40, 16)]
    gate, up, down = stack.mlps[1].targets
    assert gate.activation == up.activation != down.activation
    assert "layers.1." in gate.activation.name
    sites = sites_of(stack.targets(1))
    assert [s.kind for s in sites].count("activation") == 2 * 2
    assert [s.kind for s in sites].count("gradient") == 3 * 2


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2"])
def test_finds_what_writes_to_the_residual_stream(family):
    stack = find_stack(build(family))
    attention, mlp, *rest = stack.writers(1)
    assert attention.name == "model.layers.1.self_attn.o_proj"
    assert attention.linear is stack.layers[1].self_attn.o_proj
    assert mlp == stack.mlps[1].targets[2]
    assert [target.name.split(".")[2] for target in rest] == ["2", "2"]
    assert [(s.width, s.kind) for s in sites_of([attention])] == [(16, "activation"), (16, "gradient")]


def test_a_layer_whose_attention_puts_nothing_out_is_refused(model):
    model.model.layers[2].self_attn = torch.nn.Linear(24, 20)
    assert len(find_stack(model).writers(3)) == 2
    with pytest.raises(
        ValueError, match=r"model.layers.2: expected an attention whose output projection is a linear"
    ):
        find_stack(model).writers(1)


def test_names_are_the_models_own(model):
    names = dict(model.named_modules())
    for target in [*find_stack(model).targets(3), *find_stack(model).writers(0)]:
        assert names[target.gradient.name.removesuffix(".out")] is target.linear


def test_refuses_models_that_it_cannot_edit():
    with pytest.raises(ValueError, match="got none in GPT2LMHeadModel"):
        find_stack(AutoModelForCausalLM.from_config(CONFIGS["gpt2"](n_embd=16, n_layer=2, n_head=2, vocab_size=9)))
    with pytest.raises(ValueError, match="on the meta device"), torch.device("meta"):
        find_stack(tiny_llama())
    tied = tiny_llama()
    tied.model.layers[1].mlp.up_proj.weight = tied.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ValueError, match=r"weight of its own.*layers\.1\.mlp\.up_proj"):
        find_stack(tied)
    partial = tiny_llama()
    partial.model.layers[2].mlp = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"every layer of layers, got none in \[2\]"):
        find_stack(partial)
    quantized = tiny_llama()
    weight = quantized.model.layers[0].mlp.gate_proj.weight
    quantized.model.layers[0].mlp.gate_proj.weight = torch.nn.Parameter(weight.to(torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"got Linear with torch.uint8; load the model without quantization"):
        find_stack(quantized)
