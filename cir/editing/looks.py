"""What is looked at during an edit: the fact, its neighbours, and the text where it is nearest the fact."""

from __future__ import annotations

from dataclasses import replace
from math import isfinite
from typing import Any

from torch import Tensor

from cir.data.facts import Fact
from cir.data.sampling import Sample
from cir.editing.edits import State
from cir.forgetting.memory import tokens_at_once
from cir.forgetting.questions import Probed
from cir.forgetting.reread import Reread
from cir.forgetting.update import NonFiniteError
from cir.measures import loss_rise, mean_recall
from cir.model.capture import AnswerCapture
from cir.model.replay import Replays


class Looks:
    """At a captured model before, during and after an edit of ``fact``, which changes no layer below the tape's.

    Args:
        tape: of :func:`cir.model.capture.answering`. tokenizer: of the model.
        fact: with probes. watched: facts that must stay, and what is asked of them; ``fact`` is left out.
        text: windows; their loss is first measured now. replays: of earlier looks at the model.
    """

    def __init__(
        self,
        tape: AnswerCapture,
        tokenizer: Any,
        fact: Fact,
        watched: tuple[list[Fact], Probed],
        text: Sample,
        replays: Replays,
    ) -> None:
        self._tape, self._replays, self._text = tape, replays, text
        self._fact = Probed(tape, tokenizer, [fact], tokens_at_once(tape.device))
        neighbours, self._watched = watched
        self._same = {other.id for other in neighbours if other.id == fact.id or other.sentences == fact.sentences}
        self._original: Tensor | None = None
        self._reread: Reread | None = None

    def recall(self) -> float:
        """Of the fact."""
        (recalled,) = self._fact.recall(self._tape, self._replays).values()
        return recalled

    def state(self) -> State:
        """Of the fact and of its neighbours."""
        others = self._watched.recall(self._tape, self._replays)
        return State(self.recall(), mean_recall({name: r for name, r in others.items() if name not in self._same}))

    def read(self) -> None:
        """Measure the text as it is before the edit."""
        self._reread = Reread(self._tape, self._text.rows)
        self._original = self._reread.losses()

    def whole(self) -> State:
        """The same, and how the text has fared since it was first read.

        Raises:
            NonFiniteError: where that, or the recall, is NaN or infinite, which no bound would notice.
        """
        if self._reread is None or self._original is None:
            raise RuntimeError("expected the text to have been read before the edit")
        losses = self._reread.losses()
        rise, stderr = loss_rise(losses, self._original, self._text)
        worst = float((losses - self._original).mean(1).max())
        state = replace(self.state(), rise=rise, rise_stderr=stderr, worst=worst)
        if not isfinite(rise + stderr + worst + state.recall):
            raise NonFiniteError(f"expected a finite loss and recall after the edit, got {state}; it is taken back")
        return state
