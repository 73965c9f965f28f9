"""What is forgotten, spared and measured, as batches."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from cir.config import CIRConfig
from cir.data.facts import Fact
from cir.data.shipped import builtin_text
from cir.data.tokens import Batch, batches_of, rows_to_answers, sentence_rows, windows
from cir.measures import WINDOW

HELD_OUT = 1 / 3
"""Share of the retain text, at its end, kept for the budget where no disruption text is given."""


def fact_batches(tokenizer: Any, facts: Sequence[Fact], config: CIRConfig, device: torch.device) -> list[Batch]:
    """The facts' sentences in batches, shuffled so that each mixes many facts, and beside each sentence one without
    a share of its words (``config.word_dropout``): what is forgotten must not hang on the wording.
    """
    rows_of = rows_to_answers if config.to_answers else sentence_rows
    draw = random.Random(config.seed)
    rows = []
    for fact in facts:
        for row in rows_of(tokenizer, fact, config.max_length, config.skip_first):
            rows.append(row)
            if config.word_dropout:
                thinned = [token for token in row[:-1] if draw.random() >= config.word_dropout] + row[-1:]
                if config.skip_first + 2 <= len(thinned) < len(row):
                    rows.append(thinned)
    draw.shuffle(rows)
    return [batch.to(device) for batch in batches_of(rows, config.batch_size)]


def text_batches(
    tokenizer: Any, retain: str | None, disruption: str | None, config: CIRConfig, device: torch.device
) -> tuple[list[Batch], torch.Tensor]:
    """Batches of retain windows, and the windows (N, L) on which the budget is measured."""
    rows = windows(tokenizer, builtin_text() if retain is None else retain, config.retain_length)
    if disruption is not None:
        measured = windows(tokenizer, disruption, WINDOW)
    else:
        kept = round((1 - HELD_OUT) * len(rows))
        if kept in (0, len(rows)):
            raise ValueError(
                f"retain: expected at least two windows of {config.retain_length} tokens, of which one is "
                f"held out for the budget, got {len(rows)}"
            )
        rows, measured = rows[:kept], rows[kept:]
    return _shuffled_batches(rows, config, device), measured


def benign_batches(tokenizer: Any, text: str, config: CIRConfig, device: torch.device) -> list[Batch]:
    """Batches of windows of ``text``, ``retain_tokens`` of them at most."""
    return _shuffled_batches(windows(tokenizer, text, config.retain_length), config, device)


def _shuffled_batches(rows: torch.Tensor, config: CIRConfig, device: torch.device) -> list[Batch]:
    shuffled = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed))]
    rows = shuffled[: config.retain_tokens // config.retain_length]
    return [
        Batch(chunk, torch.ones_like(chunk, dtype=torch.bool)).to(device)
        for chunk in rows.split(config.retain_batch_size)
    ]
