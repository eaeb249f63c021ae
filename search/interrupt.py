"""The first Ctrl-C or SIGTERM stops gently, the second at once."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stopping_gently(stop: Callable[[str], None]) -> Iterator[Sequence[int]]:
    """Calls `stop` with the reason at the first signal; the second unwinds the stack.

    Outside the main thread, where Python has no signals, it does nothing.

    Yields:
        The signals that have come so far.

    Raises:
        KeyboardInterrupt: At a second signal that is Ctrl-C, in the block.
        SystemExit: At a second signal that is SIGTERM.
    """
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return

    def handle(number: int, frame: object) -> None:
        seen.append(number)
        if len(seen) == 1:
            stop("interrupted; running trials end first, once more ends them too")
        elif number == signal.SIGTERM:
            sys.exit(128 + number)
        else:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
