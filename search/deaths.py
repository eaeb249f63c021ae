"""Why a worker died, and whether another attempt can end otherwise. Knows no Ray."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

TAIL_BYTES = 32_768  # of a worker's log; a crash writes a few kilobytes, at its end

_FULL = ("No space left on device", "Disk quota exceeded")
_CRASH = re.compile(r"Fatal Python error: ([^\n]+)")
_SIGNAL = re.compile(r"\*\*\* (SIG(?!TERM|INT)[A-Z]+) received")
_HUNG = re.compile(r"^Timeout \(\d", re.MULTILINE)
_THREAD = re.compile(r"\(most recent call first\):\n((?: +File [^\n]+\n?)+)")
_FRAME = re.compile(r'File "([^"]+)", line (\d+) in (\S+)')


@dataclass(frozen=True)
class Place:
    """Where a worker runs, as it says itself before each trial.

    Attributes:
        node_id: Ray's name of the node.
        log: The file on that node that holds the worker's standard error; empty if it has none.
    """

    node_id: str
    log: str


@dataclass(frozen=True)
class Death:
    """How a trial's worker ended.

    Attributes:
        cause: One line for the trial's row.
        again: Whether another attempt may end otherwise.
        stop: Whether nothing more should start: it is not the trial's fault.
    """

    cause: str
    again: bool = False
    stop: bool = False


def own_log() -> str:
    """The file that this process's standard error goes to; empty if that is no file."""
    try:
        path = Path("/proc/self/fd/2").resolve()
    except OSError:
        return ""
    return str(path) if path.is_file() else ""


def read_tail(path: str) -> str:
    """The end of a log; empty if it cannot be read."""
    try:
        with open(path, "rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def cause_of_death(error: str, log: str, *, limit_s: float | None = None) -> Death:
    """What ended a worker.

    A crash of native code and a hang would only repeat; what came from outside (a lost node, a
    kill, another process's hunger for memory) need not.

    Args:
        error: What Ray says of it.
        log: The end of the worker's log, as far as it could be read.
        limit_s: `resources.trial_timeout_s`.
    """
    if is_disk_full(error):
        return Death(f"the disk of the run folder is full: {_last_line(error)}", True, True)
    if "running low on memory" in error or "OutOfMemoryError" in error:
        return Death("out of memory: its worker was ended before the node ran out of it", True)
    if "its node has died" in error or "NodeDiedError" in error:
        return Death("its node was lost", again=True)
    if _HUNG.search(log):
        limit = "" if limit_s is None else f" (={limit_s:g})"
        return Death(
            f"took longer than `resources.trial_timeout_s`{limit} and could not be interrupted"
            + _where(log, _HUNG, thread=-1)
        )
    for pattern in (_CRASH, _SIGNAL):
        if found := pattern.search(log):
            return Death(f"its worker crashed: {found[1]}" + _where(log, pattern))
    if "creation task" in error:
        return Death(f"its worker could not start: {_last_line(error)}")
    if "worker process has died" in error or "ActorDiedError" in error:
        return Death("its worker was killed, or ended itself", again=True)
    return Death(_last_line(error), again=True)


def is_disk_full(error: object) -> bool:
    """Whether an error says that a disk is full; Ray's copies of it have no error number."""
    return any(reason in str(error) for reason in _FULL)


def _where(log: str, after: re.Pattern[str], *, thread: int = 0) -> str:
    """The innermost Python frame of a thread listed behind a match; the main one comes last."""
    start = after.search(log)
    threads = _THREAD.findall(log, start.end()) if start else []
    frame = _FRAME.search(threads[thread]) if threads else None
    return "" if frame is None else f" (in {frame[3]}, {Path(frame[1]).name}:{frame[2]})"


def _last_line(error: str) -> str:
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no reason given"
