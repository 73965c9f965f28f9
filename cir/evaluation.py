"""Measures of a model: recall of facts, loss on text, multiple-choice accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cir.facts import Fact, load_facts, pad, windows


@dataclass
class Evaluation:
    """What :func:`evaluate` measured; None or empty where the facts or the text give nothing to measure.

    Attributes:
        recall: mean probability of the target by fact id. mean_recall: over the facts with probes.
        accuracy: share of multiple-choice questions answered rightly. loss: nats a token of the text.
    """

    recall: dict[str, float]
    mean_recall: float | None
    accuracy: float | None
    loss: float | None


TOKENS_PER_FORWARD = 1024
"""Bounds the logits in memory: 1024 tokens are 0.2 GB in float32 for a vocabulary of 49,152."""


def evaluate(
    model: Any,
    tokenizer: Any,
    facts: str | Path | Sequence[Any],
    *,
    text: str | None = None,
    window: int = 256,
    max_tokens: int | None = None,
) -> Evaluation:
    """Recall and multiple-choice accuracy of ``facts``, and the loss on ``text``; changes nothing.

    Args:
        model, tokenizer: any causal LM of transformers. facts: what :func:`cir.load_facts` reads.
        text: measured in consecutive windows of ``window`` tokens, at most ``max_tokens`` in all, evenly spread.

    Raises:
        ValueError: on malformed facts, or a text shorter than one window.
    """
    facts = load_facts(facts)
    recalls = recall(model, tokenizer, facts)
    return Evaluation(
        recall=recalls,
        mean_recall=mean_recall(recalls),
        accuracy=multiple_choice(model, tokenizer, facts),
        loss=None if text is None else text_loss(model, tokenizer, text, window=window, max_tokens=max_tokens),
    )


def recall(model: Any, tokenizer: Any, facts: Sequence[Fact]) -> dict[str, float]:
    """Mean probability of the target over each fact's probes, by fact id; facts without probes left out.

    The probability of a target of several tokens is the product of theirs, each given those before.
    """
    owners = [(fact.id, probe) for fact in facts for probe in fact.probes]
    pairs = [(probe.prompt, probe.target) for _, probe in owners]
    sums: dict[str, list[float]] = {}
    for (name, _), logp in zip(owners, continuation_logprobs(model, tokenizer, pairs), strict=True):
        sums.setdefault(name, []).append(logp)
    return {name: float(torch.tensor(logps).exp().mean()) for name, logps in sums.items()}


def mean_recall(recalls: dict[str, float]) -> float | None:
    """Mean over facts of what :func:`recall` returns; None where no fact has a probe."""
    return sum(recalls.values()) / len(recalls) if recalls else None


def multiple_choice(model: Any, tokenizer: Any, facts: Sequence[Fact]) -> float | None:
    """Share of questions whose right choice has the highest log-probability; None where no fact has choices.

    The prompt lists the choices under letters, as WMDP and MMLU are asked; the letters are compared.
    """
    asked = [fact for fact in facts if fact.question is not None and fact.choices]
    if not asked:
        return None
    pairs = [(_question(fact), f" {chr(65 + i)}") for fact in asked for i in range(len(fact.choices))]
    scores = iter(continuation_logprobs(model, tokenizer, pairs))
    hits = 0
    for fact in asked:
        own = [next(scores) for _ in fact.choices]
        hits += own.index(max(own)) == fact.answer
    return hits / len(asked)


def _question(fact: Fact) -> str:
    listed = "\n".join(f"{chr(65 + i)}. {choice}" for i, choice in enumerate(fact.choices))
    return f"{fact.question}\n{listed}\nAnswer:"


@torch.no_grad()
def continuation_logprobs(model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[float]:
    """log P(continuation | prompt) in nats for each (prompt, continuation), in the order given."""
    encoded = []
    for prompt, continuation in pairs:
        head = tokenizer(prompt)["input_ids"]
        tail = tokenizer(continuation, add_special_tokens=False)["input_ids"]
        encoded.append((head, tail))
    # Neighbours in length share a forward, so that little of it is padding.
    order = sorted(range(len(encoded)), key=lambda i: sum(map(len, encoded[i])))
    logprobs = [0.0] * len(encoded)
    width = max((sum(map(len, pair)) for pair in encoded), default=1)
    step = max(1, TOKENS_PER_FORWARD // width)
    for start in range(0, len(order), step):
        chosen = order[start : start + step]
        batch = pad([encoded[i][0] + encoded[i][1] for i in chosen]).to(model.device)
        first = min(len(encoded[i][0]) for i in chosen) - 1
        wanted = torch.arange(first, batch.input_ids.shape[1] - 1, device=model.device)
        logits = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            use_cache=False,
            logits_to_keep=wanted,
        ).logits
        for row, i in enumerate(chosen):
            head, tail = encoded[i]
            scores = logits[row, len(head) - 1 - first :][: len(tail)].float().log_softmax(-1)
            logprobs[i] = float(scores[range(len(tail)), tail].sum())
    return logprobs


def loss_rise(losses: Tensor, original: Tensor, unseen: float) -> tuple[float, float]:
    """Relative rise of the mean loss over windows (N, L), and its standard error.

    ``unseen`` is the share of the text outside those windows: of a finite text what was seen is known, so that
    nothing is in doubt where all of it was.
    """
    # Windows, not tokens, are the independent unit: the tokens of one share their context.
    rises = (losses - original).mean(1) / original.mean()
    stderr = float(rises.std()) * (unseen / len(rises)) ** 0.5 if unseen and len(rises) > 1 else 0.0
    return float(rises.mean()), stderr


@torch.no_grad()
def token_losses(model: Any, rows: Tensor) -> Tensor:
    """Loss in nats of each predicted token of windows ``rows`` (N, L): a float32 (N, L - 1) on the host."""
    step = max(1, TOKENS_PER_FORWARD // rows.shape[1])
    losses = []
    for chunk in rows.split(step):
        chunk = chunk.to(model.device)
        logits = model(input_ids=chunk, use_cache=False).logits[:, :-1].float()
        loss = F.cross_entropy(logits.flatten(0, 1), chunk[:, 1:].flatten(), reduction="none")
        losses.append(loss.view(len(chunk), -1).cpu())
    return torch.cat(losses)


def spread(rows: Tensor, tokens: int | None) -> Tensor:
    """At most ``tokens`` tokens of ``rows`` (N, L): whole windows, two at least, evenly spread over the text."""
    if tokens is None or rows.numel() <= tokens:
        return rows
    count = max(2, tokens // rows.shape[1])
    return rows[torch.linspace(0, len(rows) - 1, count).round().long()]


def text_loss(model: Any, tokenizer: Any, text: str, *, window: int = 256, max_tokens: int | None = None) -> float:
    """Mean loss in nats a token over ``text``, in windows of ``window`` tokens."""
    return float(token_losses(model, spread(windows(tokenizer, text, window), max_tokens)).mean())
