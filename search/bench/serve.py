"""`prune-search bench serve`: what readers of the live page cost the service and a search.

The same search runs alone and with readers, in turn. Readers are a process of their own, as they
are on other machines; here it takes its share of the same cores.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from ..config import SearchConfig, dump_config, parse_config
from ..environment import environment
from ..runs import Run
from .common import markdown_row, spread

CLI = [sys.executable, "-P", "-m", "prunesearch.search.cli"]
SELF = [sys.executable, "-P", "-m", "prunesearch.search.bench.serve"]
PATHS = ("/runs", "/runs/{run}", "/runs/{run}/front", "/runs/{run}/trials?limit=50")
LOOK_S = 0.5
WITHIN_S = 30.0  # an answer

Say = Callable[[str], None]


def bench_serve(
    search: SearchConfig,
    say: Say,
    *,
    clients: int = 200,
    streams: int = 20,
    rounds: int = 3,
    pause_s: float = 5.0,
) -> dict[str, Any]:
    """Runs the search alone and with readers, `rounds` times in turn.

    Args:
        search: The search; its dense model is trained once, before anything is timed.
        say: Told what is measured now.
        clients: Readers, each asking for the next page after `pause_s` on average.
        streams: Event streams, read as fast as they come.
        rounds: How often.
        pause_s: Mean seconds between two requests of a reader.
    """
    data = search.model_dump(mode="json")
    config = parse_config(data | {"cache": {**data["cache"], "reuse": "dense"}})
    found: dict[str, list[Any]] = {"alone_s": [], "read_s": [], "load": []}
    with tempfile.TemporaryDirectory(prefix="prune-search-bench-") as scratch:
        results = Path(scratch)
        path = results / "config.yaml"
        path.write_text(dump_config(config))
        say("the dense model")
        _search(path, results / "first")
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}: alone")
            found["alone_s"].append(_search(path, results / f"alone{number}"))
            say(f"round {number + 1} of {rounds}: with {clients} readers and {streams} streams")
            with served(results) as (url, pid), _Readers(url, clients, streams, pause_s) as load:
                before = _cpu_s(pid)
                memory = _Memory(pid)
                load.start(f"read{number}")
                found["read_s"].append(_search(path, results / f"read{number}", each=memory.look))
                cpu_s = _cpu_s(pid) - before
            found["load"].append(load.report | memory.report | {"cpu_s": cpu_s})
    ratios = [b / a for a, b in zip(found["alone_s"], found["read_s"], strict=True)]
    asked = {"clients": clients, "streams": streams, "pause_s": pause_s}
    return asked | found | {"ratios": ratios, "environment": environment()}


def serve_table(result: Mapping[str, Any]) -> Table:
    """The result for people."""
    table = Table(title="prune-search serve under load", show_header=False)
    for row in _rows(result):
        table.add_row(*row)
    return table


def serve_markdown(result: Mapping[str, Any], command: str) -> str:
    """The result as a page for results/."""
    here = result["environment"]
    lines = [
        "# The live page under load",
        "",
        f"`{command}`: readers ask for a page of the run at a time, event streams are read as "
        "fast as they come, and all of them are one process on the machine that also searches and "
        f"serves: {here['cores']} cores of {here['cpu']}. The same search runs alone and with "
        f"readers, {len(result['ratios'])} times in turn; seconds are those of its trials.",
        "",
        "Median (range) of the rounds.",
        "",
        markdown_row(["", ""]),
        markdown_row(["---", "---:"]),
        *(markdown_row(row) for row in _rows(result)),
    ]
    return "\n".join(lines) + "\n"


def _rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    loads: Sequence[Mapping[str, Any]] = result["load"]
    return [
        ("readers, event streams", f"{result['clients']}, {result['streams']}"),
        ("seconds between two requests of a reader", f"{result['pause_s']:g}"),
        ("requests", " ".join(str(load["requests"]) for load in loads)),
        ("events", " ".join(str(load["events"]) for load in loads)),
        ("errors", " ".join(str(load["errors"]) for load in loads)),
        ("milliseconds to an answer, median", spread([x["p50_ms"] for x in loads], 1)),
        ("milliseconds to an answer, 99 of 100", spread([x["p99_ms"] for x in loads], 1)),
        ("service: memory at first, MiB", spread([x["memory_first_mib"] for x in loads], 0)),
        ("service: most memory, MiB", spread([x["memory_most_mib"] for x in loads], 0)),
        ("service: CPU seconds", spread([x["cpu_s"] for x in loads], 1)),
        ("readers: CPU seconds", spread([x["readers_cpu_s"] for x in loads], 1)),
        ("search alone, s (its trials)", spread(result["alone_s"], 1)),
        ("search with readers, s", spread(result["read_s"], 1)),
        ("ratio", spread(result["ratios"], 3)),
    ]


# --- the search and the service --------------------------------------------------------------


def _search(config: Path, folder: Path, each: Callable[[], None] | None = None) -> float:
    """Runs it to its end; the wall-clock seconds of its trials."""
    process = subprocess.Popen(
        [*CLI, "run", str(config), "--out", str(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None:
        if each is not None:
            each()
        time.sleep(LOOK_S)
    assert process.stderr is not None
    said = process.stderr.read()
    process.stderr.close()
    if process.returncode:
        raise RuntimeError(f"the search ended with {process.returncode}: {said[-2000:]}")
    return Run(folder).times["trials_s"]


@contextmanager
def served(results: Path) -> Iterator[tuple[str, int]]:
    """The service over a results folder, in a process of its own: its address and process id."""
    process = subprocess.Popen(
        [*CLI, "serve", str(results), "--port", "0"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        found = re.search(r"http://\S+", process.stdout.readline())
        if found is None:
            raise RuntimeError("the service did not start")
        yield found[0], process.pid
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


class _Memory:
    """The resident memory of a process, looked at from time to time (Linux)."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._seen: list[float] = []

    def look(self) -> None:
        text = Path(f"/proc/{self._pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", text)
        assert found is not None
        self._seen.append(int(found[1]) / 1024)

    @property
    def report(self) -> dict[str, float]:
        return {"memory_first_mib": self._seen[0], "memory_most_mib": max(self._seen)}


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# --- the readers: a process of their own -------------------------------------------------------


