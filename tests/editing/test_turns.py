from __future__ import annotations

import threading
import time

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
