"""The relearning attack: fine-tune on related facts, and see whether the forgotten ones come back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.hooks import RemovableHandle
from tqdm.auto import tqdm

from cir.data.facts import load_facts
from cir.data.tokens import Batch, sentence_batches
from cir.forgetting.update import NonFiniteError, restore, snapshot
from cir.measures import Estimate, estimate, recall
from cir.model.capture import frozen
from cir.model.finding import find_stack, unwrapped
from cir.model.packing import packed_inputs
from cir.model.sites import Stack, Target
from cir.model.taps import is_transposed
from cir.system.checks import check_number

OPTIMIZERS: dict[str, Any] = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}


@dataclass(frozen=True)
class Relearning:
    """The settings of one attack by :func:`relearn`, whose arguments these are."""

    optimizer: str = "adam"
    lr: float = 1e-5
    lora_rank: int = 0
    epochs: int = 6
    steps: int | None = None
    probe_every: int | None = None
    all_parameters: bool = False


RELEARNINGS = {
    "adam": Relearning(),
    "adam, fast": Relearning(lr=1e-4, epochs=3),
    "sgd": Relearning("sgd", lr=0.03),
    "lora": Relearning(lr=1e-3, lora_rank=16, epochs=3),
}
"""What :func:`worst_relearning` tries."""


def strong(rates: Sequence[float]) -> dict[str, Relearning]:
    """A hundred steps of Adam at each of ``rates``, over the MLPs and over all parameters, by name."""
    return {
        f"strong, {lr:g}, {'all' if everything else 'mlps'}": Relearning(
            lr=lr, steps=100, probe_every=3, all_parameters=everything
        )
        for everything in (False, True)
        for lr in rates
    }


STRONG = strong((1e-5, 3e-5, 1e-4, 3e-4))
"""As the field attacks: rate times steps is up to 0.03, that of "adam, fast" 0.0012 on 39 facts of three sentences.
Recall is looked at often, as it is highest early on.
"""


def relearn(
    model: Any,
    tokenizer: Any,
    facts: str | Path | Sequence[Any],
    probe: str | Path | Sequence[Any],
    *,
    optimizer: str = "adam",
    lr: float = 1e-5,
    lora_rank: int = 0,
    epochs: int = 6,
    steps: int | None = None,
    probe_every: int | None = None,
    all_parameters: bool = False,
    batch_size: int = 32,
    max_length: int = 1024,
    keep: bool = False,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Attack ``model``: train **all** its MLP linears on the sentences of ``facts``; recall of ``probe``.

    Use facts related to, but apart from, the probed ones (the T and V splits of arXiv 2509.11816): what comes
    back was hidden and not forgotten.

    Args:
        model, tokenizer: as for :func:`cir.unlearn`.
        facts: to train on, with the next-token loss. probe: facts with probes.
        optimizer: ``adam`` or ``sgd`` (no momentum). lr: its rate.
        lora_rank: train adapters of this rank (arXiv 2106.09685, alpha = rank) instead of the weights; 0 for these.
        epochs: passes over ``facts``. steps: so many instead. probe_every: steps between two looks at ``probe``; by
            default an epoch's. batch_size: sentences a step, in the facts' order.
        all_parameters: train all of the model, embeddings, attention, norms and head too.
        keep: leave the attacked weights in place; by default the model ends as it came in.

    Returns:
        Recall by fact id of ``probe``, before and after each epoch: ``epochs + 1`` entries; or after each
        ``probe_every`` steps and the last.

    Raises:
        ValueError: on bad facts, a probe set without probes, an unknown optimizer, adapters of all parameters, or a
            model without MLPs or with weights that wait on the host.
        NonFiniteError: on a NaN or infinite loss.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer: expected one of {', '.join(OPTIMIZERS)}, got {optimizer!r}")
    for name, value, least in (("epochs", epochs, 1), ("batch_size", batch_size, 1), ("lora_rank", lora_rank, 0)):
        check_number(name, value, least)
    for name, given in (("steps", steps), ("probe_every", probe_every)):
        if given is not None:
            check_number(name, given, 1)
    if lora_rank and all_parameters:
        raise ValueError(f"lora_rank: expected 0 where all parameters are trained, got {lora_rank}")
    check_number("lr", lr, 0.0, whole=False)
    model, facts, probe = unwrapped(model), load_facts(facts), load_facts(probe)
    if not any(fact.probes or fact.choices for fact in probe):
        raise ValueError("probe: expected facts with probes or choices, got none")
    stack = find_stack(model)
    targets = stack.targets(len(stack.mlps) - 1)
    batches = sentence_batches(tokenizer, facts, batch_size=batch_size, max_length=max_length, skip_first=0)
    weights = list(model.parameters()) if all_parameters else [target.parameter for target in targets]
    if any(weight.device.type != model.device.type for weight in weights):
        raise ValueError(
            f"expected all weights on {model.device} to be trained there, got some that wait on the host"
        )
    held = [_Trained(weight) for weight in weights]
    before = snapshot(held)
    history = [recall(model, tokenizer, probe)]
    with ExitStack() as undo:
        if not keep:
            undo.callback(restore, held, before)
        undo.enter_context(frozen(model))
        trained = undo.enter_context(_adapted(targets, lora_rank)) if lora_rank else weights
        for weight in trained:
            weight.requires_grad_(True)
        stepper = OPTIMIZERS[optimizer](trained, lr=lr)
        last, every = steps or epochs * len(batches), probe_every or len(batches)
        for step in tqdm(range(1, last + 1), disable=not progress, desc="relearning", unit="step"):
            batch = batches[(step - 1) % len(batches)].to(model.device)
            stepper.zero_grad(set_to_none=True)
            loss = sentence_loss(model, stack, batch)
            if not math.isfinite(float(loss.detach())):
                raise NonFiniteError(f"expected a finite loss, got {float(loss.detach())}")
            loss.backward()
            stepper.step()
            if step % every == 0 or step == last:
                history.append(recall(model, tokenizer, probe))
    return history


def sentence_loss(model: Any, stack: Stack, batch: Batch) -> torch.Tensor:
    """Mean next-token loss in nats over the real tokens of ``batch``."""
    inputs, places = packed_inputs(stack, batch)
    logits = model(**inputs, use_cache=False).logits.flatten(0, 1)
    ids, predicting = batch.input_ids[batch.attention_mask], batch.predicting(0)
    return F.cross_entropy(logits[places[predicting]].float(), ids.roll(-1)[predicting])


def worst_relearning(
    model: Any,
    tokenizer: Any,
    facts: Sequence[Any],
    probe: Sequence[Any],
    *,
    relearnings: Mapping[str, Relearning] = RELEARNINGS,
    progress: bool = True,
) -> dict[str, Estimate]:
    """Recall of ``probe`` after each of ``relearnings``, at the look where most came back; ``worst`` is the highest.

    Stopping at the best of them makes every shorter attack one of them. The model ends as it came in.
    """
    outcomes = {}
    for name, settings in relearnings.items():
        history = relearn(model, tokenizer, facts, probe, **asdict(settings), progress=progress)
        looks = [now for recalls in history[1:] if (now := estimate(recalls.values()))]
        outcomes[name] = max(looks, key=lambda now: now.value)
    return {**outcomes, "worst": max(outcomes.values(), key=lambda now: now.value)}


@dataclass(frozen=True)
class _Trained:
    parameter: torch.nn.Parameter


@contextmanager
def _adapted(targets: Sequence[Target], rank: int) -> Iterator[list[torch.Tensor]]:
    """Adapters B A beside the weights of ``targets``, which on exit have them added."""
    generator = torch.Generator().manual_seed(0)
    pairs = []
    with ExitStack() as undo:
        for target in targets:
            weight = target.weight
            *experts, outputs, inputs = weight.shape
            down = torch.randn(*experts, rank, inputs, generator=generator) / inputs**0.5
            a, b = down.to(weight), weight.new_zeros(*experts, outputs, rank)
            pairs.append((a, b))
            for hook in _adapting_experts(target, a, b) if experts else [_adapting(target, a, b)]:
                undo.callback(hook.remove)
        try:
            yield [factor for pair in pairs for factor in pair]
        finally:
            with torch.no_grad():
                for target, (a, b) in zip(targets, pairs, strict=True):
                    target.weight.add_(b @ a)


def _adapting(target: Target, a: torch.Tensor, b: torch.Tensor) -> RemovableHandle:
    def add(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output + inputs[0] @ a.T @ b.T

    return target.linear.register_forward_hook(add)


def _adapting_experts(target: Target, a: torch.Tensor, b: torch.Tensor) -> list[RemovableHandle]:
    """Their forward reads weights by name: it is given those with the adapters added, for as long as it runs."""
    name = target.parameter_name.rpartition(".")[2]

    def put(module: torch.nn.Module, inputs: Any) -> None:
        whole = target.weight + b @ a
        module.__dict__[name] = whole.mT if is_transposed(module) else whole

    def take(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        del module.__dict__[name]

    return [
        target.linear.register_forward_pre_hook(put),
        target.linear.register_forward_hook(take, always_call=True),
    ]
