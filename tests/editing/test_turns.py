from __future__ import annotations

import threading
import time

import pytest

from cir.editing.turns import Turns


def test_callers_wait_and_are_served_in_order():
    turns, served = Turns(), []

    def call(number):
        with turns.taken(lambda: None):
            served.append(number)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(20)]
    with turns.taken(lambda: None):
        for number, thread in enumerate(threads, 1):
            thread.start()
            while len(turns._waiting) <= number:
                time.sleep(0.001)
        assert served == []
    for thread in threads:
        thread.join(10)
    assert served == list(range(20))


def test_one_that_gives_up_waiting_holds_up_nobody():
    def interrupt():
        raise KeyboardInterrupt

    turns = Turns()
    with turns.taken(interrupt), pytest.raises(KeyboardInterrupt), turns.taken(interrupt):
        pytest.fail("two at once")
    with turns.taken(interrupt):
        assert len(turns._waiting) == 1
    assert not turns._waiting
