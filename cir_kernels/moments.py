"""Streaming first and second moments of token rows, from which principal subspaces are solved."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cir_kernels import reference
from cir_kernels._checks import check_device, check_mask, check_rows


@dataclass
class Moments:
    """What a stream of rows x_t of width D leaves behind; all sums are float64.

    Attributes:
        count: rows seen.
        total: (D,) sum of the rows.
        action: (D, s) X^T X Omega, the action of the uncentred scatter on the test matrix.
        omega: (D, s) the test matrix Omega; None for the identity, where ``action`` is the full scatter.
    """

    count: int
    total: Tensor
    action: Tensor
    omega: Tensor | None


def new_moments(width: int, omega: Tensor | None, device: torch.device | str = "cpu") -> Moments:
    """Moments of no rows at all. ``omega`` (width, s) is taken to float64 on ``device``.

    Raises:
        ValueError: if ``omega`` is not a (width, s) matrix with s <= width.
    """
    if omega is not None:
        check_rows("omega", omega.T, width)
        if omega.shape[1] > width:
            raise ValueError(f"omega: expected at most {width} columns, got {omega.shape[1]}")
        omega = omega.to(device, torch.float64)
    columns = width if omega is None else omega.shape[1]
    zeros = torch.zeros(width, columns + 1, dtype=torch.float64, device=device)
    return Moments(0, zeros[:, 0].clone(), zeros[:, 1:].clone(), omega)


def accumulate_moments(state: Moments, x: Tensor, mask: Tensor | None = None) -> Moments:
    """Add rows ``x`` (T, D), any floating dtype, to ``state`` in place and return it.

    Rows where ``mask`` (T,) is False contribute nothing. Memory beyond the state is O(T (D + s)).

    Raises:
        ValueError: on a width, mask or device that does not fit the state.
    """
    check_rows("x", x, len(state.total))
    check_mask(mask, len(x))
    check_device(x=x, mask=mask, state=state.total)
    count, total, action = reference.moments(x, state.omega, mask)
    state.count += count
    state.total += total
    state.action += action
    return state
