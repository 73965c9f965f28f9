"""Files of text, read line by line, and strict JSON. What is anything else is refused, by the name of what it is."""

from __future__ import annotations

import gzip
import io
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

MOST_LINE = 2**20
"""Characters of a line of JSON at most."""
MOST_TEXT = 2**26
"""Characters at most of a text, and of JSON that is one list of rows."""
DEEPEST = 100
"""Brackets within brackets at most, of JSON."""
MOST_DIGITS = 1000
"""Digits of an integer at most, of JSON."""
MOST_SHOWN = 80
"""Characters at most that a message quotes."""

_UNFIT = re.compile("[\0\ud800-\udfff]")

_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[-+.\w]+', re.DOTALL)
_HALVES = re.compile(r"[\ud800-\udfff]|\\u[dD][89a-fA-F]")

_HEAD = 512
_UTF8, _UNPACK, _ROWS = "save it as UTF-8", "unpack it first", "write its rows out as JSON, an object a line"
_TEXT = "give text, or JSON with an object a line"
_KINDS = tuple(
    (re.compile(mark, re.DOTALL), kind, advice)
    for mark, kind, advice in (
        (rb"\xff\xfe\0\0|\0\0\xfe\xff", "UTF-32", _UTF8),
        (rb"\xff\xfe|\xfe\xff", "UTF-16", _UTF8),
        (rb"\x1f\x8b", "gzip", "have its name end in .gz"),
        (rb"PK\x03\x04", "zip", _UNPACK),
        (rb"BZh[1-9]1AY&SY", "bzip2", _UNPACK),
        (rb"\xfd7zXZ", "xz", _UNPACK),
        (rb"\x28\xb5\x2f\xfd", "Zstandard", _UNPACK),
        (rb".{257}ustar", "tar", _UNPACK),
        (rb"PAR1[\0-\x1f]", "parquet", _ROWS),  # PAR1 alone may begin a sentence: it is a protein
        (rb"ARROW1\0|\xff\xff\xff\xff", "arrow", _ROWS),
        (rb"SQLite format 3\0", "an SQLite database", _ROWS),
        (rb"(?=.{0,7}\0).{8}\{", "safetensors, the weights of a model", _TEXT),
        (rb"GGUF[\0-\x1f]", "GGUF, the weights of a model", _TEXT),
        (rb"%PDF-", "PDF", _TEXT),
        (rb"\{\\rtf", "RTF", _TEXT),
        (rb"version https://git-lfs", "a Git LFS pointer", "fetch what it stands for with git lfs pull"),
    )
)


def unfit(text: str) -> re.Match[str] | None:
    """Where ``text`` has what none may have: NUL, or half of a surrogate pair, which no file can hold in UTF-8."""
    return _UNFIT.search(text) if "\0" in text or not text.isascii() else None


def shown(value: object) -> str:
    """What was found, for a message: never long, and without control characters."""
    try:
        return f"{value[:MOST_SHOWN] if isinstance(value, str) else value!r:.{MOST_SHOWN}}"
    except (RecursionError, ValueError):  # brackets without end; an integer of too many digits
        return f"a value of type {type(value).__name__} that cannot be shown"


def brief(text: str, most: int = MOST_SHOWN) -> str:
    """``text``, for a message: in one line, cut where it is long, and with ? for control characters."""
    line = " ".join(text[: 2 * most].split())
    cut = line if len(line) <= most else f"{line[: most - 3]}..."
    return "".join(letter if letter.isprintable() else "?" for letter in cut)


def named(path: Path) -> str:
    """The name of a file, for a message."""
    return str(path) if str(path).isprintable() else shown(str(path))


def is_json(path: Path) -> bool:
    """Whether the name says that it holds JSON, an object a line."""
    return path.name.lower().removesuffix(".gz").endswith((".jsonl", ".ndjson", ".jsonlines", ".json"))


def looks_like_json(line: str) -> bool:
    """Whether ``line`` is an object, a list of some, or the bracket that opens one of several lines."""
    line = line.strip()
    if not line.startswith(("{", "[")):
        return False
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        return line in ("{", "[")
    except (RecursionError, ValueError):  # brackets without end; an integer of too many digits
        return True
    return isinstance(value, dict) or any(isinstance(item, dict) for item in value)


def lines_of(path: Path, longest: int = MOST_LINE) -> Iterator[str]:
    """The lines of a text file in UTF-8, without a byte order mark, gzipped where its name ends in .gz.

    No more is held at a time than one line of ``longest`` characters.

    Raises:
        ValueError: on a folder, or a file that is something else or has a longer line; the message says what and
            where. FileNotFoundError: if there is none.
    """
    number, name = 0, named(path)
    try:
        with _opened(path) as raw, _unzipped(path, raw) as file:
            _check_kind(path, file)
            lines = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape")
            while line := lines.readline(longest + 1):
                number += 1
                if len(line) > longest or unfit(line):
                    _check_line(f"{name}, line {number}", line, longest)
                yield line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{name}, after line {number}: expected gzip, got {error}") from None


