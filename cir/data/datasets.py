"""The data sets of the field as facts and text, by name: :data:`SOURCES` lists them."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from cir.data.facts import MOST_FACTS, Fact, check_fact, check_limit, evenly, leaking, split_facts
from cir.data.reading import TEXTS, Rows, from_hub, from_path
from cir.data.sources.counterfact import COUNTERFACT
from cir.data.sources.mmlu import MMLU
from cir.data.sources.muse import MUSE_BOOKS, MUSE_NEWS
from cir.data.sources.rwku import RWKU
from cir.data.sources.source import Row, Source
from cir.data.sources.text import FINEWEB_EDU, WIKITEXT
from cir.data.sources.tofu import TOFU, TOFU_FORGET01, TOFU_FORGET05
from cir.data.sources.wmdp import WMDP_BIO, WMDP_BIO_ROBUST, WMDP_CHEM, WMDP_CYBER
from cir.data.sources.zsre import ZSRE
from cir.system.files import brief, named, shown

logger = logging.getLogger(__name__)

SOURCES: dict[str, Source] = {
    "wmdp-bio": WMDP_BIO,
    "wmdp-bio-robust": WMDP_BIO_ROBUST,
    "wmdp-chem": WMDP_CHEM,
    "wmdp-cyber": WMDP_CYBER,
    "rwku": RWKU,
    "tofu": TOFU,
    "tofu-forget01": TOFU_FORGET01,
    "tofu-forget05": TOFU_FORGET05,
    "muse-news": MUSE_NEWS,
    "muse-books": MUSE_BOOKS,
    "counterfact": COUNTERFACT,
    "zsre": ZSRE,
    "wikitext": WIKITEXT,
    "fineweb-edu": FINEWEB_EDU,
    "mmlu": MMLU,
}
NAMES = tuple(SOURCES)
BENCHMARKS = tuple(name for name, source in SOURCES.items() if source.benchmark)
LEAST_ROWS = 2
"""Of a part that a benchmark measures on: fewer have no standard error."""
EXAMPLES = "_icl"
"""Ends the name of a part that has examples for prompts, on which nothing is measured."""


@dataclass(frozen=True)
class DataSet:
    """Facts to forget and what must stay.

    Attributes:
        facts: to forget; of MMLU, questions that measure ability.
        neighbours: near the facts; must stay. retain: ordinary text that is spared.
        disruption: text on which harm is measured, apart from ``retain``.
    """

    name: str
    facts: tuple[Fact, ...]
    neighbours: tuple[Fact, ...] = ()
    retain: str | None = None
    disruption: str | None = None

    def split(self, share: float = 0.8, seed: int = 0) -> tuple[list[Fact], list[Fact]]:
        """About ``share`` of the facts to relearn (T), and the others to probe (V).

        Facts that share a sentence, or a question with its answer, stay together, and the rows of one subject and
        answer are one fact, so that nothing probed is relearned.

        Raises:
            ValueError: if either would be empty.
        """
        relearn, probe = split_facts(self.facts, share, seed)
        if not relearn or not probe:
            raise ValueError(
                f"data set {self.name!r}: expected facts both to relearn and to probe, got {len(relearn)} and "
                f"{len(probe)} for the share {share}"
            )
        return relearn, probe


def load_data(name: str, path: str | Path | None = None, *, limit: int | None = None, seed: int = 0) -> DataSet:
    """Read one of :data:`SOURCES`, whose name may be in capitals too.

    Args:
        path: a local file or folder, laid out as :mod:`cir.data.reading` says; None for the hub or its cache, which
            needs the package ``datasets``.
        limit: at most so many facts, and so many neighbours, evenly spread from a start that ``seed`` draws; of a
            text that is cut into ``retain`` (two thirds) and ``disruption``, so many documents, its first.

    Raises:
        ValueError: on an unknown name; a malformed row, which the message names; more than a million facts, or one
            beyond the bounds of :func:`cir.load_facts`; a text of fewer than three documents where it is to be cut;
            or if the package ``datasets`` is needed and not installed.
        FileNotFoundError: if ``path`` does not exist or lacks a part, or there is neither a connection nor a copy
            in the cache.
    """
    name = known_name(name)
    check_limit(limit)
    source = SOURCES[name]
    parts = from_hub(name, source, limit) if path is None else from_path(Path(path), source)
    facts, neighbours = _facts(name, source, parts, limit, seed)
    return DataSet(name, facts, neighbours, **_texts(name, parts, limit))


def load_text(name: str, part: str, instead: str) -> str | None:
    """The text ``retain`` or ``disruption`` of a data set, from the hub or its cache, where nothing else is read.

    Args:
        instead: what to do where it cannot be had, for the message.

    Raises:
        ValueError, FileNotFoundError: as :func:`load_data`.
    """
    name = known_name(name)
    parts = from_hub(name, SOURCES[name], None, (part, "text"), instead)
    return _texts(name, parts, None).get(part)


def benchmark_rows(name: str, path: str | Path | None = None, *, limit: int | None = None) -> dict[str, list[Row]]:
    """The rows of each part of one of :data:`BENCHMARKS`, as the field has them.

    Args:
        path: of a benchmark of one part its file, of any a folder as the hub has it: ``CONFIGURATION/SPLIT.*`` or
            ``CONFIGURATION.*``, or the same in numbered pieces; None for the hub or its cache.
        limit: at most so many rows of a part, evenly spread.

    Raises:
        ValueError: on an unknown name; a row that is no object; or a part of fewer than two rows.
        FileNotFoundError: if ``path`` lacks a part, or as :func:`load_data`.
    """
    check_limit(limit)
    if not isinstance(name, str) or name.lower() not in BENCHMARKS:
        raise ValueError(f"expected a benchmark out of {', '.join(BENCHMARKS)}, got {shown(name)}")
    name = name.lower()
    source = replace(SOURCES[name], parts=SOURCES[name].benchmark)
    if path is None:
        read = from_hub(name, source, None, source.parts)
    else:
        read = {part: _local_rows(name, Path(path), source, part) for part in source.parts}
    return {part: _measured(name, part, rows, limit) for part, rows in read.items()}


def _local_rows(name: str, path: Path, source: Source, part: str) -> Rows:
    if not path.is_dir() and len(source.parts) == 1:
        return from_path(path, source)["facts"]
    files = [file for config, split in source.parts[part] for file in _files(name, path, config, split)]
    return [row for file in files for row in from_path(file, source)["facts"]]


def _files(name: str, folder: Path, config: str | None, split: str) -> list[Path]:
    """Those of one configuration and split: the first of the forms in which they may lie in ``folder``."""
    stems = [Path(split)] if config is None else [Path(config, split), Path(config)]
    for stem, pieces in product(stems, ("", r"-\d+-of-\d+")):
        inside = folder / stem.parent
        if inside.is_dir():
            file = re.compile(re.escape(stem.name) + pieces + r"\.[^-]+")
            if found := sorted(entry for entry in inside.iterdir() if file.fullmatch(entry.name)):
                if len(found) > 1 and not pieces:
                    raise ValueError(f"{named(inside)}: expected one file {stem.name}.*, got {len(found)}")
                return found
    wanted = " or ".join(f"{stem}.*" for stem in stems)
    got = ", ".join(sorted(entry.name for entry in folder.iterdir())) or "nothing" if folder.is_dir() else "no folder"
    raise FileNotFoundError(f"benchmark {name!r}: expected {wanted} in {named(folder)}, got {brief(got, 200)}")


def _measured(name: str, part: str, rows: Rows, limit: int | None) -> list[Row]:
    """The rows, of which a text alone is one with the column ``text``."""
    if part.endswith(EXAMPLES):
        limit = None
    elif len(rows) < LEAST_ROWS or (limit or LEAST_ROWS) < LEAST_ROWS:
        got = min(len(rows), limit or len(rows))
        raise ValueError(f"benchmark {name!r}: expected at least {LEAST_ROWS} rows of {part}, got {got}")
    if limit is not None and limit < len(rows):
        rows = [rows[i * len(rows) // limit] for i in range(limit)]
    return [_row(where, number, values) for number, (where, values) in enumerate(rows, 1)]


def _row(where: str, number: int, values: Any) -> Row:
    values = {"text": values} if isinstance(values, str) else values
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: expected an object, got {shown(values)}")
    return Row(where, str(number), values)


def known_name(name: str) -> str:
    """The name of a data set as :data:`SOURCES` has it.

    Raises:
        ValueError: if there is no such data set.
    """
    if not isinstance(name, str) or name.lower() not in SOURCES:
        raise ValueError(f"expected a data set out of {', '.join(SOURCES)}, got {shown(name)}")
    return name.lower()


def has_text(name: str) -> bool:
    """Whether the data set has text to be retained."""
    return not {"retain", "text"}.isdisjoint(SOURCES[name].parts)


def _facts(
    name: str, source: Source, parts: Mapping[str, Rows], limit: int | None, seed: int
) -> tuple[tuple[Fact, ...], tuple[Fact, ...]]:
    """Facts and neighbours, with a warning of what is amiss in them."""
    if source.fact is None:
        return (), ()
    beside = parts["facts"] if source.neighbour else parts.get("neighbours", [])
    facts = evenly(_converted(parts["facts"], name, source, source.fact), limit, seed)
    # Where each row holds a fact and its neighbours, the same places are taken of both.
    near = evenly(_converted(beside, f"{name}-neighbour", source, source.neighbour or source.fact), limit, seed)
    neighbours = _apart(near, facts)
    if changed := set(near).difference(neighbours):
        logger.warning("data set %r: %d neighbours were, in whole or part, to be forgotten", name, len(changed))
    if told := leaking((*facts, *neighbours)):
        some = ", ".join(map(brief, told[:3]))
        logger.warning("data set %r: the prompts of %d facts hold their answer: %s", name, len(told), some)
    return tuple(facts), neighbours


def _apart(near: Iterable[Fact], facts: Sequence[Fact]) -> tuple[Fact, ...]:
    """``near`` without what ``facts`` say and ask: nothing is both to be forgotten and to stay."""
    sentences, probes = _sentences(facts), {probe for fact in facts for probe in fact.probes}
    apart = (
        replace(
            fact,
            sentences=tuple(sentence for sentence in fact.sentences if sentence not in sentences),
            probes=tuple(probe for probe in fact.probes if probe not in probes),
        )
        for fact in near
    )
    return tuple(fact for fact in apart if fact.sentences)


def _converted(rows: Rows, prefix: str, source: Source, convert: Callable[[Row], Fact]) -> list[Fact]:
    """The rows as facts: those that tell the same are one, with the id that the first of them gives."""
    told: dict[tuple[str, ...], list[Fact]] = {}
    for number, (where, values) in enumerate(rows, 1):
        if not isinstance(values, Mapping):
            raise ValueError(f"{where}: expected an object with {source.columns}, got {shown(values)}")
        row = Row(where, str(number), values)
        fact = convert(row)
        fact = replace(fact, id=f"{prefix}-{fact.id}")
        check_fact(where, fact)
        told.setdefault(source.same(row) if source.same else (row.id,), []).append(fact)
        if len(told) > MOST_FACTS:
            raise ValueError(f"{where}: expected at most {MOST_FACTS:,} facts, got more; give a part of them")
    return [_joined(facts) for facts in told.values()]


def _joined(facts: Sequence[Fact]) -> Fact:
    """One fact that is told, and asked for, in all the ways of ``facts``."""
    probes = dict.fromkeys(probe for fact in facts for probe in fact.probes)
    paraphrases = dict.fromkeys(probe for fact in facts for probe in fact.paraphrases if probe not in probes)
    sentences = dict.fromkeys(sentence for fact in facts for sentence in fact.sentences)
    return replace(facts[0], sentences=tuple(sentences), probes=tuple(probes), paraphrases=tuple(paraphrases))


def _sentences(facts: Iterable[Fact]) -> set[str]:
    return {sentence for fact in facts for sentence in fact.sentences}


def _texts(name: str, parts: Mapping[str, Rows], limit: int | None) -> dict[str, str]:
    texts: dict[str, list[str]] = {part: _documents(parts[part]) for part in ("text", *TEXTS) if part in parts}
    if "text" in texts:
        texts = _cut(name, texts["text"][:limit])
    return {part: "\n\n".join(documents) for part, documents in texts.items()}


def _documents(rows: Rows) -> list[str]:
    documents = []
    for where, value in rows:
        text = value.get("text") if isinstance(value, Mapping) else value
        if not isinstance(text, str):
            raise ValueError(f"{where}: expected 'text', a string, got {shown(value)}")
        documents.append(text.strip())
    return [document for document in documents if document]


def _cut(name: str, documents: list[str]) -> dict[str, list[str]]:
    if len(documents) < 3:
        raise ValueError(
            f"data set {name!r}: expected at least three documents, of which the last third measures harm, got "
            f"{len(documents)}"
        )
    kept = len(documents) * 2 // 3
    return {"retain": documents[:kept], "disruption": documents[kept:]}
