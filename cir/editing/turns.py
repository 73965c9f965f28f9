"""One call at a time, first come, first served."""

from __future__ import annotations

import threading
from collections import deque


class Turns:
    """A lock whose waiters are served in the order they came."""

    def __init__(self) -> None:
        self._waiting: deque[threading.Lock] = deque()
        self._guard = threading.Lock()

    def __enter__(self) -> None:
        turn = threading.Lock()
        turn.acquire()
        with self._guard:
            self._waiting.append(turn)
            if self._waiting[0] is turn:
                turn.release()
        try:
            turn.acquire()
        except BaseException:  # Ctrl-C while waiting: others must not wait for this one
            self._leave(turn)
            raise

    def __exit__(self, *_: object) -> None:
        self._leave(self._waiting[0])

    def _leave(self, turn: threading.Lock) -> None:
        with self._guard:
            first = self._waiting[0] is turn
            self._waiting.remove(turn)
            if first and self._waiting:
                self._waiting[0].release()
