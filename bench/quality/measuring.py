"""One model that forgets by one method after the other, and what is measured of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import cir
from bench.baselines import BASELINES
from cir import CIRConfig, Fact, relearn
from cir.config import BreakingConfig
from cir.data.sampling import spread
from cir.forgetting.batches import fact_batches, split_text, text_batches
from cir.forgetting.budget import Meter, retreat
from cir.forgetting.report import Measure
from cir.measures import kl_divergence, mean_recall, recall, reference_of
from cir.model.checkpoints import load_model
from cir.proof.attacks import few_shot, linear_probe, quantized
from cir.proof.relearning import RELEARNINGS, STRONG, Relearning
from cir.proof.statistics import forget_quality, paired, truth_ratios

CIR = CIRConfig()
MAX_EPOCHS = 6
TRIES = 4
CONTROL = "control, "
"""Before the names of attacks whose attacker is taught something else than the related facts as they are."""
PLAIN = 200
"""Characters of a line of plain text that is taught."""
KL_TOKENS = 4096
"""Of the disruption text, where the change of what is said is measured: training on such text lowers its loss, and so
hides harm from the budget, but not this.
"""


@dataclass(frozen=True)
class Task:
    """What is to be forgotten and measured, and on which text.

    Attributes:
        relearn, probe: attackers are taught the first (T), and the second is probed (V).
        forget: to be forgotten; both of these by default.
        neighbours, same_subject, unrelated: must stay: the same relations of other subjects, other relations of the
            same subjects, and neither.
        tokens: of ``disruption`` that are measured. attacks: names out of ``relearnings``.
        thorough: try every rate of a baseline.
        contrast: what a method that can be told so is told must stay.
        gold: a model that never knew ``relearn`` and ``probe``, to be compared with.
        wrong: answers that are wrong, by the id of a probed fact, for the truth ratio.
    """

    relearn: list[Fact]
    probe: list[Fact]
    neighbours: list[Fact]
    retain: str
    disruption: str
    tokens: int
    attacks: tuple[str, ...]
    thorough: bool
    same_subject: list[Fact] = field(default_factory=list)
    unrelated: list[Fact] = field(default_factory=list)
    contrast: list[Fact] = field(default_factory=list)
    forget: list[Fact] = field(default_factory=list)
    gold: str | None = None
    relearnings: Mapping[str, Relearning] = field(
        default_factory=lambda: {**RELEARNINGS, **STRONG, **controls(RELEARNINGS["adam, fast"])}
    )
    wrong: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def epochs(self) -> int:
        return MAX_EPOCHS if self.thorough else 2

    @property
    def facts(self) -> list[Fact]:
        return self.forget or [*self.probe, *self.relearn]

    def lesson(self, attack: str) -> list[Fact]:
        """What the attacker is taught: ``relearn``, or what a control has in its place."""
        instead = CONTROLS.get(attack.removeprefix(CONTROL))
        return instead(self) if instead else self.relearn


def permuted(facts: Sequence[Fact]) -> list[Fact]:
    """Each with the answer of the next that has another, in its sentences too; left out are those without probes, and
    all where none has another.
    """
    asked = [fact for fact in facts if fact.probes]
    found = []
    for number, fact in enumerate(asked):
        own = fact.probes[0].target
        following = (later.probes[0].target for later in [*asked[number:], *asked[:number]])
        other = next((target for target in following if target != own), None)
        if other is None:
            continue
        sentences = tuple(sentence.replace(own.strip(), other.strip()) for sentence in fact.sentences)
        probes = tuple(replace(probe, target=other) for probe in fact.probes)
        found.append(replace(fact, sentences=sentences, probes=probes))
    return found


def _reworded(task: Task) -> list[Fact]:
    """What is related in the wording of its probes."""
    said = {fact.id: tuple(probe.prompt + probe.target for probe in fact.probes) for fact in task.relearn}
    return [replace(fact, sentences=said[fact.id]) for fact in task.relearn if said[fact.id]]


def _plain(task: Task) -> list[Fact]:
    """As many lines of the retain text as what is related has sentences."""
    lines = [line.strip()[:PLAIN] for line in task.retain.splitlines() if line.strip()]
    return [Fact("text", tuple(lines[: sum(len(fact.sentences) for fact in task.relearn)]))]


CONTROLS: dict[str, Callable[[Task], list[Fact]]] = {
    "permuted answers": lambda task: permuted(task.relearn),
    "other wording": _reworded,
    "plain text": _plain,
}
"""What an attacker is taught in the place of the related facts."""


def controls(relearning: Relearning) -> dict[str, Relearning]:
    """:data:`CONTROLS` as attacks of these settings, by name."""
    return {CONTROL + name: relearning for name in CONTROLS}


def hardest(attacked: Mapping[str, float]) -> str:
    """Of the attacks, of the controls where there are no others, that which brings most back."""
    attacks = [name for name in attacked if not name.startswith(CONTROL)]
    return max(attacks or attacked, key=lambda name: attacked[name])


Histories = dict[str, list[dict[str, float]]]
"""By attack, recall by fact of what is probed, before and after each epoch."""


@dataclass(frozen=True)
class Knowledge:
    """What a model recalls of the probed facts, before and under attack, and their truth ratios.

    ``others``: by attack, the mean probability of another answer of the set in the place of each, in step with
    ``histories``; None where there is no other.
    """

    histories: Histories
    ratios: dict[str, float]
    others: dict[str, list[float | None]]

    @property
    def before(self) -> dict[str, float]:
        return next(iter(self.histories.values()))[0]

    def at_best(self, attack: str) -> dict[str, float]:
        """After the epoch of ``attack`` that brought most back."""
        return self.histories[attack][self.best(attack)]

    def best(self, attack: str) -> int:
        """The number of that epoch, from 1 on."""
        history = self.histories[attack]
        return max(range(1, len(history)), key=lambda look: mean_recall(history[look]) or 0)

    @property
    def worst(self) -> str:
        """The attack that brings most back."""
        return hardest({name: mean_recall(self.at_best(name)) or 0 for name in self.histories})


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
        _, rows = split_text(self.tokenizer, task.retain, task.disruption, CIR)
        self.meter = Meter(self.model, self.tokenizer, task.facts, rows, task.tokens)
        self.reference = reference_of(self.model, spread(rows, min(task.tokens, KL_TOKENS)))
        self.before = self.meter.before
        self.gold = None if task.gold is None else knowledge(*load_model(task.gold), task)

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

    def forget_with(self, config: CIRConfig | BreakingConfig, contrast: Sequence[Fact] = ()) -> Outcome:
        """By :func:`cir.unlearn`, which is told that ``contrast`` must stay."""
        started = time.perf_counter()
        with self.restored():
            report = cir.unlearn(
                self.model,
                self.tokenizer,
                self.task.facts,
                contrast=contrast or None,
                retain=self.task.retain,
                disruption=self.task.disruption,
                config=config,
                on_signal="raise",  # or an interrupted run would be a row
                progress=False,
            )
            state = copies(self.model.parameters())
        steps = [(epoch.measure.rise, epoch.measure.mean_recall or 0) for epoch in report.epochs]
        return Outcome(report.after, steps, time.perf_counter() - started, state)

    def forget_with_baseline(
        self, name: str, rate: float, budgets: Sequence[float], seed: int
    ) -> dict[float, Outcome]:
        """The last state inside each of ``budgets`` on the way of a baseline at ``rate``."""
        # About as many retain tokens a step as of sentences, as the papers have it.
        settings = BreakingConfig(seed=seed, retain_batch_size=4)
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
        task, own = self.task, knowledge(self.model, self.tokenizer, self.task)
        relearned = {name: [mean_recall(epoch) for epoch in history] for name, history in own.histories.items()}
        rounded = {}
        for bits in (8, 4):
            with quantized(self.model, bits):
                rounded[f"quantized_{bits}bit"] = mean_recall(self.recall(task.probe))
        shown = few_shot(task.probe, task.relearn)
        read = linear_probe(self.model, self.tokenizer, task.probe, task.relearn)
        return {
            **self.rise(outcome),
            "worst_window": outcome.measure.worst,
            "kl": self.kl(),
            "recall": mean_recall(own.before),
            "recall_relearn_split": mean_recall(self.recall(task.relearn)),
            **{
                name: mean_recall(self.recall(facts))
                for name in ("neighbours", "same_subject", "unrelated", "contrast")
                if (facts := getattr(task, name))
            },
            "attacked": {name: max(history[1:]) for name, history in relearned.items()},
            "worst": mean_recall(own.at_best(own.worst)),
            "other_answer": own.others[own.worst][own.best(own.worst)],
            **rounded,
            "few_shot": mean_recall(self.recall(shown)),
            "linear_probe": None if read is None else read.value,
            "change": self.change(),
            "seconds": outcome.seconds,
            "trajectory": outcome.trajectory,
            "relearning": relearned,
            "by_fact": own.before,
            **({} if self.gold is None else beside(own, self.gold)),
        }

    def recall(self, facts: Sequence[Fact]) -> dict[str, float]:
        return recall(self.model, self.tokenizer, facts)

    def change(self) -> float:
        """Frobenius norm of all that has changed."""
        pairs = zip(self.model.parameters(), self.weights, strict=True)
        return sum(float((now.detach().cpu() - before).norm()) ** 2 for now, before in pairs) ** 0.5


def knowledge(model: Any, tokenizer: Any, task: Task) -> Knowledge:
    """Of the probed facts of ``task``; the model ends as it came in."""
    others = [replace(fact, id=f"{fact.id}, another") for fact in permuted(task.probe)]
    names = {fact.id for fact in others}
    histories: Histories = {}
    another: dict[str, list[float | None]] = {}
    for name in task.attacks:
        settings = asdict(task.relearnings[name])
        looks = relearn(model, tokenizer, task.lesson(name), [*task.probe, *others], **settings, progress=False)
        another[name] = [mean_recall({key: value for key, value in look.items() if key in names}) for look in looks]
        histories[name] = [{key: value for key, value in look.items() if key not in names} for look in looks]
    ratios = truth_ratios(model, tokenizer, task.probe, task.wrong) if task.wrong else {}
    return Knowledge(histories, ratios, another)


def beside(own: Knowledge, gold: Knowledge) -> dict[str, Any]:
    """What tells ``own`` from a model that never knew: mean differences by fact with their standard errors, before
    and after the attack that brings most back, and forget quality where there are truth ratios.
    """
    attack = own.worst
    differences = {
        "recall": paired(own.before, gold.before),
        "worst": paired(own.at_best(attack), gold.at_best(attack)),
    }
    found: dict[str, Any] = {
        "gold": {name: asdict(difference) for name, difference in differences.items() if difference is not None},
        "gold_recall": mean_recall(gold.before),
        "gold_attacked": mean_recall(gold.at_best(attack)),
    }
    if own.ratios:
        found["forget_quality"] = forget_quality(own.ratios, gold.ratios)
    return found


@torch.no_grad()
def put(parameters: Any, values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def copies(parameters: Any) -> list[Tensor]:
    return [parameter.detach().to("cpu", copy=True) for parameter in parameters]
