"""zsRE: relations in Wikipedia."""

from __future__ import annotations

from cir.data.facts import Fact
from cir.data.sources.source import Row, Source, alike, asked


def _zsre(row: Row) -> Fact:
    return asked(row.id, row.text("src"), row.texts("answers")[0], row.text("rephrase"))


def _zsre_neighbour(row: Row) -> Fact:
    question = row.text("loc").removeprefix("nq question:").rstrip("?")
    return asked(row.id, f"{question}?", row.text("loc_ans"))


def _same(row: Row) -> tuple[str, ...]:
    """The subject, or the question in copies without subjects, and the answer."""
    about = "src" if row.values.get("subject") is None else "subject"
    return alike(row.text(about), row.texts("answers")[0])


ZSRE = Source(
    "https://rome.baulab.info/data/dsets/zsre_mend_eval.json",
    {"facts": ((None, "train"),)},
    "questions on relations in Wikipedia, each with an unrelated question that must stay",
    "subject (may be absent), src, rephrase, answers, loc, loc_ans",
    "Levy et al. 2017, arXiv 1706.04115; as split by Mitchell et al. 2022, arXiv 2110.11309",
    _zsre,
    _same,
    _zsre_neighbour,
    benchmark={"facts": ((None, "train"),)},
)
