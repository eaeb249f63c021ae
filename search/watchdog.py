"""A limit on how long a trial or a job may take."""

from __future__ import annotations

import faulthandler
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

TIMEOUT_GRACE_S = 5.0
STDERR = 2  # Ray's log of the worker, whatever Python's `sys.stderr` is


@contextmanager
def watchdog(limit_s: float | None) -> Iterator[None]:
    """Ends a trial that takes too long: an exception where Python runs, else the process.

    The process is ended by a thread that needs no interpreter lock: native code may hold it. Where
    it hung is then the last thing in the process's standard error.
    """
    if limit_s is None:
        yield
        return

    def stop(signum: int, frame: Any) -> None:
        raise TimeoutError(f"took longer than `resources.trial_timeout_s` (={limit_s:g})")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    faulthandler.dump_traceback_later(limit_s + TIMEOUT_GRACE_S, exit=True, file=STDERR)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()
