"""One fact at a time: forget it, take it back, ship it, and find it all again after a restart."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from cir.config import CIRConfig, EditConfig
from cir.data.facts import Fact, load_facts, probed
from cir.data.sampling import index, sample
from cir.data.shipped import builtin_text
from cir.data.tokens import statements, windows
from cir.editing.edits import Edit, State
from cir.editing.errors import AlreadyForgottenError, EditError, UnknownFactError
from cir.editing.history import History
from cir.editing.journal import Journal, JournalError, Record
from cir.editing.looks import Looks
from cir.editing.turns import Turns
from cir.forgetting.budget import RETREATS
from cir.forgetting.events import Followers, OnStep
from cir.forgetting.factors import factorise
from cir.forgetting.fitting import Subspaces, check_fitted_on
from cir.forgetting.forgetter import Forgetter, Step
from cir.forgetting.memory import tokens_at_once
from cir.forgetting.questions import Probed, Sentence, sentences
from cir.forgetting.update import add_factors, fingerprint, restore, snapshot
from cir.measures import WINDOW, recall
from cir.model.capture import AnswerCapture, Tokens, answering
from cir.model.finding import find_stack, unwrapped
from cir.model.replay import Replays
from cir.proof.relearning import relearn as attack
from cir.system.signals import Held

UNKNOWN = 0.01
"""A fact recalled with less than this probability is not there to be forgotten."""
RETURNED = 0.05
"""A forgotten fact is back when it is recalled at more than this share of what it was."""
NEIGHBOURS_EVERY = 4
"""Looks at the fact, at most, between looks at its neighbours, which cost several times as much."""
SMALLEST_DOSE = 1 / 8
"""Share of the first dose below which neighbours that still suffer end the edit."""
LOWEST = -20.0
"""Log-odds below which nothing is left of an answer."""
Update = tuple[Tokens, float]
"""The collapsed rows of a step, and its scale."""


class Editor:
    """Edits of one model, in place, each to be undone, redone, kept in a journal and shipped.

    The weights are always those that the model came with plus the sum of the active edits, rounded once: so
    undoing gives the same bits back, whatever the order, and so does a restart from the journal. One call changes
    the model at a time; others wait and are served in the order they came. The model must not run in other threads
    during a call.

    Args:
        model, tokenizer: as for :func:`cir.unlearn`; the model that ``subspaces`` were fitted on.
        subspaces: of :meth:`Subspaces.fit`, with contrast facts.
        neighbours: facts that must stay, watched during each edit; by default the contrast facts.
        text: on which the loss is measured, half of it where it is nearest the fact; the built-in text if None.
        journal: a file to keep the edits in. One that exists is done again first. key: a secret that its records are
            signed with, see :class:`cir.editing.journal.Journal`.
        config: see :class:`EditConfig`.

    Raises:
        ValueError: on subspaces of another model or fitted on no facts, or unusable neighbours or text.
        JournalError: on a journal that is another model's or in use.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        subspaces: Subspaces,
        *,
        neighbours: Any = None,
        text: str | None = None,
        journal: str | Path | None = None,
        key: bytes | None = None,
        config: EditConfig | None = None,
    ) -> None:
        self._model = model = unwrapped(model)
        self._tokenizer, self._subspaces = tokenizer, subspaces.to(model.device)
        self._contrast = subspaces.contrast
        self._told: list[Sentence] | None = None
        self._watched: Probed | None = None
        self._replays = Replays()
        self.config = config or EditConfig()
        self._stack, self._first = find_stack(model), subspaces.fitted_on.get("layers", [0])[0]
        self._targets = self._stack.writers(self._first)
        self.fingerprint = fingerprint(self._targets)
        check_fitted_on(subspaces, self.fingerprint)
        watched = self._contrast if neighbours is None else neighbours
        facts = [probed(fact) for fact in load_facts(watched)] if watched else []
        every = -(-len(facts) // self.config.neighbours) or 1
        self._neighbours = [replace(fact, probes=fact.probes[:1]) for fact in facts[::every]]
        self._rows = windows(tokenizer, builtin_text() if text is None else text, WINDOW)
        self._index = index(self._rows)
        self._base = base = snapshot(self._targets, near=True)
        self._history = History(self.fingerprint)
        self._turns, self._broken = Turns(), False
        self._journal = None if journal is None else Journal(journal, self.fingerprint, self.config.rounding, key)
        try:
            if self._journal is not None:
                self._replay(self._journal)
        except BaseException:
            with Held():
                restore(self._targets, base)
                self.close()
            raise

    def __enter__(self) -> Editor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the journal and what is held of a GPU's memory for edits; the model stays as it is."""
        self._replays = Replays()
        if self._journal is not None:
            self._journal.close()

    @property
    def edits(self) -> tuple[Edit, ...]:
        """Those in effect, committed ones included, in the order they were made."""
        return tuple(entry.edit for entry in self._history.entries if entry.status != "undone")

    @property
    def history(self) -> tuple[tuple[Edit, str], ...]:
        """All edits made, each with its status: ``active``, ``undone`` or ``committed``."""
        return tuple((entry.edit, entry.status) for entry in self._history.entries)

    def forget(self, fact: Any, *, on_step: OnStep | None = None) -> Edit:
        """Make the model forget one fact: a :class:`Fact`, an object :func:`load_facts` reads, or a sentence.

        Steps are taken until recall is at ``target_recall`` of what it was. When neighbours suffer, the steps
        since the last look are taken back and the dose is halved. What is applied is the sum of the steps as
        low-rank factors; where the text does not bear it, a part of that. The edit says what was measured then,
        and whether the fact is :attr:`Edit.forgotten`: the bounds may have left it partly known.

        ``on_step`` is called with a :class:`cir.StepEvent` after each step, and must not call the editor; where it
        returns something true, no further step is taken. An exception of its own changes nothing.

        Raises:
            ValueError: if the fact has no sentence, as AlreadyForgottenError if an edit in effect has forgotten it,
                and as UnknownFactError if the model does not recall it.
            EditError: if not one step was within the bounds, or recall did not fall.
            NonFiniteError: on a NaN or infinite loss or gradient. OSError: if the journal cannot be written.
            In each case the model is as it was.
        """
        started, followers = time.perf_counter(), Followers(on_step)
        if isinstance(fact, str):
            fact = {"id": fact, "sentences": [fact]}
        fact = probed(load_facts([fact])[0])
        statements(self._tokenizer, fact, self.config.max_length)  # refuses what cannot be read
        with self._turn() as held, answering(self._model, self._stack, self._first) as tape:
            looks = self._looks(tape, fact)
            before = self._known(fact, looks)
            with self._whole():
                edit = self._forget(tape, fact, looks, before, held, followers)
                edit = replace(edit, seconds=time.perf_counter() - started)
                self._record("edit", {"id": edit.id}, edit)
            return edit

    def undo(self, edit: Edit | None = None) -> Edit:
        """Take an edit back, the last active one by default; the weights are then, bit for bit, those without it.

        An earlier edit than the last can be undone where later ones hold without it.

        Raises:
            ValueError: if there is no such active edit, or a fact that a later one forgot would come back.
        """
        with self._turn() as held, self._whole():
            edit = self._history.find(edit, "active").edit
            remaining = [other for other in self._history.active if other.number != edit.number]
            self._write(remaining)
            for later in (other for other in remaining if other.number > edit.number):
                held.check()
                now = recall(self._model, self._tokenizer, [later.fact])[later.id]
                least = max(RETURNED, self.config.target_recall) * later.before.recall
                if not now <= max(least, 1.25 * later.after.recall):
                    raise ValueError(
                        f"edit {edit.number} ({edit.id!r}): expected later edits to hold without it, got {now:.3f} "
                        f"recall of {later.id!r}, {later.after.recall:.3f} with it; undo edit {later.number} first"
                    )
            self._record("undo", {"number": edit.number})
            return edit

    def redo(self, edit: Edit | None = None) -> Edit:
        """Bring an undone edit back, the last one undone by default.

        Raises:
            ValueError: if there is no such undone edit.
        """
        with self._turn(), self._whole():
            edit = self._history.find(edit, "undone").edit
            self._write(sorted([*self._history.active, edit], key=lambda e: e.number))
            self._record("redo", {"number": edit.number})
            return edit

    def commit(self) -> None:
        """Make the active edits final: they can no longer be undone."""
        with self._turn():
            base = snapshot(self._targets, near=True)
            self._record("commit", {})
            self._base = base

    def measure(self, edit: Edit, relearn: Any = None) -> State:
        """The model with ``edit`` in place of the active edit of its number: what a compressed one is worth.

        Args:
            relearn: facts; if given, recall after :func:`cir.relearn` has trained on them is measured too.

        Raises:
            ValueError: if no edit of that number is active. NonFiniteError: on a NaN or infinite loss or recall.
        """
        with self._turn() as held, self._whole():
            fact, active = self._history.find(edit, "active").edit.fact, self._history.active
            with answering(self._model, self._stack, self._first) as tape:
                looks = self._looks(tape, fact)
                self._write([other for other in active if other.number < edit.number])
                looks.read()
                self._write([edit if other.number == edit.number else other for other in active])
                state = looks.whole()
            if relearn is not None:
                with held.released():
                    last = attack(self._model, self._tokenizer, relearn, [fact], progress=False)[-1]
                state = replace(state, relearned=last[fact.id])
            self._write(active)
            return state

    @contextmanager
    def _turn(self) -> Iterator[Held]:
        """To change the model: signals wait while weights, history and journal may say different things."""
        with Held() as held, self._turns.taken(held.check):
            if self._broken:
                raise RuntimeError(
                    "expected a model as its edits make it, got one that could not be brought back: load it again"
                )
            yield held

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """What an exception leaves half-done to the weights is taken back."""
        try:
            yield
        except BaseException:
            self._broken = True
            self._write(self._history.active)
            self._broken = False
            raise

    def _forget(
        self, tape: AnswerCapture, fact: Fact, looks: Looks, before: State, held: Held, followers: Followers
    ) -> Edit:
        """The edit, in place and measured."""
        config = self.config
        looks.read()
        updates, full, stopped = self._walk(tape, fact, looks, before, held, followers)
        if not updates:
            raise EditError(f"fact {fact.id!r}: {stopped} at the first steps already; nothing was changed")
        for _ in range(RETREATS + 1):
            factors, energy = factorise(self._targets, updates, config.rank, config.energy)
            edit = Edit(
                id=fact.id,
                number=len(self._history.entries) + 1,
                fact=fact,
                factors=factors,
                energy=energy,
                before=before,
                full=full,
                after=full,
                steps=len(updates),
                seconds=0.0,
                stopped=stopped,
                fingerprint=self.fingerprint,
            )
            self._write([*self._history.active, edit])
            held.check()
            after = looks.whole()
            if after.rise > config.budget or after.worst > config.worst_window:
                # Harm is as the square of the way.
                room = min(config.budget / max(after.rise, 1e-9), config.worst_window / max(after.worst, 1e-9))
                share, stopped = 0.95 * min(1.0, room) ** 0.5, "budget spent"
                updates = [(tokens, share * scale) for tokens, scale in updates]
            elif after.recall < before.recall:
                return replace(edit, after=after)
            else:
                raise EditError(
                    f"fact {fact.id!r}: expected recall to fall from {before.recall:.3f}, got "
                    f"{after.recall:.3f}; nothing was changed"
                )
        raise EditError(f"fact {fact.id!r}: expected a part of the edit within the bounds, got {after}")

    def _walk(
        self, tape: AnswerCapture, fact: Fact, looks: Looks, before: State, held: Held, followers: Followers
    ) -> tuple[list[Update], State, str]:
        """Steps in place until the fact is forgotten: those kept, the model after the last, why it stopped."""
        config = self.config
        share, goal, state = 1.0, config.target_recall * before.recall, before
        settings = CIRConfig(dose=config.dose, rounding=config.rounding, max_length=config.max_length)
        kept: list[Update] = []
        floor = settings.floor
        if self._told is None:  # once: what they are compared by, no edit changes
            length, at_once = config.max_length, tokens_at_once(tape.device)
            self._told = sentences(tape, self._tokenizer, self._contrast, max_length=length, at_once=at_once)
        about = self._tokenizer, [fact], self._subspaces, settings, self._told
        forgetter = Forgetter(tape, self._targets, *about, replays=self._replays)
        while len(kept) < config.max_steps and not followers.asked:
            ended, new = False, list[Update]()
            for _ in range(min(NEIGHBOURS_EVERY * config.check_every, config.max_steps - len(kept))):
                held.check()
                # The sentences are gone, and some probe is not yet: lower still.
                while not (step := forgetter.step(floor=floor)).live and floor > LOWEST:
                    floor -= 2 * settings.dose  # so far that a whole dose is left
                if not any(rows.any() for rows in step.tokens.values() if rows.is_floating_point()):
                    ended = True
                    break
                forgetter.apply(step, share)
                new.append((step.tokens, share))
                followers.step(0, step.odds, 1)
                if followers.asked or (len(new) % config.check_every == 0 and looks.recall() <= goal):
                    break
            now = looks.state()
            if self._harmed(now, before):
                for tokens, scale in reversed(new):
                    forgetter.apply(Step(tokens), -scale)
                share /= 2
                if share < SMALLEST_DOSE or not new:
                    return kept, state, "neighbours suffer"
                continue
            kept, state = kept + new, now
            if now.recall <= goal or ended:
                return kept, state, "forgotten" if now.recall <= goal else "nothing left to forget"
        return kept, state, "stopped by a callback" if followers.asked else "all steps taken"

    def _harmed(self, now: State, before: State) -> bool:
        if now.neighbours is None or before.neighbours is None:
            return False
        return not now.neighbours >= self.config.keep * before.neighbours  # NaN is harm

    def _known(self, fact: Fact, looks: Looks) -> State:
        """The model before an edit of ``fact``; raises where there is nothing to forget."""
        for entry in self._history.entries:
            if entry.status != "undone" and entry.edit.fact.sentences == fact.sentences:
                raise AlreadyForgottenError(f"fact {fact.id!r}: already forgotten by edit {entry.edit.number}")
        before = looks.state()
        if before.recall < UNKNOWN:
            raise UnknownFactError(
                f"fact {fact.id!r}: expected one that the model knows, got a recall of {before.recall:.4f}: "
                "forgotten already, or never known"
            )
        return before

    def _looks(self, tape: AnswerCapture, fact: Fact) -> Looks:
        if self._watched is None:  # once, as no edit changes what the lower layers say of them
            self._watched = Probed(tape, self._tokenizer, self._neighbours, tokens_at_once(tape.device))
        near = self._tokenizer(list(fact.sentences))["input_ids"]
        text = sample(self._rows, self.config.text_tokens, near, self._index)
        watched = self._neighbours, self._watched
        return Looks(tape, self._tokenizer, fact, watched, text, self._replays.follow(tape.weights))

    def _write(self, edits: Sequence[Edit]) -> None:
        """Weights = base + the sum of ``edits``, rounded once."""
        restore(self._targets, self._base)
        add_factors(self._targets, [edit.factors for edit in edits], rounding=self.config.rounding)

    def _record(self, kind: str, about: dict[str, Any], edit: Edit | None = None) -> None:
        """On the disk and in memory, or in neither."""
        if self._journal is not None:
            self._journal.append(kind, about, b"" if edit is None else edit.to_bytes())
        if edit is not None:
            self._history.add(edit)
        else:
            self._history.take(Record(kind, about, b""))

    def _replay(self, journal: Journal) -> None:
        own = {target.name for target in self._targets}
        for number, record in enumerate(journal.records, 1):
            try:
                if record.kind == "commit":
                    self._write(self._history.active)
                    self._base = snapshot(self._targets, near=True)
                self._history.take(record)
                if record.kind == "edit":
                    edit = self._history.entries[-1].edit
                    if {target.name for target in edit.targets_in(self._model)} != own:
                        raise ValueError(f"expected an edit of {len(own)} linears, got one of {len(edit.factors)}")
            except ValueError as error:
                raise JournalError(f"{journal.path}, record {number}: {error}") from error
        self._write(self._history.active)
        journal.records.clear()
