"""A limit on how long a trial or a job may take."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

TIMEOUT_GRACE_S = 10.0


@contextmanager
def watchdog(limit_s: float | None) -> Iterator[None]:
    """Ends a trial that takes too long: an exception where Python runs, else the process."""
    if limit_s is None:
        yield
        return

    def stop(signum: int, frame: Any) -> None:
        raise TimeoutError(f"took longer than `resources.trial_timeout_s` (={limit_s:g})")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    killer = threading.Timer(limit_s + TIMEOUT_GRACE_S, os._exit, args=(124,))
    killer.daemon = True
    killer.start()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        killer.cancel()
