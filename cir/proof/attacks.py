"""Cheap attacks on a model that was made to forget: each tries to show that what is gone was only hidden.

Fine-tuning, the strongest, is in :mod:`cir.proof.relearning`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cir.data.facts import Fact, Probe, check_apart, load_facts
from cir.data.tokens import continuation, pad
from cir.measures import Estimate, estimate, extracted, recall
from cir.model.finding import find_stack, unwrapped
from cir.model.linears import is_linear, matrix_of
from cir.system.checks import check_number

SHOTS = 4
QUANTIZED_GROUP = 64
PRUNED = 0.5
SAMPLED_TOKENS = 12
RIDGE = 0.1
"""Ridge of the linear probe, as a share of the mean eigenvalue of the hidden states' Gram matrix."""


def attack(
    model: Any,
    tokenizer: Any,
    facts: str | Path | Sequence[Any],
    *,
    related: str | Path | Sequence[Any] = (),
    original: Mapping[str, Tensor] | None = None,
    samples: int = 16,
    seed: int = 0,
) -> dict[str, Estimate]:
    """What each attack brings back of ``facts``; the model ends as it came in.

    Args:
        model, tokenizer: any causal LM of transformers. facts: with probes or choices.
        related: other facts of the kind, with probes, that the attacker knows.
        original: parameters by name from before the model was changed, those that were at least.
        samples: continuations drawn for each probe. seed: of the draws.

    Returns:
        By attack, of the facts:
          - ``quantized_8bit``, ``quantized_4bit``: recall with the weights rounded, see :func:`quantized`;
          - ``sampled``: share of probes whose target is in one of ``samples`` continuations at temperature 1;
          - ``few_shot`` (needs ``related``): recall after four related probes and their targets;
          - ``linear_probe`` (needs ``related``): see :func:`linear_probe`;
          - ``pruned`` (needs ``original``): recall with the smaller half of the changes undone.

    Raises:
        ValueError: if no fact has probes or choices, or one is among ``related`` too.
    """
    check_number("samples", samples, 1)
    check_number("seed", seed, 0)
    model = unwrapped(model)
    facts, related = load_facts(facts), load_facts(related) if related else []
    if not any(fact.probes or fact.choices for fact in facts):
        raise ValueError("facts: expected some with probes or choices, got none: nothing could be asked")
    check_apart(related, facts)
    outcomes: dict[str, Estimate | None] = {}
    for bits in (8, 4):
        with quantized(model, bits):
            outcomes[f"quantized_{bits}bit"] = estimate(recall(model, tokenizer, facts).values())
    if original is not None:
        with pruned(model, original):
            outcomes["pruned"] = estimate(recall(model, tokenizer, facts).values())
    if any(fact.probes for fact in facts):
        found = extracted(model, tokenizer, facts, tokens=SAMPLED_TOKENS, samples=samples, seed=seed)
        outcomes["sampled"] = estimate(found.values())
    if any(fact.probes for fact in facts) and any(fact.probes for fact in related):
        outcomes["few_shot"] = estimate(recall(model, tokenizer, few_shot(facts, related, seed)).values())
        outcomes["linear_probe"] = linear_probe(model, tokenizer, facts, related)
    return {name: outcome for name, outcome in outcomes.items() if outcome is not None}


def few_shot(facts: Sequence[Fact], related: Sequence[Fact], seed: int = 0) -> list[Fact]:
    """``facts`` whose prompts are led by four related ones with their targets, drawn anew for each."""
    draw = random.Random(seed)
    known = [probe for fact in related for probe in fact.probes]

    def led(probe: Probe) -> Probe:
        shots = draw.sample(known, min(SHOTS, len(known)))
        return replace(probe, prompt="\n".join([*(shot.prompt + shot.target for shot in shots), probe.prompt]))

    return [replace(fact, probes=tuple(led(probe) for probe in fact.probes)) for fact in facts]


@contextmanager
def quantized(model: Any, bits: int) -> Iterator[None]:
    """``model`` with its decoder's linears rounded to the nearest of 2^bits levels, evenly spread between the lowest
    and highest of each 64 weights of a row, as weight-only quantization has it; on exit the weights are as before.

    A row whose length 64 does not divide is one group.
    """
    stack = find_stack(model)
    weights = [matrix_of(m) for m in stack.decoder.modules() if is_linear(m)]
    weights += [matrix for t in stack.targets(len(stack.mlps) - 1) if t.experts for matrix in t.weight]
    with _changed(weights):
        for weight in weights:
            size = QUANTIZED_GROUP if weight.shape[1] % QUANTIZED_GROUP == 0 else weight.shape[1]
            groups = weight.data.float().reshape(weight.shape[0], -1, size)
            low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
            step = ((high - low) / (2**bits - 1)).clamp_min(torch.finfo(torch.float32).tiny)
            weight.data.copy_((((groups - low) / step).round() * step + low).view_as(weight))
        yield


