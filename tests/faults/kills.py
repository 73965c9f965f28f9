"""Processes killed while they write: what is there is whole, what was finished is not lost, and the next start clears
what was left.
"""

from __future__ import annotations

import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from cir import cli
from cir.editing.journal import Journal, read_journal
from cir.system import writing
from cir.system.writing import check_file, check_output, write_file, write_folder
from tests.tiny import TEXT, facts, tiny_llama, word_tokenizer

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
FOLDER = 0.03
"""Seconds that a folder takes, with its process, on a machine that is not busy."""
FILES = {"config.json", "generation_config.json", "model.safetensors", "report.json", "tokenizer.json"}
"""Of a checkpoint, with others."""


def killed(work: Callable[[int], None], after: float | None, number: signal.Signals) -> bytes:
    """Run ``work`` in a process of its own and kill it after that many seconds, if any; what it wrote to its pipe."""
    reader, writer = os.pipe()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    child = os.fork()
    if child == 0:
        os.close(reader)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            work(writer)
        except BaseException:
            os._exit(1)
        os._exit(0)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    os.close(writer)
    if after is not None:
        time.sleep(after)
        os.kill(child, number)
    os.waitpid(child, 0)
    with os.fdopen(reader, "rb") as pipe:
        return pipe.read()


class Moments(random.Random):
    """To kill at, within the time that the work takes on this machine as busy as it is."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        with tempfile.TemporaryDirectory() as place:
            started = time.perf_counter()
            killed(lambda _: write_folder(Path(place) / "out", _fill("new")) and None, None, signal.SIGKILL)
            self._pace = max(1.0, (time.perf_counter() - started) / FOLDER)

    def within(self, seconds: float) -> float:
        return self._pace * self.uniform(0, seconds)


def _fill(text: str) -> Callable[[Path], None]:
    def into(folder: Path) -> None:
        for name in "abc":
            (folder / name).write_text(text * 20000)

    return into


def _whole(folder: Path) -> str:
    """The text that all files of a folder hold; nothing where they are not whole."""
    texts = {(folder / name).read_text() for name in "abc" if (folder / name).is_file()}
    (text,) = texts if len(texts) == 1 and len(list(folder.iterdir())) == 4 else ("",)
    return text[:3] if text == text[:3] * 20000 else ""


def a_folder(place: Path, chance: Moments, number: signal.Signals) -> str:
    """Killed while it replaces one folder by another."""
    out = write_folder(place / "out", _fill("old"))

    def work(pipe: int) -> None:
        move = writing._put

        def told(*arguments: object) -> Path:
            os.write(pipe, b"finished")
            return move(*arguments)  # type: ignore[arg-type]

        writing._put = told  # type: ignore[assignment]
        write_folder(out, _fill("new"), overwrite=True)

    finished = killed(work, chance.within(0.03), number)
    if _whole(out) not in ("old", "new"):
        return "half of a folder was there"
    check_output(out, True)
    there = {path.name: _whole(path) for path in place.iterdir()}
    if not all(there.values()) or there.keys() - {"out", "out-1"}:
        return f"the next start found {there}"
    if finished and "new" not in there.values():
        return "what was finished is lost"
    return ""


def a_file(place: Path, chance: Moments, number: signal.Signals) -> str:
    path = place / "file"
    path.write_text("old" * 1000)
    killed(lambda _: write_file(path, lambda p: p.write_text("new" * 200000)), chance.within(0.02), number)
    if path.read_text() not in ("old" * 1000, "new" * 200000):
        return "half of a file was there"
    check_file(path)
    return "" if os.listdir(place) == ["file"] else f"the next start left {os.listdir(place)}"


def a_journal(place: Path, chance: Moments, number: signal.Signals) -> str:
    """Killed while it appends: what it was told is on the disk stays."""
    path, payload = place / "journal", os.urandom(50000)

    def work(pipe: int) -> None:
        journal = Journal(path, "f" * 64)
        for at in range(100):
            journal.append("edit", {"id": str(at)}, payload)
            os.write(pipe, b".")

    said = len(killed(work, chance.within(0.1), number))
    if not path.exists():
        return "what was recorded is lost" if said else ""
    journal = Journal(path, "f" * 64)
    journal.append("commit", {})
    journal.close()
    records = read_journal(path).records
    if not said <= len(records) - 1 <= said + 1 or any(record.payload != payload for record in records[:-1]):
        return f"{said} records were written, {len(records) - 1} are there"
    check_file(path)
    left = [name for name in os.listdir(place) if not name.startswith("journal")]
    return f"the next start left {left}" if left else ""


def a_run(place: Path, chance: Moments, number: signal.Signals) -> str:
    """`cir unlearn`, killed at any moment."""
    inputs, out = place / "in", place / "out"
    tiny_llama(hidden_size=160, intermediate_size=192).save_pretrained(inputs)
    word_tokenizer().save_pretrained(inputs)
    (inputs / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts()))
    (inputs / "text.txt").write_text(TEXT)
    options = ["--facts", str(inputs / "facts.jsonl"), "--retain", str(inputs / "text.txt"), "--max-steps", "1"]
    options += ["--budget", "5", "--worst-window", "5", "--quiet", "--device", "cpu"]

    def work(pipe: int) -> None:
        status = cli.main(["unlearn", "--model", str(inputs), "--out", str(out), *options])
        os.write(pipe, b"finished" if status in (0, 130) and out.exists() else b"")

    finished = killed(work, chance.within(3), number)
    if out.exists() and not {path.name for path in out.iterdir()} >= FILES:
        return f"half of a checkpoint was there: {os.listdir(out)}"
    if finished and not out.exists():
        return "what was finished is lost"
    check_output(out, True)
    left = set(os.listdir(place)) - {"in", "out"}
    return f"the next start left {left}" if left else ""


def sweep(count: int, runs: int, seed: int = 0) -> tuple[int, list[str]]:
    """How many processes were killed, ``count`` that write and ``runs`` of the command, and what was wrong after."""
    torch.set_num_threads(1)  # a fork has no other threads
    chance = Moments(seed)
    wrong = []
    trials = [*[(a_folder, a_file, a_journal)[at % 3] for at in range(count)], *[a_run] * runs]
    for at, trial in enumerate(trials):
        with tempfile.TemporaryDirectory() as place:
            number = SIGNALS[at // 3 % 3]
            if found := trial(Path(place), chance, number):
                wrong.append(f"{trial.__name__}, {number.name}, trial {at}: {found}")
    return len(trials), wrong
