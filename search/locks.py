"""One driver a run folder: a lock that survives crashes and says who holds it.

On one machine it is the operating system's file lock, which ends with its process. A file system
that several machines share may keep such locks to each machine, and an object store has none. So
the driver also signs with its name, and gives a sign of life every `BEAT_S`: nobody else starts
while it does, and a driver without one for `SILENT_S` is taken for dead. Silence is measured by
the storage's own clock: the clocks of the machines need not agree.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from .yaml_source import ConfigError

LOCK = ".lock"  # in the run folder: {"pid": ..., "host": ..., "since": ...}
BEAT_S = 10.0
SILENT_S = 60.0
POLL_S = 2.0
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # file systems without file locks

Say = Callable[[str], None]


class StorageError(RuntimeError):
    """The run's storage was lost to it; the message says what is safe and how to go on."""


@dataclass(frozen=True)
class Owner:
    """Who drives a run.

    Attributes:
        pid: Process id on `host`.
        host: Name of the machine.
        since: When it started, ISO 8601 in UTC.
    """

    pid: int
    host: str
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    @classmethod
    def here(cls) -> Owner:
        """This process, from now on."""
        return cls(os.getpid(), socket.gethostname(), datetime.now(UTC).isoformat())

    @classmethod
    def parse(cls, data: bytes) -> Owner | None:
        """Whoever signed with `data`; None if nobody did, or what is there is no signature."""
        try:
            found = json.loads(data)
            owner = cls(found["pid"], found["host"], found["since"])
        except (ValueError, KeyError, TypeError):
            return None
        sound = type(owner.pid) is int and owner.pid > 0
        texts = (owner.host, owner.since)
        sound = sound and all(isinstance(text, str) and text.isprintable() for text in texts)
        return owner if sound else None

    @property
    def signature(self) -> bytes:
        """What `parse` reads."""
        return (json.dumps(asdict(self)) + "\n").encode()

    @property
    def is_here(self) -> bool:
        """Whether it is, or was, a process of this machine."""
        return self.host == socket.gethostname()

    @property
    def runs_here(self) -> bool:
        """Whether it is a process of this machine that has not ended."""
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except PermissionError:
            pass  # of another user
        return self.is_here


class Sign(Protocol):
    """Where the driver of a run signs; each method may raise OSError or ConfigError."""

    def read(self) -> bytes:
        """What is written there; empty if nothing is."""

    def write(self, data: bytes) -> None:
        """Replaces it."""

    def renew(self, data: bytes) -> None:
        """Gives a sign of life; `data` is what is written there already."""

    def silent_s(self) -> float:
        """Seconds since the last sign of life, by the storage's clock."""

    def clear(self) -> None:
        """Leaves it empty."""


class Claim:
    """The right to drive a run, kept up until it ends; another driver may still take it away.

    That happens when this process was stopped, or its storage out of reach, for `SILENT_S`.
    """

    def __init__(self, sign: Sign, place: str) -> None:
        self._sign, self._place = sign, place
        self.signature = Owner.here().signature
        self.lost: str | None = None
        self._stop: Say | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="sign-of-life", daemon=True)

    def then(self, stop: Say) -> None:
        """Calls `stop` with the reason when the right is lost; at once if it is already."""
        self._stop = stop
        if self.lost is not None:
            stop(self.lost)

    def check(self) -> None:
        """Looks whether the right is lost.

        Raises:
            StorageError: If it is.
            OSError: If that cannot be told now.
            ConfigError: The same, from an object store.
        """
        if self.lost is None:
            found = self._sign.read()
            if found and found != self.signature:
                self._lose(Owner.parse(found))
        if self.lost is not None:
            raise StorageError(self.lost)

    def start(self) -> None:
        """Gives signs of life from now on."""
        self._thread.start()

    def end(self) -> None:
        """Gives the right back."""
        self._over.set()
        self._thread.join()
        with suppress(OSError, ConfigError, StorageError):  # then it ends with its silence
            self.check()
            self._sign.clear()

    def _beat(self) -> None:
        pause = POLL_S  # soon, for who signed at the same moment
        while not self._over.wait(pause):
            pause = BEAT_S
            try:
                self.check()
                self._sign.renew(self.signature)
            except StorageError:
                return
            except (OSError, ConfigError):
                pause = POLL_S  # out of reach: whoever reads or writes there says so

    def _lose(self, owner: Owner | None) -> None:
        self.lost = (
            f"`RUN_DIR` (={self._place}) must have one driver: another one has taken it over "
            f"({owner or 'unknown'}), because this one gave no sign of life for {SILENT_S:.0f} s. "
            "Let that one finish."
        )
        if self._stop is not None:
            self._stop(self.lost)


