"""The rows of a data set: from the hub, its cache on disk, or a local copy.

A local copy is one file with the rows of the hub's data set (the facts or, for a set of text, the text), or a folder
of files named after the parts ``facts``, ``neighbours``, ``retain`` and ``disruption``::

    rwku/facts-level1.jsonl   rwku/facts-level2.jsonl   rwku/neighbours.jsonl   rwku/retain.txt

Of a part in several files each has a name that begins with the part and a hyphen. Rows are read from .jsonl; from
.json that holds a list, or one object a line; and through the package ``datasets`` from .parquet, .arrow and .csv.
Text is rows with a column ``text``, or a .txt file, whose paragraphs are its documents.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from cir.data.sources.source import Source

DOCUMENTS = 1500
"""Read of a streamed text unless a limit says otherwise: about 1.5 million tokens of FineWeb-Edu."""

TEXTS = ("retain", "disruption")
_PARTS = ("facts", "neighbours", *TEXTS)
_BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}
_SUFFIXES = (".jsonl", ".json", ".txt", *_BUILDERS)

Rows = list[tuple[str, Any]]
"""Where each row stands, for error messages, and what it holds."""


def from_path(path: Path, source: Source) -> dict[str, Rows]:
    """The rows of each part, of a local copy."""
    if path.is_file():
        return {"facts" if source.fact else "text": _read(path)}
    if not path.is_dir():
        raise FileNotFoundError(f"expected a file or a folder, got {path}, which does not exist")
    parts: dict[str, Rows] = {}
    for file in sorted(path.iterdir()):
        part = file.stem.split("-")[0]
        if part in _PARTS and file.suffix in _SUFFIXES:
            parts[part] = parts.get(part, []) + _read(file)
    needed = "facts" if source.fact else "retain"
    if needed not in parts:
        found = ", ".join(sorted(file.name for file in path.iterdir())) or "an empty folder"
        raise FileNotFoundError(f"{path}: expected a file {needed}.* out of {', '.join(_SUFFIXES)}, got {found}")
    return parts


def _read(path: Path) -> Rows:
    """The rows of a file, or the paragraphs of a text."""
    if path.suffix in _BUILDERS:
        library = _hub_library(str(path))
        loaded = library.load_dataset(_BUILDERS[path.suffix], data_files=str(path), split="train")
        rows = _numbered(path, "row", loaded)
    elif path.suffix not in _SUFFIXES:
        raise ValueError(f"expected a file that ends in {', '.join(_SUFFIXES)}, got {path}")
    else:
        rows = _read_text(path, path.read_text(encoding="utf-8"))
    if not rows:
        raise ValueError(f"{path}: expected at least one row, got none")
    return rows


def _read_text(path: Path, text: str) -> Rows:
    if path.suffix == ".txt":
        return _numbered(path, "paragraph", filter(str.strip, re.split(r"\n\s*\n", text)))
    if path.suffix == ".json" and text.lstrip().startswith("["):
        return _numbered(path, "row", _parsed(str(path), text))
    lines = _numbered(path, "line", text.split("\n"))
    return [(where, _parsed(where, line)) for where, line in lines if line.strip()]


def _parsed(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: expected JSON, got {error}") from None


def _numbered(place: object, unit: str, rows: Iterable[Any]) -> Rows:
    return [(f"{place}, {unit} {number}", row) for number, row in enumerate(rows, 1)]


def from_hub(name: str, source: Source, limit: int | None) -> dict[str, Rows]:
    """The rows of each part, from the hub or its cache; of a streamed text the first ``limit``."""
    count = (limit or DOCUMENTS) if source.streamed else None
    return {
        part: [row for config, split in places for row in _hub_rows(name, source, config, split, count)]
        for part, places in source.parts.items()
    }


def _hub_rows(name: str, source: Source, config: str | None, split: str, count: int | None) -> Rows:
    library = _hub_library(f"data set {name!r}")
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
            f"{type(error).__name__}: {error}; give a local copy with --data-path PATH (path=)"
        ) from error


def _hub_library(reader: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"{reader}: expected the package datasets, which is not installed: pip install 'cir[data]', or give a "
            "local .jsonl copy with --data-path PATH (path=)"
        ) from None
    return datasets
