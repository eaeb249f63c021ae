"""Uploads what a run writes while it goes on; a store that is away for a while stops nothing."""

from __future__ import annotations

import shlex
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from .locks import Say, StorageError
from .yaml_source import ConfigError

EVERY_S = 30.0  # between two uploads of a run in which no trial ends
RETRY_S, RETRY_MAX_S = 1.0, 30.0  # the first pause after a failure, doubled up to the last
PATIENCE_S = 600.0  # how long the end of a run waits for a store that does not answer
PATIENCE_STOPPED_S = 20.0  # the same where the run was stopped, or failed


class Uploads:
    """Uploads in the background until the block ends, and then what is left.

    Args:
        push: Uploads what is new.
        uri: Where to, for messages.
        folder: The working copy, for messages.
        say: Told when uploads fail, and when they go on.
    """

    def __init__(self, push: Callable[[], None], uri: str, folder: Path, say: Say) -> None:
        self._push, self._uri, self._folder, self._say = push, uri, folder, say
        self._wake, self._over = threading.Event(), threading.Event()
        self._failed = False
        self._thread = threading.Thread(target=self._work, name="uploads", daemon=True)

    def changed(self) -> None:
        """Says that there is something new: it is uploaded soon."""
        self._wake.set()

    def __enter__(self) -> Uploads:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Uploads what is left.

        Raises:
            StorageError: If that fails for so long that it is given up; it does not replace an
                exception of the block, and is said then.
        """
        self._over.set()
        self._wake.set()
        self._thread.join()
        try:
            self._finish(PATIENCE_S if error is None else PATIENCE_STOPPED_S)
        except StorageError as reason:
            if error is None:
                raise
            self._say(f"warning: {reason}")

    def _work(self) -> None:
        pause = RETRY_S
        while not self._over.is_set():
            self._wake.clear()
            try:
                reason = self._try()
            except StorageError:
                return  # the right to write there is lost: its claim has said so
            if reason is None:
                pause = RETRY_S
                self._wake.wait(EVERY_S)
            else:
                self._over.wait(pause)
                pause = min(2 * pause, RETRY_MAX_S)

    def _finish(self, patience_s: float) -> None:
        deadline, pause = time.monotonic() + patience_s, RETRY_S
        while (reason := self._try()) is not None:
            if time.monotonic() + pause > deadline:
                uri = shlex.quote(self._uri)
                raise StorageError(
                    f"`RUN_DIR` (={self._uri}) must be reachable to take the results: {reason} "
                    f"Nothing is lost: all is in {self._folder}, and `prune-search resume {uri}` "
                    "on this machine uploads it."
                )
            time.sleep(pause)
            pause = min(2 * pause, RETRY_MAX_S)

    def _try(self) -> str | None:
        """Uploads; why that failed, or None. Says it where it is new."""
        try:
            self._push()
        except (OSError, ConfigError) as error:
            if not self._failed:
                self._say(
                    f"warning: results cannot be uploaded, it is tried again: {error} The run "
                    f"goes on; they are in {self._folder}"
                )
            self._failed = True
            return str(error)
        if self._failed:
            self._say(f"uploads go on: {self._uri} is up to date")
        self._failed = False
        return None
