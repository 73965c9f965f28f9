from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.utils import prune
from transformers import CONFIG_MAPPING as CONFIGS
from transformers import AutoModelForCausalLM

import cir
from cir.model.finding import find_stack, unwrapped
from cir.model.sites import sites_of
from tests.tiny import TEXT, facts, knowing_llama, tiny_llama, word_tokenizer

WIDE = cir.EditConfig(target_recall=0.3, keep=0.9, budget=1.0, worst_window=1.0)


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
    assert mlp == stack.mlps[1].down
    assert [target.name.split(".")[2] for target in rest] == ["2", "2"]
    assert [(s.width, s.kind) for s in sites_of([attention])] == [(16, "activation"), (16, "gradient")]


class Mute(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.keys = torch.nn.Linear(24, 20)

    def forward(self, hidden_states, **given):
        self.keys(hidden_states)
        return torch.zeros_like(hidden_states), None


def test_a_layer_whose_attention_puts_nothing_out_is_refused(model):
    model.model.layers[2].self_attn = Mute()
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
    with pytest.raises(ValueError, match="got none in MambaForCausalLM"):
        find_stack(
            AutoModelForCausalLM.from_config(CONFIGS["mamba"](hidden_size=16, num_hidden_layers=2, vocab_size=9))
        )
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
    made = tiny_llama()
    torch.nn.utils.parametrizations.weight_norm(made.model.layers[1].mlp.up_proj)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj: expected a weight that is an ordinary"):
        find_stack(made)
    pruned = tiny_llama()
    prune.l1_unstructured(pruned.model.layers[3].mlp.down_proj, "weight", amount=0.5)
    with pytest.raises(ValueError, match=r"layers\.3\.mlp\.down_proj: expected a weight that is an ordinary"):
        find_stack(pruned)
    projected = tiny_llama()
    prune.l1_unstructured(projected.model.layers[3].self_attn.o_proj, "weight", amount=0.5)
    with pytest.raises(ValueError, match=r"self_attn\.o_proj: expected a weight that is an ordinary"):
        find_stack(projected).writers(2)
    quantized = tiny_llama()
    weight = quantized.model.layers[0].mlp.gate_proj.weight
    quantized.model.layers[0].mlp.gate_proj.weight = torch.nn.Parameter(weight.to(torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"got Linear with torch.uint8; load the model without quantization"):
        find_stack(quantized)


def test_refuses_models_with_adapters():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(tiny_llama(), config)
    added = tiny_llama()
    added.add_adapter(config)
    for model in (wrapped, added):
        with pytest.raises(ValueError, match=r"expected a model without adapters, got .* merge_and_unload\(\) first"):
            find_stack(model)
    assert find_stack(wrapped.merge_and_unload()).mlps


def test_wrapped_models_are_what_they_wrap():
    model, tokenizer = knowing_llama(), word_tokenizer()
    told = facts(4)
    config = cir.CIRConfig(layers=0.5, retain_tokens=1024)
    plain = cir.Subspaces.fit(model, tokenizer, TEXT, told[1:], config=config, progress=False)
    for wrapped in (torch.compile(model, backend="eager"), torch.nn.DataParallel(model)):
        assert unwrapped(wrapped) is model
        fitted = cir.Subspaces.fit(wrapped, tokenizer, TEXT, told[1:], config=config, progress=False)
        assert list(fitted) == list(plain)
    with cir.Editor(torch.nn.DataParallel(model), tokenizer, plain, text=TEXT, config=WIDE) as editor:
        edit = editor.forget(told[0])
        names = dict(model.named_modules())
        linears = {target.name: target.linear for target in edit.targets_in(torch.nn.DataParallel(model))}
        assert linears == {name: names[name] for name in edit.factors}


def test_refuses_models_compiled_in_place():
    whole, part = tiny_llama(), tiny_llama()
    whole.compile(backend="eager")
    part.model.layers[1] = torch.compile(part.model.layers[1], backend="eager")
    for model, where in ((whole, "all of it"), (part, "model.layers.1")):
        with pytest.raises(ValueError, match=f"got '{where}' compiled in place"):
            find_stack(model)


LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
LATENT |= {"num_attention_heads": 4, "num_key_value_heads": 4}
ROUTED = {
    "moe_intermediate_size": 8,
    "n_routed_experts": 4,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
}
EXPERTS = {
    "qwen2_moe": {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 24, "num_experts": 4},
    "deepseek_v3": {**ROUTED, **LATENT},
    "glm4_moe": ROUTED,
    "llama4_text": {"num_local_experts": 2, "interleave_moe_layer_step": 1, "intermediate_size_mlp": 40},
}


@pytest.mark.parametrize("family", EXPERTS)
def test_of_mixtures_the_experts_are_found_and_what_all_tokens_share(family):
    if family not in CONFIGS:
        pytest.skip(f"no {family} in this transformers")
    model = build(family, **EXPERTS[family])
    stack, count = find_stack(model), EXPERTS[family].get("num_local_experts", 4)
    mlp = stack.mlps[-1]
    assert [target.experts for target in mlp.targets] == [0, 0, 0, count, count]
    assert mlp.writers == (mlp.targets[2], mlp.targets[4])
    assert stack.writers(len(stack.mlps) - 1)[0].name.endswith("self_attn.o_proj")
    for target in mlp.targets:
        assert model.get_parameter(target.parameter_name) is target.parameter
        width = target.activation.width, target.gradient.width
        assert target.weight.shape[-2:] == width[::-1]
        assert all(target.part(name).shape == target.weight.shape[-2:] for name in target.names)
    assert mlp.module is not None
    assert {target.linear for target in mlp.targets} <= mlp.inside == set(mlp.module.modules())


def test_refuses_experts_that_do_not_say_what_is_expected():
    model = build("glm4_moe", **EXPERTS["glm4_moe"])
    model.model.layers[1].mlp.experts.forward = lambda x, routes, shares: x
    with pytest.raises(ValueError, match="or experts as transformers runs them"):
        find_stack(model)
    model = build("glm4_moe", **EXPERTS["glm4_moe"])
    model.model.layers[1].mlp.experts.has_post_expert_norm = True
    with pytest.raises(ValueError, match="expected a dense model, or experts as transformers has them"):
        find_stack(model)


def test_refuses_experts_of_two_kinds_or_of_another_width():
    model = build("glm4_moe", **EXPERTS["glm4_moe"])
    block = model.model.layers[1].mlp
    block.more = copy.deepcopy(block.experts)
    with pytest.raises(ValueError, match=r"one module of experts a layer, got layers.1.mlp.experts and .*mlp.more"):
        find_stack(model)
    del block.more
    block.experts.down_proj = torch.nn.Parameter(torch.zeros(4, 20, 8))
    with pytest.raises(ValueError, match=r"experts from and to 16, the hidden size, got from 16 to 20"):
        find_stack(model)


def test_the_projection_of_attention_is_the_last_that_is_run_and_not_the_last_declared():
    model = tiny_llama()
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.gate_proj = torch.nn.Linear(24, 24)

        def gated(hidden_states, inner=attention.forward, gate=attention.gate_proj, **given):
            return inner(hidden_states * gate(hidden_states).sigmoid(), **given)

        attention.forward = gated
    assert {t.name.rpartition(".")[2] for t in find_stack(model).writers(0)} == {"o_proj", "down_proj"}
    broken = tiny_llama()
    broken.model.forward = lambda input_ids, use_cache: broken.model.nothing
    with pytest.raises(ValueError, match="run on input_ids alone, got 'LlamaModel' object has no attribute"):
        find_stack(broken).writers(0)
