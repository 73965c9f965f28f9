"""Damaged journals: each is refused, or what its last record lost is told; nothing is un-forgotten in silence."""

from __future__ import annotations

import logging
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

from cir.editing.history import History
from cir.editing.journal import Journal, JournalError, read_journal
from tests.faults.interrupts import Bench

Damage = Callable[[bytes, list[int], random.Random], bytes]


def _flipped(data: bytes, _: list[int], chance: random.Random) -> bytes:
    at = chance.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]


def _cut(data: bytes, ends: list[int], chance: random.Random) -> bytes:
    return data[: chance.choice([at for at in range(1, len(data)) if at not in ends])]


def _left_out(data: bytes, _: list[int], chance: random.Random) -> bytes:
    start = chance.randrange(len(data) - 1)
    return data[:start] + data[start + chance.randint(1, 2000) :]


def _inserted(data: bytes, _: list[int], chance: random.Random) -> bytes:
    at = chance.randrange(len(data))
    return data[:at] + chance.randbytes(chance.randint(1, 100)) + data[at:]


def _zeroed(data: bytes, _: list[int], chance: random.Random) -> bytes:
    """A block that was never written, as file systems leave it after a crash."""
    start = chance.randrange(0, len(data), 512)
    return data[:start] + bytes(min(512, len(data) - start)) + data[start + 512 :]


def _records(data: bytes, ends: list[int]) -> list[bytes]:
    return [data[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _swapped(data: bytes, ends: list[int], chance: random.Random) -> bytes:
    records = _records(data, ends)
    at = chance.randrange(len(records) - 1)
    records[at : at + 2] = reversed(records[at : at + 2])
    return b"".join(records)


def _doubled(data: bytes, ends: list[int], chance: random.Random) -> bytes:
    records = _records(data, ends)
    at = chance.randrange(len(records))
    return b"".join([*records[: at + 1], *records[at:]])


def _missing(data: bytes, ends: list[int], chance: random.Random) -> bytes:
    records = _records(data, ends)
    del records[chance.randrange(len(records) - 1)]  # without the last the others are a whole journal
    return b"".join(records)


def _emptied(data: bytes, ends: list[int], chance: random.Random) -> bytes:
    return b""


DAMAGES: tuple[Damage, ...] = (
    _flipped,
    _cut,
    _left_out,
    _inserted,
    _zeroed,
    _swapped,
    _doubled,
    _missing,
    _emptied,
)


def _ends(path: Path) -> list[int]:
    """Where each record ends, by opening what is before each byte that could be an end."""
    data, ends, start = path.read_bytes(), [], 0
    while start < len(data):
        line = data.index(b"\n", start) + 1
        length = int(data[start:line].split(b'"length": ')[1].split(b",")[0])
        ends.append(start := line + length + 1)
    return ends


def _opened(path: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """What an editor would make of it, and what it would warn of."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("cir")
    logger.addHandler(handler)
    try:
        fingerprint = str(read_journal(path).about["fingerprint"])
        journal = Journal(path, fingerprint, "stochastic")
        journal.close()
        history = History(fingerprint)
        for record in journal.records:
            history.take(record)
        return [(entry.edit.id, entry.status) for entry in history.entries], told
    finally:
        logger.removeHandler(handler)


def sweep(count: int, seed: int = 0) -> tuple[int, list[str]]:
    """How many were damaged, and what was wrong with how some were taken."""
    chance, wrong = random.Random(seed), []
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "whole"
        path.write_bytes(Bench().journal)
        ends, data = _ends(path), path.read_bytes()
        whole, _ = _opened(path)
        for at in range(count):
            damage = DAMAGES[at % len(DAMAGES)]
            damaged = Path(place) / f"journal-{at}"
            damaged.write_bytes(damage(data, ends, chance))
            try:
                found, told = _opened(damaged)
            except JournalError:
                continue
            except Exception as error:
                wrong.append(f"{damage.__name__}, {at}: {type(error).__name__}: {error}")
                continue
            if found != whole and not (told and list(damaged.parent.glob(f"{damaged.name}.bad-*"))):
                wrong.append(f"{damage.__name__}, {at}: {whole} became {found} in silence")
    return count, wrong
