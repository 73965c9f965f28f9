"""The mathematics once more, in float64 and plain loops. Nothing here is shared with the library."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def collapse(x: Tensor, basis: Tensor, mixer: Tensor | None) -> Tensor:
    x, basis = x.double(), basis.double()
    rank = basis.shape[1]
    out = x.clone()
    for t in range(len(x)):
        coefficients = [sum(float(x[t, d] * basis[d, i]) for d in range(x.shape[1])) for i in range(rank)]
        if mixer is not None:
            coefficients = [sum(float(mixer[i, j]) * coefficients[j] for j in range(rank)) for i in range(rank)]
        for d in range(x.shape[1]):
            out[t, d] -= sum(coefficients[i] * float(basis[d, i]) for i in range(rank))
    return out


def outer_sum(g: Tensor, a: Tensor) -> Tensor:
    total = torch.zeros(g.shape[1], a.shape[1], dtype=torch.float64)
    for t in range(len(g)):
        for i in range(g.shape[1]):
            for j in range(a.shape[1]):
                total[i, j] += g[t, i].double() * a[t, j].double()
    return total


def covariance(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.double()
    mean = sum((row for row in x), torch.zeros(x.shape[1], dtype=torch.float64)) / len(x)
    scatter = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for row in x:
        scatter += torch.outer(row - mean, row - mean)
    return mean, scatter / len(x)


def breaking_loss(outputs: dict[int, Tensor], originals: dict[int, Tensor], mask: Tensor) -> float:
    by_layer = []
    for layer, original in originals.items():
        overlaps, norms = [], []
        for t in range(len(mask)):
            if mask[t]:
                now, then = outputs[layer][t].double(), original[t].double()
                overlaps.append(max(0.0, float(torch.dot(now, then))))
                norms.append(math.sqrt(float(torch.dot(then, then))))
        mean_norm = sum(norms) / len(norms)
        by_layer.append(sum(overlaps) / len(overlaps) / mean_norm**2)
    return sum(by_layer) / len(by_layer)


def retain_loss(hidden: Tensor, original: Tensor, mask: Tensor) -> float:
    distances, norms = [], []
    for t in range(len(mask)):
        if mask[t]:
            now, then = hidden[t].double(), original[t].double()
            distances.append(float((now - then).norm()))
            norms.append(float(then.norm()))
    return (sum(distances) / len(distances)) / (sum(norms) / len(norms))


def held_variance(rows: Tensor, basis: Tensor, rank: int) -> float:
    """Share of the variance of the exact components 2..rank of ``rows`` that the span of ``basis`` holds.

    The first component is left out on both sides: one sink token can be all of it.
    """
    rows = rows.double()
    rows = rows - rows.mean(0)
    values, vectors = torch.linalg.eigh(rows.T @ rows)
    first, rest = vectors[:, -1:], values[-rank:-1]
    left = rows - (rows @ first) @ first.T
    span = torch.linalg.qr(basis.double())[0]
    return float((left @ span).square().sum() / rest.sum())
