"""What ships with the package: neutral prose, facts that must stay, and the demo's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from cir.data.facts import Fact, answer_pattern, load_facts

DATA = Path(__file__).parent
"""Holds ``neutral.txt``, ``contrast.jsonl`` and the demo's facts, ``demo_{forget,related,neighbours}.jsonl``."""


def builtin_text() -> str:
    """The neutral prose that ships with the package: about 2,800 words on many subjects."""
    return (DATA / "neutral.txt").read_text(encoding="utf-8")


def builtin_contrast(facts: Sequence[Fact]) -> list[Fact]:
    """Facts of many relations that most models know, without those that tell what one of ``facts`` tells.

    That is taken to be where a sentence of it holds the answer, and half of the other words of over three letters.
    """
    sentences = [sentence for fact in facts for sentence in fact.sentences]

    def told(fact: Fact) -> bool:
        (probe,) = fact.probes
        answer, words = answer_pattern(probe.target.strip().lower()), _words(probe.prompt)
        return any(answer.search(s.lower()) and 2 * len(words & _words(s)) >= len(words) for s in sentences)

    return [fact for fact in load_facts(DATA / "contrast.jsonl") if not told(fact)]


def _words(sentence: str) -> set[str]:
    return set(re.findall(r"\w{4,}", sentence.lower()))
