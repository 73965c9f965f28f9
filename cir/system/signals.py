"""Ctrl-C and SIGTERM end a run in its best state so far, and never in the middle of what must be whole."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger(__name__)
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP, where :func:`raised` makes exceptions of them."""


@contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """An event that the first signal sets; a second one acts as it would have without us.

    Outside the main thread, where Python allows no handlers, nothing ever sets it.
    """
    stop = threading.Event()

    def handle(number: int, frame: Any) -> None:
        stop.set()
        logger.warning("%s: stopping after this step", signal.Signals(number).name)
        signal.signal(number, before[number])

    before = _handled()
    try:
        for number in before:
            signal.signal(number, handle)
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def raised() -> Iterator[None]:
    """SIGTERM and SIGHUP as exceptions, so that what is half-done is taken back as after Ctrl-C."""

    def handle(number: int, frame: Any) -> None:
        raise Terminated(signal.Signals(number).name)

    before = _handled()
    ours = [number for number, handler in before.items() if handler == signal.SIG_DFL]
    try:
        for number in ours:
            signal.signal(number, handle)
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])


class Held:
    """Signals wait from ``with Held() as held`` until its end, or until :meth:`check`, and act then as they would.

    Outside the main thread nothing is held, as signals raise no exception there either.
    """

    def __init__(self) -> None:
        self._came: list[int] = []
        self._before: dict[int, Any] = {}
        self._state = "out"  # or holding, or released

    def __enter__(self) -> Held:
        before = _handled()
        for number in before:
            self._before[number] = before[number]
            signal.signal(number, self._handle)
        self._state = "holding"
        return self

    def __exit__(self, *_: object) -> None:
        # First of all: a handler that an exception leaves in place from here on passes on what comes.
        self._state = "out"
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self.check()

    def check(self) -> None:
        """Act on what has come; for Ctrl-C that raises KeyboardInterrupt."""
        while self._came:
            self._act(self._came.pop(0), None)

    @contextmanager
    def released(self) -> Iterator[None]:
        """Let signals act at once within, where nothing needs to be whole."""
        self._state = "released"
        self.check()
        try:
            yield
        finally:
            self._state = "holding"

    def _handle(self, number: int, frame: Any) -> None:
        if self._state == "holding":
            self._came.append(number)
        else:
            self._act(number, frame)

    def _act(self, number: int, frame: Any) -> None:
        handler = self._before[number]
        if callable(handler):
            handler(number, frame)
        else:
            signal.signal(number, handler)
            signal.raise_signal(number)


def _handled() -> dict[int, Any]:
    """The handlers of the signals that are not ignored, where this thread may set them."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    handlers = {number: _handler(number) for number in SIGNALS}
    return {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}


def _handler(number: int) -> Any:
    """What is done at a signal: what a handler passes it on to that an exception left in place, see :class:`Held`."""
    handler = signal.getsignal(number)
    while isinstance(held := getattr(handler, "__self__", None), Held) and held._state == "out":
        handler = held._before[number]
    return handler
