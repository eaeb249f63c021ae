"""Results that trials share: made once, stored by the content that they depend on.

Scores, rankings and sparse-trained weights cost seconds to hours; whichever trial asks first
makes them, one that asks meanwhile waits, later ones, resumed runs and other runs read them.

There are two shelves: the run's own, which holds what the run used (so that it can be resumed
wherever its folder goes), and the user's, which all runs on a machine share.
"""

from __future__ import annotations

import math
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from .config import CacheConfig, ConfigError
from .shelf import LEASE_S, RESULTS, TRIMMED, Lock, Packed, Shelf, address, cache_dir

if TYPE_CHECKING:
    from torch import Tensor

SHARED = "shared"  # the folder in the run folder
POLL_S = 0.2  # between two questions whether another's result is there
CHECK_EVERY = 1 / 20  # of the limit is written between two looks at the size

Say = Callable[[str], None]
Task = Literal["ready", "make", "wait", "failed"]


@dataclass(frozen=True)
class Made:
    """A shared result: tensors, and what is known of their making, as JSON values."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)

    def pack(self, key: Mapping[str, Any]) -> Packed:
        """The result as it is stored."""
        from safetensors.torch import save  # the keeper needs no torch

        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        return Packed.of(key, self.info, save(tensors) if tensors else b"")

    @classmethod
    def unpack(cls, packed: Packed) -> Made:
        """Inverse of `pack`.

        Raises:
            ConfigError: If somebody else packed it, and not in this way.
        """
        from safetensors.torch import load

        try:
            return cls(load(packed.tensors) if packed.tensors else {}, packed.info)
        except Exception as error:  # of damaged tensors the library raises several kinds
            raise ConfigError(
                f"`{SHARED}/{packed.name}` must hold tensors: {error}. Delete that folder, here "
                "and in the folder that `prune-search cache` names."
            ) from error


class Shared(Protocol):
    """Results that trials share: made by the first that asks, read by the others."""

    def __call__(self, key: Mapping[str, Any], make: Callable[[], Made]) -> tuple[Made, float]:
        """The result called `key`, and the seconds spent waiting for another to make it.

        Raises:
            FloatingPointError: If making it diverges, or did so before in this run.
        """


def make_here(key: Mapping[str, Any], make: Callable[[], Made]) -> tuple[Made, float]:
    """Shares nothing: makes the result."""
    return make(), 0.0


def sharing(ask: Callable[..., Any]) -> Shared:
    """Access to a `Cache`, which may be in another process.

    Args:
        ask: Calls a method of the cache: (its name, *arguments) -> its value.
    """
    owner = uuid.uuid4().hex

    def shared(key: Mapping[str, Any], make: Callable[[], Made]) -> tuple[Made, float]:
        name, waited = address(key), 0.0
        while True:
            task, found = ask("claim", name, owner)
            if task == "ready":
                return Made.unpack(found), waited
            if task == "failed":
                raise FloatingPointError(f"{found} (in an earlier trial that asked for the same)")
            if task == "make":
                break
            time.sleep(POLL_S)
            waited += POLL_S
        failure = None
        try:
            with _lease(lambda: ask("renew", name, owner)):
                made = make()
                ask("put", name, made.pack(key))
        except FloatingPointError as error:
            failure = str(error)
            raise
        finally:
            ask("release", name, owner, failure)
        return made, waited

    return shared


def sharing_here(cache: Cache) -> Shared:
    """Access to a cache in this process."""
    return sharing(lambda method, *arguments: getattr(cache, method)(*arguments))


def open_cache(
    config: CacheConfig,
    run_dir: Path | None,
    say: Say,
    *,
    kind: Literal["dense", "results"] = "results",
) -> Cache:
    """The cache of a run folder, in this process.

    Args:
        config: Whether other runs share it, and how much is kept for them.
        run_dir: The run folder; None where only what other runs share is asked for.
        say: Told why results cannot be shared with other runs.
        kind: Whether the dense model is asked for, or what is made of it.
    """
    run = None if run_dir is None else run_dir / SHARED
    return Cache(run, user_shelf(config, kind), config.max_gib * 2**30, say)


def user_shelf(config: CacheConfig, kind: Literal["dense", "results"] = "results") -> Path | None:
    """The folder of results that other runs share; None where they do not."""
    shared = config.reuse == "all" or config.reuse == kind
    return cache_dir() / RESULTS if shared else None


class Cache:
    """Shared results on two shelves, and who is making the missing ones.

    One process owns a run's cache and serves the others.

    Args:
        run: The run's own shelf; None without one.
        user: The shelf of all runs on this machine; None shares nothing with others.
        max_bytes: What the user's shelf may hold. The run's is not limited: it holds one result
            for each criterion, sparse training of the grid and measured architecture.
        warn: Told why results cannot be shared with other runs; the run goes on without.
    """

    def __init__(
        self,
        run: Path | None,
        user: Path | None = None,
        max_bytes: float = math.inf,
        warn: Say = warnings.warn,
    ) -> None:
        self._run = None if run is None else Shelf(run)
        self._user = None if user is None else Shelf(user)
        self._max_bytes = max_bytes
        self._warn = warn
        self._leases: dict[str, tuple[str, float]] = {}
        self._locks: dict[str, Lock] = {}
        self._unchecked = math.inf  # bytes written since the size was looked at

    def claim(self, name: str, owner: str) -> tuple[Task, Any]:
        """What `owner` is to do about a result: read it, make it, ask again soon, or give up.

        Args:
            name: From `address`.
            owner: Names the asking worker. It must `renew` its claim within `LEASE_S`.

        Returns:
            The task; with it the packed result, or the message of the failure.
        """
        self._end_silent_claims()
        if (packed := self._find(name)) is not None:
            return "ready", packed
        if (failure := self._failure(name)) is not None:
            return "failed", failure
        holder, _ = self._leases.get(name, (owner, 0.0))
        if holder != owner or not self._lock(name):
            return "wait", None
        if (packed := self._find(name)) is not None:  # stored since the first look
            self.release(name, owner)
            return "ready", packed
        self.renew(name, owner)
        return "make", None

    def renew(self, name: str, owner: str) -> None:
        """Says that `owner` is still at work on a result."""
        self._leases[name] = (owner, time.monotonic() + LEASE_S)
        if name in self._locks:
            self._locks[name].renew()

    def put(self, name: str, packed: Packed) -> None:
        """Stores a result for this run and for others."""
        if self._run is not None:
            self._run.put(name, packed)
        self.publish(name, packed)

    def publish(self, name: str, packed: Packed) -> None:
        """Stores a result for other runs."""
        with self._shared_with_others():
            size = len(packed.entry) + len(packed.tensors)
            if self._user is None or size > TRIMMED * self._max_bytes:
                return
            if self._run is not None and (self._run.folder / name).exists():
                self._user.link(name, self._run)
            else:
                self._user.put(name, packed)
            self._unchecked += size
            if self._unchecked > CHECK_EVERY * self._max_bytes:
                self._user.trim(self._max_bytes)
                self._unchecked = 0.0

    def release(self, name: str, owner: str, failure: str | None = None) -> None:
        """Ends a claim.

        Args:
            name: From `address`.
            owner: Who has claimed it.
            failure: Why it cannot be made: whoever asks in this run is told so. Without one the
                next that asks may try.
        """
        if failure is not None and self._run is not None:
            key = _failure_key(name)
            self._run.put(address(key), Packed.of(key, {"message": failure}, b""))
        if self._leases.get(name, ("", 0.0))[0] == owner:
            self._end_claim(name)

    def published(self, name: str) -> Packed | None:
        """A result that any run has stored for others."""
        with self._shared_with_others():
            if self._user is not None:
                return self._user.get(name)
        return None

    def _find(self, name: str) -> Packed | None:
        """A stored result; one of another run becomes this run's too."""
        if self._run is not None and (packed := self._run.get(name)) is not None:
            return packed
        packed = self.published(name)
        if packed is not None and self._run is not None and self._user is not None:
            try:
                self._run.link(name, self._user)
            except FileNotFoundError:  # thrown away by another process meanwhile
                self._run.put(name, packed)
        return packed

    def _failure(self, name: str) -> str | None:
        found = None if self._run is None else self._run.get(address(_failure_key(name)))
        return None if found is None else str(found.info.get("message"))

    def _lock(self, name: str) -> bool:
        """Whether no other run is making the result; from now on this one is."""
        if name in self._locks:
            return True
        with self._shared_with_others():
            if self._user is not None:
                lock = self._user.lock(name)
                if lock is None:
                    return False
                self._locks[name] = lock
        return True

    def _end_silent_claims(self) -> None:
        now = time.monotonic()
        for name in [name for name, (_, until) in self._leases.items() if until < now]:
            self._end_claim(name)

    def _end_claim(self, name: str) -> None:
        self._leases.pop(name, None)
        if (lock := self._locks.pop(name, None)) is not None:
            lock.end()

    @contextmanager
    def _shared_with_others(self) -> Iterator[None]:
        """A user's shelf that cannot be used is left alone for the rest of the run."""
        try:
            yield
        except OSError as error:
            if self._user is not None:
                self._warn(f"warning: nothing more is shared with other runs: {error}")
            self._user = None


def _failure_key(name: str) -> dict[str, Any]:
    return {"kind": "failed", "of": name}


@contextmanager
def _lease(renew: Callable[[], Any]) -> Iterator[None]:
    """Keeps saying that this worker is alive."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(LEASE_S / 4):
            renew()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
