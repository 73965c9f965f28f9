from __future__ import annotations

import pytest
import torch

import cir
from cir import evaluation
from cir.evaluation import recall, text_loss, token_losses
from cir.facts import load_facts, windows
from tests.tiny import TEXT, facts


@torch.no_grad()
def probability(model, tokenizer, prompt: str, target: str) -> float:
    """One probe, one forward for each token, no batch."""
    ids = tokenizer(prompt)["input_ids"]
    total = 1.0
    for token in tokenizer(target, add_special_tokens=False)["input_ids"]:
        total *= float(model(input_ids=torch.tensor([ids])).logits[0, -1].double().softmax(0)[token])
        ids = [*ids, token]
    return total


def test_recall_is_the_mean_probability_whatever_the_batching(model, tokenizer, monkeypatch):
    items = facts(5)
    items[0]["probes"].append({"prompt": "of", "target": " x0 gamma now"})
    want = {
        item["id"]: sum(probability(model, tokenizer, p["prompt"], p["target"]) for p in item["probes"])
        / len(item["probes"])
        for item in items
    }
    for tokens in (1, 20, 1000):
        monkeypatch.setattr(evaluation, "TOKENS_PER_FORWARD", tokens)
        assert recall(model, tokenizer, load_facts(items)) == pytest.approx(want, rel=1e-4)


def test_multiple_choice_counts_right_letters(model, tokenizer):
    asked = [
        {"sentences": ["gamma of x0"], "question": "gamma of", "choices": ["x0", "x1"], "answer": answer}
        for answer in (0, 1)
    ]
    # One question with both answers marked right in turn: exactly one is.
    assert cir.evaluate(model, tokenizer, asked).accuracy == 0.5


def test_text_loss_is_cross_entropy(model, tokenizer):
    rows = windows(tokenizer, TEXT, 32)
    with torch.no_grad():
        wanted = [float(model(input_ids=row[None], labels=row[None]).loss) for row in rows]
    assert token_losses(model, rows).shape == (len(rows), 31)
    assert text_loss(model, tokenizer, TEXT, window=32) == pytest.approx(sum(wanted) / len(wanted), rel=1e-5)
    few = text_loss(model, tokenizer, TEXT, window=32, max_tokens=64)
    assert few == pytest.approx((wanted[0] + wanted[-1]) / 2, rel=1e-5)


def test_evaluate_leaves_out_what_it_is_not_given(model, tokenizer, unchanged):
    unchanged(model)
    result = cir.evaluate(model, tokenizer, ["gamma of x0"])
    assert (result.recall, result.mean_recall, result.accuracy, result.loss) == ({}, None, None, None)
    assert cir.evaluate(model, tokenizer, facts(2), text=TEXT, window=32).loss > 0
    unchanged(model)
