"""What the options of several commands have in common. They are read without torch, so that help comes at once."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from cir.cli.output import WRONG_USAGE, complain, meant
from cir.data.datasets import SOURCES
from cir.system.files import shown

MODEL_HELP = "a hub id, a local folder, or a GGUF file"
FACTS_HELP = (
    'JSON lines: {"id", "sentences": [...], "probes": [{"prompt", "target"}]}; or a text file, a sentence a line'
)
CONTRAST_HELP = "facts that must stay: of the same relations with other subjects, and about the same subjects"
OUT_HELP = "folder for the checkpoint; written whole or not at all"
OVERWRITE_HELP = "replace --out where cir wrote it"
_OPTION = re.compile(r"--?[A-Za-z]")


class Parser(argparse.ArgumentParser):
    """Takes no abbreviations, and says what is wrong in one line."""

    commands: dict[str, Parser]

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})

    def error(self, message: str) -> NoReturn:
        complain(f"{message} (`{self.prog} --help`)")
        self.exit(WRONG_USAGE)

    def check_options(self, words: Sequence[str]) -> None:
        """End with an error at the first of ``words`` that is no option of this parser and looks like one."""
        for word in words:
            name = word.partition("=")[0]
            if word == "--":
                return
            if _OPTION.match(name) and " " not in name and name not in self._option_string_actions:
                self.error(f"expected an option, got {shown(name)}{meant(name, self._option_string_actions)}")

    def options(self) -> dict[str, argparse.Action]:
        """Every option but ``--help``, by its name in Python."""
        return {action.dest: action for action in self._actions if action.option_strings and action.dest != "help"}


def rounding(name: str) -> str:
    from cir_kernels import ROUNDINGS  # which imports torch: only where the option is given

    if name not in ROUNDINGS:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(ROUNDINGS)}, got {name!r}")
    return name


def _number(kind: Callable[[str], Any], what: str, least: float, most: float = sys.maxsize) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"expected {what}, got {text[:80]!r}")
        return value

    return read


count = _number(int, "a whole number of at least 1", 1)
whole = _number(int, "a whole number of at least 0", 0)
real = _number(float, "a number", -sys.maxsize)
positive = _number(float, "a positive number", 1e-300)
share = _number(float, "a number from 0 to 1", 0, 1)


def shared() -> Parser:
    found = Parser(add_help=False)
    found.add_argument("--device", help="cpu, cuda, cuda:1, ...; by default a GPU where there is one")
    found.add_argument(
        "--dtype", default="auto", help="float32, bfloat16 or float16; by default the checkpoint's own"
    )
    return found


def sources() -> Parser:
    found = Parser(add_help=False)
    found.add_argument("--facts", help=FACTS_HELP)
    found.add_argument(
        "--data",
        metavar="NAME",
        help=f"instead of --facts: {', '.join(name for name, source in SOURCES.items() if source.fact)}; from the "
        "hub or its cache (pip install 'cir[data]')",
    )
    found.add_argument("--data-path", metavar="PATH", help="a local copy of that data set: a file or a folder")
    found.add_argument("--limit", type=count, metavar="N", help="use so many of its facts, evenly spread")
    found.add_argument("--neighbours", metavar="FACTS", help="facts near those, which must stay")
    found.add_argument("--same-subject", metavar="FACTS", help="other facts about the same subjects, which must stay")
    found.add_argument("--related", metavar="FACTS", help="further facts of the kind, which an attacker knows")
    return found


def texts() -> Parser:
    found = Parser(add_help=False)
    found.add_argument(
        "--retain",
        metavar="TEXT",
        help="file of ordinary text like that the model must still handle; or wikitext or fineweb-edu, the data sets",
    )
    found.add_argument(
        "--disruption",
        metavar="TEXT",
        help="file (or data set) of text on which harm is measured; by default a held-out third of --retain, and "
        "without that of the built-in text, which is short: give your own for a budget that means something",
    )
    return found
