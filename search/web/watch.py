"""Live events: one watcher a run, shared by all of its clients.

A client is a cursor into the run's snapshot: nothing is queued for it, and whoever is slow gets
fewer and larger updates. Whoever does not take one at all is dropped.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .ledger import COLUMNS, Ledger, Snapshot
from .problems import ProblemError

POLL_S = 1.0
ALIVE_S = 15.0  # proxies and browsers give up on silent connections
TAKEN_WITHIN_S = 20.0
CHUNK = 500  # points in one event
MEDIA_TYPE = "text/event-stream"


class Watch:
    """Looks at one run while anybody is there to be told."""

    def __init__(self, ledger: Ledger) -> None:
        """Looks at nothing yet."""
        self.clients = 0
        self.why_over: str | None = None
        self._over = False
        self._ledger = ledger
        self._latest: Snapshot | None = None
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def join(self) -> None:
        """One client more."""
        self.clients += 1
        if self._task is None:
            self._task = asyncio.create_task(self._look())

    def leave(self) -> None:
        """One client less; without any it stops looking."""
        self.clients -= 1
        if self.clients == 0 and self._task is not None:
            self._task.cancel()

    def end(self, why: str | None = None) -> None:
        """Tells the clients that there will be no more."""
        self._over, self.why_over = True, why
        self._tell()

    async def changes(self) -> AsyncIterator[Snapshot | None]:
        """Each new snapshot, the present one first; None as a sign of life."""
        seen = None
        while not self._over:
            changed = self._changed  # before looking, so that no change is missed
            if self._latest is not seen:
                seen = self._latest
                yield seen
            try:
                await asyncio.wait_for(changed.wait(), ALIVE_S)
            except TimeoutError:
                yield None

    async def _look(self) -> None:
        while True:
            try:
                snapshot = await asyncio.to_thread(self._ledger.snapshot)
            except (OSError, ValueError) as error:
                return self.end(str(error))
            if snapshot is not self._latest:
                self._latest = snapshot
                self._tell()
            await asyncio.sleep(POLL_S)

    def _tell(self) -> None:
        told, self._changed = self._changed, asyncio.Event()
        told.set()


class Watches:
    """The watchers of a service, and how many clients they may have together."""

    def __init__(self, most: int) -> None:
        """Watches nothing yet.

        Args:
            most: Clients at a time.
        """
        self._most = most
        self._known: dict[int, Watch] = {}

    def admit(self) -> None:
        """Refuses a client where there are too many.

        Raises:
            ProblemError: The refusal.
        """
        if sum(watch.clients for watch in self._known.values()) >= self._most:
            raise ProblemError(
                503,
                f"`streams` must be at most {self._most}: so many are open. Close one, or read "
                "the run without its events.",
                {"Retry-After": "10"},
            )

    @asynccontextmanager
    async def of(self, ledger: Ledger) -> AsyncIterator[Watch]:
        """The watcher of a run, for one client."""
        watch = self._known.setdefault(id(ledger), Watch(ledger))
        watch.join()
        try:
            yield watch
        finally:
            watch.leave()
            if watch.clients == 0 or watch.why_over is not None:
                self._known.pop(id(ledger), None)

    def close(self) -> None:
        """Ends all streams."""
        for watch in list(self._known.values()):
            watch.end()


class EventStream(Response):
    """The answer that does not end: server-sent events of one run, from a cursor on."""

    media_type = MEDIA_TYPE

    def __init__(self, watches: Watches, ledger: Ledger, cursor: str | None) -> None:
        """Sends nothing yet.

        Args:
            watches: The watchers.
            ledger: The run.
            cursor: What the client has seen, from `id:` of an event; None for nothing.
        """
        super().__init__()
        self._watches, self._ledger, self._cursor = watches, ledger, cursor

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends until the client leaves or is too slow, or the run or the service ends."""
        stream = asyncio.create_task(self._stream(send))
        gone = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({stream, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stream.cancel()
            gone.cancel()
            done = await asyncio.gather(stream, gone, return_exceptions=True)
        if isinstance(done[0], Exception) and not isinstance(done[0], TimeoutError):
            raise done[0]

    async def _stream(self, send: Send) -> None:
        headers = [(b"content-type", MEDIA_TYPE.encode()), (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async with self._watches.of(self._ledger) as watch:
            async for snapshot in watch.changes():
                for event in self._events(snapshot):
                    await _put(send, event)
        if watch.why_over is not None:
            await _put(send, _event("gone", json.dumps({"detail": watch.why_over})))
        await _put(send, b"", more=False)

    def _events(self, snapshot: Snapshot | None) -> Iterator[bytes]:
        """What is new since the cursor, which moves on."""
        if snapshot is None:
            yield b": alive\n\n"
            return
        points = snapshot.after(self._cursor)
        if not (self._cursor or "").startswith(f"{snapshot.epoch}-"):
            columns = [*COLUMNS, *snapshot.metrics]
            yield _event("start", json.dumps({"columns": columns}))
        for first in range(0, len(points), CHUNK):
            chunk = points[first : first + CHUNK]
            rows = json.dumps([values for _, values in chunk], separators=(",", ":"))
            yield _event("trials", rows, f"{snapshot.epoch}-{chunk[-1][0]}")
        self._cursor = snapshot.cursor
        yield _event("progress", snapshot.progress, snapshot.cursor)


def _event(kind: str, data: str, cursor: str | None = None) -> bytes:
    name = f"id: {cursor}\n" if cursor else ""
    return f"event: {kind}\n{name}data: {data}\n\n".encode()


async def _put(send: Send, body: bytes, *, more: bool = True) -> None:
    """Sends one piece.

    Raises:
        TimeoutError: If the client does not take it.
    """
    async with asyncio.timeout(TAKEN_WITHIN_S):
        await send({"type": "http.response.body", "body": body, "more_body": more})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
