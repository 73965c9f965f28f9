"""Deltas beside linears: what changes where a model's own weights are to stay, as quantized ones must."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from cir.model.capture import frozen
from cir.model.sites import MLP, Delta, Stack, Target, is_opaque
from cir.model.taps import norm_through


def with_deltas(model: Any, stack: Stack, first_layer: int, *, empty: bool = False) -> Stack:
    """``stack`` with zeros (D_out, D_in) beside each linear that a run on the layers ``first_layer`` and above may
    change: what their attentions put out, and their MLPs. The model itself is not changed.

    They take as much as these linears would in the dtype that the model computes in. ``empty``: they are on the meta
    device, and nothing is run, to count what they take.

    Raises:
        ValueError: on experts, or a linear through which no gradient comes back.
    """
    dtype = model.get_input_embeddings().weight.dtype
    upper = [*stack.writers(first_layer), *(t for mlp in stack.mlps[first_layer:] for t in mlp.targets)]
    with frozen(model):
        deltas = {target.name: _beside(target, dtype, empty) for target in dict.fromkeys(upper)}

    def own(targets: tuple[Target, ...]) -> tuple[Target, ...]:
        return tuple(replace(target, delta=deltas.get(target.name)) for target in targets)

    def changed(mlp: MLP) -> MLP:
        return replace(mlp, targets=own(mlp.targets), writers=own(mlp.writers))

    return replace(stack, mlps=tuple(map(changed, stack.mlps)), deltas=deltas)


def _beside(target: Target, dtype: torch.dtype, empty: bool) -> Delta:
    if target.experts:
        raise ValueError(
            f"adapter: expected a model of linears, got the experts {target.name}, beside which none is made"
        )
    opaque, weight = is_opaque(target), target.parameter
    if not opaque:
        dtype = weight.dtype
    shape = target.gradient.width, target.activation.width
    if empty:
        return Delta(nn.Parameter(torch.zeros(shape, dtype=dtype, device="meta"), requires_grad=False), 0.0)
    if opaque:
        norm = norm_through(target.linear, target.name, shape[1], dtype, weight.device)
    else:
        norm = float(target.norm(torch.float64))
    return Delta(nn.Parameter(torch.zeros(shape, dtype=dtype, device=weight.device), requires_grad=False), norm)
