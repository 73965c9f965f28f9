"""Ctrl-C at each line of an editor's bookkeeping: weights, history and journal must agree, and nothing hang."""

from __future__ import annotations

import copy
import signal
import sys
import tempfile
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

import torch

from cir import CIRConfig, EditConfig, Editor, Subspaces
from cir.data.facts import load_facts
from cir.editing import editor, history, journal, turns
from cir.forgetting.update import snapshot
from cir.model.finding import find_stack
from cir.system import signals
from tests.tiny import TEXT, facts, knowing_llama, word_tokenizer

FACTS = load_facts(facts(12))
CONFIG = EditConfig(target_recall=0.3, keep=0.9, budget=1.0, worst_window=1.0, rank=6, energy=0.9999)
WATCHED = {module.__file__ for module in (editor, history, journal, turns, signals)}
HANGS = 60
"""Seconds after which a call counts as hanging."""


class Bench:
    """A trained tiny model, of which each trial has a copy with two edits, the second undone."""

    def __init__(self) -> None:
        self.model, self.tokenizer = knowing_llama(), word_tokenizer()
        fit = CIRConfig(layers=0.5, retain_tokens=1024)
        self.subspaces = Subspaces.fit(self.model, self.tokenizer, TEXT, FACTS[:6], config=fit, progress=False)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "journal"
            with self.open(path) as opened:
                opened.forget(FACTS[8])
                opened.forget(FACTS[9])
                opened.undo()
            self.journal = path.read_bytes()

    def open(self, path: Path) -> Editor:
        model = copy.deepcopy(self.model)
        return Editor(model, self.tokenizer, self.subspaces, text=TEXT, config=CONFIG, journal=path)


def weights(of: Editor) -> list[torch.Tensor]:
    return list(snapshot(find_stack(of._model).writers(0)))


CALLS: dict[str, Callable[[Editor], Any]] = {
    "forget": lambda of: of.forget(FACTS[10]),
    "undo": lambda of: of.undo(),
    "redo": lambda of: of.redo(),
    "commit": lambda of: of.commit(),
}


def lines(
    call: Callable[[], Any], at: int | None = None, watched: Container[str | None] = WATCHED
) -> list[tuple[str, int]]:
    """Each line of the files ``watched`` that runs in ``call``, in order; at that of number ``at``, SIGINT comes."""
    seen: list[tuple[str, int]] = []

    def trace(frame: Any, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in watched:
            return None
        if event == "line":
            seen.append((frame.f_code.co_filename, frame.f_lineno))
            if len(seen) - 1 == at:
                signal.raise_signal(signal.SIGINT)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return seen


def trial(bench: Bench, folder: Path, name: str, at: int) -> str:
    """What is wrong after an interrupt there; nothing if all is right."""
    path = folder / f"{name}-{at}"
    path.write_bytes(bench.journal)

    def hung(*_: Any) -> None:
        raise TimeoutError(f"{name} at {at} hangs")

    before = {number: signal.getsignal(number) for number in (signal.SIGALRM, *signals.SIGNALS)}
    signal.signal(signal.SIGALRM, hung)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.alarm(HANGS)
    try:
        with bench.open(path) as opened:
            try:
                lines(lambda: CALLS[name](opened), at)
            except KeyboardInterrupt:
                pass
            else:
                return "the interrupt was lost"
            said, held = [(edit.id, status) for edit, status in opened.history], weights(opened)
            if any(module._forward_hooks or module._forward_pre_hooks for module in opened._model.modules()):
                return "hooks were left"
            opened.close()
            with bench.open(path) as again:
                if [(edit.id, status) for edit, status in again.history] != said:
                    return f"the journal says {[status for _, status in again.history]}, the editor {said}"
                if not all(torch.equal(a, b) for a, b in zip(weights(again), held, strict=True)):
                    return "the weights are not those of the history"
                again.forget(FACTS[11])
            if len(list(folder.glob(f"{path.name}*"))) != 1:
                return "a part of the journal was set aside"
    except TimeoutError as error:
        return str(error)
    finally:
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)
    return ""


def places(bench: Bench, folder: Path) -> Iterator[tuple[str, int]]:
    """The first and the last time that each line runs, of each call."""
    for name, call in CALLS.items():
        path = folder / name
        path.write_bytes(bench.journal)
        with bench.open(path) as opened:
            seen = lines(lambda call=call, opened=opened: call(opened))
        first = {line: at for at, line in reversed(list(enumerate(seen)))}
        last = {line: at for at, line in enumerate(seen)}
        for at in sorted({*first.values(), *last.values()}):
            yield name, at


def sweep(share: float = 1.0) -> tuple[int, list[str]]:
    """How many interrupts were tried, of that share of all places, and what was wrong after some."""
    bench, wrong = Bench(), []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        every = max(1, round(1 / share))
        chosen = list(places(bench, folder))[::every]
        for name, at in chosen:
            if found := trial(bench, folder, name, at):
                wrong.append(f"{name}, line {at}: {found}")
    return len(chosen), wrong
