"""Run folders on object stores: where a run is, and the right to drive it.

A run reads and writes a working copy on this machine as it would any folder; what is new or
changed there is uploaded while it goes on. The store is the truth when a run begins, except for
rows of trials that this machine had not uploaded yet: those are kept beside it, and the ledger
takes each trial once. Everybody may read the store at any time: a row there never names a file
that is not there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from .locks import LOCK, Say, claimed, locked
from .mirror import Mirror, folder_of
from .remote import Remote, is_uri
from .uploads import Uploads

SETTLE_S = 2.0  # two drivers that start within this time see each other


@dataclass(frozen=True)
class Session:
    """The right to drive a run.

    Attributes:
        changed: To be called when something is to be uploaded soon.
        then: Takes what is to be called with the reason when the right is lost.
    """

    changed: Callable[[], None]
    then: Callable[[Say], None]


def opened(place: str | Path) -> Path:
    """The run folder on this machine, brought up to date for reading; weights are left out.

    Raises:
        ConfigError: If the store cannot be read.
    """
    if is_uri(place):
        Mirror(str(place)).refresh()
    return folder_of(place)


def fetch(place: str | Path, names: Iterable[str]) -> None:
    """Brings these files of a run folder to this machine, where they are on the store."""
    if is_uri(place):
        Mirror(str(place)).fetch(names)


def contents(place: str | Path) -> set[str]:
    """What a run folder holds; on an object store with what was never uploaded to it."""
    if is_uri(place):
        mirror = Mirror(str(place))
        return mirror.remote.files().keys() | mirror.waiting()
    folder = Path(place)
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


@contextmanager
def driving(place: str | Path, say: Say, *, new: bool) -> Iterator[Session]:
    """The one driver of a run: locks it, brings it up to date, and uploads what it writes.

    Args:
        place: The run folder or its URI.
        say: Told what happens to the lock and to the uploads.
        new: Whether the run begins: what an earlier one left in the working copy is deleted.

    Raises:
        ConfigError: If another driver has it, or the store cannot be reached.
        StorageError: At the end, if another driver took it, or not all could be uploaded.
    """
    if not is_uri(place):
        with locked(Path(place), say) as claim:
            yield Session(_nothing, claim.then)
        return
    mirror = Mirror(str(place))
    with ExitStack() as held:
        with mirror.alone():
            held.enter_context(locked(mirror.folder, _unsaid))  # the store's says it all
            sign = _Object(mirror.remote)
            claim = held.enter_context(claimed(sign, mirror.remote.uri, say, settle_s=SETTLE_S))
            mirror.clear() if new else mirror.pull()

        def push() -> None:
            claim.check()
            mirror.push()

        with Uploads(push, mirror.remote.uri, mirror.folder, say) as uploads:
            yield Session(uploads.changed, claim.then)


class _Object:
    """The driver's sign, in an object."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote

    def read(self) -> bytes:
        """What is written there; empty if nothing is."""
        try:
            return self._remote.read(LOCK)
        except FileNotFoundError:
            return b""

    def write(self, data: bytes) -> None:
        """Replaces it."""
        self._remote.write(LOCK, data)

    def renew(self, data: bytes) -> None:
        """Gives a sign of life: an object's time is that of its last writing."""
        self.write(data)

    def silent_s(self) -> float:
        """Seconds since the last sign of life, by the store's clock."""
        probe = f".now-{os.urandom(4).hex()}"
        now, then = self._remote.write(probe, b"-"), self._remote.stamp(LOCK)
        self._remote.delete(probe)
        return float(now.second - (then.second if then is not None else 0))

    def clear(self) -> None:
        """Leaves nothing."""
        self._remote.delete(LOCK)


def _nothing() -> None:
    """Nothing is to be uploaded."""


def _unsaid(line: str) -> None:
    """Nobody is told."""
