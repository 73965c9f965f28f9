"""An append-only journal on disk: what a process did to a model, from which the next one does it again.

A record is a line of JSON, the payload that it measures, and a newline. Each line holds the SHA-256 of the record
before it and of its own content, so that a record that was cut short, altered, moved or left out is found.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

logger = logging.getLogger(__name__)
FORMAT = "cir-journal-1"


@dataclass(frozen=True)
class Record:
    kind: str
    about: dict[str, Any]
    payload: bytes


class JournalError(ValueError):
    """A journal that cannot be used: another's, in use, or not a journal."""


class Journal:
    """The open journal at ``path``, locked against other processes until :meth:`close`.

    A last record that was cut short, as by a crash, is moved to a file beside it, ``.bad-<offset>``, with a warning;
    the good records before it stay. Anything else that does not check is refused, as facts would be there again.

    Args:
        path: created if it does not exist.
        fingerprint: of the model that the journal is about.
        repair: move all from the first record on that does not check, and lose it.

    Raises:
        JournalError: if another process has it open, it is no journal or that of another model, or a record of it has
            been altered, moved or left out.
    """

    def __init__(self, path: str | Path, fingerprint: str, repair: bool = False) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: what could not be written must not be tried again later, behind the next record.
        self._file: FileIO = self.path.open("ab", buffering=0)
        self._chain = ""
        self.records: list[Record] = []
        try:
            _lock(self._file, self.path)
            if not self.path.stat().st_size:
                self.append("open", {"format": FORMAT, "fingerprint": fingerprint})
                _sync_folder(self.path.parent)
                return
            with self.path.open("rb") as file:
                self.records = list(self._read(file))
            if not self.records:
                raise JournalError(f"{self.path}: expected a journal of format {FORMAT}, got another file")
            found = str(self.records.pop(0).about.get("fingerprint"))
            if found != fingerprint:
                raise JournalError(
                    f"{self.path}: expected the journal of this model, {fingerprint[:12]}, got that of {found[:12]}"
                )
            self._set_bad_tail_aside(repair)
        except BaseException:
            self._file.close()
            raise

    def append(self, kind: str, about: dict[str, Any], payload: bytes = b"") -> None:
        """Write one record; it is on the disk when this returns, and leaves no trace where it raises."""
        line, digest = _encoded(self._chain, kind, about, payload)
        start, rest = self._file.seek(0, os.SEEK_END), memoryview(line + b"\n" + payload + b"\n")
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except BaseException:
            self._file.truncate(start)
            raise
        self._chain = digest

    def close(self) -> None:
        """Release the journal. Closing twice does nothing."""
        self._file.close()

    def _read(self, file: BinaryIO) -> Iterator[Record]:
        """The records up to the first that does not check, which begins at ``_good``."""
        self._good = 0
        while line := file.readline():
            try:
                head = json.loads(line)
                payload = file.read(head["length"])
                again, digest = _encoded(self._chain, head["kind"], head["about"], payload)
                checks = again + b"\n" == line and file.read(1) == b"\n"
            except (ValueError, KeyError, TypeError):
                checks = False
            if not checks or (not self._chain and head["kind"] != "open"):
                return
            self._chain, self._good = digest, file.tell()
            yield Record(head["kind"], head["about"], payload)

    def _set_bad_tail_aside(self, repair: bool) -> None:
        tail = self.path.read_bytes()[self._good :]
        if not tail:
            return
        if not (repair or _is_cut(tail)):
            raise JournalError(
                f"{self.path}: expected records that follow from one another, got one at byte {self._good} that was "
                "altered, moved or left out; what it and all after it forgot would be there again. Take a copy back, "
                "or lose them with cir.editing.journal.Journal(path, fingerprint, repair=True)"
            )
        names = (f"{self.path.name}.bad-{self._good}" + f"-{number}" * (number > 0) for number in count())
        aside = next(path for path in map(self.path.with_name, names) if not path.exists())
        aside.write_bytes(tail)
        logger.warning("%s: %d bytes at its end do not check; moved to %s", self.path, len(tail), aside)
        self._file.truncate(self._good)
        os.fsync(self._file.fileno())


def _is_cut(tail: bytes) -> bool:
    """Whether ``tail`` is one record that was being written: less than all of it, and no other after it."""
    line, ended, rest = tail.partition(b"\n")
    if not ended:
        return True
    length = _head(line).get("length")
    later = any(_head(line).keys() >= {"sha256", "before"} for line in rest.split(b"\n"))
    return isinstance(length, int) and len(rest) <= length and not later


def _head(line: bytes) -> dict[str, Any]:
    """What a record begins with, if ``line`` is that."""
    try:
        head = json.loads(line)
    except ValueError:
        return {}
    return head if isinstance(head, dict) else {}


def _encoded(chain: str, kind: str, about: dict[str, Any], payload: bytes) -> tuple[bytes, str]:
    """The line of a record, and its digest."""
    content = {"kind": kind, "about": about, "length": len(payload), "before": chain}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode() + payload).hexdigest()
    return json.dumps({**content, "sha256": digest}, sort_keys=True).encode(), digest


def _lock(file: FileIO, path: Path) -> None:
    try:
        import fcntl
    except ImportError as error:  # Windows
        raise JournalError(f"{path}: expected a system with file locks (flock), got none") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise JournalError(f"{path}: expected a journal that no other editor has open, got one in use") from error


def _sync_folder(folder: Path) -> None:
    """A new file is on the disk once its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
