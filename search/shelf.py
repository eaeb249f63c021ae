"""A folder of results by content address, which any number of processes use at once.

    KIND-DIGEST/entry.json             what the result depends on, what is known of it, a checksum
    KIND-DIGEST/tensors.safetensors    its tensors, where it has any

An entry is made aside and renamed into place: it is whole or absent, whenever its writer dies.
Nothing is synced to the disk: an entry that a power cut damaged fails its checksum and is made
again, as is one that anybody changed.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = "results"  # the shelf in `cache_dir` that all runs share
ENTRY = "entry.json"
TENSORS = "tensors.safetensors"
LEASE_S = 30.0  # a maker that is silent for so long is taken for dead
LEFTOVER_S = 3600.0  # what a dead writer left aside is deleted after this
TRIMMED = 0.9  # of the limit is left when it was exceeded: the next entries find room
_NAME = re.compile(r"[a-z_]+-[0-9a-f]{24}")
_ASIDE, _LOCKS = ".aside", ".locks"
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)


@dataclass(frozen=True)
class Packed:
    """A result as it is stored: the entry's JSON, and its tensors (empty without any)."""

    entry: bytes
    tensors: bytes = b""

    @classmethod
    def of(cls, key: Mapping[str, Any], info: Mapping[str, Any], tensors: bytes) -> Packed:
        """Packs a result.

        Args:
            key: All that it depends on.
            info: What is known of its making, as JSON values.
            tensors: Its tensors as safetensors.
        """
        body = {"name": address(key), "key": dict(key), "info": dict(info)}
        body = json.loads(json.dumps(body))  # as it will be read: all keys are strings
        document = {"checksum": _checksum(body, tensors), **body}
        return cls((json.dumps(document) + "\n").encode(), tensors)

    @property
    def name(self) -> str:
        """Its address."""
        return str(json.loads(self.entry)["name"])

    @property
    def info(self) -> dict[str, Any]:
        """What is known of the result."""
        found: dict[str, Any] = json.loads(self.entry)["info"]
        return found

    def is_whole(self, name: str) -> bool:
        """Whether this is, unchanged, what was packed as `name`."""
        try:
            document = json.loads(self.entry)
            body = {part: document[part] for part in ("name", "key", "info")}
            whole = document["checksum"] == _checksum(body, self.tensors)
            return bool(whole and body["name"] == name and isinstance(body["info"], dict))
        except (ValueError, KeyError, TypeError, RecursionError):
            return False


def address(key: Mapping[str, Any]) -> str:
    """Content address of a result: a readable kind and a digest of all that it depends on."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    return f"{key['kind']}-{digest}"


def cache_dir() -> Path:
    """Where results are kept for other runs: one folder a user."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PRUNE_SEARCH_CACHE") or Path(base) / "prune-search")


