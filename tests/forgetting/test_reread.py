"""The loss on the same text, and recall of the same facts, while only late layers change."""

from __future__ import annotations

import pytest
import torch

from cir.data.facts import load_facts
from cir.forgetting.questions import Probed, ask, joined, questions, sentences
from cir.forgetting.reread import Reread
from cir.measures import recall, token_losses
from cir.model.capture import answering
from cir.model.finding import find_stack
from tests.model.test_sites import build
from tests.tiny import facts, knowing_llama, word_tokenizer

PROBED = [
    {"id": "a", "sentences": ["the alpha"], "probes": [{"prompt": "the alpha of beta1 is", "target": " gamma1 now"}]},
    {
        "id": "b",
        "sentences": ["the beta"],
        "probes": [{"prompt": "beta2", "target": " is"}, {"prompt": "the gamma of beta3", "target": " is delta3"}],
    },
    {"id": "not asked", "sentences": ["the gamma"]},
]


@pytest.mark.parametrize("first", [0, 1, 3])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3_text", "olmo2"])
def test_losses_are_those_of_whole_forwards_though_lower_layers_run_once(family, first, unchanged):
    model = build(family, vocab_size=128).eval()
    stack = find_stack(model)
    first = min(first, len(stack.mlps) - 1)
    rows = torch.randint(0, 128, (5, 300), generator=torch.Generator().manual_seed(0))
    calls = []
    handle = stack.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    with answering(model, stack, first) as tape:
        reread = Reread(tape, rows)
        torch.testing.assert_close(reread.losses(), token_losses(model, rows), atol=2e-5, rtol=2e-5)
        with torch.no_grad():
            for target in stack.writers(first):
                target.linear.weight.mul_(1.5)
        calls.clear()
        now = reread.losses()
        assert bool(calls) == (first == 0)
        torch.testing.assert_close(now, token_losses(model, rows), atol=2e-5, rtol=2e-5)
    handle.remove()


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("at_once", [8, 512])
def test_recall_is_that_of_whole_forwards_though_lower_layers_run_once(first, at_once, unchanged):
    model, tokenizer = knowing_llama(), word_tokenizer()
    stack, probed = find_stack(model), load_facts(PROBED)
    calls = []
    handle = stack.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    with answering(model, stack, first) as tape:
        again = Probed(tape, tokenizer, probed, at_once)
        for _ in range(2):
            calls.clear()
            now = again.recall(tape)
            assert bool(calls) == (first == 0)
            assert list(now) == ["a", "b"]
            assert now == pytest.approx(recall(model, tokenizer, probed), rel=1e-4)
            with torch.no_grad():
                for target in stack.writers(first):
                    target.linear.weight.mul_(0.9)
        assert Probed(tape, tokenizer, probed[2:], at_once).recall(tape) == {}
    handle.remove()


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "olmo2"])
def test_sentences_are_read_once_and_asked_in_any_selection(family):
    model, tokenizer = build(family, vocab_size=128).eval(), word_tokenizer()
    stack, told = find_stack(model), load_facts(facts(6))
    first = len(stack.mlps) - 1
    calls = []
    handle = stack.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    with answering(model, stack, first) as tape:
        known = sentences(tape, tokenizer, told, max_length=64, at_once=40)
        calls.clear()
        chosen = [sentence for sentence in known if sentence.owner in (1, 4)][::-1]
        rows = joined([part.read(tape) for part in ask(tape, chosen, 512)])
        assert not calls
        assert rows.owners.tolist() == [4, 4, 1, 1]
        directly = questions(tape, tokenizer, [told[4], told[1]], max_length=64, at_once=64)
        want = joined([part.read(tape) for part in directly])
    handle.remove()
    order = torch.tensor([1, 0, 3, 2])  # of the sentences of each fact
    torch.testing.assert_close(rows.odds, want.odds[order], atol=1e-4, rtol=1e-4)
    for name, x in want.tokens.items():
        torch.testing.assert_close(rows.tokens[name], x[order], atol=1e-5, rtol=1e-3)
