"""What is asked of facts: the tokens that tell them, and what the model says there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cir.data.facts import Fact
from cir.data.tokens import Statement, continuation, opening, pad, statements
from cir.model.capture import AnswerCapture, Below, Hidden, Tokens, at_least_float32
from cir.model.replay import Replays, Values
from cir.system.processes import agreed

CONTEXT = 2
"""Tokens before another that make it likely whatever the fact: grammar, and the rest of a name."""
GAIN = 1.0
"""Nats by which all that was said before must raise a token's log-odds above these alone, for it to tell the fact."""

ODDS = "odds"
"""Beside the names of sites, that of the log-odds."""
PEERS = 16
"""Contrast facts that are relearned where one fact is forgotten alone, at most."""
LIKE = 0.95
"""Cosine of the states of two facts of one relation, at least. SmolLM2's capitals have 0.97 to 1.00, and with facts
of other relations 0.80 to 0.90."""


@dataclass(frozen=True)
class Questions:
    """Sentences in one forward, and the tokens (T,) in them that tell facts.

    Attributes:
        below: what the layers that do not change say of the sentences.
        at: of each, the place of the real token that predicts it. answers: its id. owners: number of its fact, on
            the host.
    """

    below: Below
    at: Tensor
    answers: Tensor
    owners: Tensor

    def read(self, tape: AnswerCapture, replays: Replays | None = None) -> Rows:
        """Ask the model as it is."""

        def function(given: Values) -> Values:
            odds, hidden = self._predicted(tape, given)
            return {ODDS: agreed(odds.detach()), **tape.backward((odds * given["counts"].to(odds)).sum(), hidden)}

        tokens = self._told("read", function, replays)
        return Rows(self.owners, tokens.pop(ODDS), tokens)

    @torch.no_grad()
    def odds(self, tape: AnswerCapture, replays: Replays | None = None) -> Tensor:
        """(T,) log-odds of the answers, in nats."""

        def function(given: Values) -> Values:
            return {ODDS: agreed(self._predicted(tape, given)[0])}

        return self._told("odds", function, replays)[ODDS]

    @torch.no_grad()
    def likeliest(self, tape: AnswerCapture) -> tuple[Tensor, Tensor]:
        """(T,) log-odds of the answers, and the tokens (T,) that are likeliest instead or with them."""
        logits, _ = tape.predict(self.below, self.at, keep=False)
        return agreed(_log_odds(logits, self.answers)), agreed(logits.argmax(1))

    @property
    def states(self) -> Tensor | None:
        """(T, width) what the layers that do not change say where each token is predicted; None if all change."""
        hidden = self.below.hidden
        return None if hidden is None else hidden.flatten(0, -2)[self.below.places[self.at].to(hidden.device)]

    def _told(self, name: str, function: Callable[[Values], Values], replays: Replays | None) -> Values:
        """What ``function`` gives of the tensors of this, rows of which may be added that count for nothing."""
        places = self.below.places[self.at]
        given = {**self.below.inputs, "places": places, "answers": self.answers, "counts": torch.ones_like(places)}
        if self.below.hidden is not None:
            given["hidden"] = self.below.hidden
        if replays is None or not self.below.alone:
            return function(given)
        return replays(name, function, given, len(self.at))

    def _predicted(self, tape: AnswerCapture, given: Values) -> tuple[Tensor, Hidden]:
        inputs = {name: given[name] for name in self.below.inputs}
        below = replace(self.below, inputs=inputs, places=given["places"], hidden=given.get("hidden"))
        logits, hidden = tape.predict(below, torch.arange(len(below.places), device=below.places.device))
        return _log_odds(logits, given["answers"]), hidden


def _log_odds(logits: Tensor, answers: Tensor) -> Tensor:
    """(T,) of ``answers`` (T,): unlike of the log-probability, much is left to learn where they are likely."""
    logits, answers = at_least_float32(logits), answers.to(logits.device)[:, None]
    return logits.gather(1, answers).squeeze(1) - logits.scatter(1, answers, -torch.inf).logsumexp(1)


@dataclass(frozen=True)
class Rows:
    """The tokens that tell facts, T of them.

    Attributes:
        owners: (T,) number of the fact of each, on the host. odds: (T,) log p / (1 - p) of its probability, in nats.
        tokens: at every site, rows (T, width): inputs where each is predicted, and gradients of its log-odds.
    """

    owners: Tensor
    odds: Tensor
    tokens: Tokens

    def __getitem__(self, kept: Tensor) -> Rows:
        """Those of the places ``kept``, which are on the host."""
        on = {device: kept.to(device) for device in {rows.device for rows in (self.odds, *self.tokens.values())}}
        tokens = {name: rows[on[rows.device]] for name, rows in self.tokens.items()}
        return Rows(self.owners[kept], self.odds[on[self.odds.device]], tokens)

    def at(self, names: Collection[str]) -> Rows:
        """The same at the sites of these ``names`` alone."""
        return replace(self, tokens={name: self.tokens[name] for name in names})

    def split(self, counts: Sequence[int]) -> list[Rows]:
        """In parts of so many."""
        tokens = {name: rows.split(list(counts)) for name, rows in self.tokens.items()}
        pairs = zip(self.owners.split(list(counts)), self.odds.split(list(counts)), strict=True)
        return [
            Rows(owners, odds, {name: pieces[i] for name, pieces in tokens.items()})
            for i, (owners, odds) in enumerate(pairs)
        ]


