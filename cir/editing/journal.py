"""An append-only journal on disk: what a process did to a model, from which the next one does it again.

A record is a line of JSON, the payload that it measures, and a newline. Each line holds the SHA-256 of the record
before it and of its own content, so that a record that was cut short, altered, moved or left out is found. That tells
damage, not intent: who can write the file can write another chain. With a key, which the file does not hold, the
digests are HMACs, and nobody without the key can; even then the last records can be cut off without a trace.

It is a file of its own and no SQLite: all that is asked of it is to append, and to be read once from the beginning;
an edit is megabytes, which a database would write twice (WAL); a chain of digests says what a page's checksum does
not, that no record is missing; and what is wrong can be seen with an editor of text.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
from dataclasses import dataclass, field
from io import FileIO
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from cir.system.files import strict_json
from cir.system.writing import write_file

logger = logging.getLogger(__name__)
FORMAT = "cir-journal-1"
MOST_LINE, MOST_PAYLOAD = 2**16, 2**31
"""Bytes of a record's line and of its payload."""
LEAST_KEY = 16
"""Bytes of a key."""


@dataclass(frozen=True)
class Record:
    kind: str
    about: dict[str, Any]
    payload: bytes


class JournalError(ValueError):
    """A journal that cannot be used: another's, in use, damaged, or not a journal."""


@dataclass
class Contents:
    """What a journal holds: what its first record says of it, the ``records`` after that which check, the byte
    ``good`` up to which they reach and the digest of the last. ``tail``: the bytes behind, which do not check.
    """

    about: dict[str, Any] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    good: int = 0
    chain: str = ""
    tail: bytes = b""

    @property
    def cut(self) -> bool:
        """Whether the tail is one record that was being written: less than all of it, and no other after it."""
        line, ended, rest = self.tail.partition(b"\n")
        if not ended:
            return len(line) < MOST_LINE
        length = _head(line).get("length")
        later = any(_head(line).keys() >= {"sha256", "before"} for line in rest.split(b"\n"))
        return isinstance(length, int) and len(rest) <= length and not later


def read_journal(path: str | Path, key: bytes | None = None) -> Contents:
    """Read a journal without opening it for more.

    Raises:
        JournalError: if it is none, or ``key`` is not its own. OSError: if there is no such file.
    """
    path = Path(path)
    if not path.is_file() and path.exists():
        raise JournalError(f"{path}: expected a file, got something else")
    with path.open("rb") as file:
        first, digest = _next(file, "", None), ""
        if first is None or first[0].kind != "open" or first[0].about.get("format") != FORMAT:
            file.seek(0)
            # Of a keyed journal the first record does not check without the key, and still says what it is.
            about = _head(file.readline(MOST_LINE)).get("about")
            if not isinstance(about, dict) or about.get("format") != FORMAT or not about.get("keyed"):
                what = "another file" if path.stat().st_size else "an empty one, from which all may have been lost"
                raise JournalError(f"{path}: expected a journal of format {FORMAT}, got {what}")
            if key is None:
                raise JournalError(f"{path}: expected the key that this journal was made with, got none")
            file.seek(0)
            first = _next(file, "", key)
            if first is None:
                raise JournalError(f"{path}: expected the key that this journal was made with, got another")
        elif key is not None:
            raise JournalError(f"{path}: expected a journal made with a key, got one without")
        contents = Contents(first[0].about, [], file.tell(), first[1])
        while (found := _next(file, contents.chain, key)) is not None:
            record, digest = found
            contents.records.append(record)
            contents.chain, contents.good = digest, file.tell()
        file.seek(contents.good)
        contents.tail = file.read()
    return contents


def set_aside(path: Path, contents: Contents) -> Path:
    """Move the tail of a journal, which does not check, to a new file beside it, ``.bad-<offset>``."""
    for number in count():
        aside = path.with_name(f"{path.name}.bad-{contents.good}" + f"-{number}" * (number > 0))
        try:
            with aside.open("xb") as file:
                file.write(contents.tail)
                os.fsync(file.fileno())
        except FileExistsError:
            continue
        break
    with path.open("r+b") as journal:
        journal.truncate(contents.good)
        os.fsync(journal.fileno())
    logger.warning("%s: %d bytes at its end do not check; moved to %s", path, len(contents.tail), aside)
    return aside