@contextmanager
def pruned(model: Any, original: Mapping[str, Tensor]) -> Iterator[None]:
    """``model`` with the smaller half of the entries that differ from ``original`` put back, in each parameter."""
    parameters = {name: p for name, p in model.named_parameters() if name in original}
    with _changed(list(parameters.values())):
        for name, parameter in parameters.items():
            before = original[name].to(parameter)
            size = (parameter.data - before).abs().float()
            differing = size[size > 0]
            if len(differing):
                kept = size > differing.kthvalue(max(1, int(PRUNED * len(differing)))).values
                parameter.data.copy_(torch.where(kept, parameter.data, before))
        yield


@contextmanager
def _changed(weights: Sequence[Tensor]) -> Iterator[None]:
    """On exit ``weights`` are as they were, bit for bit."""
    before = [weight.detach().to("cpu", copy=True) for weight in weights]
    try:
        yield
    finally:
        for weight, values in zip(weights, before, strict=True):
            weight.data.copy_(values)


def linear_probe(model: Any, tokenizer: Any, facts: Sequence[Fact], related: Sequence[Fact]) -> Estimate | None:
    """Whether a linear map can read the targets of ``facts`` from hidden states, fitted on those of ``related``.

    At each layer a ridge regression leads from the hidden state at the end of a prompt to the output embedding of
    the target's first token. A probe is read where, of all the targets, its own has the highest inner product.
    By the layer at which most are read; the share is by fact.
    """
    states, tokens, owners = _at_prompt_ends(model, tokenizer, [*related, *facts])
    embedding = model.get_output_embeddings().weight.detach()
    candidates, targets = torch.tensor(tokens).unique(return_inverse=True)
    outputs = embedding[candidates.to(embedding.device)].cpu().double()
    outputs = outputs / outputs.norm(dim=1, keepdim=True)
    known = sum(len(fact.probes) for fact in related)
    best = None
    for rows in states.double():
        rows = rows - rows[:known].mean(0)
        gram = rows[:known] @ rows[:known].T
        # Prompts that end in one token are all alike at the lowest layer: nothing is to be read there.
        gram += RIDGE * gram.diagonal().mean().clamp_min(1e-12) * torch.eye(known, dtype=gram.dtype)
        read = rows[known:] @ rows[:known].T @ torch.linalg.solve(gram, outputs[targets[:known]] - outputs.mean(0))
        hits = ((read @ outputs.T).argmax(1) == targets[known:]).double()
        by_fact: dict[str, list[float]] = {}
        for name, hit in zip(owners[known:], hits.tolist(), strict=True):
            by_fact.setdefault(name, []).append(hit)
        here = estimate(sum(own) / len(own) for own in by_fact.values())
        if best is None or (here is not None and here.value > best.value):
            best = here
    return best


@torch.no_grad()
def _at_prompt_ends(model: Any, tokenizer: Any, facts: Sequence[Fact]) -> tuple[Tensor, list[int], list[str]]:
    """Of every probe: hidden states (layers + 1, probes, D) at the end of its prompt, first target token, fact id.

    They are what each layer reads, and what the decoder returns. transformers' own ``output_hidden_states`` leaves
    hooks on the model.
    """
    owners = [(fact.id, probe) for fact in facts for probe in fact.probes]
    told = [continuation(tokenizer, probe.prompt, probe.target) for _, probe in owners]
    stack, here, states = find_stack(model), list[Tensor](), []

    def read(layer: nn.Module, args: Any, given: dict[str, Any]) -> None:
        here.append((args[0] if args else given["hidden_states"])[0, -1].float().cpu())

    def returned(decoder: nn.Module, args: Any, output: Any) -> None:
        here.append(output[0][0, -1].float().cpu())

    with ExitStack() as undo:
        for layer in stack.layers:
            undo.callback(layer.register_forward_pre_hook(read, with_kwargs=True).remove)
        undo.callback(stack.decoder.register_forward_hook(returned).remove)
        for head, _ in told:
            batch = pad([head]).to(model.device)
            here.clear()
            model(input_ids=batch.input_ids, use_cache=False, logits_to_keep=1)
            states.append(torch.stack(here))
    return torch.stack(states, dim=1), [tail[0] for _, tail in told], [name for name, _ in owners]
