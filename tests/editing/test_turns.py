from __future__ import annotations

import signal
import threading
import time

import pytest

from cir.editing.turns import Turns


def test_callers_wait_and_are_served_in_order():
    turns, served = Turns(), []

    def call(number):
        with turns:
            served.append(number)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(20)]
    with turns:
        for number, thread in enumerate(threads, 1):
            thread.start()
            while len(turns._waiting) <= number:
                time.sleep(0.001)
        assert served == []
    for thread in threads:
        thread.join(10)
    assert served == list(range(20))


def test_one_that_gives_up_waiting_holds_up_nobody():
    def interrupt(*_):
        raise KeyboardInterrupt

    turns = Turns()
    with turns:
        before = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        try:
            with pytest.raises(KeyboardInterrupt):
                turns.__enter__()
        finally:
            signal.signal(signal.SIGALRM, before)
    with turns:
        assert len(turns._waiting) == 1
