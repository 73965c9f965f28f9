"""What a run takes of the device's memory, counted beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from cir.config import BreakingConfig, CIRConfig, rank_at
from cir.data.tokens import Batch
from cir.forgetting.subspace import columns_at
from cir.measures import TOKENS_PER_FORWARD, WINDOW
from cir.model.offload import free_memory, upper_modules
from cir.model.shards import gathered_bytes
from cir.model.sites import Site, Stack, Target, apart, sites_of
from cir.system.processes import least

OFFLOAD = ("auto", "always", "never")
TOKENS_AT_ONCE, ON_GPU, STEP_ON_GPU = 512, 2048, 768
"""In one forward. A GPU multiplies 512 tokens by a layer of Llama-3.1-8B in less time than the host takes to launch
it. Steps are launched as graphs, and what autograd keeps of 768 tokens is an eighth of those weights.
"""
ROOMY = 2
"""Times as many tokens of a step where a GPU has room for twice what that takes: larger products, fewer launches."""
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k", "top_k")
"""What configurations call the number of experts that a token is routed to."""
ROWS_OF_A_FACT = 4
"""Tokens of a step that tell one, about."""
KEPT = 2**14
"""Tokens of contrast facts and of counterfactuals, about."""
LEAST_AT_ONCE = 32
"""A sentence: no step is made smaller."""
HIDDEN_KEPT, INNER_KEPT = 12, 4
"""Vectors of a layer's hidden and MLP sizes that autograd keeps of a token: norms, attention, residuals; the MLP."""