class Journal:
    """The open journal at ``path``, locked against other processes until :meth:`close`.

    A last record that was cut short, as by a crash, is moved to a file beside it, ``.bad-<offset>``, with a warning;
    the good records before it stay. Anything else that does not check is refused, as facts would be there again.

    Args:
        path: created if it does not exist.
        fingerprint: of the model that the journal is about.
        rounding: of the weights that the records lead to.
        key: a secret of 16 bytes or more that makes the chain an HMAC; of a journal that was made with one, the same.

    Raises:
        JournalError: if another process has it open; it is no journal, or that of another model, key or rounding; or
            a record of it has been altered, moved or left out.
    """

    def __init__(
        self, path: str | Path, fingerprint: str, rounding: str = "nearest", key: bytes | None = None
    ) -> None:
        if key is not None and len(key) < LEAST_KEY:
            raise JournalError(f"expected a key of {LEAST_KEY} bytes or more, got {len(key)}")
        self.path, self._key = Path(path).absolute(), key
        self._fault = ""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            self._create(
                {"format": FORMAT, "fingerprint": fingerprint, "rounding": rounding, "keyed": key is not None}
            )
        # Unbuffered: what could not be written must not be tried again later, behind the next record.
        self._file: FileIO = self.path.open("ab", buffering=0)
        try:
            lock(self._file, self.path)
            contents = read_journal(self.path, key)
            for name, own in (("fingerprint", fingerprint), ("rounding", rounding)):
                found = contents.about.get(name, own)
                if found != own:
                    raise JournalError(
                        f"{self.path}: expected the journal of this model, {name} {own[:12]}, got that of "
                        f"{str(found)[:12]!r}"
                    )
            if contents.tail and not contents.cut:
                raise JournalError(
                    f"{self.path}: expected records that follow from one another, got one at byte {contents.good} "
                    "that was altered, moved or left out; what it and all after it forgot would be there again. Take "
                    "a copy back, or lose them with `cir journal repair`"
                )
            if contents.tail:
                set_aside(self.path, contents)
            self.records, self._chain, self._end = contents.records, contents.chain, contents.good
        except BaseException:
            self._file.close()
            raise

    def append(self, kind: str, about: dict[str, Any], payload: bytes = b"") -> None:
        """Write one record; it is on the disk when this returns, and leaves no trace where it raises.

        Raises:
            JournalError: if the file was deleted, replaced or written to by another since it was opened, or cannot be
                brought back to what it was; a record that is too long. OSError: as the system has it.
        """
        self._check()
        line, digest = _encoded(self._chain, kind, about, payload, self._key)
        if len(line) >= MOST_LINE or len(payload) > MOST_PAYLOAD:
            raise JournalError(f"expected a record of at most {MOST_PAYLOAD} bytes, got {len(line)} + {len(payload)}")
        rest = memoryview(line + b"\n" + payload + b"\n")
        size = len(rest)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except BaseException as error:
            self._take_back(error)
            raise
        self._chain, self._end = digest, self._end + size

    def close(self) -> None:
        """Release the journal. Closing twice does nothing."""
        self._file.close()

    def _create(self, about: dict[str, Any]) -> None:
        """With its first record, or not at all: an empty journal is one that was lost."""
        line, _ = _encoded("", "open", about, b"", self._key)

        def fill(partial: Path) -> None:
            partial.write_bytes(line + b"\n\n")

        try:
            write_file(self.path, fill, overwrite=False)
        except FileExistsError:  # made by another in this moment, who has it open
            return

    def _check(self) -> None:
        """That appending goes on where the last record ended, in the file that others will find."""
        if self._fault:
            raise JournalError(f"{self.path}: {self._fault}; open it again")
        own = os.fstat(self._file.fileno())
        try:
            there = self.path.stat()
        except FileNotFoundError:
            raise JournalError(
                f"{self.path}: expected the journal that was opened, got none: it was deleted"
            ) from None
        if (own.st_dev, own.st_ino) != (there.st_dev, there.st_ino):
            raise JournalError(f"{self.path}: expected the journal that was opened, got another: it was replaced")
        if own.st_size != self._end:
            raise JournalError(
                f"{self.path}: expected {self._end} bytes, got {own.st_size}: another has written to it"
            )

    def _take_back(self, error: BaseException) -> None:
        try:
            self._file.truncate(self._end)
        except OSError as again:
            self._fault = f"could neither write ({error}) nor take that back ({again})"


def _next(file: BinaryIO, chain: str, key: bytes | None) -> tuple[Record, str] | None:
    """The next record and its digest, where it checks."""
    line = file.readline(MOST_LINE)
    head = _head(line)
    kind, about, length = (head.get(name) for name in ("kind", "about", "length"))
    if not isinstance(kind, str) or not isinstance(about, dict) or type(length) is not int:
        return None
    if not 0 <= length <= MOST_PAYLOAD:
        return None
    payload = file.read(length)
    again, digest = _encoded(chain, kind, about, payload, key)
    if not hmac.compare_digest(again + b"\n", line) or file.read(1) != b"\n":
        return None
    return Record(kind, about, payload), digest


def _head(line: bytes) -> dict[str, Any]:
    """What a record begins with, if ``line`` is that."""
    try:
        head = strict_json("", line.decode())
    except ValueError:
        return {}
    return head if isinstance(head, dict) else {}


def _encoded(chain: str, kind: str, about: dict[str, Any], payload: bytes, key: bytes | None) -> tuple[bytes, str]:
    """The line of a record, and its digest."""
    content = {"kind": kind, "about": about, "length": len(payload), "before": chain}
    text = json.dumps(content, sort_keys=True).encode() + payload
    digest = hashlib.sha256(text).hexdigest() if key is None else hmac.digest(key, text, "sha256").hex()
    return json.dumps({**content, "sha256": digest}, sort_keys=True).encode(), digest


def lock(file: FileIO, path: Path) -> None:
    """Until ``file`` is closed; raises JournalError where another process has it."""
    try:
        import fcntl
    except ImportError as error:  # Windows
        raise JournalError(f"{path}: expected a system with file locks (flock), got none") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise JournalError(f"{path}: expected a journal that no other editor has open, got one in use") from error
