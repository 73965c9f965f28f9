"""Which windows of a long text are measured, and what those say of all of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """Windows ``rows`` (n, L) of a text of ``count``: the first ``near`` stand for themselves, the others, evenly
    spread over the rest of the text, for all of that.
    """

    rows: Tensor
    near: int
    count: int

    def mean(self, values: Tensor) -> tuple[float, float]:
        """Mean over the text of ``values`` (n,), one a window, and its standard error: 0 where all was measured."""
        # Windows, not tokens, are the independent unit: the tokens of one share their context.
        values, left = values.double(), self.count - self.near
        known, rest = values[: self.near], values[self.near :]
        if not len(rest):
            return float(known.mean()), 0.0
        unseen = 1 - len(rest) / left
        stderr = float(rest.std()) * (unseen / len(rest)) ** 0.5 if unseen and len(rest) > 1 else 0.0
        return float(known.sum() + left * rest.mean()) / self.count, stderr * left / self.count


@dataclass(frozen=True)
class Index:
    """What windows (N, L) of a text hold, for :func:`sample` to be asked of them more than once.

    Attributes:
        tokens: (N, L) ids of each window in order. new: (N, L) which are not that of the place before.
        rarity: by id, log of one over the share of the windows with it.
    """

    tokens: Tensor
    new: Tensor
    rarity: Tensor


def index(rows: Tensor) -> Index:
    """Of the windows ``rows`` (N, L)."""
    ordered = rows.sort(1).values
    new = torch.cat([torch.ones_like(ordered[:, :1]), ordered.diff(dim=1)], 1) != 0
    windows_with = torch.bincount(ordered[new])
    return Index(ordered, new, (len(rows) / windows_with.clamp_min(1)).log())


def sample(
    rows: Tensor, tokens: int | None, near: Sequence[Sequence[int]] = (), known: Index | None = None
) -> Sample:
    """At most ``tokens`` tokens of a text's windows ``rows`` (N, L): whole windows, two or three at least.

    Half of them are those nearest the token ids of the sentences ``near``, where there are any: harm to a text is
    rare and large where it has the words that the facts share, so that an even sample tells little of it.
    ``known``: :func:`index` of the rows.
    """
    if tokens is None or rows.numel() <= tokens:
        return Sample(rows, len(rows), len(rows))
    size = min(max(3 if near else 2, tokens // rows.shape[1]), len(rows))
    first = size // 2 if near else 0
    order = (
        _nearness(known or index(rows), near).argsort(descending=True, stable=True)
        if near
        else torch.arange(len(rows))
    )
    rest = order[first:].sort().values
    chosen = rest[torch.linspace(0, len(rest) - 1, size - first).round().long()]
    return Sample(rows[torch.cat([order[:first], chosen])], first, len(rows))


def _nearness(known: Index, sentences: Sequence[Sequence[int]]) -> Tensor:
    """(N,) TF-IDF: by token of a window, the share of the sentences with it times log of one over that of windows."""
    sentences_with = torch.zeros(len(known.rarity), dtype=torch.float64)
    for sentence in sentences:
        ids = torch.tensor(sorted(set(sentence)), dtype=torch.long)
        sentences_with[ids[ids < len(sentences_with)]] += 1 / len(sentences)
    return ((sentences_with * known.rarity)[known.tokens] * known.new).sum(1)


def spread(rows: Tensor, tokens: int | None) -> Tensor:
    """At most ``tokens`` tokens of ``rows`` (N, L): whole windows, two at least, evenly spread over the text."""
    return sample(rows, tokens).rows
