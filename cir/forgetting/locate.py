"""Where facts live: what recall is left as one kind of module says the same of every fact, and the layer in which a
subject and what is said of it come together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from cir.config import CIRConfig
from cir.data.facts import Fact, load_facts
from cir.data.tokens import continuation, encode
from cir.forgetting.questions import Questions, questions
from cir.measures import mean_recall, recall
from cir.model.capture import AnswerCapture, frozen
from cir.model.finding import find_stack, unwrapped
from cir.model.linears import is_linear
from cir.model.sites import Stack

KINDS = ("mlp", "attention")
PLACES = ("subject", "last")
ASKED = 32
"""Sentences that are asked where facts come together, at most."""
SMALLEST_FALL = 1.0
"""Nats of log-odds lost as answers' states are interchanged: where it is less, they do not tell facts apart."""
SPARED = 0.7
"""Of that, what interchanging before a layer spares at least, for the pair to be made in it or above."""
BELOW = 0.07
"""Of the depth, layers under that one which are updated too: training on related facts mends the way there first."""
ALIKE = 0.5
"""Of the words of two sentences, those in both, for one to be interchanged with the other."""
Hook = Callable[[tuple[str, int], Tensor, Tensor], Tensor | None]
"""Given kind and layer, a module's output (B, L, D), and the places (2, B) of :data:`PLACES` in each row."""


@dataclass(frozen=True)
class Location:
    """What :func:`locate` found.

    Attributes:
        recall: mean over the facts with nothing ablated.
        groups: of layers that were ablated together.
        ablated: by kind of module and place, the mean recall that each group of layers leaves.
    """

    recall: float
    groups: tuple[range, ...]
    ablated: dict[tuple[str, str], tuple[float, ...]]

    def table(self) -> str:
        """A line for each kind of module and place, a column for each group of layers."""
        names = [f"{g[0]}-{g[-1]}" if len(g) > 1 else str(g[0]) for g in self.groups]
        lines = [f"{'recall ' + format(self.recall, '.3f'):<24}" + "".join(f"{name:>8}" for name in names)]
        for (kind, place), left in self.ablated.items():
            lines.append(f"{kind + ', ' + place:<24}" + "".join(f"{value:>8.3f}" for value in left))
        return "\n".join(lines)


def locate(
    model: Any,
    tokenizer: Any,
    facts: str | Path | Sequence[Any],
    *,
    width: int = 1,
    subjects: Mapping[str, str] | None = None,
    progress: bool = True,
) -> Location:
    """Which layers and modules of ``model`` carry ``facts``, by mean ablation; nothing is changed.

    What the MLPs, or the attentions, of a group of layers put out at one place of each probe is replaced by its mean
    over all probes: all that tells one fact from another is lost there. The places are the last token of the subject
    and the last token of the prompt, which predicts the answer.

    Args:
        model, tokenizer: as for :func:`cir.unlearn`. facts: with probes, several, as their mean is taken.
        width: layers of a group.
        subjects: by fact id, the subject as its prompts have it; by default the rarest token of each prompt, the last
            one where there are several.

    Raises:
        ValueError: if fewer than two facts have probes, a prompt does not hold its subject, or a layer has not just
            one module beside its MLP that mixes tokens.
    """
    facts = [fact for fact in load_facts(facts) if fact.probes]
    if len(facts) < 2:
        raise ValueError(f"facts: expected at least two with probes, whose mean is taken, got {len(facts)}")
    if width < 1:
        raise ValueError(f"width: expected at least 1, got {width}")
    model = unwrapped(model)
    stack = find_stack(model)
    modules = _modules(stack)
    places = _places(tokenizer, facts, subjects)
    groups = tuple(range(start, min(start + width, len(stack.mlps))) for start in range(0, len(stack.mlps), width))
    sums: dict[tuple[str, int], Tensor] = {}
    rows = 0

    def observe(key: tuple[str, int], output: Tensor, at: Tensor) -> None:
        nonlocal rows
        rows += at.shape[1] * (key == next(iter(modules)))
        here = output[torch.arange(output.shape[0], device=output.device), at].double().sum(1)
        sums[key] = sums.get(key, 0) + here

    def recalled(hook: Hook, keys: Sequence[tuple[str, int]]) -> float:
        with _hooked(model, {key: modules[key] for key in keys}, places, hook):
            return mean_recall(recall(model, tokenizer, facts)) or 0.0

    with frozen(model):
        whole = recalled(observe, list(modules))
        means = {key: total / rows for key, total in sums.items()}
        ablated: dict[tuple[str, str], tuple[float, ...]] = {}
        with tqdm(total=len(KINDS) * len(PLACES) * len(groups), disable=not progress, desc="locating") as bar:
            for kind in KINDS:
                for number, place in enumerate(PLACES):

                    def ablate(key: tuple[str, int], output: Tensor, at: Tensor, number: int = number) -> Tensor:
                        changed = output.clone()
                        of_rows = torch.arange(len(output), device=output.device)
                        changed[of_rows, at[number]] = means[key][number].to(output.dtype)
                        return changed

                    left = []
                    for group in groups:
                        left.append(recalled(ablate, [(kind, layer) for layer in group]))
                        bar.update()
                    ablated[kind, place] = tuple(left)
    return Location(whole, groups, ablated)


