"""The loop: forget epoch by epoch, and return the best state inside the disruption budget."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from cir.config import CIRConfig
from cir.data.facts import leaking, load_facts
from cir.forgetting.batches import fact_batches, text_batches
from cir.forgetting.budget import Best, Meter, reached
from cir.forgetting.fitting import Subspaces
from cir.forgetting.forgetter import Forgetter
from cir.forgetting.memory import needed, settle
from cir.forgetting.report import Clock, Measure, Report, hash_facts, library_versions, peak_memory
from cir.forgetting.update import restore
from cir.measures import unknown_facts
from cir.model.capture import capture
from cir.model.offload import offloaded
from cir.model.sites import find_stack, sites_of

logger = logging.getLogger(__name__)


def unlearn(
    model: Any,
    tokenizer: Any,
    facts: str | Path | Sequence[Any],
    *,
    retain: str | None = None,
    disruption: str | None = None,
    config: CIRConfig | None = None,
    subspaces: Subspaces | None = None,
    offload: str = "auto",
    progress: bool = True,
) -> Report:
    """Make ``model`` forget ``facts``, in place (CIR, arXiv 2509.11816).

    The model ends in the best state found whose loss on the disruption text rose by no more than the budget
    (by one standard error less, where only a part of the text is measured). Best is the lowest mean recall or,
    without probes, the most epochs. That may be the state it came in. Ctrl-C and SIGTERM end the run in the
    best state so far, and so does an exception.

    Args:
        model: a causal LM of Hugging Face transformers with gated MLPs, in float32, bfloat16 or float16.
        tokenizer: its tokenizer.
        facts: what :func:`cir.load_facts` reads: a path, facts, or sentences.
        retain: text whose directions are spared, and for retain steps; the built-in text if None.
        disruption: text on which the budget is measured; if None, a held-out third of the retain text.
        config: see :class:`CIRConfig`.
        subspaces: collapse against these throughout, instead of bases fitted on the facts and the retain text.
        offload: whether the weights above the loss layers wait on the host, to visit the GPU for budget checks:
            ``always``, ``never`` or, as ``auto``, where its memory would not suffice. Not after the run.
        progress: show a progress bar, and what memory is needed.

    Returns:
        A :class:`Report`. Its ``stopped`` is ``"interrupted"`` after a signal.

    Raises:
        ValueError: on bad facts, text, model or configuration, before anything is changed.
        MemoryError: if the device has too little for the smallest steps, before anything is changed.
        NonFiniteError: on a NaN or infinite loss or gradient.
    """
    config = config or CIRConfig()
    facts = load_facts(facts)
    if told := leaking(facts):
        logger.warning(
            "the prompts of %d facts hold their answer, which is no recall: %s", len(told), ", ".join(told[:5])
        )
    stack = find_stack(model)
    layers = config.layers(len(stack.mlps))
    targets = stack.targets(config.last_updated(len(stack.mlps)))
    config.check_ranks(sites_of(targets))
    config.check_rounding(targets[0].linear.weight.dtype)
    batches = fact_batches(tokenizer, facts, config, model.device)
    retain_batches, disruption_rows = text_batches(tokenizer, retain, disruption, config, model.device)
    fitting = config if subspaces is None else replace(config, rank_activation=0, rank_gradient=0, rank_background=0)
    steps = config.max_epochs * len(batches) + (len(batches) if subspaces is None else 0)
    steps += len(retain_batches) if fitting.rank_background or fitting.retain_rate else 0
    need = needed(model, stack, batches, retain_batches, fitting)
    need, offloads = settle(model, stack, layers[-1], need, offload)
    if progress:
        waiting = ", the upper ones of which wait on the host" if offloads else ""
        tqdm.write(f"about {need.peak / 2**30:.2f} GiB are needed beyond the weights{waiting}", file=sys.stderr)
    clock, started = Clock(model.device), time.perf_counter()

    with (
        stop_on_signals() as stop,
        offloaded(model, stack, layers[-1], model.device) if offloads else nullcontext(),
        capture(model, stack, layers[-1], targets) as tape,
        tqdm(total=steps, disable=not progress, unit="step") as bar,
    ):
        with clock.phase("measure"):
            meter = Meter(model, tokenizer, facts, disruption_rows, config.disruption_tokens)
            whole = meter
            if config.full_check and meter.partial:
                whole = Meter(model, tokenizer, facts, disruption_rows, None)
            unknown = unknown_facts(model, tokenizer, facts)
        if unknown:
            logger.warning("%d facts are not known to begin with: %s", len(unknown), ", ".join(unknown[:5]))
        report = Report(
            config, hash_facts(facts), meter.before, meter.before, unknown=unknown, versions=library_versions()
        )
        best = Best(targets, meter, report)
        try:
            with clock.phase("fit"):
                forgetter = Forgetter(
                    tape, targets, layers, batches, retain_batches, config, subspaces, at_once=need.tokens
                )
                forgetter.fit(bar.update, stop)
            report.stopped = "all epochs done"
            for number in range(1, config.max_epochs + 1):
                with clock.phase("epochs"):
                    losses = forgetter.epoch(config.rate, bar.update, stop, last=number == config.max_epochs)
                if stop.is_set():
                    report.stopped = "interrupted"
                    break
                with clock.phase("measure"):
                    inside = best.consider(number, losses)
                    if not inside:
                        best.retreat(number, losses)
                bar.set_postfix_str(_summary(report.epochs[-1].measure))
                if reached(report.after, config.target_recall):
                    report.stopped = "target recall reached"
                    break
                if not inside:
                    report.stopped = "budget spent"
                    break
            if whole is not meter and report.stopped != "interrupted":
                with clock.phase("measure"):
                    best.confirm(whole)
        finally:
            restore(targets, best.weights)
    report.seconds = {**clock.seconds, "total": time.perf_counter() - started}
    report.peak_memory, report.predicted_memory = peak_memory(model.device), need.peak
    return report


@contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; a second one acts as it would have without us.

    Outside the main thread, where Python allows no handlers, nothing ever sets it.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before: dict[int, Any] = {number: signal.getsignal(number) for number in signals}

    def handle(number: int, frame: Any) -> None:
        stop.set()
        logger.warning("%s: stopping after this step", signal.Signals(number).name)
        signal.signal(number, before[number])

    try:
        for number in before:
            signal.signal(number, handle)
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _summary(measure: Measure) -> str:
    recalled = "" if measure.mean_recall is None else f"recall {measure.mean_recall:.3f}, "
    return f"{recalled}loss {measure.rise:+.2%}"
