from __future__ import annotations

import os
import signal
import threading

import pytest

from cir.system import signals
from cir.system.signals import SIGNALS, Held, Terminated, raised, stop_on_signals
from tests.faults.interrupts import lines


def send(number=signal.SIGINT):
    os.kill(os.getpid(), number)


def test_a_held_signal_acts_at_the_end_and_not_before():
    done = []

    def work():
        with Held():
            send()
            with Held():
                send()
            done.append("all of it")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["all of it"]


def test_a_held_signal_acts_where_it_is_asked_for_or_released():
    def asked():
        with Held() as held:
            held.check()
            send()
            held.check()
            pytest.fail("went on")

    def released():
        with Held() as held, held.released():
            send()
            pytest.fail("went on")

    def before():
        with Held() as held:
            send()
            with held.released():
                pytest.fail("went on")

    for work in (asked, released, before):
        with pytest.raises(KeyboardInterrupt):
            work()


def test_elsewhere_than_in_the_main_thread_nothing_is_held():
    found = []

    def work():
        with Held() as held:
            held.check()
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGINT)]


def test_what_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Held(), raised(), stop_on_signals() as stop:
            send(signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert not stop.is_set()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_sigterm_is_an_exception_where_that_was_asked():
    with pytest.raises(Terminated, match="SIGTERM"), raised():
        send(signal.SIGTERM)


def test_a_signal_at_any_line_of_it_is_neither_lost_nor_leaves_a_handler():
    def hold():
        with Held() as held:
            held.check()

    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    for at in range(len(lines(hold, watched=[signals.__file__]))):
        with pytest.raises(KeyboardInterrupt):
            lines(hold, at, [signals.__file__])
        # A handler that an interrupt left in place passes on what comes, and is seen through.
        with pytest.raises(KeyboardInterrupt):
            send()
        with pytest.raises(Terminated), raised():
            send(signal.SIGTERM)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_signals_are_held_on_after_what_was_released():
    done = []

    def work():
        with Held() as held:
            with held.released(), Held():
                pass
            send()
            done.append("the rest")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["the rest"]
