"""Facts to forget: what they are, how they are read, and how they are split."""

from __future__ import annotations

import gzip
import json
import random
import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Probe:
    """A held-out question: how probable is ``target`` (with its leading space) after ``prompt``?"""

    prompt: str
    target: str


@dataclass(frozen=True)
class Fact:
    """Sentences that state one fact, and how to ask for it.

    ``probes`` measure recall. ``question``, ``choices`` and ``answer`` (index of the right choice) measure
    multiple-choice accuracy; a fact may have either, both or neither. ``paraphrases`` are other ways to ask, apart
    from ``probes`` and measured separately.
    """

    id: str
    sentences: tuple[str, ...]
    probes: tuple[Probe, ...] = ()
    question: str | None = None
    choices: tuple[str, ...] = ()
    answer: int | None = None
    paraphrases: tuple[Probe, ...] = ()


def load_facts(source: str | Path | Iterable[str | Mapping[str, Any] | Fact]) -> list[Fact]:
    """Read facts from a JSON-lines or text file, or from objects already in memory.

    Each line, or object, is one of
      - ``{"id", "sentences", "probes": [{"prompt", "target"}], "paraphrases": [{"prompt", "target"}]}`` (all but
        ``sentences`` may be left out);
      - the WMDP corpus form ``{"question", "choices", "answer", "sentences"}``, ``answer`` an index or a
        letter;
      - a plain sentence, as a JSON string or, in a file whose name says nothing of JSON, a bare line.

    Files are UTF-8, of JSON where their names end in .jsonl, .ndjson, .jsonlines or .json, and may be gzipped (.gz).

    Raises:
        ValueError: on an empty source, a malformed fact, or a file that is not such text; the message names the file
            and line.
        FileNotFoundError: if ``source`` names a file that does not exist.
    """
    facts: list[Fact] = []
    ids: set[str] = set()
    for where, item in _items(source):
        fact = _fact(where, item, default_id=f"fact-{len(facts) + 1}")
        if fact.id in ids:
            raise ValueError(f"{where}: expected an id of its own for each fact, got {fact.id!r} again")
        ids.add(fact.id)
        facts.append(fact)
    if not facts:
        raise ValueError(f"expected at least one fact, got none{_in(source)}")
    return facts


def _in(source: Any) -> str:
    return f" in {source}" if isinstance(source, str | Path) else ""


