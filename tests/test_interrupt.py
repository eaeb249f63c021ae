"""One signal asks, two end."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from prunesearch.search.interrupt import SIGNALS, stopping_gently


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # Python runs the handler between two instructions


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_asks_and_the_block_goes_on(number: int) -> None:
    reasons, ended = [], []
    before = [signal.getsignal(n) for n in SIGNALS]
    with stopping_gently(reasons.append) as seen:
        assert not seen
        send(number)
        ended.append(True)
    assert ended and list(seen) == [number] and len(reasons) == 1 and "once more" in reasons[0]
    assert [signal.getsignal(n) for n in SIGNALS] == before


@pytest.mark.parametrize(
    ("second", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_the_second_signal_ends_the_block(second: int, error: type[BaseException]) -> None:
    with pytest.raises(error), stopping_gently(lambda reason: None):
        send(signal.SIGINT)
        send(second)
        pytest.fail("it went on")


def test_without_a_signal_and_in_other_threads_nothing_happens() -> None:
    with stopping_gently(pytest.fail):
        pass
    done = []

    def work() -> None:
        with stopping_gently(pytest.fail):
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done
