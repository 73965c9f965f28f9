"""Sentences of several lengths in one forward: packed where a model keeps them apart, else padded."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from inspect import signature
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from cir.data.tokens import Batch
from cir.model.sites import Stack
from cir.model.taps import is_experts, replace_forward, runs_all
from cir.system.processes import everywhere


def packed_inputs(stack: Stack, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
    """What the decoder is to run, and the places (N,) of the batch's real tokens in its flattened output."""
    attention = _attention_of(stack.decoder)
    if "flash" in attention:  # drops the padding by itself
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        return inputs, batch.attention_mask.flatten().nonzero().squeeze(1)
    # Padding would be a third of short sentences; packed, positions that restart keep them apart in attention.
    if keeps_apart(stack.decoder, stack.run):
        input_ids, position_ids, places = batch.packed
        return {"input_ids": input_ids, "position_ids": position_ids}, places
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask.long()}
    return inputs, batch.attention_mask.flatten().nonzero().squeeze(1)


def _attention_of(decoder: nn.Module) -> str:
    return str(getattr(getattr(decoder, "config", None), "_attn_implementation", ""))


_APART: WeakKeyDictionary[nn.Module, dict[str, bool]] = WeakKeyDictionary()


@torch.no_grad()
def keeps_apart(decoder: nn.Module, run: Callable[..., Any] | None = None) -> bool:
    """Whether what ``decoder`` says of a sentence is the same to the bit whatever sentence is packed before it: not
    so where layers are recurrent or convolve, which do not look at positions. Run once, on tokens of no meaning,
    by ``run``, if not itself.
    """
    if "position_ids" not in signature(decoder.forward).parameters:
        return False
    run = run or partial(decoder, use_cache=False)
    known, attention = _APART.setdefault(decoder, {}), _attention_of(decoder)
    if attention not in known:
        embedding = cast(nn.Embedding, decoder.get_input_embeddings())  # type: ignore[operator]
        first, second = torch.arange(16), torch.arange(8)
        position_ids = torch.cat([first, second])[None].to(embedding.weight.device)
        said: list[list[Tensor]] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            # Of every module, as what little seeps through may be lost to rounding where residuals are added.
            rows = output[0] if isinstance(output, tuple | list) and output else output
            if isinstance(rows, Tensor) and rows.shape[:2] == position_ids.shape:
                said[-1].append(rows[0, 16:18])

        with ExitStack() as undo:
            for module in decoder.modules():
                undo.callback(setattr, module, "training", module.training)
                undo.callback(module.register_forward_hook(keep).remove)
                if is_experts(module) and not runs_all(module):
                    replace_forward(undo, module, _row_by_row(module.forward))
            decoder.eval()  # no dropout
            for before in (first, first.flip(0) + 7):
                said.append([])
                ids = (torch.cat([before, second]) % embedding.num_embeddings)[None].to(position_ids.device)
                said[-1].append(run(input_ids=ids, position_ids=position_ids)[0][0, 16:])
        known[attention] = everywhere(all(map(torch.equal, *said)))
    return known[attention]


def _row_by_row(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same one token at a time, as the rounding of an expert's product may hang on how many rows it has."""

    def alone(*args: Tensor) -> Tensor:
        return torch.cat([forward(*rows) for rows in zip(*(arg.split(1) for arg in args), strict=True)])

    return alone
