"""What is forgotten, spared and measured, as batches."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from cir.config import BreakingConfig, CIRConfig
from cir.data.facts import Fact
from cir.data.shipped import builtin_text
from cir.data.tokens import Batch, batches_of, sentence_rows, windows
from cir.measures import WINDOW

HELD_OUT = 1 / 3
"""Share of the retain text, at its end, kept for the budget where no disruption text is given."""


def fact_batches(tokenizer: Any, facts: Sequence[Fact], config: BreakingConfig, device: torch.device) -> list[Batch]:
    """The facts' sentences in batches, shuffled so that each mixes many facts."""
    rows = [row for fact in facts for row in sentence_rows(tokenizer, fact, config.max_length, config.skip_first)]
    random.Random(config.seed).shuffle(rows)
    return [batch.to(device) for batch in batches_of(rows, config.batch_size)]


def text_batches(
    tokenizer: Any, retain: str | None, disruption: str | None, config: BreakingConfig, device: torch.device
) -> tuple[list[Batch], torch.Tensor]:
    """Batches of retain windows, and the windows (N, L) on which the budget is measured."""
    rows, measured = split_text(tokenizer, retain, disruption, config)
    rows = chosen(rows, config)
    whole = torch.ones_like(rows, dtype=torch.bool)
    return [batch.to(device) for batch in Batch(rows, whole).split(config.retain_batch_size)], measured


def split_text(
    tokenizer: Any, retain: str | None, disruption: str | None, config: CIRConfig | BreakingConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows (N, L) of retain text and those on which the budget is measured, if not of ``disruption`` then of its
    last third.

    Raises:
        ValueError: on a text that is too short.
    """
    rows = windows(tokenizer, builtin_text() if retain is None else retain, config.retain_length)
    if disruption is not None:
        return rows, windows(tokenizer, disruption, WINDOW)
    kept = round((1 - HELD_OUT) * len(rows))
    if kept in (0, len(rows)):
        raise ValueError(
            f"retain: expected at least two windows of {config.retain_length} tokens, of which one is "
            f"held out for the budget, got {len(rows)}"
        )
    return rows[:kept], rows[kept:]


def chosen(rows: torch.Tensor, config: CIRConfig | BreakingConfig) -> torch.Tensor:
    """``retain_tokens`` of the windows ``rows`` (N, L), drawn at random."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed))
    return rows[order[: config.retain_tokens // config.retain_length]]
