from __future__ import annotations

import os
import signal
import sys
import threading

import pytest

from cir.data import signals
from cir.data.signals import SIGNALS, Held, Terminated, raised, stop_on_signals


def send(number=signal.SIGINT):
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def handlers_stay():
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before


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


def lines_of(function):
    """How many lines of the module run in ``function``."""
    seen = []

    def trace(frame, event, _):
        if frame.f_code.co_filename != signals.__file__:
            return None
        if event == "line":
            seen.append(frame.f_lineno)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return len(seen)


def test_a_signal_at_any_line_of_it_is_neither_lost_nor_leaves_a_handler(monkeypatch):
    def hold():
        with Held() as held:
            held.check()

    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    for at in range(lines_of(hold)):
        left = at

        def trace(frame, event, _):
            nonlocal left
            if frame.f_code.co_filename != signals.__file__:
                return None
            if event == "line":
                left -= 1
                if left == -1:
                    signal.raise_signal(signal.SIGINT)
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            with pytest.raises(KeyboardInterrupt):
                hold()
        finally:
            sys.settrace(before)
        # A handler that an interrupt left in place passes on what comes.
        with pytest.raises(KeyboardInterrupt):
            send()
        for number, handler in handlers.items():
            signal.signal(number, handler)