@contextmanager
def locked(folder: Path, say: Say) -> Iterator[Claim]:
    """One driver a run folder; the lock ends with the process, however it ends.

    Args:
        folder: The run folder; made if it is not there.
        say: Told when the run of a driver that crashed is taken over.

    Raises:
        ConfigError: If another driver has the folder.
        StorageError: At the end, if another driver took it meanwhile.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sign = FileSign(folder / LOCK)
    if sign.path.is_symlink() or (sign.path.exists() and not sign.path.is_file()):
        raise ConfigError(  # what it leads to would be overwritten
            f"`{sign.path}` must be a file of this folder: it is a link or a folder. Delete it."
        )
    with sign.path.open("ab") as file:
        alone = _lock(file.fileno(), sign, str(folder))
        with claimed(sign, str(folder), say, alone=alone) as claim:
            yield claim


@contextmanager
def claimed(
    sign: Sign, place: str, say: Say, *, alone: bool = False, settle_s: float = 0.0
) -> Iterator[Claim]:
    """Signs as the driver of a run, until the block ends.

    Args:
        sign: Where.
        place: The run's name, for messages.
        say: Told when the run of a driver that crashed is taken over.
        alone: Whether no other process of this machine can have it.
        settle_s: How long to wait for one that signs at the same moment; the last one has it.

    Raises:
        ConfigError: If another driver has it.
        StorageError: At the end, if another driver took it meanwhile.
    """
    _wait_for_silence(sign, place, say, alone)
    claim = Claim(sign, place)
    sign.write(claim.signature)
    if settle_s:
        time.sleep(settle_s)
        if (found := sign.read()) != claim.signature:
            raise _in_use(place, Owner.parse(found))
    claim.start()
    try:
        yield claim
    finally:
        claim.end()
    if claim.lost is not None:
        raise StorageError(claim.lost)


def in_use(folder: Path) -> bool:
    """Whether a process of this machine drives the run in `folder`."""
    try:
        with (folder / LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError as error:
        return error.errno not in _NO_LOCKS
    return False


class FileSign:
    """A sign in a file; its time of change is the sign of life."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> bytes:
        """What is written there; empty if nothing is."""
        with suppress(FileNotFoundError):
            return self.path.read_bytes()
        return b""

    def write(self, data: bytes) -> None:
        """Replaces it in place: the file lock belongs to the file, not to its name."""
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            os.pwrite(handle, data, 0)  # first, so that a reader never finds it empty
            os.ftruncate(handle, len(data))
        finally:
            os.close(handle)

    def renew(self, data: bytes) -> None:
        """Gives a sign of life."""
        os.utime(self.path)

    def silent_s(self) -> float:
        """Seconds since the last sign of life, by the clock that stamps files there."""
        with tempfile.TemporaryFile(dir=self.path.parent) as new, self.path.open("rb") as file:
            # open: a network file system then asks its server
            return os.fstat(new.fileno()).st_mtime - os.fstat(file.fileno()).st_mtime

    def clear(self) -> None:
        """Leaves it empty."""
        os.truncate(self.path, 0)


def _lock(handle: int, sign: FileSign, place: str) -> bool:
    """Takes the file lock; False where the file system has none."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise _in_use(place, Owner.parse(sign.read())) from error
    return True


def _wait_for_silence(sign: Sign, place: str, say: Say, alone: bool) -> None:
    """Returns when nobody drives the run; what another machine's driver does takes a while to see.

    Raises:
        ConfigError: If somebody does.
    """
    first, before = sign.read(), None
    while (found := sign.read()) and (owner := Owner.parse(found)) is not None:
        silent_s = sign.silent_s()
        ended = owner.is_here and (alone or not owner.runs_here)
        if ended or silent_s > SILENT_S:
            say(f"taken over from a driver that did not end in order ({owner})")
            return
        renewed = found != first or (before is not None and silent_s < before)
        if renewed or (owner.is_here and silent_s < 2 * BEAT_S):
            raise _in_use(place, owner)
        if before is None:
            say(f"{place} has a driver ({owner}): waiting for its next sign of life")
        before = silent_s
        time.sleep(POLL_S)


def _in_use(place: str, owner: Owner | None) -> ConfigError:
    who = f" ({owner})" if owner is not None else ""
    return ConfigError(
        f"`RUN_DIR` (={place}) must not be in use: another process is running this search{who}. "
        "Wait for it, or stop it first."
    )
