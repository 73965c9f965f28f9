"""The method: steps along what is specific to each fact, until it is gone and stays gone; see docs/method.md."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cir.config import CIRConfig
from cir.data.facts import Fact
from cir.forgetting.doses import doses, gram, told_apart
from cir.forgetting.memory import ROWS_OF_A_FACT, tokens_of_a_step
from cir.forgetting.mending import Kept
from cir.forgetting.plan import EpochLosses
from cir.forgetting.questions import Questions, Rows, Sentence, ask, joined, peers, sentences
from cir.forgetting.subspace import SiteSubspaces
from cir.forgetting.update import NonFiniteError, add_outer, norm_of, phase, restore, sign_step, sizes, snapshot
from cir.model.capture import AnswerCapture, Tokens
from cir.model.replay import Replays
from cir.model.sites import Target, names_of, sites_of
from cir.system.processes import anywhere

LEAST_FALL = 2.0
"""Nats by which an answer has to fall that was not likely to begin with."""
LEAST_DOSE = 0.5
"""Nats of a dose where less than that is left to go: the first order is not all, and gone is below the floor."""
FEW = 0.05
"""Of the facts of a batch, that may come back in the last step."""
RELEARNING_RATES = 1.5e-3, 5e-2
"""Least and greatest length of a step of relearning, at each weight, over the root mean square of its linear's."""
BACK, NATS, MOST = 3.0, 3.0, 3.0
"""Mean log-odds that steps of relearning are to bring back before the last of them, as an attacker who is done has;
nats short of it for which they lengthen e-fold; and by how much they do so or shorten at once."""


@dataclass(frozen=True)
class Step:
    """What a step adds to the weights: G^T A of these ``tokens`` at every target.

    ``odds``: mean log-odds of the answers before it. ``live``: how many were not gone. ``lengths``: (T,) of the parts
    that the rows add, see :func:`told_apart`.
    """

    tokens: Tokens
    odds: float = 0.0
    live: int = 0
    lengths: Tensor | None = None


@dataclass(frozen=True)
class Lesson:
    """What is relearned of a batch, and what is then asked.

    Attributes:
        taught, asked: numbers of the facts; none are taught where the peers of a fact are.
        lesson, questions: the forwards of each.
        rows: of peers, along which each step moved the MLPs, to be repeated.
    """

    taught: list[int]
    asked: list[int]
    lesson: list[Questions]
    questions: list[Questions]
    rows: list[Tokens]


