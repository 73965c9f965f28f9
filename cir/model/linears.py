"""What multiplies rows with a matrix, and when."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch._subclasses import FakeTensor

from cir.model.taps import keep_packed

_TURNS: WeakKeyDictionary[nn.Module, WeakKeyDictionary[nn.Module, int]] = WeakKeyDictionary()


@torch.no_grad()
def linears_run(decoder: nn.Module, run: Callable[..., Any]) -> Mapping[nn.Module, int]:
    """When ``run`` runs each linear of ``decoder``, the first at 0: as it is declared, where there are no weights.

    Projections of gates and of keys may be declared after that of the output. Run once, on two tokens of no meaning.

    Raises:
        ValueError: if it does not run on token ids alone.
    """
    linears = [module for module in decoder.modules() if is_linear(module)]
    if any(isinstance(p, FakeTensor) or p.device.type == "meta" for p in decoder.parameters()):
        return {linear: number for number, linear in enumerate(linears)}
    if decoder not in _TURNS:
        turns: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
        with ExitStack() as undo:
            for module in decoder.modules():
                undo.callback(setattr, module, "training", module.training)
            decoder.eval()
            keep_packed(undo, decoder)
            for linear in linears:
                hook = linear.register_forward_hook(lambda module, args, output: turns.update({module: len(turns)}))
                undo.callback(hook.remove)
            device = next(decoder.parameters()).device
            try:
                run(input_ids=torch.ones(1, 2, dtype=torch.long, device=device))
            except Exception as error:
                raise ValueError(f"expected layers that are run on input_ids alone, got {error!s:.200}") from error
        _TURNS[decoder] = turns
    return _TURNS[decoder]


def is_linear(module: nn.Module) -> bool:
    """Whether it multiplies rows with a matrix: nn.Linear, or Conv1D of transformers, as GPT-2 has it."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def matrix_of(linear: nn.Module) -> torch.Tensor:
    """The weight (D_out, D_in) of what :func:`is_linear`; Conv1D keeps the transpose."""
    weight = cast(torch.Tensor, linear.weight)
    return weight if isinstance(linear, nn.Linear) else weight.T


def shape_of(linear: nn.Module) -> tuple[int, int]:
    """(D_out, D_in) of what :func:`is_linear`, whose weight may be packed."""
    if isinstance(linear, nn.Linear):
        return linear.out_features, linear.in_features
    hidden, inner = matrix_of(linear).shape
    return hidden, inner