def _modules(stack: Stack) -> dict[tuple[str, int], nn.Module]:
    """The MLP of each layer, and the one other child that has linears: what mixes tokens."""
    found: dict[tuple[str, int], nn.Module] = {}
    for number, (layer, mlp) in enumerate(zip(stack.layers, stack.mlps, strict=True)):
        mixers = {
            name: child
            for name, child in layer.named_children()
            if not mlp.inside & set(child.modules()) and any(map(is_linear, child.modules()))
        }
        if len(mixers) != 1:
            raise ValueError(
                f"layer {number}: expected one module with linears beside the MLP, got {', '.join(mixers) or 'none'}"
            )
        if mlp.module is None:
            raise ValueError(f"layer {number}: expected one module that puts out all of its MLP, got two")
        found["mlp", number] = mlp.module
        found["attention", number] = next(iter(mixers.values()))
    return found


def _places(
    tokenizer: Any, facts: Sequence[Fact], subjects: Mapping[str, str] | None
) -> dict[tuple[int, ...], tuple[int, int]]:
    """By the token ids of a probe with its target, the places of the subject's last token and of the prompt's."""
    told = {probe: continuation(tokenizer, probe.prompt, probe.target) for fact in facts for probe in fact.probes}
    spread = Counter(token for fact in facts for token in {t for probe in fact.probes for t in told[probe][0]})
    found = {}
    for fact in facts:
        for probe in fact.probes:
            ids, target = told[probe]
            if subjects is None:
                at = min(range(len(ids)), key=lambda i: (spread[ids[i]], -i))
            else:
                before, subject, _ = probe.prompt.partition(subjects[fact.id])
                if not subject:
                    raise ValueError(f"fact {fact.id!r}: expected {subjects[fact.id]!r} in {probe.prompt!r}")
                at = len(encode(tokenizer, before + subject)) - 1
            found[tuple(ids + target)] = at, len(ids) - 1
    return found


@contextmanager
def _hooked(
    model: Any,
    modules: Mapping[tuple[str, int], nn.Module],
    places: Mapping[tuple[int, ...], tuple[int, int]],
    hook: Hook,
) -> Iterator[None]:
    """``hook`` sees what ``modules`` put out, and may replace it; which row is which probe tell its token ids."""
    at = torch.empty(0)

    def find(module: nn.Module, args: Any, given: dict[str, Any]) -> None:
        nonlocal at
        masks = given["attention_mask"].bool()
        rows = [tuple(ids[mask].tolist()) for ids, mask in zip(given["input_ids"], masks, strict=True)]
        at = torch.tensor([places[row] for row in rows], device=masks.device).T

    def seen(key: tuple[str, int]) -> Callable[..., Any]:
        def call(module: nn.Module, args: Any, output: Any) -> Any:
            several = isinstance(output, tuple | list)
            rows = output[0] if several else output
            # Some mixtures put out the tokens of all rows one after the other.
            changed = hook(key, rows.view(at.shape[1], -1, rows.shape[-1]), at.to(rows.device))
            if changed is None:
                return None
            changed = changed.view(rows.shape)
            return type(output)([changed, *output[1:]]) if several else changed

        return call

    with ExitStack() as undo:
        undo.callback(model.register_forward_pre_hook(find, with_kwargs=True).remove)
        for key, module in modules.items():
            undo.callback(module.register_forward_hook(seen(key)).remove)
        yield