class Forgetter:
    """Steps on one captured model, batch by batch of facts.

    Args:
        tape: of :func:`cir.model.capture.answering`. targets: what it taps.
        tokenizer: of the model. facts: to be forgotten.
        common: what is collapsed, of :meth:`cir.Subspaces.fit`.
        config: see :class:`CIRConfig`.
        contrast: what is told of facts that must stay, of which the most alike are relearned where a fact is alone in
            its step.
        told: what ``facts`` tell, if they were read. kept: what has to stay, see :meth:`mend`.
        at_once: tokens of a step in one forward and backward; by default what suits the device.
        replays: of earlier steps on the model, if any.
    """

    def __init__(
        self,
        tape: AnswerCapture,
        targets: Sequence[Target],
        tokenizer: Any,
        facts: Sequence[Fact],
        common: SiteSubspaces,
        config: CIRConfig,
        contrast: Sequence[Sentence] = (),
        told: Sequence[Sentence] = (),
        kept: Sequence[Sentence] = (),
        at_once: int | None = None,
        replays: Replays | None = None,
    ) -> None:
        self._tape, self._targets, self._common, self._config = tape, targets, common, config
        self._random = random.Random(config.seed)
        device = targets[0].weight.device
        self._at_once = at_once = at_once or tokens_of_a_step(device)
        self._weight = norm_of(targets)
        self._updates, self._remainders = config.seed << 32, dict[str, Tensor]()
        self._spare: list[Tensor] | None = None
        self._written, self._taught = (names_of(sites_of(of)) for of in (targets, tape.mlps))
        self._sizes, self._rate = sizes(tape.mlps), RELEARNING_RATES[0]
        self._replays = replays or Replays().follow(tape.weights)
        self._steps_left = config.max_steps
        self._left: dict[int, set[int]] = {}
        self._before: dict[int, Tensor] = {}
        self._lessons: dict[int, list[Lesson]] = {}
        self._kept = Kept(tape, kept, at_once, config.seed) if kept else None
        order = list(range(len(facts)))
        self._random.shuffle(order)

        batches = [order[i : i + config.batch_size] for i in range(0, len(order), config.batch_size)]
        with phase("read facts"):
            own: list[list[Sentence]] = [[] for _ in facts]
            for sentence in told or sentences(tape, tokenizer, facts, max_length=config.max_length, at_once=at_once):
                own[sentence.owner].append(sentence)
            self._batches = [[own[i] for i in batch] for batch in batches]
            self._whole = [self._ask(of) for of in self._batches]
            self._counts = [[sum(len(s.statement.told) for s in fact) for fact in of] for of in self._batches]
            self._peers: list[Questions] = []
            if contrast and config.relearning_steps and min(map(len, batches)) == 1:
                self._peers = peers(tape, contrast, self.asked)

    @property
    def asked(self) -> list[Questions]:
        """What is asked of all facts."""
        return [asked for whole in self._whole for asked in whole]

    @property
    def rate(self) -> float:
        """The length of a step of relearning, see :data:`RELEARNING_RATES`."""
        return self._rate

    def epoch(
        self,
        on_step: Callable[[], object] = lambda: None,
        stop: threading.Event | None = None,
        told: Callable[[int, float, int], object] | None = None,
    ) -> EpochLosses:
        """``check_every`` steps of each batch, fewer once all facts are gone or ``max_steps`` are taken.

        Facts are gone if their answers are, and no more than :data:`FEW` come back as others are relearned: of many
        some come back by the ones or the others, and each step draws those anew.

        Set ``stop`` to end after the step under way. ``told`` is called after each step with the number of the batch,
        the mean log-odds before the step and how many facts are left, all of which the host has.

        Raises:
            NonFiniteError: before the step that met a NaN or infinity changes any weight.
        """
        odds: list[float] = []
        gone = False
        for number, batch in enumerate(self._batches):  # what has not been read is left
            self._left.setdefault(number, {fact[0].owner for fact in batch})
        for _ in range(min(self._config.check_every, self._steps_left)):
            gone, self._steps_left = True, self._steps_left - 1
            for number in range(len(self._batches)):
                if stop is not None and anywhere(stop.is_set()):
                    stop.set()
                    return EpochLosses(_mean(odds), left=self._facts_left())
                step = self.step(number)
                odds.append(step.odds)
                gone &= not self._left[number]
                if self._left[number]:
                    self.apply(step)
                    self.mend(step)
                on_step()
                if told is not None:
                    told(number, step.odds, len(self._facts_left()))
            if gone:
                break
        return EpochLosses(_mean(odds), gone=gone, left=self._facts_left())

    def _facts_left(self) -> tuple[int, ...]:
        return tuple(sorted(set().union(*self._left.values())))

    def step(self, number: int = 0, floor: float | None = None) -> Step:
        """What takes the facts of batch ``number`` nearer to being gone, each by its dose; no weight changes.

        With a ``floor``, an answer is gone there and not at that of the configuration.

        Raises:
            NonFiniteError: on a NaN or infinity.
        """
        # Peers stay as they are while a fact goes, so that they are read once; but that nothing is left is told by
        # what they are in these weights alone.
        anew = len(self._batches[number]) > 1 or number not in self._lessons
        step = self._step(number, floor, anew)
        return step if anew or step.live else self._step(number, floor, anew=True)

    def _step(self, number: int, floor: float | None, anew: bool) -> Step:
        config = self._config
        rows = self._read(self._whole[number])
        before = self._before.setdefault(number, rows.odds)
        floors = (before - LEAST_FALL).clamp_max(config.floor if floor is None else floor)
        known, left = rows.odds > floors, rows.odds - floors
        live = known
        if config.relearning_steps and (len(self._batches[number]) > 1 or self._peers):
            back = self._returning(number, rows, anew)
            rows, live, left = _replaced(rows.at(self._written), back, floors, config.relearning_floor)
        odds, live, left, known = torch.stack([rows.odds, live.to(left), left, known.to(left)]).cpu()
        mean = float(odds.mean())
        if not torch.isfinite(odds).all():
            raise NonFiniteError(f"expected finite log-odds, got a mean of {mean}; no weight was changed")
        kept = live.nonzero().squeeze(1)
        returned = set(rows.owners[kept].tolist())
        few = len(returned) <= FEW * len(self._batches[number])
        self._left[number] = set(rows.owners[known > 0].tolist()) | (set() if few else returned)
        if not len(kept):
            return Step({}, mean, 0)
        tokens, lengths = self._dosed(rows[kept], left[kept])
        return Step(tokens, mean, len(kept), lengths)

    def apply(self, step: Step, scale: float = 1.0) -> None:
        """Add ``scale`` times a step to the weights."""
        self._updates += 1
        with phase("update"):
            add_outer(self._targets, step.tokens, scale, self._config.rounding, self._updates, self._remainders)

    def mend(self, after: Step) -> None:
        """Raise what has to stay and has fallen, by a step of the other sign; but not what is one with facts of the
        step ``after`` which this comes, as they go first.
        """
        if self._kept is None:
            return
        with phase("mend"):
            fallen = self._kept.fallen(self._written, ROWS_OF_A_FACT * self._config.batch_size, self._replays)
        if fallen is not None:
            self.apply(Step(self._dosed(*fallen, apart=after)[0]), -1.0)

    def _ask(self, facts: Iterable[Sequence[Sentence]]) -> list[Questions]:
        return ask(self._tape, [sentence for fact in facts for sentence in fact], self._at_once)

    def _read(self, forwards: Sequence[Questions]) -> Rows:
        with phase("forward, backward"):
            return joined([asked.read(self._tape, self._replays) for asked in forwards])

    def _returning(self, number: int, rows: Rows, anew: bool) -> Rows:
        """The rows of the batch after others of it were relearned, at the sites that are written; the weights are
        then as before, when they gave ``rows``: what relearning starts from. Peers are read ``anew``, or what was
        read of them is repeated.
        """
        counts = self._counts[number]
        pieces, found = rows.split(counts), dict[int, Rows]()
        back: Tensor | None = None
        if anew:
            self._lessons[number] = self._lessons_of(self._batches[number])
        self._spare = snapshot(self._tape.mlps, into=self._spare, near=True)
        for lesson in self._lessons[number]:
            try:
                if lesson.taught:
                    self._relearn(joined([pieces[i].at(self._taught) for i in lesson.taught]).tokens)
                for step in range(self._config.relearning_steps - bool(lesson.taught)):
                    read = self._read(lesson.lesson) if anew else None
                    tokens = lesson.rows[step] if read is None else read.at(self._taught).tokens
                    self._relearn(tokens)
                    if read is not None and lesson.taught:
                        back = read.odds.mean()
                    elif read is not None:
                        lesson.rows.append(tokens)
                asked = self._read(lesson.questions).at(self._written)
            finally:
                restore(self._tape.mlps, self._spare)
            found |= dict(zip(lesson.asked, asked.split([counts[i] for i in lesson.asked]), strict=True))
        if back is not None:
            self._reach(float(back))
        return joined([found[i] for i in range(len(counts))])

    def _reach(self, back: float) -> None:
        """Steps of relearning are as long as it takes to bring what is taught back: attackers go on until then."""
        if math.isfinite(back):
            most, (least, greatest) = math.log(MOST), RELEARNING_RATES
            change = math.exp(min(max((BACK - back) / NATS, -most), most))
            self._rate = min(max(self._rate * change, least), greatest)

    def _lessons_of(self, facts: Sequence[Sequence[Sentence]]) -> list[Lesson]:
        """Each half of ``facts`` is relearned and the other asked; where there is one, its peers are relearned.

        What two facts share comes back by the one if it is taught and the other is asked. So the halves are others
        each time, and of two facts with one answer each is in a half of its own.
        """
        said = [fact[0].statement for fact in facts]
        answers = [tuple(statement.ids[place] for place in statement.told) for statement in said]
        order = self._random.sample(range(len(facts)), len(facts))
        rank = {answers[i]: number for number, i in enumerate(order)}
        order.sort(key=lambda i: rank[answers[i]])
        halves = order[1::2], order[::2]
        of = [self._ask([facts[i] for i in half]) for half in halves]
        if not halves[0]:
            return [Lesson([], order, self._peers, of[1], [])]
        return [Lesson(halves[1 - i], halves[i], of[1 - i], of[i], []) for i in range(2)]

    def _relearn(self, tokens: Tokens) -> None:
        """Raise the log-odds of rows as an attacker does: all over the MLPs, and nothing is collapsed."""
        self._updates += 1
        with phase("relearn"):
            lengths = [self._rate * size for size in self._sizes]
            sign_step(self._tape.mlps, tokens, lengths, self._updates)

    def _dosed(self, rows: Rows, left: Tensor, apart: Step | None = None) -> tuple[Tokens, Tensor]:
        """The rows collapsed, those of each fact scaled to its dose, which is no more than what is ``left`` to go, or
        to nothing where they cannot be told ``apart`` from that step's; and the lengths of the parts they add.
        """
        config = self._config
        with phase("collapse, dose"):
            sites = sites_of(self._targets)
            collapsed = self._common.collapse_({name: rows.tokens[name].clone() for name in names_of(sites)}, sites)
            effects = gram(self._targets, rows.tokens, collapsed)
            lengths = effects.diagonal().clamp_min(0).sqrt()
            scale = doses(
                rows.owners,
                effects,
                gram(self._targets, collapsed, collapsed),
                left.clamp(min(LEAST_DOSE, config.dose), config.dose),
                config.max_change * self._weight,
            )
            if not torch.isfinite(scale).all():
                raise NonFiniteError("expected finite gradients, got NaN or infinity; no weight was changed")
            if apart is not None and apart.lengths is not None:
                along = gram(self._targets, rows.tokens, apart.tokens)
                scale = scale.where(told_apart(along, lengths, apart.lengths), 0)
            for site in sites:
                if site.kind == "gradient":
                    collapsed[site.name] *= scale[:, None].to(collapsed[site.name])
            return collapsed, lengths * scale.abs()


def _replaced(now: Rows, then: Rows, floors: Tensor, returned: float) -> tuple[Rows, Tensor, Tensor]:
    """Of each row the one that came back, where it did; whether it is not gone; and by how many nats."""
    returns = then.odds > returned
    tokens = {
        name: torch.where(returns.to(rows.device).view(-1, *[1] * (rows.ndim - 1)), then.tokens[name], rows)
        for name, rows in now.tokens.items()
    }
    left = now.odds - floors
    left = torch.where(returns, left.maximum(then.odds - returned), left)
    return replace(now, tokens=tokens), returns | (now.odds > floors), left


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
