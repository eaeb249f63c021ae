"""Commands of prune-search as processes of their own, and what they say."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence

from ..yaml_source import ConfigError
from .problems import ProblemError

COMMAND = [sys.executable, "-P", "-m", "prunesearch.search.cli"]
MOST_AT_ONCE = 2
WAIT_S = 60.0  # for a turn
WRONG_INPUT = 2
_MINE = "prune-search: "


class Commands:
    """Runs commands and waits for them, few at a time."""

    def __init__(self) -> None:
        """Runs nothing yet."""
        self._running: set[subprocess.Popen[str]] = set()
        self._room = threading.BoundedSemaphore(MOST_AT_ONCE)

    def end(self) -> None:
        """Ends those in progress."""
        for process in list(self._running):
            process.terminate()

    def ask(self, *words: str, within_s: float, command: Sequence[str] = COMMAND) -> str:
        """What a command prints.

        Raises:
            ConfigError: If it says that the input is wrong.
            ProblemError: If it fails, or takes too long.
        """
        name = words[0] if words else "options"
        with self._turn():
            process = subprocess.Popen(
                [*command, *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment(),
            )
            self._running.add(process)
            try:
                said, complaint = process.communicate(timeout=within_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                raise ProblemError(
                    504, f"`{name}` must end within {within_s:.0f} s: it did not. Run it by hand."
                ) from None
            finally:
                self._running.discard(process)
        if process.returncode == WRONG_INPUT:
            raise ConfigError(message_of(complaint))
        if process.returncode:
            raise ProblemError(409, f"`{name}` must succeed: it did not. {message_of(complaint)}")
        return said

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Few commands at a time: each loads torch and a data set."""
        if not self._room.acquire(timeout=WAIT_S):
            raise ProblemError(
                503, "`checks` must be fewer: others are running. Wait.", {"Retry-After": "10"}
            )
        try:
            yield
        finally:
            self._room.release()


def message_of(said: str) -> str:
    """What a command says of its end: its own lines if there are any, else the last."""
    lines = [line for line in said.splitlines() if line.strip()]
    own = [index for index, line in enumerate(lines) if line.startswith(_MINE)]
    if not own:
        return lines[-1].strip()[:500] if lines else "It said nothing."
    text = "\n".join(lines[own[-1] :]).removeprefix(_MINE)
    return re.sub(r"\x1b\[[0-9;]*m", "", text)[:5000]


def environment() -> dict[str, str]:
    """Of a command whose output is read by a program."""
    return os.environ | {"NO_COLOR": "1", "TERM": "dumb"}
