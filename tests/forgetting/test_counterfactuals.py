from __future__ import annotations

import pytest
import torch

from cir.data.facts import load_facts
from cir.forgetting import counterfactuals as made
from cir.forgetting.counterfactuals import counterfactuals
from cir.forgetting.questions import ask, joined, sentences
from cir.model.capture import answering
from cir.model.finding import find_stack
from tests.tiny import deepened, facts, knowing_llama, word_tokenizer

FACTS = load_facts(facts(12))


@pytest.fixture(scope="module")
def knowing():
    return knowing_llama(), word_tokenizer()


@pytest.mark.parametrize("first", [0, 1])
def test_one_token_is_another_and_the_answer_is_the_models(knowing, first):
    model, tokenizer = deepened(knowing[0], 1), knowing[1]
    with answering(model, find_stack(model), first) as tape:
        told = sentences(tape, tokenizer, FACTS[:4], max_length=64, at_once=512)
        found = counterfactuals(model, tape, tokenizer, told, at_once=64, seed=0)
        sources = [(s.owner, s.statement.ids[: s.statement.told[0] + 1]) for s in told]
        avoided = {token for _, ids in sources for token in ids}
        read = joined([part.read(tape) for part in ask(tape, found, 512)])
    assert len(found) > 8
    for sentence, odds in zip(found, read.odds.tolist(), strict=True):
        *prompt, answer = sentence.statement.ids
        source = next(
            ids
            for owner, ids in sources
            if owner == sentence.owner and len(ids) == len(prompt) + 1 and sum(map(int.__ne__, ids, prompt)) == 1
        )
        (place,) = (i for i, (a, b) in enumerate(zip(source, prompt, strict=False)) if a != b)
        assert place
        assert prompt[place] not in avoided
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
            before = model(torch.tensor([source[:-1]])).logits[0, -1].log_softmax(-1)
        assert answer == int(logits.argmax()) != source[-1]
        assert _odds(before[source[-1]]) - _odds(logits[source[-1]]) >= made.FALL
        assert odds == pytest.approx(_odds(logits[answer]), abs=1e-3)  # of what the lower layers said, too


def test_a_token_that_the_answer_hangs_on_is_put_into_what_must_stay(knowing, monkeypatch):
    model, tokenizer = knowing
    monkeypatch.setattr(made, "TEMPLATES", 5)
    with answering(model, find_stack(model), 0) as tape:
        told, kept = (sentences(tape, tokenizer, of, max_length=64, at_once=512) for of in (FACTS[:4], FACTS[4:]))
        given = {"at_once": 64, "seed": 0}
        alone = counterfactuals(model, tape, tokenizer, told, **given)
        found = counterfactuals(model, tape, tokenizer, told, kept, **given)
    added = [(s.owner, s.statement.ids) for s in found if s.statement.ids not in [t.statement.ids for t in alone]]
    assert 3 < len(added) <= 5 * made.NEAREST
    words = model.get_input_embeddings().weight.detach()
    for owner, (*prompt, answer) in added:
        own = {token for s in told if s.owner == owner for token in s.statement.ids[1 : s.statement.told[0]]}
        sources = [s.statement.ids[: s.statement.told[0] + 1] for s in kept]
        near = [ids for ids in sources if len(ids) == len(prompt) + 1 and sum(map(int.__ne__, ids, prompt)) == 1]
        assert near
        for ids in near:
            (place,) = (i for i, (a, b) in enumerate(zip(ids, prompt, strict=False)) if a != b)
            like = torch.cosine_similarity(words[ids[1:-1]], words[prompt[place]], dim=1)
            if prompt[place] in own and int(like.argmax()) == place - 1 and answer != ids[-1]:
                break
        else:
            pytest.fail(f"expected a word of fact {owner} in the place of its nearest, got {prompt}")
        with torch.no_grad():
            assert answer == int(model(torch.tensor([prompt])).logits[0, -1].argmax())
        assert answer not in [s.statement.ids[s.statement.told[0]] for s in told if s.owner == owner]


def _odds(logprob):
    return float(logprob - torch.log1p(-logprob.exp()))


def test_no_more_sentences_than_are_asked_for_and_each_fact_in_turn(knowing, monkeypatch):
    model, tokenizer = knowing
    monkeypatch.setattr(made, "SENTENCES", 4)
    with answering(model, find_stack(model), 0) as tape:
        told = sentences(tape, tokenizer, FACTS[:4], max_length=64, at_once=512)
        found = counterfactuals(model, tape, tokenizer, told, at_once=64, seed=0)
        assert {sentence.owner for sentence in found} == set(range(4))
        assert len(found) <= 4 * made.PLACES * made.NEAREST
        assert counterfactuals(model, tape, tokenizer, [], at_once=64, seed=0) == []
        # Nothing but what opens it goes before the answer.
        short = sentences(tape, tokenizer, load_facts(["beta0"]), max_length=64, at_once=512)
        monkeypatch.setattr(made, "opening", lambda tokenizer: [0, 0])
        assert counterfactuals(model, tape, tokenizer, short, at_once=64, seed=0) == []
