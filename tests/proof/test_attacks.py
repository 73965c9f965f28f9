from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

from cir.data.facts import load_facts
from cir.data.tokens import sentence_batches
from cir.measures import recall
from cir.model.finding import find_stack
from cir.proof.attacks import _at_prompt_ends, attack, few_shot, linear_probe, pruned, quantized
from cir.proof.relearning import RELEARNINGS, STRONG, Relearning, relearn, sentence_loss, worst_relearning
from tests.tiny import facts, knowing_llama, word_tokenizer

KNOWN, PROBED = load_facts(facts(12))[:8], load_facts(facts(12))[8:]


@pytest.fixture(scope="module")
def knowing():
    return knowing_llama(), word_tokenizer()


def test_quantized_rounds_each_group_of_64_to_its_own_levels_and_puts_the_weights_back(unchanged):
    model = knowing_llama()
    linear = model.model.layers[0].self_attn.q_proj
    linear.weight = torch.nn.Parameter(torch.randn(3, 128, generator=torch.Generator().manual_seed(0)))
    before, norm = linear.weight.detach().clone(), model.model.norm.weight.detach().clone()
    unchanged(model)
    with quantized(model, 2):
        for row, wanted in zip(linear.weight.detach(), before, strict=True):
            for group, was in zip(row.split(64), wanted.split(64), strict=True):
                levels = torch.linspace(float(was.min()), float(was.max()), 4)
                nearest = levels[(was[:, None] - levels).abs().argmin(1)]
                assert torch.allclose(group, nearest, atol=1e-6)
        assert torch.equal(model.model.norm.weight, norm)
    unchanged(model)


def test_pruned_undoes_the_smaller_half_of_the_changes(unchanged):
    model = knowing_llama()
    weight = find_stack(model).mlps[0].targets[0].linear.weight
    name = "model.layers.0.mlp.gate_proj.weight"
    original = {name: weight.detach().clone()}
    with torch.no_grad():
        weight[0, :4] += torch.tensor([0.1, -0.2, 0.3, -0.4])
    after = weight.detach().clone()
    unchanged(model)
    with pruned(model, original):
        assert torch.equal(weight[0, :2], original[name][0, :2])
        assert torch.equal(weight[0, 2:], after[0, 2:])
        assert torch.equal(weight[1:], after[1:])
    unchanged(model)


def test_few_shot_prompts_are_led_by_related_answers_and_leak_nothing_of_their_own():
    led = few_shot(PROBED, KNOWN, seed=1)
    assert led == few_shot(PROBED, KNOWN, seed=1)
    assert led != few_shot(PROBED, KNOWN, seed=2)
    for fact, was in zip(led, PROBED, strict=True):
        (probe,) = fact.probes
        lines = probe.prompt.split("\n")
        assert len(lines) == 5
        assert lines[-1] == was.probes[0].prompt
        assert was.probes[0].target not in probe.prompt
        assert all(any(line == p.prompt + p.target for k in KNOWN for p in k.probes) for line in lines[:-1])


def test_a_linear_probe_reads_what_is_in_the_hidden_states(knowing):
    model, tokenizer = knowing
    # What the model is about to say is there to be read at the last layer; a model of noise holds nothing.
    assert linear_probe(model, tokenizer, KNOWN, KNOWN).value == 1.0
    blank = knowing_llama()
    with torch.no_grad():
        blank.model.embed_tokens.weight.zero_()
    # All rows are alike: each is read as the same one of the eight targets, at every layer.
    assert linear_probe(blank, tokenizer, KNOWN, KNOWN).value == pytest.approx(1 / 8)


def test_hidden_states_are_those_of_transformers_and_leave_no_hooks(unchanged):
    model, tokenizer = knowing_llama(), word_tokenizer()
    unchanged(model)
    states, tokens, owners = _at_prompt_ends(model, tokenizer, PROBED[:2])
    unchanged(model)
    for i, fact in enumerate(PROBED[:2]):
        ids = torch.tensor([tokenizer(fact.probes[0].prompt)["input_ids"]])
        with torch.no_grad():
            wanted = model(ids, output_hidden_states=True).hidden_states
        torch.testing.assert_close(states[:, i], torch.stack([layer[0, -1] for layer in wanted]))
    assert owners == [fact.id for fact in PROBED[:2]]
    assert tokens == [tokenizer(f.probes[0].target, add_special_tokens=False)["input_ids"][0] for f in PROBED[:2]]


def test_attacks_name_what_they_found_and_change_nothing(knowing, unchanged):
    model, tokenizer = knowing
    unchanged(model)
    state = torch.random.get_rng_state()
    outcomes = attack(model, tokenizer, PROBED, related=KNOWN, original={}, samples=2)
    assert torch.equal(torch.random.get_rng_state(), state)
    unchanged(model)
    assert list(outcomes) == ["quantized_8bit", "quantized_4bit", "pruned", "sampled", "few_shot", "linear_probe"]
    untouched = sum(recall(model, tokenizer, PROBED).values()) / len(PROBED)
    assert untouched > 0.9
    assert outcomes["pruned"].value == pytest.approx(untouched)  # nothing had changed
    assert outcomes["quantized_8bit"].value == pytest.approx(untouched, abs=0.02)
    assert outcomes["sampled"].value == 1.0
    assert all(outcome.count == len(PROBED) for outcome in outcomes.values())
    assert list(attack(model, tokenizer, PROBED)) == ["quantized_8bit", "quantized_4bit", "sampled"]


