"""What a data set is to us, and what reads a row of the kinds that several have."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cir.data.facts import Fact, Probe
from cir.system.files import brief, shown

QUESTION = "Q: {}\nA:"
"""How a question is asked; its answer follows after a space."""
CHOICES = "question, choices, answer (index or letter)"
"""The columns that :func:`multiple_choice` reads."""

_OMISSION = re.compile(r"\s*\[(?:\.\.\.|…)\]")


@dataclass(frozen=True)
class Source:
    """Where a data set is, and how it is read.

    Attributes:
        hub: its id on the hub, or the address of its one file.
        parts: the configurations (None: the default) and splits of each part; ``text`` is cut into ``retain`` and
            ``disruption``. holds, columns, cite: for people.
        fact: a row as a fact; None for a set of text. same: what the rows of one fact have in common, as
            :func:`alike` gives it. neighbour: a row of the facts as its neighbours.
        streamed: too large to be downloaded; only what is used is read.
        benchmark: configurations and splits, as in ``parts``, of what :func:`cir.proof.benchmarks.benchmark` measures
            on; of a name that ends in ``_icl``, examples for its prompts.
    """

    hub: str
    parts: Mapping[str, tuple[tuple[str | None, str], ...]]
    holds: str
    columns: str
    cite: str
    fact: Callable[[Row], Fact] | None = None
    same: Callable[[Row], tuple[str, ...]] | None = None
    neighbour: Callable[[Row], Fact] | None = None
    streamed: bool = False
    benchmark: Mapping[str, tuple[tuple[str | None, str], ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """A row of a data set, where it stands, and an id of its own.

    Its methods read one column, and raise a ValueError that names row and column if that is not as expected.
    """

    where: str
    id: str
    values: Mapping[str, Any]

    def text(self, column: str) -> str:
        """A string that is not empty."""
        value = self.values.get(column)
        if not isinstance(value, str) or not one_line(value):
            raise self._wrong(column, "a string that is not empty")
        return value.strip()

    def texts(self, column: str, *, blank: bool = False) -> tuple[str, ...]:
        """A list of strings, which may be empty if ``blank``."""
        value = self.values.get(column)
        fits = isinstance(value, list | tuple) and all(isinstance(text, str) for text in value)
        if not value or not fits or not (blank or all(map(one_line, value))):
            raise self._wrong(column, "a list of strings")
        return tuple(value)

    def index(self, column: str, count: int) -> int:
        """An index below ``count``, or its letter."""
        value = self.values.get(column)
        if isinstance(value, str) and len(value) == 1:
            value = string.ascii_uppercase.find(value.upper())
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < count:
            raise self._wrong(column, f"the index or the letter of one of {count} choices")
        return value

    def inner(self, column: str) -> Row:
        """A mapping, as a row of its own."""
        value = self.values.get(column)
        if not isinstance(value, Mapping):
            raise self._wrong(column, "an object")
        return replace(self, where=f"{self.where}, {column!r}", values=value)

    def _wrong(self, column: str, expected: str) -> ValueError:
        if column in self.values:
            got = shown(self.values[column])
        else:
            got = f"the columns {brief(', '.join(map(str, self.values)))}"
        return ValueError(f"{self.where}: expected {column!r}, {expected}, got {got}")


def one_line(text: str) -> str:
    """``text`` as one line, without the ``[...]`` where its source was shortened."""
    return " ".join(_OMISSION.sub("", text).split())


def alike(*texts: str) -> tuple[str, ...]:
    """``texts`` in a form in which those that say the same are the same."""
    return tuple(unicodedata.normalize("NFKC", one_line(text)).casefold() for text in texts)


def asked(name: str, question: str, answer: str, *paraphrases: str) -> Fact:
    question, answer = one_line(question), one_line(answer)
    probe, *others = (Probe(QUESTION.format(one_line(text)), f" {answer}") for text in (question, *paraphrases))
    return Fact(name, (f"{question} {answer}",), (probe,), paraphrases=tuple(others))


def completed(name: str, prompts: Iterable[str], answer: str, paraphrases: Iterable[str] = ()) -> Fact:
    probes, others = (
        tuple(Probe(one_line(text), f" {one_line(answer)}") for text in texts) for texts in (prompts, paraphrases)
    )
    return Fact(name, tuple(f"{probe.prompt}{probe.target}." for probe in probes), probes, paraphrases=others)


def multiple_choice(row: Row) -> Fact:
    """No probes; where the row has no sentences, the question and the right choice are the sentence."""
    question, choices = row.text("question"), row.texts("choices", blank=True)
    answer = row.index("answer", len(choices))
    given = row.values.get("sentences") is not None
    sentences = row.texts("sentences") if given else (f"{question} {choices[answer]}".strip(),)
    return Fact(row.id, sentences, question=question, choices=choices, answer=answer)


def same_choice(row: Row) -> tuple[str, ...]:
    """The question and the text of the right choice."""
    choices = row.texts("choices", blank=True)
    return alike(row.text("question"), choices[row.index("answer", len(choices))])


def same_answer(row: Row) -> tuple[str, ...]:
    """The question and the answer."""
    return alike(row.text("question"), row.text("answer"))


def question_answer(row: Row) -> Fact:
    given = row.values.get("paraphrased_question") is not None
    paraphrases = [row.text("paraphrased_question")] if given else []
    return asked(row.id, row.text("question"), row.text("answer"), *paraphrases)
