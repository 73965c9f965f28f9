"""What the command line reads: facts, what must stay, and texts, from files or from a data set of the field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cir.data.datasets import SOURCES as DATA_SETS
from cir.data.datasets import load_data
from cir.data.facts import Fact, is_json, lines_of, load_facts, looks_like_json

SOURCES = ("facts", "data", "data_path", "limit", "neighbours", "same_subject", "related", "retain", "disruption")


@dataclass(frozen=True)
class Inputs:
    """``sources`` says where the rest came from: a value for each option of :data:`SOURCES` that was given."""

    sources: dict[str, Any]
    facts: list[Fact]
    neighbours: list[Fact]
    same_subject: list[Fact]
    related: list[Fact]
    retain: str | None
    disruption: str | None

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Inputs:
        """Read what the options ``given`` name; files take the place of the data set's own parts.

        Raises:
            ValueError: unless just one of ``facts`` and ``data`` is given, on malformed facts, or a data set without
                the text that is asked of it.
            OSError: if a file, or a copy of the data set, is not there.
        """
        sources = {name: value for name in SOURCES if (value := given.get(name)) is not None}
        if ("facts" in sources) == ("data" in sources):
            raise ValueError("expected facts from either --facts or --data, got " + " and ".join(sources or ["none"]))
        facts, neighbours, texts = [], [], {}
        if "data" in sources:
            data = load_data(sources["data"], sources.get("data_path"), limit=sources.get("limit"))
            facts, neighbours = list(data.facts), list(data.neighbours)
            texts = {"retain": data.retain, "disruption": data.disruption}
            if not facts:
                raise ValueError(f"--data: expected a data set of facts, got {sources['data']}, which is text")
        texts |= {part: read_text(sources[part], part) for part in ("retain", "disruption") if part in sources}
        names = ("facts", "neighbours", "same_subject", "related")
        own = {name: load_facts(sources[name]) for name in names if name in sources}
        return cls(
            sources,
            own.get("facts", facts),
            own.get("neighbours", neighbours),
            own.get("same_subject", []),
            own.get("related", []),
            texts.get("retain"),
            texts.get("disruption"),
        )


def read_text(source: str, part: str) -> str:
    """A text file or, where ``source`` is no file but the name of a data set, its ``retain`` or ``disruption`` part.

    Raises:
        ValueError: if the data set has no such part, or the file holds JSON or is not in UTF-8. OSError: if there is
            no such file, or copy of the data set.
    """
    if source not in DATA_SETS or Path(source).exists():
        return plain_text(Path(source), part)
    text = getattr(load_data(source), part)
    if text is None:
        raise ValueError(f"--{part}: expected a data set with such text, got {source}")
    return text


def plain_text(path: Path, option: str) -> str:
    """All of a file.

    Raises:
        ValueError: if it holds JSON or is not in UTF-8. OSError: if it cannot be read.
    """
    lines = list(lines_of(path))
    if is_json(path) or any(map(looks_like_json, lines[:1])):
        raise ValueError(f"--{option}: expected plain text, got JSON in {path}; write out the text of its rows")
    return "".join(lines)
