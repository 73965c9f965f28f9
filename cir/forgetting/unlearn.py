"""The loop: forget epoch by epoch, and return the best state inside the disruption budget."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from tqdm.auto import tqdm

from cir.config import BreakingConfig, CIRConfig
from cir.data.facts import Fact, check_contrast, leaking, load_facts
from cir.data.shipped import builtin_contrast
from cir.forgetting.adapter import Delivery
from cir.forgetting.batches import chosen, split_text
from cir.forgetting.budget import Best, Meter, reached
from cir.forgetting.counterfactuals import counterfactuals
from cir.forgetting.events import Followers, OnRound, OnStep
from cir.forgetting.fitting import Subspaces, check_fitted_on, fitted
from cir.forgetting.forgetter import Forgetter
from cir.forgetting.locate import located
from cir.forgetting.memory import fits, needed_to_forget, tokens_at_once
from cir.forgetting.paper import plan_breaking
from cir.forgetting.plan import Epoch, EpochLosses, Plan, Recalls, Run
from cir.forgetting.questions import LIKE, Probed, ask, likeness, sentences
from cir.forgetting.report import Clock, Measure, Report, hash_facts, library_versions, peak_memory
from cir.forgetting.reread import Reread
from cir.forgetting.update import fingerprint, restore, snapshot
from cir.measures import unknown_facts
from cir.model.capture import answering
from cir.model.deltas import with_deltas
from cir.model.finding import find_stack, unwrapped
from cir.model.shards import processes_of
from cir.model.sites import is_opaque, sites_of
from cir.system.processes import anywhere, together
from cir.system.signals import stop_on_signals

logger = logging.getLogger(__name__)
Offload = Literal["auto", "always", "never"]
OnSignal = Literal["return", "raise"]


def unlearn(
    model: Any,
    tokenizer: Any,
    facts: str | Path | Sequence[Any],
    *,
    contrast: str | Path | Sequence[Any] | None = None,
    retain: str | None = None,
    disruption: str | None = None,
    config: CIRConfig | BreakingConfig | None = None,
    subspaces: Subspaces | None = None,
    offload: Offload = "auto",
    on_step: OnStep | None = None,
    on_round: OnRound | None = None,
    on_signal: OnSignal = "return",
    adapter: str | Path | None = None,
    progress: bool = True,
) -> Report:
    """Make ``model`` forget ``facts``, in place or by an adapter; docs/method.md tells how.

    The model ends in the best state found whose loss on the disruption text rose by no more than the budget
    (by one standard error less, where only a part of the text is measured). Best is the lowest mean recall or,
    without probes, the most epochs. That may be the state it came in. Ctrl-C and SIGTERM end the run in the
    best state so far, and so does an exception, but for one of a callback: after that the model is as it came in.

    Args:
        model: a causal LM of Hugging Face transformers, see docs/families.md, in float32, bfloat16 or float16;
            with ``adapter`` also one whose linears are quantized: subclasses of nn.Linear, as those of bitsandbytes,
            or with weights that are tensor subclasses, as torchao's.
        tokenizer: its tokenizer.
        facts: what :func:`cir.load_facts` reads: a path, facts, or sentences.
        contrast: facts that must stay: of the same relations with other subjects, and about the same subjects. The
            more of both, the less is lost of what is like them and not given. By default built-in ones of other
            relations (:func:`cir.data.shipped.builtin_contrast`); () for none.
        retain: text whose directions are spared; the built-in text if None.
        disruption: text on which the budget is measured; if None, a held-out third of the retain text.
        config: see :class:`CIRConfig`; with one of :meth:`CIRConfig.paper` the model forgets in the paper's way.
        subspaces: of :meth:`Subspaces.fit` on this model, in place of ``contrast``: nothing is fitted then, and what
            the model says near these facts (docs/method.md, counterfactuals) is not spared.
        offload: in the paper's way, whether the weights above the loss layers wait on the host, to visit the GPU
            for budget checks: ``always``, ``never`` or, as ``auto``, where its memory would not suffice.
        on_step, on_round: called with a :class:`cir.StepEvent` after each step, and with a :class:`cir.RoundEvent`
            for each budget check. Where one returns something true, the run ends as after its last epoch: what has
            been done is measured, and kept inside the budget. Either takes one more copy, on the host, of the weights
            that change.
        on_signal: after Ctrl-C or SIGTERM, ``return`` the report, or ``raise`` KeyboardInterrupt.
        adapter: a new folder. The model's own weights then stay as they are, to the bit, and what makes it forget is
            written there as a LoRA adapter that peft loads, of ``adapter_rank`` of :class:`CIRConfig` at most; after
            an exception nothing is. The report's ``after`` is the model with the adapter, its ``adapter.whole`` that
            with all of the change. Meanwhile there is a delta beside each linear of the layers that change through
            which attention puts out or which is of an MLP: they take what these linears would unquantized.
        progress: show a progress bar, and what memory is needed.

    Returns:
        A :class:`Report`. Its ``stopped`` is ``"interrupted"`` after a signal.

    Raises:
        ValueError: on bad facts, text, model or configuration, or contrast facts that are to be forgotten too, before
            anything is changed.
        FileExistsError, OSError: if ``adapter`` exists or cannot be written, before anything is done.
        MemoryError: if the device has too little for the smallest steps, before anything is changed.
        NonFiniteError: on a NaN or infinite loss or gradient.
        KeyboardInterrupt: after a signal, if ``on_signal`` is ``raise``; the model is in the best state so far.
    """
    for name, value, valid in (("offload", offload, Offload), ("on_signal", on_signal, OnSignal)):
        if value not in get_args(valid):
            raise ValueError(f"{name}: expected one of {', '.join(get_args(valid))}, got {value!r}")
    followers = Followers(on_step, on_round)
    config, model = config or CIRConfig(), unwrapped(model)
    delivery = None
    if adapter is not None:
        if isinstance(config, BreakingConfig):
            raise ValueError("adapter: expected none with the paper's configuration, which changes most weights")
        delivery = Delivery(adapter, getattr(model, "name_or_path", ""), config)
    facts = load_facts(facts)
    if told := leaking(facts):
        logger.warning(
            "the prompts of %d facts hold their answer, which is no recall: %s", len(told), ", ".join(told[:5])
        )
    texts = {"retain": retain, "disruption": disruption}
    if isinstance(config, BreakingConfig):
        if contrast is not None or subspaces is not None:
            raise ValueError("contrast and subspaces: expected none with the paper's configuration, which has no use")
        plan = plan_breaking(model, tokenizer, facts, config, **texts, offload=offload, followed=followers.step)
    else:
        if offload == "always":
            raise ValueError(
                "offload: expected auto or never, as all layers are run, or the paper's preset, got always"
            )
        if subspaces is not None and contrast is not None:
            raise ValueError(
                "expected either contrast or subspaces, which have contrast facts of their own, got both"
            )
        if contrast is None:
            kept = builtin_contrast(facts) if subspaces is None else subspaces.contrast
        else:
            kept = load_facts(contrast) if isinstance(contrast, str | Path) or len(contrast) else []
        followed = None if on_step is None else followers.step
        with together(processes_of(model)):
            plan = _plan(
                model,
                tokenizer,
                facts,
                kept,
                config,
                subspaces,
                **texts,
                beside=delivery is not None,
                followed=followed,
                progress=progress,
            )
    if progress:
        needed = f"about {plan.memory / 2**30:.2f} GiB are needed beyond the weights"
        tqdm.write(f"{needed}{plan.waiting}", file=sys.stderr)
    with together(processes_of(model)):
        report = _run(model, tokenizer, facts, config, plan, followers, delivery, progress)
    if delivery is not None:
        delivery.write()
    if on_signal == "raise" and followers.stop.is_set():
        raise KeyboardInterrupt("a signal ended the run; the model is in its best state so far")
    return report


def _plan(
    model: Any,
    tokenizer: Any,
    facts: Sequence[Fact],
    contrast: Sequence[Fact],
    config: CIRConfig,
    subspaces: Subspaces | None,
    *,
    retain: str | None,
    disruption: str | None,
    beside: bool,
    followed: Callable[[int, float, int], object] | None,
    progress: bool,
) -> Plan:
    """Steps along what is specific to each fact, until all are gone: of weights, or of deltas ``beside`` them."""
    check_contrast(facts, contrast)
    stack = find_stack(model, quantized=beside, sharded=not beside)
    text, measured = split_text(tokenizer, retain, disruption, config)
    if subspaces is None:
        every = [*facts, *contrast]
        first = located(model, tokenizer, every, config, quantized=beside).first_layer(len(stack.mlps))
    else:
        first = subspaces.fitted_on.get("layers", [0])[0]
        if any(map(is_opaque, stack.writers(first))):
            raise ValueError("subspaces: expected none for a quantized model; give contrast facts")
        check_fitted_on(subspaces, fingerprint(stack.writers(first)))
    counted = with_deltas(model, stack, first, empty=True) if beside else stack
    targets = counted.writers(first)
    config.check_rounding(targets[0].weight.dtype)
    rows = chosen(text, config)
    need = fits(model, needed_to_forget(model, counted, targets, measured.numel(), config))
    if beside:
        stack = with_deltas(model, stack, first)
        targets = stack.writers(first)

    @contextmanager
    def opened(on_step: Callable[[], object], stop: threading.Event) -> Iterator[Run]:
        with answering(model, stack, first) as tape:
            choices: dict[str, Any] = {}

            def start() -> Epoch:
                at_once = need.tokens
                told, own = (
                    sentences(tape, tokenizer, of, max_length=config.max_length, at_once=at_once)
                    for of in (contrast, facts)
                )
                kept = list(told)
                if subspaces is None:
                    near = counterfactuals(model, tape, tokenizer, own, told, at_once=at_once, seed=config.seed)
                    kept, choices["counterfactuals"] = [*told, *near], len(near)
                    asked = ask(tape, kept, at_once)
                    common = fitted(tape, targets, rows, asked, config, at_once=at_once, progress=progress)
                else:
                    common = subspaces.to(model.device)
                choices["directions_left"] = common.left(sites_of(targets))
                forgetter = Forgetter(tape, targets, tokenizer, facts, common, config, told, own, kept, at_once)
                if first:  # else there are no states that tell of the relation alone
                    _warn_of(facts, likeness(forgetter.asked, told))

                def epoch(number: int) -> EpochLosses:
                    losses = forgetter.epoch(on_step, stop, followed)
                    choices["relearning_rate"] = forgetter.rate
                    return losses

                return epoch

            def recalls(asked: Sequence[Fact]) -> Recalls:
                return partial(Probed(tape, tokenizer, asked, tokens_at_once(model.device)).recall, tape)

            # Letters of multiple-choice questions are compared by the whole model.
            by_letter = any(not fact.probes and fact.choices for fact in facts)
            yield Run(start, lambda windows: Reread(tape, windows).losses, None if by_letter else recalls, choices)

    epochs = -(-config.max_steps // config.check_every)
    batches = -(-len(facts) // config.batch_size)
    layers, steps = range(first, len(stack.mlps)), batches * config.max_steps
    return Plan(targets, layers, measured, epochs, config.dose, steps, need.peak, "", opened)


def _warn_of(facts: Sequence[Fact], alike: Tensor | None) -> None:
    """That facts have no contrast of their relation, by what :func:`likeness` says; without contrast, of all."""
    nearest = torch.zeros(len(facts)) if alike is None else alike.amax(1)
    without = [fact.id for fact, value in zip(facts, nearest.tolist(), strict=True) if value < LIKE]
    if without:
        logger.warning(
            "%d facts have no contrast fact of the same relation (similarity %.2f at most, of one relation %.2f): "
            "others of their kind may suffer, give some as contrast: %s",
            len(without),
            float(nearest[nearest < LIKE].max()),
            LIKE,
            ", ".join(without[:5]),
        )


def _run(
    model: Any,
    tokenizer: Any,
    facts: Sequence[Fact],
    config: CIRConfig | BreakingConfig,
    plan: Plan,
    followers: Followers,
    delivery: Delivery | None,
    progress: bool,
) -> Report:
    clock, started = Clock(model.device), time.perf_counter()
    with (
        stop_on_signals() as stop,
        tqdm(total=plan.steps, disable=not progress, unit="step") as bar,
        plan.opened(bar.update, stop) as run,
    ):
        followers.stop = stop
        with clock.phase("measure"):
            meter = Meter(model, tokenizer, facts, plan.disruption, config.disruption_tokens, run.read, run.ask)
            whole = meter
            if config.full_check and meter.partial:
                whole = Meter(model, tokenizer, facts, plan.disruption, None)
            unknown = unknown_facts(model, tokenizer, facts)
        if unknown:
            logger.warning("%d facts are not known to begin with: %s", *_counted(unknown))
        report = Report(
            config,
            hash_facts(facts),
            meter.before,
            meter.before,
            layers=(plan.layers[0], plan.layers[-1]),
            n_facts=len(facts),
            unknown=unknown,
            versions=library_versions(),
        )
        best = Best(plan.targets, meter, report, plan.rate)
        untouched = snapshot(plan.targets) if followers.any else best.weights
        try:
            with clock.phase("fit"):
                epoch = run.start()
            report.stopped = "all epochs done"
            for number in range(1, plan.epochs + 1):
                with clock.phase("epochs"):
                    losses = epoch(number)
                if anywhere(followers.asked):
                    stop.clear()  # it was set by a callback, not by a signal
                if anywhere(stop.is_set()):
                    stop.set()
                    report.stopped = "interrupted"
                    break
                with clock.phase("measure"):
                    inside = best.consider(number, losses)
                    if not inside:
                        best.retreat(number, losses)
                report.unforgotten, report.chosen = [facts[i].id for i in losses.left], dict(run.chosen)
                bar.set_postfix_str(_summary(report.epochs[-1].measure))
                followers.rounds(report, None if isinstance(config, BreakingConfig) else len(losses.left))
                if ended := _ended(report, inside, losses.gone, anywhere(followers.asked)):
                    report.stopped = ended
                    break
            if whole is not meter and report.stopped != "interrupted":
                with clock.phase("measure"):
                    best.confirm(whole)
                    meter = whole
            if delivery is not None:
                restore(plan.targets, best.weights)
                with clock.phase("adapter"):
                    delivery.truncate(plan.targets, meter, report)
        finally:
            restore(plan.targets, untouched if followers.failed else best.weights)
    if report.unforgotten:
        logger.warning("%d facts are not all forgotten: %s", *_counted(report.unforgotten))
    report.seconds = {**clock.seconds, "total": time.perf_counter() - started}
    report.peak_memory, report.predicted_memory = peak_memory(model.device), plan.memory
    return report


def _counted(ids: Sequence[str]) -> tuple[int, str]:
    """How many, and the first of them."""
    return len(ids), ", ".join(ids[:5])


def _ended(report: Report, inside: bool, gone: bool, asked: bool) -> str:
    """Why no further epoch is to come, if none is."""
    if reached(report.after, report.config.target_recall):
        return "target recall reached"
    if not inside:
        return "budget spent"
    if gone:
        return "forgotten"
    return "stopped by a callback" if asked else ""


def _summary(measure: Measure) -> str:
    recalled = "" if measure.mean_recall is None else f"recall {measure.mean_recall:.3f}, "
    return f"{recalled}loss {measure.rise:+.2%}"
