from __future__ import annotations

import pytest
import torch

from cir.config import CIRConfig
from cir.data.facts import load_facts
from cir.forgetting.locate import locate, located, pair_layer
from tests.tiny import deepened, facts, knowing_llama


@pytest.fixture(scope="module")
def model():
    return knowing_llama()


def test_what_is_ablated_is_the_same_of_every_fact(model, tokenizer, unchanged):
    unchanged(model)
    found = locate(model, tokenizer, facts(6), progress=False)
    unchanged(model)
    assert found.recall > 0.9
    assert [len(group) for group in found.groups] == [1] * 4
    assert found.ablated.keys() == {(kind, place) for kind in ("mlp", "attention") for place in ("subject", "last")}
    left = torch.tensor(list(found.ablated.values()))
    assert left.shape == (4, 4)
    assert left.min() < 0.5 < 0.9 * found.recall < left.max()


def test_it_is_mean_ablation_written_out(model, tokenizer):
    """The attention of layer 0 at the last token, by hand: one forward for the mean, one with it."""
    items = facts(4)
    prompts = [tokenizer(item["probes"][0]["prompt"])["input_ids"] for item in items]
    targets = [tokenizer(item["probes"][0]["target"], add_special_tokens=False)["input_ids"] for item in items]
    assert len({len(prompt) for prompt in prompts}) == 1
    assert all(len(target) == 1 for target in targets)
    seen = []
    attention = model.model.layers[0].self_attn

    def keep(module, args, output):
        seen.append(output[0][:, -1].clone())

    def ablate(module, args, output):
        output[0][:, -1] = seen[0].mean(0)
        return output

    probabilities = []
    for hook in (keep, ablate):
        handle = attention.register_forward_hook(hook)
        with torch.no_grad():
            logits = model(torch.tensor(prompts)).logits[:, -1]
        handle.remove()
        probabilities.append(float(logits.softmax(-1)[range(4), [t[0] for t in targets]].mean()))
    found = locate(model, tokenizer, items, progress=False)
    assert found.recall == pytest.approx(probabilities[0], rel=1e-4)
    assert found.ablated["attention", "last"][0] == pytest.approx(probabilities[1], rel=1e-3)


def test_layers_are_ablated_in_groups_and_shown_in_a_table(model, tokenizer):
    found = locate(model, tokenizer, facts(4), width=3, progress=False)
    assert found.groups == (range(3), range(3, 4))
    head, *lines = found.table().splitlines()
    assert head.split()[-2:] == ["0-2", "3"]
    assert lines[0].split()[:2] == ["mlp,", "subject"]
    assert len(lines) == 4


def test_the_subject_is_the_rarest_token_or_the_one_named(model, tokenizer):
    items = facts(4)
    named = {item["id"]: f"beta{item['id'][1:]}" for item in items}
    by_name = locate(model, tokenizer, items, subjects=named, progress=False)
    assert by_name == locate(model, tokenizer, items, progress=False)
    elsewhere = locate(model, tokenizer, items, subjects=dict.fromkeys(named, "gamma"), progress=False)
    assert elsewhere.ablated["mlp", "subject"] != by_name.ablated["mlp", "subject"]
    assert elsewhere.ablated["mlp", "last"] == by_name.ablated["mlp", "last"]


def test_what_cannot_be_located_is_refused(model, tokenizer, unchanged):
    unchanged(model)
    with pytest.raises(ValueError, match="expected at least two with probes, whose mean is taken, got 1"):
        locate(model, tokenizer, facts(1), progress=False)
    with pytest.raises(ValueError, match="width: expected at least 1, got 0"):
        locate(model, tokenizer, facts(2), width=0, progress=False)
    with pytest.raises(ValueError, match="fact 'f0': expected 'nobody' in"):
        locate(model, tokenizer, facts(2), subjects={"f0": "nobody", "f1": "nobody"}, progress=False)
    unchanged(model)


def interchanged(model, tokenizer, sentences):
    """By layer, the mean probability of the last token of each sentence, the state before it being the next one's."""
    ids = torch.stack([torch.tensor(tokenizer(sentence)["input_ids"]) for sentence in sentences])
    found = []
    for number in range(len(model.model.layers)):

        def swap(module, args):
            states = args[0].clone()
            states[:, -1] = args[0].roll(-1, 0)[:, -1]
            return (states, *args[1:])

        handle = model.model.layers[number].register_forward_pre_hook(swap)
        with torch.no_grad():
            logits = model(ids[:, :-1]).logits[:, -1]
        handle.remove()
        found.append(float(logits.softmax(-1).gather(1, ids[:, -1:]).mean()))
    return found


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_pair_is_made_in_the_layer_before_which_answers_can_swap(count, tokenizer, unchanged, monkeypatch):
    chosen = load_facts([f"the gamma of beta{i} is delta{i}" for i in range(6)])
    model = deepened(knowing_llama(), count)
    unchanged(model)
    assert pair_layer(model, tokenizer, chosen) == count
    unchanged(model)
    by_hand = interchanged(model, tokenizer, [fact.sentences[0] for fact in chosen])
    assert by_hand[count] == pytest.approx(by_hand[0], rel=1e-4)
    assert by_hand[count] > 0.9
    assert by_hand[count + 1] < 0.1
    assert located(model, tokenizer, chosen, CIRConfig()).first_layer(count + 4) == count
    monkeypatch.setattr("cir.forgetting.locate.BELOW", 0.3)
    assert located(model, tokenizer, chosen, CIRConfig()).first_layer(count + 4) == (1 if count == 3 else 0)
    assert located(model, tokenizer, chosen, CIRConfig(layers=0.5)).layers == 0.5


def test_where_it_cannot_be_told_the_layers_are_a_share_of_the_depth(tokenizer):
    model = knowing_llama()
    assert pair_layer(model, tokenizer, load_facts(["the gamma of beta1 is delta1"])) is None
    unlike = ["the gamma of beta1 is delta1", "word1 then2 some3 is more4 word3"]
    assert pair_layer(model, tokenizer, load_facts(unlike)) is None
    with torch.no_grad():  # nothing of the subject reaches the answer
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    chosen = load_facts([f"the gamma of beta{i} is delta{i}" for i in range(6)])
    assert pair_layer(model, tokenizer, chosen) is None
    assert located(model, tokenizer, chosen, CIRConfig()).first_layer(10) == 7