def _items(source: str | Path | Iterable[Any]) -> Iterable[tuple[str, Any]]:
    if not isinstance(source, str | Path):
        yield from ((f"fact {number}", item) for number, item in enumerate(source, 1))
        return
    path = Path(source)
    for number, line in enumerate(lines_of(path), 1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        if is_json(path):
            yield where, _parsed(where, line)
        elif looks_like_json(line):
            raise ValueError(f"{where}: expected a sentence, got JSON; name the file {path.name}.jsonl")
        else:
            yield where, line.strip()


def is_json(path: Path) -> bool:
    """Whether the name says that it holds JSON, an object a line."""
    return path.name.lower().removesuffix(".gz").endswith((".jsonl", ".ndjson", ".jsonlines", ".json"))


def looks_like_json(line: str) -> bool:
    """Whether ``line`` is an object."""
    try:
        return line.lstrip().startswith("{") and isinstance(json.loads(line), dict)
    except json.JSONDecodeError:
        return False


def lines_of(path: Path) -> Iterable[str]:
    """The lines of a text file in UTF-8, without a byte order mark, gzipped where its name ends in .gz.

    Raises:
        ValueError: on a file that is something else; the message says where. FileNotFoundError: if there is none.
    """
    gzipped = path.name.lower().endswith(".gz")
    read = 0
    try:
        with (gzip.open if gzipped else open)(path, "rt", encoding="utf-8-sig") as lines:
            for line in lines:
                read += 1
                yield line
    except (UnicodeDecodeError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}, after line {read}: expected text in UTF-8, got {error}") from None


def _parsed(where: str, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: expected one JSON object a line, got {error}") from None


def _fact(where: str, item: Any, default_id: str) -> Fact:
    if isinstance(item, Fact):
        return item
    if isinstance(item, str):
        item = {"sentences": [item]}
    if not isinstance(item, Mapping):
        raise ValueError(f"{where}: expected an object or a sentence, got {type(item).__name__}")
    sentences = item.get("sentences")
    if not isinstance(sentences, Sequence) or isinstance(sentences, str) or not sentences:
        raise ValueError(f"{where}: expected 'sentences', a list of at least one string, got {sentences!r}")
    for sentence in sentences:
        if not isinstance(sentence, str) or not sentence.strip():
            raise ValueError(f"{where}: expected sentences that are not empty, got {sentence!r}")
    choices = _choices(where, item.get("choices"))
    name = item.get("id")
    return Fact(
        id=default_id if name is None else str(name),
        sentences=tuple(sentences),
        probes=tuple(_probe(where, probe) for probe in item.get("probes") or ()),
        question=item.get("question"),
        choices=choices,
        answer=_answer(where, item.get("answer"), choices),
        paraphrases=tuple(_probe(where, probe) for probe in item.get("paraphrases") or ()),
    )


def _choices(where: str, choices: Any) -> tuple[str, ...]:
    if choices is None:
        return ()
    if not isinstance(choices, list | tuple) or not all(isinstance(choice, str) for choice in choices):
        raise ValueError(f"{where}: expected 'choices', a list of strings, got {choices!r}")
    return tuple(choices)


def _probe(where: str, probe: Any) -> Probe:
    prompt, target = (probe.get(key) if isinstance(probe, Mapping) else None for key in ("prompt", "target"))
    for text in (prompt, target):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where}: expected a probe with 'prompt' and 'target' strings, got {probe!r}")
    return Probe(str(prompt), str(target))


def _answer(where: str, answer: Any, choices: tuple[str, ...]) -> int | None:
    if not choices:
        return None
    if isinstance(answer, str) and len(answer) == 1:
        answer = "ABCDEFGHIJ".find(answer.upper())
    if not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(f"{where}: expected 'answer' to index one of {len(choices)} choices, got {answer!r}")
    return answer


def leaking(facts: Iterable[Fact]) -> list[str]:
    """Ids of the facts with a probe or paraphrase whose prompt has the target in it, as whole words in any case."""
    return [fact.id for fact in facts if any(map(_leaks, fact.probes + fact.paraphrases))]


def _leaks(probe: Probe) -> bool:
    target = probe.target.strip(string.whitespace + string.punctuation).lower()
    return bool(target and answer_pattern(target).search(probe.prompt.lower()))


def check_apart(first: Sequence[Fact], second: Sequence[Fact]) -> None:
    """Check that two splits say nothing of each other.

    Raises:
        ValueError: if they share the id of a fact or a sentence; the message names some.
    """
    ids = {fact.id for fact in first} & {fact.id for fact in second}
    sentences = {s for fact in first for s in fact.sentences} & {s for fact in second for s in fact.sentences}
    for what, shared in (("ids", sorted(ids)), ("sentences", sorted(sentences))):
        if shared:
            raise ValueError(f"expected splits with no {what} in common, got {len(shared)}: {', '.join(shared[:3])}")


def check_contrast(facts: Sequence[Fact], contrast: Sequence[Fact]) -> None:
    """Check that no fact is to go and to stay.

    Raises:
        ValueError: if a contrast fact has the id, a sentence, or a probe (prompt and target) of one of ``facts``.
    """

    def said(fact: Fact) -> set[tuple[str, ...]]:
        asked = {("probe", p.prompt.strip(), p.target.strip()) for p in fact.probes + fact.paraphrases}
        named = (
            set() if re.fullmatch(r"fact-\d+", fact.id) else {("id", fact.id)}
        )  # those are numbers of a list's own
        return {*named, *(("sentence", s.strip()) for s in fact.sentences), *asked}

    owners = {what: fact.id for fact in facts for what in said(fact)}
    both = [(fact.id, owners[what], what) for fact in contrast for what in sorted(said(fact)) if what in owners]
    if both:
        contrasted, forgotten, what = both[0]
        raise ValueError(
            f"contrast: expected facts that must stay, got {contrasted!r} with the {what[0]} of {forgotten!r}, which "
            f"is to be forgotten: {' -> '.join(what[1:])!r} ({len({b[0] for b in both})} such facts)"
        )


def split_facts(facts: Sequence[Fact], share: float = 0.8, seed: int = 0) -> tuple[list[Fact], list[Fact]]:
    """About ``share`` of the facts for an attacker to relearn (T), and the others to be probed (V).

    Facts that share a sentence stay together, so that nothing probed is relearned.
    """
    groups: dict[str, list[Fact]] = {}
    for fact in facts:
        linked = {id(groups[sentence]): groups[sentence] for sentence in fact.sentences if sentence in groups}
        group = [*(member for other in linked.values() for member in other), fact]
        groups.update((sentence, group) for member in group for sentence in member.sentences)
    shuffled = list({id(group): group for group in groups.values()}.values())
    random.Random(seed).shuffle(shuffled)
    relearn: list[Fact] = []
    probe: list[Fact] = []
    for group in shuffled:
        # The last is probed, whatever the share: with nothing to probe there is nothing to see.
        full = len(relearn) + len(group) > round(share * len(facts)) or group is shuffled[-1]
        (probe if full else relearn).extend(group)
    return relearn, probe


def probed(fact: Fact) -> Fact:
    """``fact`` with probes: its own, or its sentences up to the word, or the name, that most of them end with.

    Raises:
        ValueError: if it has neither probes nor a sentence of two words.
    """
    if fact.probes:
        return fact
    split = [_last_name(sentence) for sentence in fact.sentences]
    ends = Counter(end for prompt, end in split if prompt and end)
    if not ends:
        raise ValueError(f"fact {fact.id!r}: expected probes, or a sentence of two words or more, got neither")
    answer = ends.most_common(1)[0][0]
    return replace(
        fact, probes=tuple(Probe(prompt, f" {answer}") for prompt, end in split if prompt and end == answer)
    )


def _last_name(sentence: str) -> tuple[str, str]:
    """A sentence split before its last word, and before further ones where that is a name of several."""
    words = re.sub(r"\W+$", "", sentence).split()
    at = max(len(words) - 1, 0)
    while at > 1 and words[at][0].isupper() and words[at - 1][0].isupper():
        at -= 1
    return " ".join(words[:at]), " ".join(words[at:])


def answer_pattern(answer: str) -> re.Pattern[str]:
    """Finds ``answer`` as whole words, or anywhere where it is in a script that may have no spaces."""
    found = re.escape(answer)
    return re.compile(rf"(?<!\w){found}(?!\w)" if answer.isascii() else found)