def located(
    model: Any, tokenizer: Any, facts: Sequence[Fact], config: CIRConfig, quantized: bool = False
) -> CIRConfig:
    """``config`` with ``layers`` where the model at hand has ``facts``, unless it says so itself.

    That is from :data:`BELOW` under the layer of :func:`pair_layer` on; without such a layer it comes back as it is.
    ``quantized``: whether the model may be.
    """
    if config.layers is not None:
        return config
    depth = len(find_stack(model, quantized=quantized, sharded=True).mlps)
    first = pair_layer(model, tokenizer, facts, max_length=config.max_length, quantized=quantized)
    if first is None:
        return config
    return replace(config, layers=(depth - max(first - round(BELOW * depth), 0)) / depth)


@torch.no_grad()
def pair_layer(
    model: Any, tokenizer: Any, facts: Sequence[Fact], *, max_length: int = 128, quantized: bool = False
) -> int | None:
    """The layer in which what tells ``facts`` apart reaches the token that predicts the answer; nothing is changed.

    By interchange intervention (arXiv 2106.02997): before a layer, the state of that token is put in the place of
    another fact's, of the sentence most alike with another answer after the same token. Below the layer asked for,
    answers hardly change, as the state tells of the relation alone; above, they become the other's. The highest layer
    before which answers still stay is found by halving, in about log2(depth) forwards of at most :data:`ASKED`
    sentences.

    Returns:
        The number of the layer; None where no two facts can be interchanged, or answers do not depend on that state.

    Raises:
        ValueError: on a sentence of more than ``max_length`` tokens or of one.
    """
    stack = find_stack(model, quantized=quantized, sharded=True)
    facts = facts[:: -(-len(facts) // ASKED) or 1]
    if len(facts) < 2:
        return None
    chosen = [replace(fact, sentences=fact.sentences[: ASKED // len(facts)]) for fact in facts]
    with frozen(model):
        tape = AnswerCapture(model, stack, 0)
        at_once = ASKED * max_length  # so that all are in one forward
        (asked,) = questions(tape, tokenizer, chosen, max_length=max_length, at_once=at_once)
        rows, others = _interchangeable(asked)
        if not len(rows):
            return None
        places = asked.below.places[asked.at]

        def odds(layer: int) -> float:
            with _interchanged(stack, layer, places[rows], places[others]):
                return float(asked.odds(tape)[rows].mean())

        first, last = 0, len(stack.mlps) - 1
        known, left = odds(first), odds(last)
        if known - left < SMALLEST_FALL:
            return None
        while last - first > 1:
            middle = (first + last) // 2
            if odds(middle) >= left + SPARED * (known - left):
                first = middle
            else:
                last = middle
    return first


def _interchangeable(asked: Questions) -> tuple[Tensor, Tensor]:
    """Rows of ``asked``, and for each the one of the sentence most alike with another answer after the same token."""
    inputs, ends = asked.below.inputs, asked.below.places[asked.at].tolist()
    ids = inputs["input_ids"].flatten().tolist()
    columns = torch.arange(inputs["input_ids"].shape[1]).expand_as(inputs["input_ids"])
    positions = inputs.get("position_ids", columns).flatten().tolist()
    read = [set(ids[end - positions[end] : end + 1]) for end in ends]
    rows, others = [], []
    for row, (own, answer) in enumerate(zip(read, asked.answers.tolist(), strict=True)):
        alike = {
            other: len(own & read[other]) / len(own | read[other])
            for other, its in enumerate(asked.answers.tolist())
            if its != answer and ids[ends[other]] == ids[ends[row]] and asked.owners[other] != asked.owners[row]
        }
        best = max(alike, key=alike.__getitem__, default=None)
        if best is not None and alike[best] >= ALIKE:
            rows.append(row)
            others.append(best)
    device = asked.at.device
    return torch.tensor(rows, device=device, dtype=torch.long), torch.tensor(others, device=device, dtype=torch.long)


@contextmanager
def _interchanged(stack: Stack, layer: int, rows: Tensor, others: Tensor) -> Iterator[None]:
    """Before ``layer``, the states of the tokens ``rows`` of the flattened forward are those of ``others``."""

    def swap(module: nn.Module, args: Any, output: Any) -> Any:
        several = isinstance(output, tuple | list)
        states = output[0] if several else output
        flat = states.flatten(0, -2).clone()
        flat[rows.to(flat.device)] = states.flatten(0, -2)[others.to(flat.device)]
        flat = flat.view_as(states)
        return type(output)([flat, *output[1:]]) if several else flat

    with ExitStack() as undo:
        if layer:  # the tokens themselves are the same
            undo.callback(stack.layers[layer - 1].register_forward_hook(swap).remove)
        yield
