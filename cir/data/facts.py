"""Facts to forget: what they are, how they are read, and how they are split."""

from __future__ import annotations

import random
import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

from cir.system.files import brief, is_json, lines_of, looks_like_json, named, shown, strict_json, unfit

MOST_FACTS = 1_000_000
MOST_SENTENCE = 100_000
"""Characters of a sentence, prompt, target, question or choice at most."""
MOST_ID = 1_000
"""Characters of an id at most."""


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
        ``sentences`` may be left out; an id is a string or a number);
      - the WMDP corpus form ``{"question", "choices", "answer", "sentences"}``, ``answer`` an index or a
        letter;
      - a plain sentence, as a JSON string or, in a file whose name says nothing of JSON, a bare line.

    Files are UTF-8, of JSON where their names end in .jsonl, .ndjson, .jsonlines or .json, and may be gzipped (.gz).
    A line has 1 MiB of characters at most, a sentence, prompt, target, question or choice 100,000, an id 1,000; there
    are a million facts at most.

    Raises:
        ValueError: on an empty source, a malformed fact, or a file that is not such text; the message names the file
            and line, and what was found.
        FileNotFoundError: if ``source`` names a file that does not exist.
    """
    facts: list[Fact] = []
    ids: set[str] = set()
    for where, item in _items(source):
        if len(facts) == MOST_FACTS:
            raise ValueError(f"{where}: expected at most {MOST_FACTS:,} facts, got more; give them in parts")
        fact = _fact(where, item, default_id=f"fact-{len(facts) + 1}")
        if fact.id in ids:
            raise ValueError(f"{where}: expected an id of its own for each fact, got {shown(fact.id)} again")
        ids.add(fact.id)
        facts.append(fact)
    if not facts:
        raise ValueError(f"expected at least one fact, got none{_in(source)}")
    return facts


def _in(source: Any) -> str:
    return f" in {named(Path(source))}" if isinstance(source, str | Path) else ""


def _items(source: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(source, str | Path):
        yield from _lines(Path(source))
        return
    if not isinstance(source, Iterable) or isinstance(source, Mapping | bytes):
        raise ValueError(f"expected a file or a list of facts, got {shown(source)}")
    yield from ((f"fact {number}", item) for number, item in enumerate(source, 1))


def _lines(path: Path) -> Iterable[tuple[str, Any]]:
    if path.name.lower().removesuffix(".gz").endswith((".csv", ".tsv")):
        raise ValueError(f"{named(path)}: expected JSON with an object a line, or a sentence a line, got a table")
    for number, line in enumerate(lines_of(path), 1):
        where = f"{named(path)}, line {number}"
        if not line.strip():
            continue
        if is_json(path):
            yield where, strict_json(where, line)
        elif looks_like_json(line):
            raise ValueError(f"{where}: expected a sentence, got JSON; name the file {shown(path.name + '.jsonl')}")
        else:
            yield where, line.strip()


def check_fact(where: str, fact: Fact) -> None:
    """Check one that was not read by :func:`load_facts` as that would.

    Raises:
        ValueError: if it is malformed; the message begins with ``where``.
    """
    _fact(where, vars(fact), "")


def _fact(where: str, item: Any, default_id: str) -> Fact:
    if isinstance(item, Fact):
        check_fact(where, item)
        return item
    if isinstance(item, str):
        item = {"sentences": [item]}
    if not isinstance(item, Mapping):
        raise ValueError(f"{where}: expected an object or a sentence, got {shown(item)}")
    sentences = item.get("sentences")
    if not _is_list(sentences) or not sentences:
        raise ValueError(f"{where}: expected 'sentences', a list of at least one string, got {shown(sentences)}")
    choices = _choices(where, item.get("choices"))
    question = item.get("question")
    return Fact(
        id=_id(where, item.get("id"), default_id),
        sentences=tuple(_text(where, "sentences that are not empty", sentence) for sentence in sentences),
        probes=_probes(where, "probes", item.get("probes")),
        question=None if question is None else _text(where, "'question', a string that is not empty", question),
        choices=choices,
        answer=_answer(where, item.get("answer"), choices),
        paraphrases=_probes(where, "paraphrases", item.get("paraphrases")),
    )


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _text(where: str, expected: str, text: Any) -> str:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: expected {expected}, got {shown(text)}")
    return _fit(where, text)


def _fit(where: str, text: str, most: int | None = None) -> str:
    """``text``, if it is not too long and can be written in UTF-8."""
    most = most or MOST_SENTENCE
    if len(text) > most:
        raise ValueError(f"{where}: expected at most {most:,} characters, got {len(text):,}: {shown(text)}")
    if found := unfit(text):
        what = "NUL" if found[0] == "\0" else "half of a surrogate pair"
        raise ValueError(f"{where}: expected text, got {what} after {shown(text[: found.start()][-20:])}")
    return text


def _id(where: str, value: Any, default: str) -> str:
    if value is None:
        return default
    number = isinstance(value, Real) and not isinstance(value, bool) and value - value == 0  # not so of inf and nan
    try:
        name = str(value) if number or isinstance(value, str) else ""
    except ValueError:  # an integer of too many digits
        name = ""
    if not name.strip():
        raise ValueError(f"{where}: expected 'id', a string that is not empty or a number, got {shown(value)}")
    return _fit(f"{where}, 'id'", name, MOST_ID)


def _choices(where: str, choices: Any) -> tuple[str, ...]:
    if choices is None:
        return ()
    if not isinstance(choices, list | tuple) or not all(isinstance(choice, str) for choice in choices):
        raise ValueError(f"{where}: expected 'choices', a list of strings, got {shown(choices)}")
    return tuple(_fit(where, choice) for choice in choices)


def _probes(where: str, key: str, probes: Any) -> tuple[Probe, ...]:
    if probes is None:
        return ()
    if not _is_list(probes):
        raise ValueError(f"{where}: expected {key!r}, a list of objects, got {shown(probes)}")
    return tuple(_probe(where, probe) for probe in probes)


def _probe(where: str, probe: Any) -> Probe:
    values = vars(probe) if isinstance(probe, Probe) else probe
    if not isinstance(values, Mapping):
        values = {}
    for text in (values.get("prompt"), values.get("target")):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where}: expected a probe with 'prompt' and 'target' strings, got {shown(probe)}")
    return Probe(_fit(where, values["prompt"]), _fit(where, values["target"]))


def _answer(where: str, answer: Any, choices: tuple[str, ...]) -> int | None:
    if not choices:
        return None
    index = "ABCDEFGHIJ".find(answer.upper()) if isinstance(answer, str) and len(answer) == 1 else answer
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(choices):
        raise ValueError(f"{where}: expected 'answer' to index one of {len(choices)} choices, got {shown(answer)}")
    return index


def evenly(facts: Sequence[Fact], limit: int | None, seed: int = 0) -> list[Fact]:
    """At most ``limit`` of the facts, from a start that ``seed`` draws: of those ordered by subject, each gets its
    share.

    Raises:
        ValueError: as :func:`check_limit`.
    """
    check_limit(limit)
    if limit is None or limit >= len(facts):
        return list(facts)
    start = random.Random(seed).random()
    return [facts[int((i + start) * len(facts) / limit)] for i in range(limit)]


def check_limit(limit: int | None) -> None:
    """Check how many facts are asked for.

    Raises:
        ValueError: if that is less than one.
    """
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise ValueError(f"expected a limit of at least 1, got {shown(limit)}")


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
            some = ", ".join(map(brief, shared[:3]))
            raise ValueError(f"expected splits with no {what} in common, got {len(shared)}: {some}")


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
            f"contrast: expected facts that must stay, got {shown(contrasted)} with the {what[0]} of "
            f"{shown(forgotten)}, which is to be forgotten: {shown(' -> '.join(what[1:]))} "
            f"({len({b[0] for b in both})} such facts)"
        )


def split_facts(facts: Sequence[Fact], share: float = 0.8, seed: int = 0) -> tuple[list[Fact], list[Fact]]:
    """About ``share`` of the facts for an attacker to relearn (T), and the others to be probed (V).

    Facts that share a sentence, or a question with its answer, stay together, so that nothing probed is relearned.
    """
    groups: dict[str | Probe, list[Fact]] = {}
    for fact in facts:
        linked = {id(groups[said]): groups[said] for said in _said(fact) if said in groups}
        group = [*(member for other in linked.values() for member in other), fact]
        groups.update((said, group) for member in group for said in _said(member))
    shuffled = list({id(group): group for group in groups.values()}.values())
    random.Random(seed).shuffle(shuffled)
    relearn: list[Fact] = []
    probe: list[Fact] = []
    for group in shuffled:
        # The last is probed, whatever the share: with nothing to probe there is nothing to see.
        full = len(relearn) + len(group) > round(share * len(facts)) or group is shuffled[-1]
        (probe if full else relearn).extend(group)
    return relearn, probe


def _said(fact: Fact) -> tuple[str | Probe, ...]:
    return (*fact.sentences, *fact.probes, *fact.paraphrases)


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
        raise ValueError(f"fact {shown(fact.id)}: expected probes, or a sentence of two words or more, got neither")
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