@dataclass(frozen=True)
class Need:
    """Bytes of the device's memory that a run takes beyond the weights.

    Attributes:
        held: throughout: bases, without a GPU copies of the updated weights, and in the paper's way moments.
        rows: of the largest step, at every site. token: that autograd keeps for one of the ``tokens`` run at once.
        check: the logits of a budget check.
        moments: that bases are solved from, beyond the bases. solving: what one of them takes. predicted: that
            autograd keeps for a token of text, of which half as many are run with gradients.
    """

    held: int
    rows: int
    token: int
    check: int
    tokens: int = TOKENS_AT_ONCE
    moments: int = 0
    solving: int = 0
    predicted: int = 0

    @property
    def peak(self) -> int:
        fit = self.moments + max(self.solving, self.predicted * min(self.tokens, TOKENS_AT_ONCE) // 2)
        return self.held + max(fit, self.rows + self.token * self.tokens, self.check)

    def within(self, have: int) -> Need:
        """The same with as few tokens at once as ``have`` bytes take.

        Raises:
            MemoryError: if they do not take it with the least.
        """
        room = (have - self.held - self.rows) // self.token
        if self.predicted:
            fitted = 2 * (have - self.held - self.moments) // self.predicted
            room = room if fitted >= TOKENS_AT_ONCE else min(room, fitted)
        need = replace(self, tokens=max(LEAST_AT_ONCE, min(self.tokens, room)))
        if need.peak > have:
            raise MemoryError(
                f"expected {need.peak / 2**30:.2f} GiB of free memory beyond the weights, got {have / 2**30:.2f} GiB"
            )
        return need


def tokens_at_once(device: torch.device) -> int:
    """In one forward."""
    return ON_GPU if device.type == "cuda" else TOKENS_AT_ONCE


def tokens_of_a_step(device: torch.device) -> int:
    """In one forward and backward, where memory allows it."""
    return STEP_ON_GPU if device.type == "cuda" else TOKENS_AT_ONCE


def needed_to_forget(
    model: Any,
    stack: Stack,
    targets: Sequence[Target],
    text: int,
    config: CIRConfig,
    device: torch.device | None = None,
) -> Need:
    """What :func:`cir.unlearn` takes, by counting: bases, the moments that they are solved from and, without a GPU,
    copies of the updated and of the relearned weights; deltas beside all of these, where they are left as they are;
    hidden states of what is measured of ``text`` tokens and of what has to stay; what FSDP gathers; the rows of a
    step's tokens, twice, at about four sentences a fact. ``device``: of the model, where it is not there yet.
    """
    device = device or model.device
    sites = sites_of(targets)
    ranks = {site: rank_at(site, config.rank) for site in apart(sites)}
    size = targets[0].weight.element_size()
    vocabulary = model.config.get_text_config().vocab_size
    # The moments of a site are let go as its basis comes, which takes a few of their size; the narrow ones first.
    sketched = {site: columns_at(site, rank) for site, rank in ranks.items()}
    solving = freed = 0
    for site, columns in sorted(sketched.items(), key=lambda item: item[0].width):
        solving = max(solving, 8 * columns * (4 * site.width + 3 * columns) - freed)
        freed += (8 - 4) * columns * site.width
    bases = sum(4 * columns * site.width for site, columns in sketched.items())
    held, moments = bases, max(0, _moments(ranks) - bases)
    hidden, inner = _widths(model, stack)
    depth = sum(mlp.down in targets for mlp in stack.mlps)
    relearned = [target for mlp in stack.mlps[-depth:] for target in mlp.targets]
    beside = {target.name: target.weight.nbytes for target in [*targets, *relearned] if target.delta is not None}
    held += sum(beside.values())
    layers = depth * size * (HIDDEN_KEPT * hidden + INNER_KEPT * inner)
    if device.type != "cuda":
        held += (3 if config.full_check else 2) * sum(target.weight.nbytes for target in targets)
        held += sum(target.weight.nbytes for target in relearned)
        # A gradient and what a weight becomes, in float32, where it is relearned.
        held += 2 * 4 * max(target.weight.shape[-2:].numel() for target in targets)
    held += (min(text, config.disruption_tokens or 0) + KEPT) * hidden * size + gathered_bytes(stack.owners)
    return Need(
        held=held,
        rows=2 * ROWS_OF_A_FACT * config.batch_size * size * sum(site.width * _rows(model, site) for site in sites),
        # Of every token logits, as they come and in float32 twice; or what autograd keeps, and of a quarter of the
        # tokens logits, in float32, as log-probabilities, and their gradients.
        token=max(vocabulary * (size + 8), layers + vocabulary * (size + 12) // 4),
        tokens=tokens_of_a_step(device),
        check=vocabulary * (tokens_at_once(device) * size + WINDOW * 8),
        moments=moments,
        solving=solving,
        predicted=layers + vocabulary * (size + 8),
    )


def needed(
    model: Any, stack: Stack, batches: Sequence[Batch], retain: Sequence[Batch], config: BreakingConfig
) -> Need:
    """What :func:`cir.unlearn` takes in the paper's way, by counting."""
    layers, last = config.layers(len(stack.mlps)), config.last_updated(len(stack.mlps))
    targets = stack.targets(last)
    sites = sites_of(targets)
    size = targets[0].weight.element_size()
    ranks = {"activation": config.rank_activation, "gradient": config.rank_gradient}
    common = {site: rank_at(site, ranks[site.kind]) for site in apart(sites)}
    held = sum(4 * site.width * rank for site, rank in common.items()) + _moments(common, config.exact)
    if model.device.type != "cuda":
        held += (3 if config.full_check else 2) * sum(target.weight.nbytes for target in targets)
    forget = max(int(batch.counted(config.skip_first).sum()) for batch in batches)
    keep = max((int(batch.attention_mask.sum()) for batch in retain if config.retain_rate), default=0)
    window = max(WINDOW, config.retain_length)
    hidden, inner = _widths(model, stack)
    return Need(
        held=held,
        rows=max(forget, keep) * size * sum(site.width * _rows(model, site) for site in sites),
        token=len(stack.layers[: layers[-1] + 1]) * size * (HIDDEN_KEPT * hidden + INNER_KEPT * inner),
        # As they come, and of a window in float32 and as log-probabilities.
        check=model.config.get_text_config().vocab_size * (TOKENS_PER_FORWARD * size + window * 8),
    )


def _widths(model: Any, stack: Stack) -> tuple[int, int]:
    """Of the residual stream, and of what the widest MLP has for a token, in all its experts."""
    inner = max(sum(t.activation.width * _rows(model, t.activation) for t in mlp.writers) for mlp in stack.mlps)
    return stack.mlps[0].down.gradient.width, inner


def _rows(model: Any, site: Site) -> int:
    """Of a token at a site."""
    return experts_of_a_token(model, site.experts) if site.experts else 1


def experts_of_a_token(model: Any, experts: int) -> int:
    """How many of them, by the configuration; all of them where it does not say."""
    config = model.config.get_text_config()
    found = (getattr(config, name, None) for name in TOP_K)
    return next((min(k, experts) for k in found if isinstance(k, int)), experts)


def fits(model: Any, need: Need) -> Need:
    """``need`` with as many tokens at once as the device's free memory takes, and more where a GPU has plenty.

    Raises:
        MemoryError: if it does not take it with the least.
    """
    have = free_memory(model.device)
    if have is None:
        return need
    have = least(have)  # of the device that has least: each process makes the same forwards
    roomy = replace(need, tokens=ROOMY * need.tokens)
    return roomy if model.device.type == "cuda" and 2 * roomy.peak < have else need.within(have)


def settle(model: Any, stack: Stack, last_layer: int, need: Need, offloading: str) -> tuple[Need, bool]:
    """What will be taken of the memory that is free, and whether the upper weights are to wait on the host.

    Raises:
        ValueError: if ``offloading`` is none of :data:`OFFLOAD`.
        MemoryError: if it does not suffice even so.
    """
    if offloading not in OFFLOAD:
        raise ValueError(f"offload: expected one of {', '.join(OFFLOAD)}, got {offloading!r}")
    device, have = model.device, free_memory(model.device)
    sizes, on_device = [], 0
    for module in upper_modules(model, stack, last_layer):
        sizes.append(sum(parameter.nbytes for parameter in module.parameters()))
        on_device += sum(parameter.nbytes for parameter in module.parameters() if parameter.device == device)
    if have is None:
        return need, offloading == "always"
    # A model spread over several devices stays as it is.
    movable = device.type == "cuda" and on_device == sum(sizes)
    moves = offloading == "always" or (offloading == "auto" and movable and need.peak > have)
    if device.type == "cuda" and (moves or on_device < sum(sizes)):
        # Those on the host come back one module at a time.
        have += (on_device if moves else 0) - max(sizes, default=0)
    return need.within(have), moves


def _moments(ranks: Mapping[Site, int], exact: bool = False) -> int:
    """Bytes of X^T X Omega in float64, or of half X^T X; and of Omega in bfloat16, which sites of one shape share."""
    columns = {site: columns_at(site, rank, exact) for site, rank in ranks.items() if rank}
    shared = {(site.width, n) for site, n in columns.items() if n < site.width}
    sums = sum(site.width * (8 * n if n < site.width else 4 * n + 4) for site, n in columns.items())
    return sums + sum(2 * width * n for width, n in shared)