def joined(parts: Sequence[Rows]) -> Rows:
    """All of ``parts`` in one."""
    if len(parts) == 1:
        return parts[0]
    owners, odds = (torch.cat([getattr(part, name) for part in parts]) for name in ("owners", "odds"))
    tokens = {name: torch.cat([part.tokens[name] for part in parts]) for name in parts[0].tokens}
    return Rows(owners, odds, tokens)


@dataclass(frozen=True)
class Sentence:
    """What of a sentence leads to its answer.

    Attributes:
        owner: number of its fact. statement: its tokens, and which of them tell the fact.
        hidden: (L, width) what the layers that do not change say of all tokens but the last; None if there are none,
            or if they put out more than that.
    """

    owner: int
    statement: Statement
    hidden: Tensor | None

    @property
    def owners(self) -> Tensor:
        return torch.full((len(self.statement.told),), self.owner)

    @property
    def states(self) -> Tensor | None:
        """As those of :class:`Questions`."""
        places = torch.tensor(list(self.statement.told))
        return None if self.hidden is None else self.hidden[(places - 1).to(self.hidden.device)]


def questions(
    tape: AnswerCapture, tokenizer: Any, facts: Sequence[Fact], *, max_length: int, at_once: int
) -> list[Questions]:
    """Ask for all of ``facts``, as :func:`sentences` and :func:`ask` do."""
    return ask(tape, sentences(tape, tokenizer, facts, max_length=max_length, at_once=at_once), at_once)


def sentences(
    tape: AnswerCapture, tokenizer: Any, facts: Sequence[Fact], *, max_length: int, at_once: int
) -> list[Sentence]:
    """All of ``facts``, read in forwards of at most ``at_once`` tokens, or of one sentence.

    A token tells the fact if all that goes before it in its sentence makes it likelier than the last :data:`CONTEXT`
    tokens do, by :data:`GAIN`; of each sentence at least the one for which that is most does.

    Raises:
        ValueError: on a sentence of more than ``max_length`` tokens or of one.
    """
    told = [
        (number, statement)
        for number, fact in enumerate(facts)
        for statement in statements(tokenizer, fact, max_length)
    ]
    first = opening(tokenizer)
    return [sentence for part in parts_of(told, at_once) for sentence in _read(tape, part, first)]


def ask(tape: AnswerCapture, chosen: Sequence[Sentence], at_once: int) -> list[Questions]:
    """Ask what ``chosen`` tell, in forwards of at most ``at_once`` tokens, or of one sentence."""
    told = [(sentence.owner, sentence.statement) for sentence in chosen]
    states = iter(sentence.hidden for sentence in chosen)
    return [asked_of(tape, part, [next(states) for _ in part]) for part in parts_of(told, at_once)]


def likeness(facts: Sequence[Questions], others: Sequence[Questions | Sentence]) -> Tensor | None:
    """(F, O) highest cosine of the states of two facts' tokens, each side in the order of its facts' numbers; None
    where all layers change. Before these, states tell of the relation alone, see
    :func:`cir.forgetting.locate.pair_layer`.
    """
    sides = []
    pair: tuple[Sequence[Questions | Sentence], ...] = facts, others
    for side in pair:
        states = [part.states for part in side]
        if not states or any(rows is None for rows in states):
            return None
        rows = F.normalize(torch.cat([rows.float() for rows in states if rows is not None]), dim=1)
        _, places = torch.cat([part.owners for part in side]).unique(return_inverse=True)
        sides.append((rows, places.to(rows.device)))
    (own, of_fact), (other, of_other) = sides
    count = int(of_other.max()) + 1
    cosines = (own @ other.T).flatten()
    pairs = (of_fact[:, None] * count + of_other).flatten()
    best = cosines.new_full(((int(of_fact.max()) + 1) * count,), -1.0)
    return best.scatter_reduce(0, pairs, cosines, "amax").view(-1, count)


def peers(tape: AnswerCapture, contrast: Sequence[Sentence], facts: Sequence[Questions]) -> list[Questions]:
    """The first sentence each of the :data:`PEERS` facts of ``contrast`` most like ``facts``, in one forward."""
    first = {sentence.owner: sentence for sentence in reversed(contrast)}
    alike = likeness(facts, contrast)
    order = sorted(first) if alike is None else alike.amax(0).argsort(descending=True).tolist()
    chosen = [first[owner] for owner in order[:PEERS]]
    return ask(tape, chosen, sum(len(sentence.statement.ids) for sentence in chosen))


