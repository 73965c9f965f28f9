"""The loss on the same text, again and again, while only late layers change."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cir.data.tokens import Batch
from cir.forgetting.memory import tokens_at_once
from cir.model.capture import AnswerCapture


class Reread:
    """Windows of text ``rows`` (N, L) to be read again and again while only layers change that ``tape`` is of: those
    below are run once, and what they say, N L hidden states, is kept.
    """

    def __init__(self, tape: AnswerCapture, rows: Tensor) -> None:
        self._tape = tape
        self._parts = [
            (chunk, tape.below(Batch(chunk, torch.ones_like(chunk, dtype=torch.bool))))
            for chunk in rows.to(tape.device).split(max(1, tokens_at_once(tape.device) // rows.shape[1]))
        ]

    @torch.no_grad()
    def losses(self) -> Tensor:
        """What :func:`cir.measures.token_losses` is of the model as it is now."""
        found = []
        for chunk, below in self._parts:
            at = torch.arange(chunk.numel(), device=chunk.device).view_as(chunk)[:, :-1].flatten()
            logits, _ = self._tape.predict(below, at, keep=False)
            for ids, own in zip(chunk, logits.split(chunk.shape[1] - 1), strict=True):
                found.append(F.cross_entropy(own.float(), ids[1:].to(own.device), reduction="none"))
        return torch.stack([losses.cpu() for losses in found])
