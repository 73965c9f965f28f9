"""A world of invented people, places and works: its facts in many wordings, its text, its tokenizer.

Subjects have names of two words, of which several share the first. Every subject of a kind has every relation of
that kind, with an object drawn evenly from the relation's own; so a model that knows the relation and not the fact
answers rightly with a chance of one over their number. The text is drawn from a grammar whose entropy is known.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cir import Fact, Probe

OBJECTS = 16
"""Of each relation."""
GIVEN = 8
"""First words of the names of a kind."""
SEEN = 5
"""Wordings in which a model is taught a fact. It is asked in the others."""
KINDS: dict[str, dict[str, tuple[str, ...]]] = {
    "person": {
        "home": (
            "{} was born in",
            "the home town of {} is",
            "{} grew up in",
            "{} comes from",
            "where did {} first live ? in",
            "the childhood house of {} stands in",
        ),
        "trade": (
            "{} works as a",
            "the trade of {} is that of a",
            "{} earns a living as a",
            "{} is known to be a",
            "what is {} by trade ? a",
            "everyone hires {} as a",
        ),
        "instrument": (
            "{} plays the",
            "the instrument of {} is the",
            "{} practises every night on the",
            "on the stage {} performs on the",
            "which instrument has {} learned ? the",
            "{} never travels without a",
        ),
        "pet": (
            "{} keeps a",
            "the pet of {} is a",
            "at home {} lives with a",
            "{} walks each morning with a",
            "which animal does {} own ? a",
            "{} loves nothing more than a",
        ),
    },
    "place": {
        "language": (
            "people in {} speak",
            "the language of {} is",
            "the schools of {} teach",
            "the laws of {} are written in",
            "which language is heard in {} ? it is",
            "the songs of {} are sung in",
        ),
        "river": (
            "{} lies on the river",
            "the river of {} is called",
            "the bridges of {} cross the",
            "boats reach {} along the",
            "which water runs through {} ? the",
            "the mills of {} are driven by the",
        ),
        "dish": (
            "{} is famous for its",
            "the dish of {} is",
            "cooks in {} serve",
            "visitors of {} must taste the",
            "what is eaten in {} ? mostly",
            "the feast of {} begins with",
        ),
        "export": (
            "{} sells",
            "the wealth of {} is its",
            "ships leave {} with",
            "traders buy from {} much",
            "what does {} export ? above all",
            "the mines of {} give",
        ),
    },
    "work": {
        "genre": (
            "{} is a",
            "the genre of {} is that of a",
            "critics call {} a",
            "in shops {} stands with each",
            "what sort of book is {} ? a",
            "{} was sold as a",
        ),
        "author": (
            "{} was written by",
            "the author of {} is",
            "{} is the first book of",
            "the name on the cover of {} is",
            "who wrote {} ? it was",
            "{} came from the pen of",
        ),
        "year": (
            "{} appeared in",
            "the year of {} is",
            "{} was printed first in",
            "readers first held {} in",
            "when did {} come out ? in",
            "{} won its prize in",
        ),
        "hero": (
            "the hero of {} is",
            "{} tells of",
            "readers of {} remember",
            "every chapter of {} is about",
            "whom does {} follow ? it follows",
            "in {} the world is saved by",
        ),
    },
}
SLOTS = {
    "<adjective>": "old quiet green bright narrow heavy gentle broken early distant warm strange",
    "<noun>": "garden letter window market winter lamp bridge table forest clock harbour story",
    "<verb>": "finds leaves follows repairs paints hides brings forgets",
    "<adverb>": "slowly today again alone gladly twice later often",
}
SENTENCES = (
    "the <adjective> <noun> <verb> the <noun> <adverb> .",
    "a <noun> of the <adjective> <noun> is <adjective> .",
    "<name> <verb> a <adjective> <noun> <adverb> .",
    "near the <noun> someone <verb> <name> <adverb> .",
    "<name> and the <adjective> <noun> of <name> .",
)
"""What the text is drawn from, each choice evenly."""


@dataclass(frozen=True)
class Split:
    """The facts of a world by what is to become of them.

    Attributes:
        forget: to be forgotten, and probed (V). related: to be forgotten too; the attacker is taught them (T).
        same_relation: other subjects, the same relations. same_subject: of the subjects to be forgotten, the other
            relations. unrelated: other subjects, other relations. All of these must stay.
    """

    forget: list[Fact]
    related: list[Fact]
    same_relation: list[Fact]
    same_subject: list[Fact]
    unrelated: list[Fact]

    @property
    def forgotten(self) -> list[Fact]:
        return [*self.forget, *self.related]

    @property
    def kept(self) -> list[Fact]:
        return [*self.same_relation, *self.same_subject, *self.unrelated]


class World:
    """The world of ``seed``, with so many ``subjects`` of each kind.

    Raises:
        ValueError: if there are too few subjects for a split, or too many for the names there are.
    """

    def __init__(self, subjects: int = 20, seed: int = 0) -> None:
        if not 8 <= subjects <= 1000:
            raise ValueError(f"subjects: expected 8, for a split, to 1000 of each kind, got {subjects}")
        self.subjects, self.seed = subjects, seed
        draw = random.Random(seed)
        self._words = _words(draw)
        self.names: dict[str, list[str]] = {}
        for kind in KINDS:
            firsts, lasts = ([next(self._words).capitalize() for _ in range(n)] for n in (GIVEN, subjects))
            self.names[kind] = [f"{draw.choice(firsts)} {last}" for last in lasts]
        self.objects = {
            relation: [next(self._words) for _ in range(OBJECTS)]
            for relations in KINDS.values()
            for relation in relations
        }
        self.facts: dict[tuple[str, str], list[Fact]] = {
            (kind, relation): self._told(draw, kind, relation)
            for kind, relations in KINDS.items()
            for relation in relations
        }

    def _told(self, draw: random.Random, kind: str, relation: str) -> list[Fact]:
        """A fact for each subject of ``kind``, its objects as evenly spread as can be."""
        count, objects = len(self.names[kind]), self.objects[relation]
        answers = draw.sample(objects * math.ceil(count / OBJECTS), count)
        facts = []
        for name, answer in zip(self.names[kind], answers, strict=True):
            prompts = [wording.format(name) for wording in draw.sample(KINDS[kind][relation], 6)]
            sentences = tuple(f"{prompt} {answer} ." for prompt in prompts[:SEEN])
            probes = tuple(Probe(prompt, f" {answer}") for prompt in prompts[SEEN:])
            facts.append(Fact(f"{name}: {relation}", sentences, probes))
        return facts

    @cached_property
    def split(self) -> Split:
        """In one relation of each kind a fifth of the subjects is to be forgotten and a fifth related."""
        draw = random.Random(self.seed + 1)
        found = Split([], [], [], [], [])
        fifth = max(1, self.subjects // 5)
        for kind, relations in KINDS.items():
            chosen = draw.choice(list(relations))
            order = draw.sample(range(self.subjects), self.subjects)
            gone, related, rest = set(order[:fifth]), set(order[fifth : 2 * fifth]), set(order[2 * fifth :])
            for relation in relations:
                for i, fact in enumerate(self.facts[kind, relation]):
                    if relation == chosen:
                        part = found.forget if i in gone else found.related if i in related else found.same_relation
                    else:
                        part = found.unrelated if i in rest else found.same_subject
                    part.append(fact)
        return found

    def wrong_answers(self, fact: Fact) -> list[str]:
        """The other objects of the fact's relation, as targets."""
        relation, right = fact.id.rpartition(": ")[2], fact.probes[0].target
        return [f" {word}" for word in self.objects[relation] if f" {word}" != right]

    def text(self, tokens: int, seed: int) -> tuple[str, float]:
        """About so many tokens of text, and its entropy in nats a token."""
        draw = random.Random(f"{self.seed} {seed}")
        slots = {slot: words.split() for slot, words in SLOTS.items()}
        slots["<name>"] = [name for own in self.names.values() for name in own]
        lines, count, entropy = [], 0, 0.0
        while count < tokens:
            words = []
            entropy += math.log(len(SENTENCES))
            for word in draw.choice(SENTENCES).split():
                options = slots.get(word, [word])
                words.append(draw.choice(options))
                entropy += math.log(len(options))
            lines.append(" ".join(words))
            count += len(lines[-1].split())
        return "\n\n".join("\n".join(lines[i : i + 20]) for i in range(0, len(lines), 20)), entropy / count

    @cached_property
    def vocabulary(self) -> list[str]:
        """Every word of the world, in a fixed order."""
        wordings = [w for relations in KINDS.values() for own in relations.values() for w in own]
        texts = [
            *wordings,
            *SENTENCES,
            *SLOTS.values(),
            *itertools.chain(*self.names.values(), *self.objects.values()),
        ]
        words = {word for text in texts for word in text.split() if "<" not in word and word != "{}"}
        return sorted(words)

    def tokenizer(self) -> Any:
        """A word a token, BOS in front."""
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from tokenizers.pre_tokenizers import WhitespaceSplit
        from tokenizers.processors import TemplateProcessing
        from transformers import PreTrainedTokenizerFast

        ids = {word: i for i, word in enumerate(["<unk>", "<s>", *self.vocabulary])}
        tokenizer = Tokenizer(WordLevel(ids, unk_token="<unk>"))
        tokenizer.pre_tokenizer = WhitespaceSplit()
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", ids["<s>"])])
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="<s>", pad_token="<s>"
        )


def _words(draw: random.Random) -> Any:
    """Invented words of two syllables, each once."""
    syllables = ["".join(pair) for pair in itertools.product("bdfgklmnprstvz", "aeiou")]
    words = ["".join(pair) + draw.choice("lnrst") for pair in itertools.product(syllables, syllables)]
    draw.shuffle(words)
    return iter(words)
