"""RWKU: real people and what is near them."""

from __future__ import annotations

import re

from cir.data.facts import Fact, Probe
from cir.data.sources.source import QUESTION, Row, Source, alike, asked, one_line

_BLANK = re.compile(r"_{2,}")


def _rwku(row: Row) -> Fact:
    """A statement up to its blank, or a question."""
    subject, query, answer = one_line(row.text("subject")), one_line(row.text("query")), one_line(row.text("answer"))
    name = f"{subject}: {answer.casefold()}"
    blank = _BLANK.search(query)
    if blank is None:
        return asked(name, query, answer)
    lead = query[: blank.start()].rstrip(" \"'\u201c\u2018(")
    stated = _BLANK.sub(lambda _: answer, query)
    return Fact(name, (stated,), (Probe(lead or QUESTION.format(query), f" {answer}"),))


def _same(row: Row) -> tuple[str, ...]:
    """A fact is asked with a blank and as a question too, and must not be relearned from the one and probed with the
    other.
    """
    return alike(row.text("subject"), row.text("answer"))


RWKU = Source(
    "jinzhuoran/RWKU",
    {
        "facts": (("forget_level1", "test"), ("forget_level2", "test")),
        "neighbours": (("neighbor_level1", "test"), ("neighbor_level2", "test")),
    },
    "facts on 200 famous people, and on what is near them",
    "subject, query (with ___ for the answer, or a question), answer",
    "Jin et al. 2024, arXiv 2406.10890",
    _rwku,
    _same,
    benchmark={
        part: ((part, "test"),)
        for part in ("forget_level1", "forget_level2", "forget_level3", "neighbor_level1", "neighbor_level2")
    },
)
