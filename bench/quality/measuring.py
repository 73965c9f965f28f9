"""One model that forgets by one method after the other, and what is measured of each."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

import cir
from bench.baselines import BASELINES
from cir import CIRConfig, Fact, Subspaces, relearn
from cir.data.sampling import spread
from cir.forgetting.batches import fact_batches, text_batches
from cir.forgetting.budget import Meter, retreat
from cir.forgetting.report import Measure
from cir.measures import kl_divergence, mean_recall, recall, reference_of
from cir.model.checkpoints import load_model
from cir.proof.attacks import few_shot, quantized
from cir.proof.relearning import RELEARNINGS

CIR = CIRConfig()
MAX_EPOCHS = 6
TRIES = 4
KL_TOKENS = 4096
"""Of the disruption text, where the change of what is said is measured: training on such text lowers its loss, and so
hides harm from the budget, but not this.
"""


@dataclass(frozen=True)
class Task:
    """What is to be forgotten and measured, and on which text. ``thorough``: try every rate of a baseline."""

    relearn: list[Fact]
    probe: list[Fact]
    neighbours: list[Fact]
    retain: str
    disruption: str
    tokens: int
    attacks: tuple[str, ...]
    thorough: bool

    @property
    def epochs(self) -> int:
        return MAX_EPOCHS if self.thorough else 2

    @property
    def facts(self) -> list[Fact]:
        return [*self.probe, *self.relearn]


@dataclass
class Outcome:
    """``measure``: of the state reached, which has ``weights``. ``trajectory``: (rise, recall) epoch by epoch."""

    measure: Measure
    trajectory: list[tuple[float, float]]
    seconds: float
    weights: list[Tensor]


class Bench:
    """One model, forgetting by one method after the other from the same weights."""

    def __init__(self, source: str, task: Task) -> None:
        self.task = task
        self.model, self.tokenizer = load_model(source)
        self.weights = [parameter.detach().to("cpu", copy=True) for parameter in self.model.parameters()]
        # Losses of the original, against which every method is measured.
        _, rows = text_batches(self.tokenizer, task.retain, task.disruption, CIR, self.model.device)
        self.meter = Meter(self.model, self.tokenizer, task.facts, rows, task.tokens)
        self.reference = reference_of(self.model, spread(rows, min(task.tokens, KL_TOKENS)))
        self.before = self.meter.before

    def kl(self) -> float:
        return float(kl_divergence(self.model, self.reference).mean())

    def harm(self) -> Measure:
        """What is measured, with the KL in units of the original loss as the rise, where that is larger."""
        now = self.meter.measure()
        return replace(now, rise=max(now.rise, self.kl() / self.before.loss))

    def rise(self, outcome: Outcome) -> dict[str, float]:
        """Of the loss alone."""
        measure = outcome.measure
        return {"rise": measure.loss / self.before.loss - 1, "rise_stderr": measure.rise_stderr}

    @contextmanager
    def restored(self) -> Iterator[None]:
        try:
            yield
        finally:
            put(self.model.parameters(), self.weights)

    def forget_with(self, config: CIRConfig, contrast: bool = False) -> Outcome:
        """By :func:`cir.unlearn`, against bases of the neighbours where ``contrast``."""
        started, subspaces = time.perf_counter(), None
        with self.restored():
            if contrast:
                texts = self.task.retain, self.task.neighbours
                subspaces = Subspaces.fit(self.model, self.tokenizer, *texts, config=config, progress=False)
            report = cir.unlearn(
                self.model,
                self.tokenizer,
                self.task.facts,
                retain=self.task.retain,
                disruption=self.task.disruption,
                config=config,
                subspaces=subspaces,
                progress=False,
            )
            state = copies(self.model.parameters())
        steps = [(epoch.measure.rise, epoch.measure.mean_recall or 0) for epoch in report.epochs]
        return Outcome(report.after, steps, time.perf_counter() - started, state)

    def forget_with_baseline(
        self, name: str, rate: float, budgets: Sequence[float], seed: int
    ) -> dict[float, Outcome]:
        """The last state inside each of ``budgets`` on the way of a baseline at ``rate``."""
        # Whole sentences, and about as many retain tokens a step, as the papers have it.
        settings = replace(CIR, seed=seed, to_answers=False, word_dropout=0.0, retain_batch_size=4)
        batches = fact_batches(self.tokenizer, self.task.facts, settings, self.model.device)
        retain, _ = text_batches(self.tokenizer, self.task.retain, None, settings, self.model.device)
        epochs, left, steps, found = self.task.epochs, sorted(budgets), [], {}
        started = time.perf_counter()
        with (
            self.restored(),
            BASELINES[name](self.model, batches, retain, rate=rate, epochs=epochs, seed=seed) as baseline,
        ):
            now, reached = self.before, copies(self.model.parameters())
            for number in range(1, epochs + 1):
                before = reached, now
                baseline.epoch()
                now, reached = self.harm(), copies(self.model.parameters())
                steps.append((now.rise, now.mean_recall or 0))
                while left and (now.rise_bound > left[0] or number == epochs):
                    budget, best = left.pop(0), now
                    if now.rise_bound > budget:
                        best = self.back_to_budget(*before, now, budget)
                    state = copies(self.model.parameters())
                    found[budget] = Outcome(best, list(steps), time.perf_counter() - started, state)
                    put(self.model.parameters(), reached)
                if not left:
                    break
        return found

    def back_to_budget(self, inside: Sequence[Tensor], at: Measure, over: Measure, budget: float) -> Measure:
        """From the model as it is, where ``over`` was measured, towards weights where ``at`` was, until inside.

        As :func:`cir.unlearn` does, with more tries; ``inside`` itself where all fail.
        """

        def go(part: float, share: float) -> Measure:
            pairs = zip(inside, copies(self.model.parameters()), strict=True)
            put(self.model.parameters(), [torch.lerp(a, b, part) for a, b in pairs])
            return self.harm()

        found = retreat(at, over, budget, go, tries=TRIES)
        if found is None:
            put(self.model.parameters(), inside)
        return found or at

    def examine(self, outcome: Outcome) -> dict[str, Any]:
        """Everything a row says of an outcome."""
        with self.restored():
            put(self.model.parameters(), outcome.weights)
            return self._examine(outcome)

    def _examine(self, outcome: Outcome) -> dict[str, Any]:
        task = self.task
        recalls = self.recall(task.probe)
        relearned = {
            name: [
                mean_recall(epoch)
                for epoch in relearn(
                    self.model, self.tokenizer, task.relearn, task.probe, **asdict(RELEARNINGS[name]), progress=False
                )
            ]
            for name in task.attacks
        }
        rounded = {}
        for bits in (8, 4):
            with quantized(self.model, bits):
                rounded[f"quantized_{bits}bit"] = mean_recall(self.recall(task.probe))
        shown = few_shot(task.probe, task.relearn)
        return {
            **self.rise(outcome),
            "kl": self.kl(),
            "recall": mean_recall(recalls),
            "recall_relearn_split": mean_recall(self.recall(task.relearn)),
            "neighbours": mean_recall(self.recall(task.neighbours)),
            "attacked": {name: max(history[1:]) for name, history in relearned.items()},
            "worst": max(max(history[1:]) for history in relearned.values()),
            **rounded,
            "few_shot": mean_recall(self.recall(shown)),
            "change": self.change(),
            "seconds": outcome.seconds,
            "trajectory": outcome.trajectory,
            "relearning": relearned,
            "by_fact": recalls,
        }

    def recall(self, facts: Sequence[Fact]) -> dict[str, float]:
        return recall(self.model, self.tokenizer, facts)

    def change(self) -> float:
        """Frobenius norm of all that has changed."""
        pairs = zip(self.model.parameters(), self.weights, strict=True)
        return sum(float((now.detach().cpu() - before).norm()) ** 2 for now, before in pairs) ** 0.5


@torch.no_grad()
def put(parameters: Any, values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def copies(parameters: Any) -> list[Tensor]:
    return [parameter.detach().to("cpu", copy=True) for parameter in parameters]
