"""The losses of the paper (arXiv 2509.11816), to break what the MLPs say and to keep what the model represents."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cir.measures import NonFiniteError


@dataclass(frozen=True)
class OriginalOutput:
    """What a module put out before any update: rows (T, D) of the counted tokens, and their mean norm."""

    rows: Tensor
    norm: float


def original_output(output: Tensor, mask: Tensor) -> OriginalOutput:
    """Keep the rows of ``output`` (N, D) where ``mask`` (N,) is True, or whose places ``mask`` (T,) has.

    Raises:
        NonFiniteError: on rows that are NaN or infinite. ValueError: on rows that are all zero.
    """
    rows = _counted(output, mask)
    norm = float(rows.norm(dim=-1, dtype=torch.float64).mean())
    if not math.isfinite(norm):
        raise NonFiniteError("expected layers of finite outputs, got NaN or infinity")
    if not norm:
        raise ValueError("expected layers whose outputs can be broken, got some that put out zeros alone")
    # Pinned, so that they come back to a GPU while it works.
    return OriginalOutput(rows.cpu().pin_memory() if rows.is_cuda else rows, norm)


def mlp_breaking(outputs: Mapping[int, Tensor], originals: Mapping[int, OriginalOutput], mask: Tensor) -> Tensor:
    """Mean over loss layers l of mean over tokens of max(0, o_l . o_l^orig) / n_l^2.

    Args:
        outputs: MLP outputs o_l (N, D) by layer, at least those in ``originals``.
        originals: by loss layer, the outputs before any update, and n_l.
        mask: the tokens of ``originals``, as for :func:`original_output`.

    Returns:
        A float32 scalar (float64 for float64 models).
    """
    terms = []
    for layer, original in originals.items():
        rows, before = _beside(_counted(outputs[layer], mask), original)
        terms.append((rows * before).sum(-1).clamp_min(0).mean() / original.norm**2)
    return torch.stack([term.to(terms[0].device) for term in terms]).mean()


def hidden_retain(hidden: Tensor, original: OriginalOutput, mask: Tensor) -> Tensor:
    """Mean distance ||h - h^orig|| over tokens, over the mean norm ||h^orig||.

    Args:
        hidden: (N, D) hidden states now. original: those before any update, of the tokens in ``mask``.
    """
    rows, before = _beside(_counted(hidden, mask), original)
    return (rows - before).norm(dim=-1).mean() / original.norm


def _counted(output: Tensor, mask: Tensor) -> Tensor:
    # Layers may be spread over several GPUs.
    return output[mask.to(output.device)]


def _beside(rows: Tensor, original: OriginalOutput) -> tuple[Tensor, Tensor]:
    rows = _at_least_float(rows)
    return rows, original.rows.to(rows.device, non_blocking=True).to(rows.dtype)


def _at_least_float(rows: Tensor) -> Tensor:
    return rows if rows.dtype == torch.float64 else rows.float()
