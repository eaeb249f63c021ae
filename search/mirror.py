"""A working copy on this machine and its mirror on an object store, kept equal both ways."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from .locks import LOCK, in_use
from .remote import Remote, Stamp, checked, is_safe, is_uri
from .shelf import cache_dir
from .store import atomic_write_bytes, read_json, write_json
from .yaml_source import ConfigError

COPIES = "runs"  # the working copies, in the user's cache folder
CONFIG = "config.yaml"
STATE, MUTEX = "state.json", "mutex"  # beside the working copy
ROWS, FRONT = "trials/", "front.parquet"  # the ledger: its rows name other files
WEIGHTS = ".safetensors"
NUM_THREADS = 8
_ATTEMPTS = 5  # to list and read a folder while its driver compacts it


class LocalStamp(NamedTuple):
    """What tells one version of a file in the working copy from another."""

    size: int
    mtime_ns: int


class Synced(NamedTuple):
    """The versions of one file that are the same on both sides."""

    local: LocalStamp
    remote: Stamp


def folder_of(place: str | Path) -> Path:
    """The run folder on this machine: the working copy of a URI, which may not be there yet.

    Raises:
        ConfigError: If `place` is a URI, but not that of a run folder.
    """
    if not is_uri(place):
        return Path(place)
    uri = checked(str(place))
    name = urlsplit(uri).path.rpartition("/")[2]
    if not name:
        raise ConfigError(
            f"`RUN_DIR` (={uri}) must name a folder in its bucket. Write it as "
            "s3://BUCKET/PREFIX/NAME."
        )
    digest = hashlib.sha256(uri.encode()).hexdigest()[:16]
    return cache_dir() / COPIES / digest / re.sub(r"[^A-Za-z0-9._-]", "_", name)


class Mirror:
    """A run folder on an object store and its working copy on this machine.

    Raises:
        ConfigError: If `uri` is not that of a run folder.
        UnreachableError: Here and in most methods, if the store refuses or does not answer.
    """

    def __init__(self, uri: str) -> None:
        self.folder = folder_of(uri)
        self.remote = Remote(uri)
        self._state = self.folder.parent / STATE
        self._synced = self._load()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other process of this machine brings the working copy up to date meanwhile."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder.parent / MUTEX).open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def refresh(self) -> None:
        """Downloads what a reader needs, unless this machine drives the run: it has all then."""
        with self.alone():
            if not in_use(self.folder):
                self.pull(weights=False)

    def fetch(self, names: Iterable[str]) -> None:
        """Downloads single files that are not in the working copy, where the store has them."""
        with self.alone():
            self._synced = self._load()
            missing = {name for name in names if is_safe(name)}
            missing = {name for name in missing if not (self.folder / name).exists()}
            stamps = {name: self.remote.stamp(name) for name in missing}
            self._download({name: stamp for name, stamp in stamps.items() if stamp is not None})
            self._save()

    def pull(self, *, weights: bool = True) -> None:
        """Brings the working copy up to date with the store.

        A row of ours that was not uploaded is kept beside the store's.

        Raises:
            ConfigError: If the run was deleted from the store.
        """
        self._synced = self._load()
        try:
            for attempt in range(_ATTEMPTS):
                try:
                    return self._pull(weights)
                except FileNotFoundError:  # its driver has compacted rows since they were listed
                    if attempt == _ATTEMPTS - 1:
                        raise
        finally:
            self._save()

    def push(self) -> None:
        """Uploads what is new or changed in the working copy, deletes what is gone from it.

        Whenever it is cut short, no row on the store names a file that is not there: a file is
        uploaded before the row that names it, and deleted after the row that no longer does.
        """
        before = self._ledger()
        rows = {name: self._bytes(name) for name in self._changed(before)}
        files = self._files()  # listed after the rows were read, so it holds what they name
        try:
            self._upload({name: files[name] for name in self._changed(files)}, self._bytes)
            now = self._ledger()
            same = {name: now[name] for name in rows if now.get(name) == before[name]}
            self._upload(same, rows.__getitem__)
            if now == before:  # else there may be a row, not uploaded yet, that gave a file up
                self._delete(self._synced.keys() - before.keys() - files.keys())
        finally:
            self._save()

    def waiting(self) -> set[str]:
        """Files of the working copy that are not yet uploaded."""
        return set(self._changed(self._ledger() | self._files()))

    def clear(self) -> None:
        """Empties the working copy, except for its lock."""
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()
        self._synced = {}
        self._save()

    # --- from the store ---------------------------------------------------------------------

    def _pull(self, weights: bool) -> None:
        remote, local = self.remote.files(), self._ledger() | self._files()
        if CONFIG in self._synced and CONFIG not in remote:
            raise ConfigError(
                f"`RUN_DIR` (={self.remote.uri}) must hold the run: it was deleted there. What "
                f"this machine knows of it is in {self.folder}: use that, or delete it."
            )
        wanted = {name: remote[name] for name in remote if weights or not _is_heavy(name)}
        known = local.keys() & self._synced.keys() & wanted.keys()
        for name in known:
            if self._synced[name].remote == wanted[name]:
                del wanted[name]
        self._download(wanted)
        for name in self._synced.keys() - remote.keys():
            if self._synced.pop(name).local == local.get(name):
                (self.folder / name).unlink(missing_ok=True)

    def _download(self, wanted: Mapping[str, Stamp]) -> None:
        start_ns = time.time_ns()
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            for name, stamp in zip(wanted, pool.map(self._place, wanted), strict=True):
                self._synced[name] = Synced(stamp, wanted[name])
        # Of two equal rows the ledger takes the later file's, so the files keep the store's order;
        # a compaction came before a row of the same second. The times are ours, because what is
        # written next must be later.
        order = sorted(wanted, key=lambda name: (wanted[name].second, "/compact-" not in name))
        for index, name in enumerate(order):
            path, time_ns = self.folder / name, start_ns + 1000 * index
            os.utime(path, ns=(time_ns, time_ns))
            self._synced[name] = Synced(_local_stamp(path), wanted[name])

    def _place(self, name: str) -> LocalStamp:
        """Downloads a file; a row of ours that was not uploaded is set aside, still a row."""
        data, path = self.remote.read(name), self.folder / name
        if name.startswith(ROWS) and path.exists():
            known = self._synced.get(name)
            ours = known is None or known.local != _local_stamp(path)
            if ours and path.read_bytes() != data:
                os.replace(path, path.with_name(f"{path.stem}-{os.urandom(4).hex()}.parquet"))
        atomic_write_bytes(path, data)
        return _local_stamp(path)

    # --- to the store -----------------------------------------------------------------------

    def _upload(
        self, files: Mapping[str, LocalStamp], content: Callable[[str], bytes | None]
    ) -> None:
        def send(name: str) -> Stamp | None:
            data = content(name)
            return None if data is None else self.remote.write(name, data)

        with ThreadPoolExecutor(NUM_THREADS) as pool:
            for name, stamp in zip(files, pool.map(send, files), strict=True):
                if stamp is not None:
                    self._synced[name] = Synced(files[name], stamp)

    def _delete(self, names: Collection[str]) -> None:
        for name in sorted(names, key=_is_row, reverse=True):
            self.remote.delete(name)
            del self._synced[name]

    def _changed(self, local: Mapping[str, LocalStamp]) -> list[str]:
        synced = self._synced
        return [name for name in local if name not in synced or synced[name].local != local[name]]

    def _bytes(self, name: str) -> bytes | None:
        """A file's content; None if it has gone since it was listed."""
        with suppress(FileNotFoundError):
            return (self.folder / name).read_bytes()
        return None

    # --- what there is ----------------------------------------------------------------------

    def _ledger(self) -> dict[str, LocalStamp]:
        """The files of the working copy that hold rows."""
        return {name: stamp for name, stamp in self._walk() if _is_row(name)}

    def _files(self) -> dict[str, LocalStamp]:
        """The other files of the working copy."""
        return {name: stamp for name, stamp in self._walk() if not _is_row(name)}

    def _walk(self) -> Iterator[tuple[str, LocalStamp]]:
        for folder, folders, files in os.walk(self.folder):
            folders[:] = [name for name in folders if is_safe(name)]
            for path in (Path(folder, name) for name in files if is_safe(name)):
                with suppress(FileNotFoundError):
                    yield path.relative_to(self.folder).as_posix(), _local_stamp(path)

    def _load(self) -> dict[str, Synced]:
        if not self._state.exists():
            return {}
        try:
            files = read_json(self._state)["files"]
            return {
                name: Synced(LocalStamp(*local), Stamp(*remote))
                for name, (local, remote) in files.items()
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"`{self._state}` must say what is uploaded: {error}. Delete it: the store is "
                "compared anew."
            ) from error

    def _save(self) -> None:
        write_json(self._state, {"uri": self.remote.uri, "files": self._synced})


def _is_row(name: str) -> bool:
    return name.startswith(ROWS) or name == FRONT


def _is_heavy(name: str) -> bool:
    return name.endswith(WEIGHTS)


def _local_stamp(path: Path) -> LocalStamp:
    status = path.stat()
    return LocalStamp(status.st_size, status.st_mtime_ns)
