"""What the command line says and writes: nothing from a file reaches a terminal as it is."""

from __future__ import annotations

import difflib
import json
import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from cir.system.writing import write_text

MOST = 600
"""Characters of an error."""
DONE, FAILED, WRONG_USAGE, PARTLY, INTERRUPTED = 0, 1, 2, 3, 130
"""Exit statuses."""
Outcome = tuple[int, Any]
"""Of a command: its exit status, and what ``--json`` prints of it."""
PACKAGES = ("cir", "cir_kernels")


def escaped(text: object, lines: bool = True) -> str:
    """``text`` with what a terminal would act on, or that changes the order of letters, escaped; newlines stay
    where ``lines``.
    """
    return "".join(
        c if c.isprintable() or (lines and c == "\n") else c.encode("unicode_escape").decode() for c in str(text)
    )


def say(text: object = "") -> None:
    """A line, or several, of standard output; of standard error where that is to hold JSON alone."""
    print(escaped(text))


def complain(what: object) -> None:
    """One line of standard error, whatever ``what`` has."""
    line = " ".join(str(what).split())
    print("cir:", escaped(line if len(line) <= MOST else f"{line[:MOST]} ...", lines=False), file=sys.stderr)


def meant(word: str, known: Iterable[str]) -> str:
    """A question after the one of ``known`` that ``word`` is most like, if it is like any."""
    close = difflib.get_close_matches(word, sorted(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def write_json(path: str, value: object) -> None:
    """To a file, or to standard output for ``-``.

    Raises:
        ValueError: on figures that are NaN or infinite, for which JSON has no form.
    """
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    if path == "-":
        sys.stdout.write(text)
    else:
        write_text(path, text)


class Warnings(logging.Handler):
    """What the library logs, a line each."""

    def emit(self, record: logging.LogRecord) -> None:
        complain(f"{record.levelname.lower()}: {record.getMessage()}")


@contextmanager
def logged(verbose: int) -> Iterator[None]:
    """Show what the packages log: warnings and, for each of ``verbose``, what is a level below: INFO, then DEBUG."""
    level = max(logging.WARNING - 10 * verbose, logging.DEBUG)
    handler, loggers = Warnings(level), [logging.getLogger(name) for name in PACKAGES]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        if verbose:
            logger.setLevel(level)
    try:
        yield
    finally:
        for logger, was in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(was)
