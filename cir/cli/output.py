"""What the command line says and writes: nothing from a file reaches a terminal as it is."""

from __future__ import annotations

import json
import logging
import sys

from cir.system.writing import write_text

MOST = 600
"""Characters of an error."""


def escaped(text: object, lines: bool = True) -> str:
    """``text`` with what a terminal would act on, or that changes the order of letters, escaped; newlines stay
    where ``lines``.
    """
    return "".join(
        c if c.isprintable() or (lines and c == "\n") else c.encode("unicode_escape").decode() for c in str(text)
    )


def say(text: object = "") -> None:
    """A line, or several, of standard output."""
    print(escaped(text))


def complain(what: object) -> None:
    """One line of standard error, whatever ``what`` has."""
    line = " ".join(str(what).split())
    print("cir:", escaped(line if len(line) <= MOST else f"{line[:MOST]} ...", lines=False), file=sys.stderr)


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
    """Warnings of the library, a line each."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        complain(f"{record.levelname.lower()}: {record.getMessage()}")
