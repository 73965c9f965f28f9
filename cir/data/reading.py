"""The rows of a data set: from the hub, its cache on disk, or a local copy.

A local copy is one file with the rows of the hub's data set (the facts or, for a set of text, the text), or a folder
of files named after the parts ``facts``, ``neighbours``, ``retain`` and ``disruption``::

    rwku/facts-level1.jsonl   rwku/facts-level2.jsonl   rwku/neighbours.jsonl   rwku/retain.txt

Of a part in several files each has a name that begins with the part and a hyphen. Rows are read from .jsonl, .ndjson
or .jsonlines; from .json that holds a list, or one object a line; and through the package ``datasets`` from .parquet,
.arrow and .csv. Text is rows with a column ``text``, or a .txt file, whose paragraphs are its documents. All but the
tables may be gzipped (.gz). An object on a line has 1 MiB of characters at most; a document of a set of text, a list
and a .txt file have 64 MiB at most.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from cir.data.sources.source import Source
from cir.system.files import MOST_LINE, MOST_TEXT, brief, lines_of, named, strict_json, whole_text

DOCUMENTS = 1500
"""Read of a streamed text unless a limit says otherwise: about 1.5 million tokens of FineWeb-Edu."""

TEXTS = ("retain", "disruption")
_PARTS = ("facts", "neighbours", *TEXTS)
ALL = (*_PARTS, "text")
_BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}
_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines", ".json", ".txt", *_BUILDERS)
LOCAL_COPY = "give a local copy with --data-path PATH (path=)"
"""What to do where the hub cannot be reached."""

Rows = list[tuple[str, Any]]
"""Where each row stands, for error messages, and what it holds."""


def from_path(path: Path, source: Source) -> dict[str, Rows]:
    """The rows of each part, of a local copy."""
    if not path.exists():
        raise FileNotFoundError(f"expected a file or a folder, got {named(path)}, which does not exist")
    if not path.is_dir():
        part = "facts" if source.fact else "text"
        return {part: _read(path, part)}
    parts: dict[str, Rows] = {}
    for file in sorted(path.iterdir()):
        part = file.name.split(".")[0].split("-")[0].lower()
        if part in _PARTS and _suffix(file) in _SUFFIXES:
            parts[part] = parts.get(part, []) + _read(file, part)
    needed = "facts" if source.fact else "retain"
    if needed not in parts:
        found = ", ".join(sorted(file.name for file in path.iterdir())) or "an empty folder"
        raise FileNotFoundError(
            f"{named(path)}: expected a file {needed}.* out of {', '.join(_SUFFIXES)}, got {brief(found, 200)}"
        )
    return parts


def _suffix(path: Path) -> str:
    """What the name says of the content, in lower case."""
    name = path.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    return suffix if suffix not in _BUILDERS else Path(name).suffix


def _read(path: Path, part: str) -> Rows:
    """The rows of a file, or the paragraphs of a text."""
    suffix = _suffix(path)
    if suffix not in _SUFFIXES:
        raise ValueError(f"expected a file that ends in {', '.join(_SUFFIXES)}, got {named(path)}")
    longest = MOST_LINE if part in ("facts", "neighbours") else MOST_TEXT
    if suffix in _BUILDERS:
        rows = _read_table(path, _BUILDERS[suffix])
    elif suffix == ".txt":
        rows = _numbered(named(path), "paragraph", filter(str.strip, re.split(r"\n\s*\n", whole_text(path))))
    elif suffix == ".json" and (text := whole_text(path)).lstrip().startswith("["):
        rows = _numbered(named(path), "row", strict_json(named(path), text))
    else:
        lines = _numbered(named(path), "line", lines_of(path, longest))
        rows = [(where, strict_json(where, line)) for where, line in lines if line.strip()]
    if not rows:
        raise ValueError(f"{named(path)}: expected at least one row, got none")
    return rows


def _read_table(path: Path, builder: str) -> Rows:
    library = _hub_library(named(path), "give a copy as .jsonl")
    try:
        return _numbered(named(path), "row", library.load_dataset(builder, data_files=str(path), split="train"))
    except Exception as error:  # of whichever reader failed; they have no base in common
        raise ValueError(f"{named(path)}: expected {builder}, got {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {brief(str(error), 200)}"


def _numbered(place: str, unit: str, rows: Iterable[Any]) -> Rows:
    return [(f"{place}, {unit} {number}", row) for number, row in enumerate(rows, 1)]


def from_hub(
    name: str, source: Source, limit: int | None, parts: Container[str] = ALL, instead: str = LOCAL_COPY
) -> dict[str, Rows]:
    """The rows of each of the ``parts``, from the hub or its cache; of a streamed text the first ``limit``.

    Raises:
        FileNotFoundError: if it cannot be had; the message says what was looked for, and what to do ``instead``.
    """
    count = (limit or DOCUMENTS) if source.streamed else None
    library = _hub_library(f"data set {name!r}", instead)
    return {
        part: [
            row for config, split in places for row in _hub_rows(library, name, source, config, split, count, instead)
        ]
        for part, places in source.parts.items()
        if part in parts
    }


def _hub_rows(
    library: Any, name: str, source: Source, config: str | None, split: str, count: int | None, instead: str
) -> Rows:
    place = f"{source.hub} (configuration {config or 'default'}, split {split})"
    if source.hub.startswith("https://"):
        where: dict[str, Any] = {"path": "json", "data_files": source.hub}
    else:
        where = {"path": source.hub, "name": config}
    try:
        rows = library.load_dataset(**where, split=split, streaming=source.streamed)
        return _numbered(place, "row", islice(rows, count))
    except Exception as error:  # of whichever of the library's transports failed; they have no base in common
        raise FileNotFoundError(
            f"data set {name!r}: expected {place} from the hub or in {library.config.HF_DATASETS_CACHE}, got "
            f"{_reason(error)}; {instead}"
        ) from error


def _hub_library(reader: str, instead: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"{reader}: expected the package datasets, which is not installed: pip install 'cir[data]', or {instead}"
        ) from None
    return datasets
