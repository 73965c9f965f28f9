"""What has to stay and fell as facts went, to be raised again."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cir.forgetting.questions import Rows, Sentence, ask, joined
from cir.model.capture import AnswerCapture
from cir.model.replay import Replays

LOST, GONE = 0.5, 3.0
"""Nats by which an answer that has to stay has fallen, to be raised again; and from which on it is one with a
fact: facts come first, and it is let be."""
FEW_LOST = 0.01
"""Of the answers asked for, that may have: the last of them and the last facts to go can be one another's price."""
ASKED = 2048
"""Tokens that are asked after a step, at most: so many of all that has to stay, drawn anew."""


class Kept:
    """What has to stay, as the model says it now.

    Args:
        tape: of the model as it came. told: that. at_once: tokens of a forward. seed: of what is drawn.
    """

    def __init__(self, tape: AnswerCapture, told: Sequence[Sentence], at_once: int, seed: int) -> None:
        self._tape, self._random = tape, random.Random(seed)
        mixed = self._random.sample(told, len(told))  # each forward is of all kinds
        self._parts = [(part, part.odds(tape)) for part in ask(tape, mixed, at_once)]
        self._drawn = min(len(self._parts), max(1, ASKED // at_once))

    def fallen(self, names: Collection[str], most: int, replays: Replays | None = None) -> tuple[Rows, Tensor] | None:
        """The answers that fell, the ``most`` that did furthest, at the sites of these ``names``, each with an
        owner of its own; and by how many nats (T,). None where these are few.
        """
        drawn = self._random.sample(self._parts, self._drawn)
        down = torch.cat([before - part.odds(self._tape, replays) for part, before in drawn]).cpu()  # one wait
        fell = (down > LOST) & (down < GONE)
        if int(fell.sum()) <= FEW_LOST * len(fell):
            return None
        pieces = list[Rows]()
        for (part, _), of in zip(drawn, fell.split([len(before) for _, before in drawn]), strict=True):
            if of.any():
                pieces.append(part.read(self._tape, replays).at(names)[of.nonzero().squeeze(1)])
        rows, by = joined(pieces), down[fell]
        furthest = by.topk(min(most, len(by))).indices
        rows, by = rows[furthest], by[furthest]
        return replace(rows, owners=torch.arange(len(by))), by.to(rows.odds.device)
