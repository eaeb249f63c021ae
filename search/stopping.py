"""Asking the process that drives a run to end, from another process of its machine."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from .locks import LOCK, FileSign, Owner, in_use
from .yaml_source import ConfigError

SIGNED_WITHIN_S = 5.0  # between a driver's lock and its signature lie a few system calls


def stop(folder: Path, place: str) -> Owner:
    """Asks the driver to end as the first Ctrl-C does; the second time at once.

    By SIGTERM: Ray blocks SIGINT in what it starts. Only the process that has the lock is asked:
    a signature alone means nothing, its process may have ended long ago.

    Args:
        folder: The run folder on this machine.
        place: What to call it in messages.

    Raises:
        ConfigError: If no process drives the run, or none that can be reached from here.
    """
    deadline = time.monotonic() + SIGNED_WITHIN_S
    while in_use(folder) and time.monotonic() < deadline:
        owner = Owner.parse(FileSign(folder / LOCK).read())
        if owner is not None and _ask(owner, place):
            return owner
        time.sleep(0.05)
    raise ConfigError(
        f"`RUN_DIR` (={place}) must be a run in progress: no process of this machine drives it. "
        f"`prune-search status {place}` shows how far it is."
    )


def _ask(owner: Owner, place: str) -> bool:
    """Whether the owner was there to be asked."""
    if not owner.is_here:
        raise ConfigError(
            f"`RUN_DIR` (={place}) must be stopped on the machine that drives it ({owner}). Run "
            "the command there."
        )
    try:
        os.kill(owner.pid, signal.SIGTERM)
    except ProcessLookupError:
        return False  # the signature of an earlier driver
    except PermissionError:
        raise ConfigError(
            f"`RUN_DIR` (={place}) must be stopped by the user who drives it ({owner})."
        ) from None
    return True
