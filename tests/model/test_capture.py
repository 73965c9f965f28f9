from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING

from cir.data.tokens import pad
from cir.forgetting.objectives import mlp_breaking, original_output
from cir.model.capture import answering, capture
from cir.model.finding import find_stack
from cir.model.packing import keeps_apart, packed_inputs
from cir.model.sites import sites_of
from cir.proof.relearning import sentence_loss
from tests.model.test_sites import build

BATCH = pad([[1, 5, 9, 20, 7], [1, 30, 2, 11], [1, 8, 44, 3, 16]])


def loss_of(outputs, mask):
    return sum((o[mask] ** 3).sum() for o in outputs.values())


def real(rows):
    """(B, L, D) of the padded batch to (N, D)"""
    return rows[BATCH.attention_mask]


@pytest.mark.parametrize("layers_require_grad", [True, False])
def test_activations_and_gradients_are_autograds(model, layers_require_grad, unchanged):
    for parameter in model.parameters():
        parameter.requires_grad_(layers_require_grad)
    model.train()
    model.model.layers[1].eval()
    unchanged(model)
    stack, mask = find_stack(model), BATCH.predicting(1)
    with capture(model, stack, 2) as tape:
        hidden = tape.forward(BATCH, mask)
        tokens = tape.backward(loss_of(hidden.mlp_outputs((1, 2)), mask), hidden)
        assert all(p.grad is None for p in model.parameters())
    unchanged(model)

    # The same with plain hooks on the whole model.
    seen, mlps = {}, {}
    for target in stack.targets(2):

        def keep(module, args, output, target=target):
            output.requires_grad_(True).retain_grad()
            seen[target] = (args[0], output)

        target.linear.register_forward_hook(keep)
    for layer in (1, 2):
        stack.mlps[layer].down.linear.register_forward_hook(lambda m, a, out, layer=layer: mlps.update({layer: out}))
    model.eval()(input_ids=BATCH.input_ids, attention_mask=BATCH.attention_mask)
    loss_of({layer: real(out) for layer, out in mlps.items()}, mask).backward()
    assert set(tokens) == {site.name for site in sites_of(stack.targets(2))}
    for target, (a, y) in seen.items():
        torch.testing.assert_close(tokens[target.activation.name], real(a)[mask], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(tokens[target.gradient.name], real(y.grad)[mask], atol=1e-4, rtol=1e-4)


def test_nothing_above_the_last_layer_runs(model):
    assert keeps_apart(model.model)  # once, by whole forwards
    ran = []
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    model.lm_head.register_forward_hook(lambda *_: ran.append("head"))
    with capture(model, find_stack(model), 1) as tape, torch.no_grad():
        hidden = tape.forward(BATCH, BATCH.counted(0))
        assert ran == [0, 1]
        ran.clear()
        whole = model(input_ids=BATCH.input_ids, attention_mask=BATCH.attention_mask, output_hidden_states=True)
        assert ran == [0, 1, 2, 3, "head"]
    torch.testing.assert_close(hidden.real(hidden.last), whole.hidden_states[2][BATCH.attention_mask])


def test_rows_that_are_observed_are_those_that_were_kept(model):
    seen = {}
    with capture(model, find_stack(model), 1) as tape, torch.no_grad():
        kept = tape.forward(BATCH, BATCH.counted(1)).tokens
        hidden = tape.forward(BATCH, BATCH.counted(1), seen.update)
    assert seen.keys() == kept.keys()
    for name, rows in kept.items():
        assert torch.equal(rows, seen[name])
        assert not hidden.tokens[name].numel()


def test_everything_is_restored_after_an_exception(model, unchanged):
    unchanged(model)
    stack = find_stack(model)
    with pytest.raises(RuntimeError, match="stop here"), capture(model, stack, 2) as tape:  # noqa: PT012
        stack.mlps[1].down.linear.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop here")))
        tape.forward(BATCH, BATCH.counted(0))
    stack.mlps[1].down.linear._forward_hooks.clear()
    unchanged(model)


def test_a_second_capture_is_refused_and_harms_nothing(model, unchanged):
    unchanged(model)
    stack = find_stack(model)
    with capture(model, stack, 1) as tape:
        with pytest.raises(RuntimeError, match=r"layers\.0.*already captured"), capture(model, stack, 1):
            pass
        tape.forward(BATCH, BATCH.counted(0))
    unchanged(model)


def test_another_librarys_wrapper_comes_back(model):
    linear = find_stack(model).targets(0)[0].linear
    wrapper = linear.forward
    linear.forward = wrapper
    with capture(model, find_stack(model), 1):
        assert linear.forward is not wrapper
    assert linear.__dict__["forward"] is wrapper


def test_full_forwards_inside_a_capture_leave_no_tokens_and_cost_no_graph(model):
    with capture(model, find_stack(model), 1) as tape:
        hidden = tape.forward(BATCH, BATCH.counted(1))
        before = dict(hidden.tokens)
        with torch.no_grad():
            model(input_ids=torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]]))
        assert hidden.tokens.keys() == before.keys()
        mask = BATCH.counted(1)
        outputs = hidden.mlp_outputs([0])
        originals = {0: original_output(outputs[0].detach(), mask)}
        tokens = tape.backward(mlp_breaking(outputs, originals, mask), hidden)
    assert all(len(rows) == int(mask.sum()) for rows in tokens.values())


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("mistral", {"sliding_window": 3}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("gemma", {}),
        ("gemma2", {"sliding_window": 3}),
        ("gemma3_text", {"sliding_window": 3}),
        ("olmo2", {}),
    ],
)
def test_sentences_run_end_to_end_do_not_see_each_other(family, changes):
    model = build(family, **changes).eval()
    rows = [1, 5, 9, 20, 7, 8, 9], [1, 30, 2, 11], [1, 8]
    batch = pad(rows)
    with capture(model, find_stack(model), 1) as tape, torch.no_grad():
        hidden = [tape.forward(each, each.counted(0)) for each in (batch, *(pad([row]) for row in rows))]
        together, *alone = (each.real(each.last) for each in hidden)
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)


LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MIXED = ["linear_attention", "full_attention", "linear_attention"]
MAMBA = {"mamba_d_state": 8, "mamba_chunk_size": 16, "mamba_d_head": 8}
HYBRIDS = {
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_n_groups": 1},
    "bamba": {**MAMBA, "mamba_n_heads": 8, "attn_layer_indices": [1]},
    "qwen3_next": {**LINEAR, "layer_types": MIXED, "num_experts": 0, "mlp_only_layers": [0, 1, 2]},
    "qwen3_5_text": {**LINEAR, "layer_types": MIXED},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", HYBRIDS)
def test_sentences_are_padded_where_layers_would_run_through_them(family, dtype):
    if family not in CONFIG_MAPPING:
        pytest.skip(f"no {family} in this transformers")
    model = build(family, hidden_size=32, head_dim=8, **HYBRIDS[family]).eval().to(dtype)
    stack = find_stack(model)
    assert not keeps_apart(stack.decoder)
    rows = [1, 5, 9, 20, 7, 8, 9], [1, 30, 2, 11], [1, 8]
    batch = pad(rows)
    near = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 3e-2, "rtol": 3e-2}
    with capture(model, stack, 1) as tape, torch.no_grad():
        hidden = [tape.forward(each, each.counted(0)) for each in (batch, *(pad([row]) for row in rows))]
        together, *alone = (each.real(each.last) for each in hidden)
    torch.testing.assert_close(together, torch.cat(alone), **near)
    with torch.no_grad():
        losses = [float(sentence_loss(model, stack, each)) for each in (batch, *(pad([row]) for row in rows))]
    counts = [len(row) - 1 for row in rows]
    mean = sum(loss * n for loss, n in zip(losses[1:], counts, strict=True)) / sum(counts)
    assert losses[0] == pytest.approx(mean, rel=1e-4 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma2", "gemma3_text", "olmo2"])
def test_sentences_are_packed_where_all_layers_attend(family, dtype):
    stack = find_stack(build(family).eval().to(dtype))
    assert keeps_apart(stack.decoder)
    assert "position_ids" in packed_inputs(stack, pad([[1, 2], [3]]))[0]


@pytest.mark.parametrize("first", [0, 1, 3])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "qwen3"])
def test_answers_and_their_gradients_are_autograds(family, first, unchanged):
    changes = {"num_hidden_layers": 4, "attn_implementation": "eager"}
    if family.startswith("gemma"):
        changes |= {"final_logit_softcapping": 3.0, "sliding_window": 3}
    model = build(family, **changes).eval()
    unchanged(model)
    stack = find_stack(model)
    at = torch.tensor([1, 3, 6, 9])  # of the 14 real tokens, row after row
    with answering(model, stack, first) as tape:
        below = tape.below(BATCH)
        for _ in range(2):  # the layers below are run once
            predicted, hidden = tape.predict(below, at)
            tokens = tape.backward(predicted[:, 7].sum(), hidden)
    unchanged(model)

    seen = {}
    tapped = list({*stack.writers(first), *(t for mlp in stack.mlps[first:] for t in mlp.targets)})
    for target in tapped:

        def keep(module, args, output, target=target):
            output.requires_grad_(True).retain_grad()
            seen[target] = (args[0], output)

        target.linear.register_forward_hook(keep)
    logits = model(input_ids=BATCH.input_ids, attention_mask=BATCH.attention_mask.long(), use_cache=False).logits
    want = real(logits)[at]
    torch.testing.assert_close(predicted, want, atol=1e-5, rtol=1e-4)
    want[:, 7].sum().backward()
    assert set(tokens) == {site.name for site in sites_of(tapped)}
    for target, (a, y) in seen.items():
        torch.testing.assert_close(tokens[target.activation.name], real(a)[at], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(tokens[target.gradient.name], real(y.grad)[at], atol=1e-5, rtol=1e-4)


def test_what_fails_in_an_answer_leaves_the_model_as_it_was(model, unchanged):
    unchanged(model)
    stack = find_stack(model)
    with answering(model, stack, 2) as tape:
        below = tape.below(BATCH)
        with pytest.raises(IndexError):
            tape.predict(below, torch.tensor([99]))
        tape.predict(below, torch.tensor([1]))
        with pytest.raises(RuntimeError, match="already captured"), answering(model, stack, 3):
            pass
    unchanged(model)
    model.get_output_embeddings = lambda: None
    with pytest.raises(ValueError, match="expected a model with an LM head"), answering(model, stack, 2):
        pass