class _Readers:
    """Starts the readers' process, and ends it with its report."""

    def __init__(self, url: str, clients: int, streams: int, pause_s: float) -> None:
        self._arguments = [url, str(clients), str(streams), str(pause_s)]
        self._process: subprocess.Popen[str] | None = None
        self.report: dict[str, Any] = {}

    def __enter__(self) -> _Readers:
        return self

    def start(self, run: str) -> None:
        self._process = subprocess.Popen(
            [*SELF, *self._arguments, run], stdout=subprocess.PIPE, text=True
        )

    def __exit__(self, *exc: object) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        said, _ = self._process.communicate(timeout=120)
        self.report = json.loads(said)


@dataclass
class _Load:
    """What the readers saw."""

    times_ms: list[float] = field(default_factory=list)
    events: int = 0
    errors: int = 0


async def _read(url: str, clients: int, streams: int, pause_s: float, run: str) -> dict[str, Any]:
    load, over = _Load(), asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, over.set)
    host, _, port = url.removeprefix("http://").partition(":")
    readers = [_reader(host, int(port), run, pause_s, load) for _ in range(clients)]
    followers = [_follower(host, int(port), run, load) for _ in range(streams)]
    tasks = [asyncio.create_task(work) for work in (*readers, *followers)]
    await over.wait()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    times = sorted(load.times_ms)
    used = os.times()
    return {
        "requests": len(times),
        "events": load.events,
        "errors": load.errors,
        "p50_ms": statistics.median(times),
        "p99_ms": times[int(0.99 * (len(times) - 1))],
        "readers_cpu_s": used.user + used.system,
    }


async def _reader(host: str, port: int, run: str, pause_s: float, load: _Load) -> None:
    draw = random.Random()
    await asyncio.sleep(draw.uniform(0, pause_s))
    while True:
        path = draw.choice(PATHS).format(run=run)
        started = time.perf_counter()
        try:
            async with asyncio.timeout(WITHIN_S):
                status = await _get(host, port, path)
            expected = status == 200 or (status == 404 and run in path)  # it has just begun
        except (OSError, TimeoutError, ValueError):
            expected = False
        load.errors += not expected
        load.times_ms.append((time.perf_counter() - started) * 1e3)
        await asyncio.sleep(draw.expovariate(1 / pause_s))


async def _get(host: str, port: int, path: str) -> int:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        await _ask(writer, host, port, path)
        answer = await reader.read()
        head, _, body = answer.partition(b"\r\n\r\n")
        status = int(head.split(b" ", 2)[1])
        if status == 200:
            json.loads(body)
        return status
    finally:
        writer.close()


async def _follower(host: str, port: int, run: str, load: _Load) -> None:
    while True:
        try:
            reader, writer = await asyncio.open_connection(host, port)
            try:
                await _ask(writer, host, port, f"/runs/{run}/events")
                began = (await reader.readline()).split(b" ", 2)[1] == b"200"
                while line := await reader.readline():
                    load.events += began and line.startswith(b"event: ")
            finally:
                writer.close()
            load.errors += began  # a stream does not end by itself
        except OSError:
            load.errors += 1
        await asyncio.sleep(0.5)  # the run has not begun


async def _ask(writer: asyncio.StreamWriter, host: str, port: int, path: str) -> None:
    head = f"GET /api/v1{path} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n"
    writer.write(head.encode())
    await writer.drain()


if __name__ == "__main__":
    _url, _clients, _streams, _pause_s, _run = sys.argv[1:]
    print(
        json.dumps(asyncio.run(_read(_url, int(_clients), int(_streams), float(_pause_s), _run)))
    )
