"""The loop: forget epoch by epoch, and return the best state inside the disruption budget."""

from __future__ import annotations

import logging
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from cir.capture import capture
from cir.config import CIRConfig
from cir.engine import NonFiniteError, interpolate, phase, restore, snapshot
from cir.evaluation import WINDOW, loss_rise, recall, sample, token_losses, unknown_facts
from cir.facts import Batch, Fact, batches_of, leaking, load_facts, rows_to_answers, sentence_rows, windows
from cir.forget import EpochLosses, Forgetter
from cir.memory import needed, offloaded, settle
from cir.report import Clock, Epoch, Measure, Report, hash_facts, library_versions, peak_memory
from cir.sites import Target, find_stack, sites_of
from cir.subspace import Subspaces

logger = logging.getLogger(__name__)

HELD_OUT = 1 / 3
"""Share of the retain text, at its end, kept for the budget where no disruption text is given."""
RETREATS = 3
"""States tried, at most, on the line back from an epoch that overstepped the budget."""


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
        best = _Best(targets, meter, report)
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
                if _reached(report.after, config.target_recall):
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


def builtin_text() -> str:
    """The neutral prose that ships with the package: about 2,800 words on many subjects."""
    return (Path(__file__).parent / "data" / "neutral.txt").read_text(encoding="utf-8")


class Meter:
    """Measures the model against its state ``before``, when the meter was made, on at most ``tokens`` of ``rows``
    (N, L), half of them where the text is nearest the facts.
    """

    def __init__(self, model: Any, tokenizer: Any, facts: list[Fact], rows: torch.Tensor, tokens: int | None) -> None:
        self._model, self._tokenizer, self._facts = model, tokenizer, facts
        near = tokenizer([sentence for fact in facts for sentence in fact.sentences])["input_ids"]
        self._sample = sample(rows, tokens, near)
        with phase("budget check"):
            self._original = token_losses(model, self._sample.rows)
        if not torch.isfinite(self._original).all():
            raise NonFiniteError(
                "expected a finite loss on the disruption text before any update, got NaN or infinity"
            )
        self.before = self._measured(self._original)

    @property
    def partial(self) -> bool:
        """Whether windows were left out."""
        return len(self._sample.rows) < self._sample.count

    def measure(self) -> Measure:
        """The loss, and what is recalled of the facts."""
        with phase("budget check"):
            losses = token_losses(self._model, self._sample.rows)
        return self._measured(losses)

    def _measured(self, losses: torch.Tensor) -> Measure:
        rise, stderr = loss_rise(losses, self._original, self._sample)
        with phase("recall"):
            recalls = recall(self._model, self._tokenizer, self._facts)
        return Measure(recalls, self._sample.mean(losses.mean(1))[0], rise, stderr)


class _Best:
    """The best state so far inside the budget: its ``weights``, and its measure in the report's ``after``."""

    def __init__(self, targets: Sequence[Target], meter: Meter, report: Report) -> None:
        self._targets, self._meter, self._report = targets, meter, report
        self.weights = snapshot(targets)
        self._untouched = snapshot(targets) if report.config.full_check else self.weights
        self._spare: list[torch.Tensor] | None = None

    def consider(self, number: int, losses: EpochLosses, share: float = 1.0) -> bool:
        """Measure the model after ``share`` of an epoch's change, and report it; whether it is inside the budget."""
        now, config = self._meter.measure(), self._report.config
        inside = now.rise_bound <= config.budget
        kept = inside and _better(now, self._report.after)
        self._report.epochs.append(Epoch(number, share * config.rate, losses.breaking, losses.retain, now, kept))
        if kept:
            # Into the second of two, so that one is whole whatever happens meanwhile.
            taken = snapshot(self._targets, into=self._spare)
            self.weights, self._spare, self._report.after = taken, self.weights, now
        return inside

    def retreat(self, number: int, losses: EpochLosses) -> None:
        """Back from an epoch that overstepped the budget, on the line to the best state, until inside."""
        before, weights, share = self._report.after, self.weights, 1.0
        for _ in range(RETREATS):
            part = share_inside(before, self._report.epochs[-1].measure, self._report.config.budget)
            share *= part
            interpolate(self._targets, weights, part)
            if self.consider(number, losses, share):
                return

    def confirm(self, whole: Meter) -> None:
        """Measure the best state on the ``whole`` text, and go back to the model as it came until inside."""
        restore(self._targets, self.weights)
        self._report.before = whole.before
        for _ in range(1 + RETREATS):
            now = whole.measure()
            if now.rise <= self._report.config.budget:
                self.weights, self._report.after = snapshot(self._targets, into=self._spare), now
                return
            share = share_inside(whole.before, now, self._report.config.budget)
            logger.warning("the whole text's loss rose by %.3f %%: back to %.0f %%", 100 * now.rise, 100 * share)
            interpolate(self._targets, self._untouched, share)
        self.weights, self._report.after = self._untouched, whole.before


