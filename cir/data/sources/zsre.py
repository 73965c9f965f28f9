"""zsRE: relations in Wikipedia."""

from __future__ import annotations

from cir.data.facts import Fact
from cir.data.sources.source import Row, Source, asked


def _zsre(row: Row) -> Fact:
    return asked(row.id, row.text("src"), row.texts("answers")[0], row.text("rephrase"))


def _zsre_neighbour(row: Row) -> Fact:
    question = row.text("loc").removeprefix("nq question:").rstrip("?")
    return asked(row.id, f"{question}?", row.text("loc_ans"))


ZSRE = Source(
    "https://rome.baulab.info/data/dsets/zsre_mend_eval.json",
    {"facts": ((None, "train"),)},
    "questions on relations in Wikipedia, each with an unrelated question that must stay",
    "src, rephrase, answers, loc, loc_ans",
    "Levy et al. 2017, arXiv 1706.04115; as split by Mitchell et al. 2022, arXiv 2110.11309",
    _zsre,
    _zsre_neighbour,
)
