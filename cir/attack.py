"""The relearning attack: fine-tune on related facts, and see whether the forgotten ones come back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from cir.engine import NonFiniteError, restore, snapshot
from cir.evaluation import recall
from cir.facts import load_facts, sentence_batches
from cir.sites import find_stack


def relearn(
    model: Any,
    tokenizer: Any,
    facts: str | Path | Sequence[Any],
    probe: str | Path | Sequence[Any],
    *,
    lr: float = 1e-5,
    epochs: int = 6,
    batch_size: int = 32,
    max_length: int = 128,
    keep: bool = False,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Attack ``model``: train **all** its MLP linears with Adam on the sentences of ``facts``; recall of ``probe``.

    Use facts related to, but apart from, the probed ones (the T and V splits of arXiv 2509.11816): what comes
    back was hidden and not forgotten.

    Args:
        model, tokenizer: as for :func:`cir.unlearn`.
        facts: to train on, with the next-token loss. probe: facts with probes.
        lr: Adam's. epochs: passes over ``facts``. batch_size: sentences a step, in the facts' order.
        keep: leave the attacked weights in place; by default the model ends as it came in.

    Returns:
        Recall by fact id of ``probe``, before and after each epoch: ``epochs + 1`` entries.

    Raises:
        ValueError: on bad facts, a probe set without probes, or a model without gated MLPs.
        NonFiniteError: on a NaN or infinite loss.
    """
    facts, probe = load_facts(facts), load_facts(probe)
    if not any(fact.probes for fact in probe):
        raise ValueError("probe: expected facts with probes, got none")
    stack = find_stack(model)
    targets = stack.targets(len(stack.mlps) - 1)
    batches = sentence_batches(tokenizer, facts, batch_size=batch_size, max_length=max_length, skip_first=0)
    weights = [target.linear.weight for target in targets]
    before = snapshot(targets)
    history = [recall(model, tokenizer, probe)]
    with ExitStack() as undo:
        if not keep:
            undo.callback(restore, targets, before)
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
        model.eval()
        for parameter in model.parameters():
            undo.callback(setattr, parameter, "grad", parameter.grad)
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        optimizer = torch.optim.Adam(weights, lr=lr)
        for _ in tqdm(range(epochs), disable=not progress, desc="relearning", unit="epoch"):
            for batch in batches:
                batch = batch.to(model.device)
                labels = batch.input_ids.masked_fill(~batch.attention_mask, -100)
                optimizer.zero_grad(set_to_none=True)
                loss = model(
                    input_ids=batch.input_ids,
                    attention_mask=batch.attention_mask,
                    labels=labels,
                    use_cache=False,
                ).loss
                if not math.isfinite(float(loss.detach())):
                    raise NonFiniteError(f"expected a finite loss, got {float(loss.detach())}")
                loss.backward()
                optimizer.step()
            history.append(recall(model, tokenizer, probe))
    return history