def _better(now: Measure, best: Measure) -> bool:
    """Without probes, later is better."""
    return now.mean_recall is None or best.mean_recall is None or now.mean_recall < best.mean_recall


def _reached(measure: Measure, target: float | None) -> bool:
    return target is not None and measure.mean_recall is not None and measure.mean_recall <= target


def share_inside(best: Measure, over: Measure, budget: float) -> float:
    """The share of the way from ``best`` to ``over`` that should end just inside: harm is as the square of a length
    that grows in proportion to the way, and so does the standard error.
    """
    room, slope = budget - best.rise_bound, over.rise_stderr - best.rise_stderr
    start = max(best.rise, 0.0) ** 0.5
    growth = max(max(over.rise - min(best.rise, 0.0), 0.0) ** 0.5 - start, 0.0)
    # The larger root of growth^2 x^2 + linear x = room, in the form that loses no digits where the curve is flat.
    linear = 2 * start * growth + slope
    root = (linear**2 + 4 * growth**2 * max(room, 0.0)) ** 0.5
    return 0.95 * min(1.0, 2 * max(room, 0.0) / max(linear + root, 1e-30))


def _summary(measure: Measure) -> str:
    recalled = "" if measure.mean_recall is None else f"recall {measure.mean_recall:.3f}, "
    return f"{recalled}loss {measure.rise:+.2%}"


def fact_batches(tokenizer: Any, facts: Sequence[Fact], config: CIRConfig, device: torch.device) -> list[Batch]:
    """The facts' sentences in batches, shuffled so that each mixes many facts, and beside each sentence one without
    a share of its words (``config.word_dropout``): what is forgotten must not hang on the wording.
    """
    rows_of = rows_to_answers if config.to_answers else sentence_rows
    draw = random.Random(config.seed)
    rows = []
    for fact in facts:
        for row in rows_of(tokenizer, fact, config.max_length, config.skip_first):
            rows.append(row)
            if config.word_dropout:
                thinned = [token for token in row[:-1] if draw.random() >= config.word_dropout] + row[-1:]
                if config.skip_first + 2 <= len(thinned) < len(row):
                    rows.append(thinned)
    draw.shuffle(rows)
    return [batch.to(device) for batch in batches_of(rows, config.batch_size)]


def text_batches(
    tokenizer: Any, retain: str | None, disruption: str | None, config: CIRConfig, device: torch.device
) -> tuple[list[Batch], torch.Tensor]:
    """Batches of retain windows, and the windows (N, L) on which the budget is measured."""
    rows = windows(tokenizer, builtin_text() if retain is None else retain, config.retain_length)
    if disruption is not None:
        measured = windows(tokenizer, disruption, WINDOW)
    else:
        kept = round((1 - HELD_OUT) * len(rows))
        if kept in (0, len(rows)):
            raise ValueError(
                f"retain: expected at least two windows of {config.retain_length} tokens, of which one is "
                f"held out for the budget, got {len(rows)}"
            )
        rows, measured = rows[:kept], rows[kept:]
    return _shuffled_batches(rows, config, device), measured


def benign_batches(tokenizer: Any, text: str, config: CIRConfig, device: torch.device) -> list[Batch]:
    """Batches of windows of ``text``, ``retain_tokens`` of them at most."""
    return _shuffled_batches(windows(tokenizer, text, config.retain_length), config, device)


def _shuffled_batches(rows: torch.Tensor, config: CIRConfig, device: torch.device) -> list[Batch]:
    shuffled = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed))]
    rows = shuffled[: config.retain_tokens // config.retain_length]
    return [
        Batch(chunk, torch.ones_like(chunk, dtype=torch.bool)).to(device)
        for chunk in rows.split(config.retain_batch_size)
    ]
