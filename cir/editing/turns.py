"""One call at a time, first come, first served."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

POLL = 0.1
"""Seconds between looks at whether a waiter has been interrupted."""


class Turns:
    """A lock whose waiters are served in the order they came."""

    def __init__(self) -> None:
        self._waiting: deque[threading.Lock] = deque()
        self._guard = threading.Lock()

    @contextmanager
    def taken(self, check: Callable[[], None]) -> Iterator[None]:
        """Wait for a turn, and have it. ``check`` may raise, while waiting, what ends that: others go on then."""
        turn = threading.Lock()
        with self._guard:
            self._waiting.append(turn)
            if self._waiting[0] is not turn:
                turn.acquire()
        try:
            while not turn.acquire(timeout=POLL):
                check()
            yield
        finally:
            with self._guard:
                first = self._waiting[0] is turn
                self._waiting.remove(turn)
                if first and self._waiting:
                    self._waiting[0].release()