def whole_text(path: Path, longest: int = MOST_TEXT) -> str:
    """All of a text file, of ``longest`` characters at most.

    Raises:
        ValueError, FileNotFoundError: as :func:`lines_of`, or if it is longer.
    """
    lines, length = [], 0
    for line in lines_of(path, longest):
        length += len(line)
        if length > longest:
            raise ValueError(f"{named(path)}: expected at most {longest:,} characters, got more; give a part of it")
        lines.append(line)
    return "".join(lines)


def _opened(path: Path) -> IO[bytes]:
    try:
        if not path.is_dir():
            return path.open("rb")
        got = "a folder"
    except (FileNotFoundError, PermissionError):
        raise
    except OSError as error:  # the name is too long, or leads through a file
        got = str(error.strerror)
    except ValueError:  # NUL, or half of a surrogate pair
        got = "a name that no file has"
    raise ValueError(f"{named(path):.200}: expected a file, got {got}")


def _unzipped(path: Path, raw: IO[bytes]) -> Any:
    if not path.name.lower().endswith(".gz"):
        return raw
    head = _head(raw)
    if head and not head.startswith(b"\x1f\x8b"):
        kind, _ = next(_kinds(head), ("what does not begin as it does", ""))
        raise ValueError(f"{named(path)}: expected gzip, as its name ends in .gz, got {kind}")
    return gzip.GzipFile(fileobj=raw)


def _head(file: Any) -> bytes:
    """How a file begins, which stays to be read."""
    return bytes(file.peek(_HEAD)[:_HEAD])


def _kinds(head: bytes) -> Iterator[tuple[str, str]]:
    """What a file is that begins so, and what to do about it; nothing where it may be text."""
    yield from ((kind, advice) for mark, kind, advice in _KINDS if mark.match(head))
    if max(head[0::2].count(0), head[1::2].count(0)) > len(head) / 4:
        yield "UTF-16 or binary data", _UTF8


def _check_kind(path: Path, file: Any) -> None:
    for kind, advice in _kinds(_head(file)):
        raise ValueError(f"{named(path)}: expected text in UTF-8, got {kind}; {advice}")


def _check_line(where: str, line: str, longest: int) -> None:
    if len(line) > longest and not line.endswith("\n"):
        raise ValueError(f"{where}: expected at most {longest:,} characters a line, got more: {shown(line)}")
    if not (found := unfit(line)):
        return
    got = "NUL" if found[0] == "\0" else f"the byte 0x{ord(found[0]) & 0xFF:x}, as Latin-1 or binary data has"
    after = shown(line[max(found.start() - 20, 0) : found.start()])
    raise ValueError(f"{where}: expected text in UTF-8, got {got}, after {after}; {_UTF8}")


class _RefusedError(ValueError):
    """What Python's reader lets pass, and the token by which its line is found."""

    def __init__(self, got: str, token: str = "") -> None:
        super().__init__(got)
        self.token = token


def strict_json(where: str, text: str) -> Any:
    """What ``text`` holds, as JSON, without what Python reads beyond that, or could not write again.

    Raises:
        ValueError: if it is no JSON; on NaN, Infinity and numbers that become it, integers of more than a thousand
            digits, an object with a key twice, more than a hundred brackets within brackets, and half of a surrogate
            pair. The message begins with ``where`` and, in a text of several lines, names the line.
    """
    try:
        value = json.loads(
            text, parse_constant=_constant, parse_float=_float, parse_int=_integer, object_pairs_hook=_object
        )
        _check_depth(text, value)
        _check_halves(text)
    except _RefusedError as error:
        raise ValueError(f"{where}: expected JSON, got {error}{_line(text, error.token)}") from None
    except RecursionError:
        raise ValueError(f"{where}: expected JSON, got more than {DEEPEST} brackets within brackets") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: expected JSON, got {shown(text.strip())}: {error}") from None
    return value


def _line(text: str, token: str) -> str:
    """Where ``token`` first stands, if that is a question."""
    if "\n" in text.strip():
        for found in _TOKEN.finditer(text):
            if found[0] == token:
                return f" in line {text.count(chr(10), 0, found.start()) + 1}"
    return ""


def _constant(token: str) -> Any:
    raise _RefusedError(f"{token}, which is no number of JSON", token)


def _float(token: str) -> float:
    value = float(token)
    if math.isinf(value):
        raise _RefusedError(f"the number {token:.{MOST_SHOWN}}, which is too large", token)
    return value


def _integer(token: str) -> int:
    if len(token) > MOST_DIGITS:
        raise _RefusedError(f"an integer of {len(token):,} digits, more than {MOST_DIGITS:,}", token)
    return int(token)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        again = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise _RefusedError(f"an object with {shown(again)} twice")
    return value


def _check_depth(text: str, value: Any) -> None:
    depth, level = 0, [value] if text.count("[") + text.count("{") > DEEPEST else []
    while level := [outer for outer in level if isinstance(outer, dict | list)]:
        depth += 1
        if depth > DEEPEST:
            raise RecursionError
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)]


def _check_halves(text: str) -> None:
    for found in _TOKEN.finditer(text) if _HALVES.search(text) else ():
        if found[0].startswith('"'):
            string = json.loads(found[0])
            if unfit(string.replace("\0", "")):
                raise _RefusedError(f"half of a surrogate pair in {shown(string)}", found[0])