class Shelf:
    """The entries in `folder`, which is created by the first write."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, name: str) -> Packed | None:
        """The entry called `name`, marked as used now; None if there is none that is whole."""
        path = self.folder / name
        try:
            tensors = path / TENSORS
            entry = (path / ENTRY).read_bytes()
            packed = Packed(entry, tensors.read_bytes() if tensors.exists() else b"")
        except OSError as error:
            if error.errno not in _ABSENT:
                raise
            packed = Packed(b"")
        if packed.is_whole(name):
            with contextlib.suppress(FileNotFoundError):  # thrown away meanwhile
                os.utime(path)
            return packed
        if os.path.lexists(path):
            self._discard(path)
        return None

    def put(self, name: str, packed: Packed) -> None:
        """Stores an entry. One that is there already stays: it means the same."""
        with self._aside() as aside:
            aside.mkdir()
            if packed.tensors:
                (aside / TENSORS).write_bytes(packed.tensors)
            (aside / ENTRY).write_bytes(packed.entry)
            self._place(aside, name)

    def link(self, name: str, other: Shelf) -> None:
        """Takes over an entry of another shelf without a copy of its bytes, where possible."""
        with self._aside() as aside:
            aside.mkdir()
            for file in (other.folder / name).iterdir():
                try:
                    os.link(file, aside / file.name)
                except OSError:  # another file system, or one without links
                    shutil.copyfile(file, aside / file.name)
            self._place(aside, name)

    def lock(self, name: str) -> Lock | None:
        """The right to make an entry; None while another live process has it.

        It ends with the process that holds it, or when that process is silent for `LEASE_S`.
        """
        path = self.folder / _LOCKS / name
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            lock = Lock(path, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                silent = time.time() - os.fstat(handle).st_mtime > LEASE_S
                if not silent:
                    os.close(handle)
                    return None
                lock.end()  # the next turn makes another file
                continue
            if lock.is_current:
                lock.renew()
                return lock
            os.close(handle)  # its holder deleted it before we had it

    def trim(self, max_bytes: float) -> None:
        """Throws the least recently used entries away when all together exceed `max_bytes`."""
        self._sweep()
        found = sorted(self._sizes(), key=lambda item: item[1])
        total = sum(size for _, _, size in found)
        if total <= max_bytes:
            return
        for path, _, size in found:
            if total <= TRIMMED * max_bytes:
                return
            self._discard(path)
            total -= size

    def clear(self) -> None:
        """Throws all entries away, and nothing else that may lie in the folder."""
        for path, _, _ in self._sizes():
            self._discard(path)

    def usage(self) -> dict[str, tuple[int, int]]:
        """Number of entries and bytes, by kind."""
        found: dict[str, list[int]] = collections.defaultdict(list)
        for path, _, size in self._sizes():
            found[path.name.rpartition("-")[0]].append(size)
        return {kind: (len(sizes), sum(sizes)) for kind, sizes in sorted(found.items())}

    def _sizes(self) -> Iterator[tuple[Path, float, int]]:
        """Path, time of last use and bytes of each entry."""
        with contextlib.suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            for entry in entries:
                if not _NAME.fullmatch(entry.name):
                    continue
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    status = entry.stat(follow_symlinks=False)
                    files = sum(file.stat().st_size for file in os.scandir(entry.path))
                    yield Path(entry.path), status.st_mtime, status.st_size + files

    def _place(self, aside: Path, name: str) -> None:
        while True:
            try:
                os.rename(aside, self.folder / name)
                return
            except OSError as error:
                if error.errno not in _TAKEN:
                    raise
            if self.get(name) is not None:
                return

    def _discard(self, path: Path) -> None:
        """Takes an entry away at once for all, then deletes it."""
        with self._aside() as aside, contextlib.suppress(FileNotFoundError):
            os.rename(path, aside)

    @contextlib.contextmanager
    def _aside(self) -> Iterator[Path]:
        """A path of one's own beside the entries; what is left there is deleted."""
        path = self.folder / _ASIDE / uuid.uuid4().hex
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield path
        finally:
            _delete(path)

    def _sweep(self) -> None:
        """Deletes what dead writers left."""
        with contextlib.suppress(FileNotFoundError):
            for path in (self.folder / _ASIDE).iterdir():
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - path.lstat().st_mtime > LEFTOVER_S:
                        _delete(path)


@dataclass(frozen=True)
class Lock:
    """A locked file; another process that finds it locked and fresh waits."""

    path: Path
    handle: int

    @property
    def is_current(self) -> bool:
        """Whether the file is still the one that others would lock."""
        try:
            return os.path.samestat(os.fstat(self.handle), os.stat(self.path))
        except FileNotFoundError:
            return False

    def renew(self) -> None:
        """Says that the work goes on."""
        os.utime(self.handle)

    def end(self) -> None:
        """Lets others at it."""
        if self.is_current:
            self.path.unlink(missing_ok=True)
        os.close(self.handle)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)  # another process may be deleting it too
    else:
        path.unlink(missing_ok=True)


def _checksum(body: Mapping[str, Any], tensors: bytes) -> str:
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode())
    digest.update(tensors)
    return digest.hexdigest()
