"""What the command line reads: facts, what must stay, and texts, from files or from a data set of the field."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cir.data.datasets import SOURCES as DATA_SETS
from cir.data.datasets import has_text, load_data, load_text
from cir.data.facts import Fact, check_limit, evenly, load_facts
from cir.system.files import MOST_TEXT, is_json, looks_like_json, named, shown, whole_text

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
        """Read what the options ``given`` name; files take the place of the data set's own parts. Of the facts, from
        either source, ``limit`` are used, evenly spread.

        Raises:
            ValueError: unless just one of ``facts`` and ``data`` is given, on malformed facts, or a data set without
                the text that is asked of it.
            OSError: if a file, or a copy of the data set, is not there.
        """
        sources = {name: value for name in SOURCES if (value := given.get(name)) is not None}
        for name, value in sources.items():
            if name != "limit" and not isinstance(value, str):
                raise ValueError(f"--{name.replace('_', '-')}: expected the name of a file, got {shown(value)}")
        if ("facts" in sources) == ("data" in sources):
            both = [name for name in ("facts", "data") if name in sources]
            raise ValueError("expected facts from either --facts or --data, got " + " and ".join(both or ["none"]))
        check_limit(limit := sources.get("limit"))
        facts, neighbours, texts = [], [], {}
        if "data" in sources:
            data = load_data(sources["data"], sources.get("data_path"), limit=limit)
            facts, neighbours = list(data.facts), list(data.neighbours)
            texts = {"retain": data.retain, "disruption": data.disruption}
            if not facts:
                raise ValueError(f"--data: expected a data set of facts, got {sources['data']}, which is text")
        texts |= {part: read_text(sources[part], part) for part in ("retain", "disruption") if part in sources}
        names = ("facts", "neighbours", "same_subject", "related")
        own = {name: load_facts(sources[name]) for name in names if name in sources}
        return cls(
            sources,
            evenly(own.get("facts", facts), limit),
            own.get("neighbours", neighbours),
            own.get("same_subject", []),
            own.get("related", []),
            texts.get("retain"),
            texts.get("disruption"),
        )


def read_text(source: str, part: str) -> str:
    """A text file or, where ``source`` is no file but the name of a data set, its ``retain`` or ``disruption`` part.

    Raises:
        ValueError: if the data set has no such part, or the file is not as :func:`plain_text` says. OSError: if there
            is no such file, or copy of the data set.
    """
    name = source.lower()
    if name not in DATA_SETS or os.path.isfile(source):
        try:
            return plain_text(Path(source), part)
        except FileNotFoundError:
            names = ", ".join(filter(has_text, DATA_SETS))
            raise FileNotFoundError(
                f"--{part}: expected a text file or one of {names}, got {shown(source)}, which is neither"
            ) from None
    text = load_text(name, part, f"give a text file instead with --{part} FILE") if has_text(name) else None
    if text is None:
        raise ValueError(f"--{part}: expected a data set with such text, got {name}")
    return text


def plain_text(path: Path, option: str) -> str:
    """All of a file, of 64 MiB of characters at most.

    Raises:
        ValueError: if it holds JSON, nothing, or more than that, or is not in UTF-8. OSError: if it cannot be read.
    """
    text = whole_text(path, MOST_TEXT)
    if not text.strip():
        raise ValueError(f"--{option}: expected plain text, got nothing in {named(path)}")
    if is_json(path) or looks_like_json(text.lstrip().split("\n", 1)[0]):
        raise ValueError(f"--{option}: expected plain text, got JSON in {named(path)}; write its text out")
    return text


def paths(arguments: argparse.Namespace) -> list[str]:
    """All that was given but the output, some of which are files and folders."""
    given = {name: value for name, value in vars(arguments).items() if name not in ("out", "fact")}
    values = (value if isinstance(value, list) else [value] for value in given.values())
    return [text for value in values for text in value if isinstance(text, str)]
