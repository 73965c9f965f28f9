"""How far rows move the log-odds, to first order: of a fact, of others, and of each other."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from cir.model.capture import Tokens
from cir.model.sites import Site, Target, sites_of
from cir.model.taps import hit

ONE = 0.9
"""Cosine from which on two rows are of one pair in two wordings."""
GRAM_ENTRIES = 2**24
"""Of rows that inner products are formed of at once, in float64."""


def doses(owners: Tensor, effects: Tensor, lengths: Tensor, dose: Tensor, longest: float) -> Tensor:
    """The scale (T,) of each fact's rows, the same for all of a fact.

    With dW = c sum_t G'_t^T A'_t over the rows t of a fact, its row t changes by c sum_u effects[t, u], to first
    order. c is such that the mean over t is that of -``dose``, or ||dW|| is ``longest`` where that is less; 0 where
    the collapse has left nothing of a fact.

    Args:
        owners: (T,) number of the fact of each row. dose: (T,) in nats.
        effects, lengths: (T, T) sums over all linears of (G_t . G'_u) (A_t . A'_u) and (G'_t . G'_u) (A'_t . A'_u).
    """
    facts, place = owners.unique(return_inverse=True)
    place = place.to(effects.device)
    same = place[:, None] == place
    effect, squared, wanted = (
        effects.new_zeros(len(facts)).index_add_(0, place, rows.to(effects))
        for rows in ((effects * same).sum(1), (lengths * same).sum(1), dose)
    )
    scale = torch.minimum(wanted / effect, longest * squared.clamp_min(0).rsqrt())
    return -torch.where((effect <= 0) | (squared <= 0), torch.zeros_like(scale), scale)[place]


def told_apart(along: Tensor, lengths: Tensor, added: Tensor) -> Tensor:
    """Which of T rows (T,) can stay where others lower theirs: those of a cosine below :data:`ONE` with each.

    Rows are as long as their part, G'^T A', in the metric of the collapse: its square is by how many nats the part
    moves the row itself.

    Args:
        along: (T, U) by how many nats each part that is added moves each row, the sums of (G_t . G'_u) (A_t . A'_u).
        lengths: (T,) of the rows' own parts. added: (U,) of those that are added.
    """
    return (-along <= ONE * lengths[:, None] * added).all(1)


def gram(targets: Sequence[Target], left: Tokens, right: Tokens) -> Tensor:
    """(T, U) float64: the inner products of the rows' outer products, over all targets."""
    total: Any = 0
    device = targets[0].weight.device
    sites = sites_of(targets)
    grams = _grams([site.name for site in sites if not site.experts], left, right)
    grams |= {site.name: _gram_by_expert(site, left, right) for site in sites if site.experts}
    for target in targets:
        total = total + grams[target.gradient.name].to(device) * grams[target.activation.name].to(device)
    return total


def _grams(names: Collection[str], left: Tokens, right: Tokens) -> Tokens:
    """(T, U) float64 of each site; those of one width in few launches."""
    alike: dict[tuple[int, torch.device], list[str]] = {}
    for name in names:
        alike.setdefault((left[name].shape[1], left[name].device), []).append(name)
    found: Tokens = {}
    for same in alike.values():
        few = max(1, GRAM_ENTRIES // max(left[same[0]].numel(), 1))
        for names in (same[i : i + few] for i in range(0, len(same), few)):
            stacks = [torch.stack([rows[name] for name in names]).double() for rows in (left, right)]
            found |= dict(zip(names, stacks[0] @ stacks[1].mT, strict=True))
    return found


def _gram_by_expert(site: Site, left: Tokens, right: Tokens) -> Tensor:
    """(T, U) float64: of each two tokens the sum over the experts that both are routed to."""
    sides = []
    for rows in (left, right):
        flat = rows[site.name].flatten(0, 1)
        sides.append({number: (of, flat[at].double()) for number, of, at in hit(rows[site.routes], site.experts)})
    shape = len(left[site.routes]), len(right[site.routes])
    total = torch.zeros(shape, dtype=torch.float64, device=left[site.routes].device)
    for number in sorted(sides[0].keys() & sides[1].keys()):
        (of, a), (others, b) = sides[0][number], sides[1][number]
        total.index_put_((of[:, None], others), a @ b.T, accumulate=True)
    return total