def test_overlapping_splits_and_facts_that_ask_nothing_are_refused(knowing):
    with pytest.raises(ValueError, match="no ids in common, got 1: f8"):
        attack(*knowing, PROBED, related=[*KNOWN, PROBED[0]])
    with pytest.raises(ValueError, match="no sentences in common"):
        attack(*knowing, PROBED, related=[replace(PROBED[0], id="another")])
    with pytest.raises(ValueError, match="probes or choices, got none"):
        attack(*knowing, ["gamma of x0"])


@pytest.mark.parametrize("settings", [{"optimizer": "sgd", "lr": 0.05}, {"lora_rank": 4, "lr": 1e-2}])
def test_relearning_by_sgd_and_by_adapters_teaches_and_is_taken_back(tokenizer, unchanged, settings):
    model = knowing_llama()
    fresh = load_facts(
        [{"id": "new", "sentences": ["alpha1 beta2 x5"], "probes": [{"prompt": "alpha1 beta2", "target": " x5"}]}]
    )
    unchanged(model)
    history = relearn(model, tokenizer, fresh, fresh, epochs=8, progress=False, **settings)
    unchanged(model)
    assert history[-1]["new"] > 2 * history[0]["new"]
    relearn(model, tokenizer, fresh, fresh, epochs=8, progress=False, keep=True, **settings)
    unchanged(model, weights=False)
    assert recall(model, tokenizer, fresh)["new"] == pytest.approx(history[-1]["new"], rel=1e-3)


def test_relearning_of_all_parameters_looks_every_few_steps_and_is_taken_back(unchanged):
    model, tokenizer = knowing_llama(), word_tokenizer()
    unchanged(model)
    moved = {}
    for everything in (False, True):
        settings = {"steps": 7, "probe_every": 3, "lr": 1e-3, "batch_size": 2, "all_parameters": everything}
        history = relearn(model, tokenizer, KNOWN, PROBED, **settings, progress=False)
        assert len(history) == 1 + 3  # after 3, 6 and 7 steps
        unchanged(model)
        trained = copy.deepcopy(model)
        relearn(trained, tokenizer, KNOWN, PROBED, **settings, keep=True, progress=False)
        pairs = zip(model.named_parameters(), trained.parameters(), strict=True)
        moved[everything] = {name for (name, before), after in pairs if not torch.equal(before, after)}
        assert recall(trained, tokenizer, PROBED) == history[-1]
    assert moved[True] == {name for name, _ in model.named_parameters()}
    assert moved[False] == {name for name in moved[True] if ".mlp." in name}
    with pytest.raises(ValueError, match="lora_rank: expected 0 where all parameters are trained, got 4"):
        relearn(model, tokenizer, KNOWN, PROBED, lora_rank=4, all_parameters=True)
    with pytest.raises(ValueError, match="probe_every"):
        relearn(model, tokenizer, KNOWN, PROBED, probe_every=0)
    assert {(s.lr, s.all_parameters) for s in STRONG.values()} == {
        (lr, everything) for lr in (1e-5, 3e-5, 1e-4, 3e-4) for everything in (False, True)
    }


def test_the_loss_that_is_trained_is_that_of_each_sentence_alone(tokenizer):
    model = knowing_llama()
    (batch,) = sentence_batches(tokenizer, KNOWN, batch_size=99, max_length=64, skip_first=0)
    losses = []
    for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
        row = ids[mask][None]
        losses.append(float(model(input_ids=row, labels=row).loss.detach()) * (row.shape[1] - 1))
    count = int(batch.attention_mask.sum()) - len(batch.input_ids)
    got = float(sentence_loss(model, find_stack(model), batch).detach())
    assert got == pytest.approx(sum(losses) / count, rel=1e-4)


def test_adapters_change_a_weight_by_their_rank_at_most(tokenizer):
    model = knowing_llama()
    weight = find_stack(model).mlps[1].targets[0].linear.weight
    before = weight.detach().clone()
    relearn(model, tokenizer, KNOWN, PROBED, lora_rank=2, lr=1e-2, epochs=2, keep=True, progress=False)
    values = torch.linalg.svdvals((weight.detach() - before).double())
    assert values[1] > 0
    assert values[2] < 1e-5 * values[0]


def test_the_worst_relearning_is_the_best_epoch_of_the_best_attack(knowing):
    model, tokenizer = knowing
    attacks = {"weak": Relearning(lr=1e-9, epochs=1), "wild": Relearning("sgd", lr=0.01, epochs=3)}
    found = worst_relearning(model, tokenizer, KNOWN, PROBED, relearnings=attacks, progress=False)
    assert list(found) == [*attacks, "worst"]
    wild = relearn(model, tokenizer, KNOWN, PROBED, optimizer="sgd", lr=0.01, epochs=3, progress=False)
    best = max(sum(epoch.values()) / len(epoch) for epoch in wild[1:])
    assert found["wild"].value == pytest.approx(best)
    assert found["worst"].value == max(found["weak"].value, found["wild"].value)
    assert not math.isnan(found["worst"].stderr)
    assert {settings.optimizer for settings in RELEARNINGS.values()} == {"adam", "sgd"}
    with pytest.raises(ValueError, match="optimizer: expected one of adam, sgd, got 'lion'"):
        relearn(model, tokenizer, KNOWN, PROBED, optimizer="lion")
