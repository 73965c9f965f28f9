"""A study of forgetting the pair of subject and relation, which :func:`cir.unlearn` does not run yet: docs/pairs.md.

Only where both have been read is there a pair: in late layers, at the token that predicts the answer. There the
outputs of attention and MLP are changed so that the answer's log-probability falls, by a dose that is stated in nats
for each fact, along what text and contrast facts do not use.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.quality.measuring import Bench, Outcome, Task, copies
from bench.records import ROOT, write_rows
from cir import Fact, load_facts
from cir.data.tokens import Batch, pad, rows_to_answers, windows
from cir.model.capture import frozen
from cir.model.checkpoints import demo_model
from cir.model.sites import find_stack
from cir.proof.relearning import RELEARNINGS

LENGTH, WINDOWS = 128, 16
"""Tokens of a window of text, and windows of a forward."""


@dataclass(frozen=True)
class PairConfig:
    """How to forget pairs; nothing is in units of one model.

    Attributes:
        layers: share of the depth that is updated, from the top.
        nats: dose, by which a step is to lower each fact's log-probability, to first order.
        floor: log-probability at which a sentence counts no more.
        ridge_activation, ridge_gradient: of the soft collapse, in mean eigenvalues of what is collapsed.
        contrast_weight: of the contrast facts' activations beside the text's, each as a mean over tokens.
        text_tokens: of the retain text that are read.
        max_steps: at most.
    """

    layers: float = 0.3
    nats: float = 1.0
    floor: float = -6.0
    ridge_activation: float = 3e-3
    ridge_gradient: float = 1e-2
    contrast_weight: float = 10.0
    text_tokens: int = 8192
    max_steps: int = 40


@dataclass
class _Rows:
    """Inputs (T, D_in) and gradients of the log-probability (T, D_out), by linear, where answers are predicted."""

    logprobs: Tensor
    inputs: dict[str, Tensor]
    gradients: dict[str, Tensor]


@dataclass
class _Asked:
    """Sentences up to their answers: the places and ids of these, and which fact each sentence states."""

    batch: Batch
    last: Tensor
    answers: Tensor
    owners: Tensor


@dataclass
class _Tape:
    """The linears that are updated, and what a forward and backward leaves of each."""

    linears: dict[str, nn.Linear]
    inputs: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)


def forget_pairs(
    model: Any, tokenizer: Any, facts: Sequence[Fact], contrast: Sequence[Fact], text: str, config: PairConfig
) -> int:
    """Make ``model`` forget ``facts`` in place and keep ``contrast``; the steps taken.

    At each linear, inputs A and gradients G lose what is common by X' = X - X C (C + m I)^-1 = m X (C + m I)^-1,
    with C the second moments of text and contrast facts, and m the ridge. A fact's change is the sum of G'_t^T A'_t
    over its sentences t; it is scaled by c so that the sum over u and all linears of c (G_t . G'_u) (A_t . A'_u), the
    change of t's log-probability to first order, is -``nats`` in the mean over t.

    Raises:
        ValueError: without contrast facts, or if the collapse leaves nothing of a fact; a step that meets such a fact
            changes no weight.
    """
    if not contrast:
        raise ValueError("contrast: expected facts that must stay, got none")
    with _taped(model, config) as tape:
        whiten_inputs, whiten_gradients = _collapses(model, tokenizer, contrast, text, tape, config)
        asked = _asked(tokenizer, facts, model.device)
        for step in range(config.max_steps):
            rows = _read(model, tape, asked)
            live = rows.logprobs > config.floor
            if not live.any():
                return step
            _step(tape, rows, asked.owners, live, whiten_inputs, whiten_gradients, config.nats)
    return config.max_steps


@torch.no_grad()
def _step(
    tape: _Tape,
    rows: _Rows,
    owners: Tensor,
    live: Tensor,
    whiten_inputs: dict[str, Tensor],
    whiten_gradients: dict[str, Tensor],
    nats: float,
) -> None:
    inputs = {name: x @ whiten_inputs[name] for name, x in rows.inputs.items()}
    gradients = {name: g @ whiten_gradients[name] for name, g in rows.gradients.items()}
    kernel = sum(
        (rows.gradients[name] @ gradients[name].T) * (rows.inputs[name] @ inputs[name].T) for name in tape.linears
    )
    scale = torch.zeros_like(rows.logprobs)
    for fact in owners[live].unique():
        own = live & (owners == fact)
        effect = kernel[own][:, own].sum() / own.sum()
        if not 0 < effect < torch.inf:
            raise ValueError(f"fact {int(fact)}: expected an effect above 0 after the collapse, got {float(effect)}")
        scale[own] = -nats / effect
    for name, linear in tape.linears.items():
        linear.weight += (gradients[name] * scale[:, None]).T @ inputs[name]


def _collapses(
    model: Any, tokenizer: Any, contrast: Sequence[Fact], text: str, tape: _Tape, config: PairConfig
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The soft collapse m (C + m I)^-1 of each linear's inputs and of its gradients."""
    moments: dict[str, Tensor] = {}
    rows = windows(tokenizer, text, LENGTH)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    rows = rows[: config.text_tokens // LENGTH].to(model.device)
    with torch.no_grad():
        for chunk in rows.split(WINDOWS):
            model(input_ids=chunk, use_cache=False, logits_to_keep=1)
            for name, x in tape.inputs.items():
                moments[name] = moments.get(name, 0) + _moment(x.flatten(0, 1), rows.numel())
    found = _read(model, tape, _asked(tokenizer, contrast, model.device))
    of_gradients = {}
    for name in tape.linears:
        x, g = found.inputs[name], found.gradients[name]
        moments[name] += config.contrast_weight * _moment(x, len(x))
        unit = g / g.norm(dim=1, keepdim=True).clamp_min(torch.finfo(g.dtype).tiny)
        of_gradients[name] = _collapse(_moment(unit, len(g)), config.ridge_gradient)
    return {name: _collapse(c, config.ridge_activation) for name, c in moments.items()}, of_gradients


def _moment(rows: Tensor, count: int) -> Tensor:
    return rows.double().T @ rows.double() / count


def _collapse(moment: Tensor, ridge: float) -> Tensor:
    width = len(moment)
    shift = ridge * moment.trace() / width * torch.eye(width, dtype=moment.dtype, device=moment.device)
    return torch.linalg.solve(moment + shift, shift).float()


def _asked(tokenizer: Any, facts: Sequence[Fact], device: torch.device) -> _Asked:
    rows, owners = [], []
    for number, fact in enumerate(facts):
        for row in rows_to_answers(tokenizer, fact, LENGTH, 1):
            rows.append(row)
            owners.append(number)
    last, answers, owner = (
        torch.tensor(numbers, device=device)
        for numbers in ([len(row) - 2 for row in rows], [row[-1] for row in rows], owners)
    )
    return _Asked(pad([row[:-1] for row in rows]).to(device), last, answers, owner)


def _read(model: Any, tape: _Tape, asked: _Asked) -> _Rows:
    places = torch.arange(len(asked.last), device=asked.last.device)
    mask = asked.batch.attention_mask
    logits = model(input_ids=asked.batch.input_ids, attention_mask=mask.long(), use_cache=False).logits
    logprobs = logits[places, asked.last].float().log_softmax(-1)[places, asked.answers]
    # Of what the first updated linear puts out, so that the backward ends there.
    torch.autograd.grad(logprobs.sum(), tape.inputs["start"])
    inputs = {name: tape.inputs[name][places, asked.last].detach() for name in tape.linears}
    gradients = {name: tape.gradients[name][places, asked.last] for name in tape.linears}
    return _Rows(logprobs.detach(), inputs, gradients)


@contextmanager
def _taped(model: Any, config: PairConfig) -> Iterator[_Tape]:
    stack = find_stack(model)
    first = len(stack.mlps) - max(1, round(config.layers * len(stack.mlps)))
    linears: dict[str, Any] = {}
    layers: Any = stack.layers
    for number in range(first, len(stack.mlps)):
        linears[f"{number}.attention"] = layers[number].self_attn.o_proj
        linears[f"{number}.mlp"] = stack.mlps[number].targets[2].linear
    tape = _Tape(linears)

    def start(module: nn.Module, args: Any, given: dict[str, Any]) -> Any:
        if not torch.is_grad_enabled():
            return None
        hidden = args[0] if args else given["hidden_states"]
        tape.inputs["start"] = hidden = hidden.detach().requires_grad_()
        return ((hidden, *args[1:]), given) if args else (args, {**given, "hidden_states": hidden})

    def read(name: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            tape.inputs[name] = args[0].detach()
            if output.requires_grad:
                output.register_hook(lambda grad: tape.gradients.__setitem__(name, grad))

        return keep

    with ExitStack() as undo:
        undo.enter_context(frozen(model))
        undo.callback(stack.layers[first].register_forward_pre_hook(start, with_kwargs=True).remove)
        for name, linear in linears.items():
            undo.callback(linear.register_forward_hook(read(name)).remove)
        yield tape


def outcome(bench: Bench, facts: Sequence[Fact], config: PairConfig) -> Outcome:
    """What :func:`forget_pairs` makes of the bench's model, which is then as before."""
    started = time.perf_counter()
    with bench.restored():
        forget_pairs(bench.model, bench.tokenizer, facts, bench.task.contrast, bench.task.retain, config)
        seconds = time.perf_counter() - started
        return Outcome(bench.meter.measure(), [], seconds, copies(bench.model.parameters()))


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.pairs", description=__doc__)
    parser.add_argument("--model", default=demo_model())
    parser.add_argument("--probe", type=Path, required=True, help="facts to forget")
    parser.add_argument("--relearn", type=Path, required=True, help="related facts, which the attacker is taught")
    parser.add_argument("--same-subject", type=Path, required=True, help="facts of which every other one is contrast")
    parser.add_argument("--contrast", type=int, default=20, help="of --relearn, the first so many are contrast")
    parser.add_argument("--also", action="store_true", help="forget the rest of --relearn too")
    parser.add_argument("--retain", type=Path, required=True)
    parser.add_argument("--disruption", type=Path, required=True)
    parser.add_argument("--floor", type=float, nargs="+", default=[PairConfig.floor])
    parser.add_argument("--attacks", nargs="+", choices=list(RELEARNINGS), default=list(RELEARNINGS))
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    arguments = parser.parse_args()
    probe, relearn, same = (load_facts(getattr(arguments, name)) for name in ("probe", "relearn", "same_subject"))
    rest = relearn[arguments.contrast :]
    task = Task(
        relearn=relearn,
        probe=probe,
        neighbours=[] if arguments.also else rest,
        same_subject=same[1::2],
        unrelated=relearn[: arguments.contrast],
        contrast=[*relearn[: arguments.contrast], *same[::2]],
        retain=arguments.retain.read_text(encoding="utf-8"),
        disruption=arguments.disruption.read_text(encoding="utf-8"),
        tokens=8192,
        attacks=tuple(arguments.attacks),
        thorough=True,
    )
    bench = Bench(arguments.model, task)
    facts = [*probe, *rest] if arguments.also else probe
    for config in (PairConfig(floor=floor) for floor in arguments.floor):
        made = outcome(bench, facts, config)
        row = {"bench": "pairs", "facts": len(facts), "config": asdict(config), **bench.examine(made)}
        write_rows(arguments.out / "pairs.jsonl", [row])
        print({name: round(value, 4) for name, value in row.items() if isinstance(value, float)}, row["attacked"])


if __name__ == "__main__":
    main()
