"""The paper's way to forget (arXiv 2509.11816), as a plan that :func:`cir.unlearn` carries out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import count
from typing import Any

from cir.config import BreakingConfig
from cir.data.facts import Fact
from cir.forgetting.batches import fact_batches, text_batches
from cir.forgetting.breaking import Breaker
from cir.forgetting.memory import needed, settle
from cir.forgetting.plan import Epoch, EpochLosses, Plan, Run
from cir.model.capture import capture
from cir.model.finding import find_stack
from cir.model.offload import offloaded
from cir.model.sites import Stack, Target, sites_of


def plan_breaking(
    model: Any,
    tokenizer: Any,
    facts: Sequence[Fact],
    config: BreakingConfig,
    *,
    retain: str | None,
    disruption: str | None,
    offload: str,
    followed: Callable[[int], object],
) -> Plan:
    """Epochs of steps over all facts, each as long, until the budget is spent. ``followed`` is called with the number
    of the batch after each step of theirs.
    """
    stack = find_stack(model)
    layers = config.layers(len(stack.mlps))
    targets = stack.targets(config.last_updated(len(stack.mlps)))
    _check_experts(stack, targets, layers, config)
    config.check_ranks(sites_of(targets))
    config.check_rounding(targets[0].weight.dtype)
    batches = fact_batches(tokenizer, facts, config, model.device)
    retain_batches, disruption_rows = text_batches(tokenizer, retain, disruption, config, model.device)
    need = needed(model, stack, batches, retain_batches, config)
    need, offloads = settle(model, stack, layers[-1], need, offload)

    @contextmanager
    def opened(on_step: Callable[[], object], stop: threading.Event) -> Iterator[Run]:
        with (
            offloaded(model, stack, layers[-1], model.device) if offloads else nullcontext(),
            capture(model, stack, layers[-1], targets) as tape,
        ):

            def start() -> Epoch:
                breaker = Breaker(tape, targets, layers, batches, retain_batches, config, at_once=need.tokens)
                breaker.fit(on_step, stop)

                def epoch(number: int) -> EpochLosses:
                    batches = count()

                    def stepped() -> None:
                        on_step()
                        followed(next(batches))

                    return breaker.epoch(config.rate, stepped, stop, last=number == config.max_epochs)

                return epoch

            yield Run(start)

    steps = (config.max_epochs + 1) * len(batches) + (len(retain_batches) if config.retain_rate else 0)
    waiting = ", the upper ones of which wait on the host" if offloads else ""
    updated = range(config.last_updated(len(stack.mlps)) + 1)
    epochs, rate = config.max_epochs, config.rate
    return Plan(targets, updated, disruption_rows, epochs, rate, steps, need.peak, waiting, opened)


def _check_experts(stack: Stack, targets: Sequence[Target], layers: Sequence[int], config: BreakingConfig) -> None:
    """That what is broken is all that a layer's MLP says, and that statistics are those of tokens."""
    apart = [layer for layer in layers if stack.mlps[layer].module is None]
    if apart:
        raise ValueError(f"expected one module that puts out all of a layer's MLP, got two in layers {apart}")
    if config.statistics != "tokens" and any(target.experts for target in targets):
        raise ValueError(f"statistics: expected tokens for a mixture of experts, got {config.statistics!r}")