def _read(tape: AnswerCapture, part: Sequence[tuple[int, Statement]], first: list[int]) -> list[Sentence]:
    """Of each statement, the tokens told that tell the fact."""
    found = asked_of(tape, part)
    told = [list(statement.told) for _, statement in part]
    if len(found.at) > len(part):
        # The same tokens after a few others alone.
        pairs = [(row, statement.ids, place) for row, (_, statement) in enumerate(part) for place in statement.told]
        rows = torch.tensor([row for row, _, _ in pairs])
        alone = pad([first + ids[max(place - CONTEXT, len(first)) : place] for _, ids, place in pairs])
        alone = alone.to(tape.device)
        ends = alone.attention_mask.sum(1).cumsum(0) - 1
        apart = Questions(tape.below(alone), ends, found.answers, found.owners)
        gain = (found.odds(tape) - apart.odds(tape)).cpu()
        most = gain.new_full((len(part),), -torch.inf).scatter_reduce(0, rows, gain, "amax")
        kept = ((gain >= GAIN) | (gain == most[rows])).tolist()
        told = [[] for _ in part]
        for (row, _, place), keep in zip(pairs, kept, strict=True):
            told[row] += [place] if keep else []
    return [
        Sentence(owner, Statement(statement.ids, places), None if hidden is None else hidden[: places[-1]])
        for (owner, statement), places, hidden in zip(part, told, states_of(found, part), strict=True)
    ]


def states_of(asked: Questions, part: Sequence[tuple[int, Statement]]) -> Sequence[Tensor | None]:
    """Of each statement of ``part``, as :func:`asked_of` it, the ``hidden`` of a :class:`Sentence`."""
    below, lengths = asked.below, [statement.told[-1] for _, statement in part]
    if below.hidden is None or below.beside is not None:
        return [None] * len(part)
    return below.hidden.flatten(0, -2)[below.places.to(below.hidden.device)].split(lengths)


def asked_of(
    tape: AnswerCapture, part: Sequence[tuple[int, Statement]], states: Sequence[Tensor | None] = ()
) -> Questions:
    """All that is told of each statement. ``states``: what the layers that do not change say, if they were run."""
    batch = pad([statement.ids[: statement.told[-1]] for _, statement in part]).to(tape.device)
    lengths = batch.attention_mask.sum(1)
    pairs = [(row, place) for row, (_, statement) in enumerate(part) for place in statement.told]
    rows, places = (torch.tensor(numbers, device=tape.device) for numbers in zip(*pairs, strict=True))
    answers = torch.tensor([part[row][1].ids[place] for row, place in pairs], device=tape.device)
    owners = torch.tensor([part[row][0] for row, _ in pairs])
    known = [hidden for hidden in states if hidden is not None]
    below = tape.below(batch, torch.cat(known) if len(known) == len(part) else None)
    return Questions(below, (lengths.cumsum(0) - lengths)[rows] + places - 1, answers, owners)


class Probed:
    """Recall of facts by their probes, again and again while only late layers change; those below are run once."""

    def __init__(self, tape: AnswerCapture, tokenizer: Any, facts: Sequence[Fact], at_once: int) -> None:
        facts = [fact for fact in facts if fact.probes]
        probes = [(place, probe) for place, fact in enumerate(facts) for probe in fact.probes]
        told = []
        for number, (_, probe) in enumerate(probes):
            head, tail = continuation(tokenizer, probe.prompt, probe.target)
            told.append((number, Statement([*head, *tail], range(len(head), len(head) + len(tail)))))
        self._facts = [fact.id for fact in facts]
        self._of_fact = torch.tensor([place for place, _ in probes])
        self._parts = [asked_of(tape, part) for part in parts_of(told, at_once)]

    def recall(self, tape: AnswerCapture, replays: Replays | None = None) -> dict[str, float]:
        """What :func:`cir.measures.recall` is of the model as it is now."""
        if not self._facts:
            return {}
        odds = torch.cat([part.odds(tape, replays) for part in self._parts]).double().cpu()  # one wait
        probes = torch.cat([part.owners for part in self._parts])
        logprobs = odds.new_zeros(len(self._of_fact)).index_add_(0, probes, F.logsigmoid(odds))
        means = odds.new_zeros(len(self._facts)).index_add_(0, self._of_fact, logprobs.exp())
        means /= torch.bincount(self._of_fact, minlength=len(self._facts))
        return dict(zip(self._facts, means.tolist(), strict=True))


def parts_of(told: Sequence[tuple[int, Statement]], at_once: int) -> Iterator[list[tuple[int, Statement]]]:
    part: list[tuple[int, Statement]] = []
    tokens = 0
    for number, statement in told:
        if part and tokens + len(statement.ids) > at_once:
            yield part
            part, tokens = [], 0
        part.append((number, statement))
        tokens += len(statement.ids)
    if part:
        yield part
