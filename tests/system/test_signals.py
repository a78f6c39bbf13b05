from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ggft.system.errors import Interrupted
from ggft.system.signals import SAME_WISH_S, StopSignals, deferred


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_acts_while_the_main_thread_is_busy_and_is_raised_later(number: int) -> None:
    heard = threading.Event()
    before = signal.getsignal(number)
    with StopSignals() as stop:
        stop.on_stop(heard.set)
        os.kill(os.getpid(), number)
        assert heard.wait(2)
        assert stop.signal_number == number
        with pytest.raises(Interrupted) as caught:
            stop.check()
        assert caught.value.exit_code == 128 + number
        stop.on_stop(None)
    assert signal.getsignal(number) is before


def test_the_wish_is_repeated_until_it_is_heard() -> None:
    """A cancel that falls between two native calls is lost; the next one must come by itself."""
    calls: list[float] = []
    with StopSignals() as stop:
        stop.on_stop(lambda: calls.append(time.monotonic()))
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 5
        while len(calls) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        stop.on_stop(None)
        count = len(calls)
        assert count >= 3
        time.sleep(0.3)
        assert len(calls) == count


def test_a_late_action_learns_of_an_earlier_signal() -> None:
    stop = StopSignals()
    stop.request(signal.SIGTERM)
    heard: list[int] = []
    stop.on_stop(lambda: heard.append(1))
    assert heard == [1]


def test_without_a_signal_nothing_happens() -> None:
    with StopSignals() as stop:
        stop.check()
        assert stop.signal_number is None


def test_other_threads_may_use_it() -> None:
    errors: list[BaseException] = []

    def use() -> None:
        try:
            with StopSignals() as stop:
                stop.check()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert errors == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_deferred_signal_comes_at_the_end(number: int) -> None:
    def handler(number: int, _: object) -> None:
        raise Interrupted("interrupted", signal_number=number)

    done = []

    def native() -> None:
        with deferred():
            os.kill(os.getpid(), number)
            time.sleep(0.01)
            done.append(1)

    before = signal.signal(number, handler)
    try:
        with pytest.raises(Interrupted):
            native()
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)
    assert done == [1]


def test_deferring_between_stop_signals_is_one_wish() -> None:
    with StopSignals() as stop:
        with deferred():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1.5 * SAME_WISH_S)
        with pytest.raises(Interrupted):
            stop.check()


IGNORE_FIRST = """
import sys, time
from ggft.system.signals import StopSignals
with StopSignals() as stop:
    print("ready", flush=True)
    while stop.signal_number is None:
        time.sleep(0.01)
    print("first", flush=True)
    time.sleep(60)
"""


def test_the_second_sigint_exits_at_once(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", IGNORE_FIRST], stdout=subprocess.PIPE, text=True
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGINT)
        assert child.stdout.readline() == "first\n"
        child.send_signal(signal.SIGINT)  # passed on by another process: the same Ctrl-C
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(timeout=2 * SAME_WISH_S)
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=2) == 130
