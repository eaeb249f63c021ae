"""Run folders made by hand, and the service on a free port of this machine."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from helpers import SMALL

from prunesearch.search.config import dump_config, load_config
from prunesearch.search.records import TrialResult, TrialStatus
from prunesearch.search.store import Store, write_json
from prunesearch.search.web.app import App, create_app
from prunesearch.search.web.server import Server
from prunesearch.search.web.settings import Settings

BASELINE = {
    "accuracy": 0.98, "loss": 0.1, "macs": 10_000_000, "num_params": 270_000,
    "peak_memory_mib": 1.2, "latency_ms": 0.9,
}  # fmt: skip
START = 1_750_000_000.0


def make_run(results: Path, name: str, trials: int = 30, *, seed: int = 0) -> Path:
    """A finished run: dense model, controls, every status, one compacted part."""
    folder = results / name
    folder.mkdir(parents=True)
    source = folder / "config.yaml"
    source.write_text(SMALL)
    config = load_config(source, [f"name={name}", f"search.trials={trials}"])
    source.write_text(dump_config(config))
    write_json(folder / "baseline.json", BASELINE)
    write_json(folder / "environment.json", {"python": "3.11"})
    write_json(folder / "times.json", {"trials_s": 12.5})
    draw = random.Random(seed)
    store = Store(folder)
    rows = [make_row(n, draw) for n in range(trials)]
    for row in rows[:1]:
        store.write_trial(row)
    store.compact()
    if rows[1:]:
        write_rows(store, rows[1:])
    return folder


def make_row(number: int, draw: random.Random) -> TrialResult:
    """One trial; its figures look like those of a search."""
    keep = 1.0 if number == 0 else round(draw.uniform(0.2, 1.0), 2)
    status = TrialStatus.COMPLETED
    if number % 11 == 5:
        status = TrialStatus.FAILED
    elif number % 13 == 6:
        status = TrialStatus.INFEASIBLE
    origin = "seed: uniform 0.5" if number % 7 == 3 else "sampler"
    row = TrialResult(
        trial_id=f"t{number:05d}",
        status=status,
        criterion="random" if number % 5 == 4 else "magnitude_l1",
        candidate=json.dumps(
            {"criterion": "magnitude_l1", "keep": {"all": keep}, "select": "ratio", "k": None,
             "dropped_blocks": ["layer1.1"], "origin": origin}
        ),
        dropped_blocks=["layer1.1"] if number % 2 else [],
        widths={"conv1": max(1, round(16 * keep)), "layer1.0.conv1": max(1, round(16 * keep))},
        fidelity=2,
        seed=number,
        host="here",
        device="cpu",
        started_at=START + number,
        finished_at=START + number + 0.9,
    )  # fmt: skip
    if status is TrialStatus.FAILED:
        return replace(row, message="RuntimeError: <img src=x onerror=alert(1)> & more")
    accuracy = 0.98 - 0.5 * (1 - keep) ** 2 - draw.uniform(0, 0.04)
    return replace(
        row,
        accuracy=accuracy,
        accuracy_drop=0.98 - accuracy,
        accuracy_by_fidelity=[accuracy - 0.1, accuracy - 0.05, accuracy],
        loss=1 - accuracy,
        latency_ms=0.9 * (0.2 + 0.8 * keep),
        speedup=1 / (0.2 + 0.8 * keep),
        macs=int(1e7 * keep**2),
        num_params=int(2.7e5 * keep**2),
        peak_memory_mib=1.2 * keep,
        finetune_s=0.5,
        measure_s=0.3,
    )


def write_rows(store: Store, rows: list[TrialResult]) -> None:
    """Many rows at once: a part of each would take the test's time."""
    import pyarrow.parquet as pq

    from prunesearch.search.store import to_table

    numbers = [int(p.stem.partition("-")[2]) for p in store.trials_dir.glob("compact-*.parquet")]
    path = store.trials_dir / f"compact-{max(numbers, default=0) + 1}.parquet"
    pq.write_table(to_table(rows), path)


@dataclass
class Served:
    """A running service."""

    url: str
    port: int
    app: App


@contextmanager
def serving(results: Path, *, buffer: int | None = None, **settings: Any) -> Iterator[Served]:
    """The service on a free loopback port, in a thread; `buffer` bounds what the system keeps."""
    with socket.socket() as listener:
        if buffer is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
        listener.bind(("127.0.0.1", 0))
        listener.listen(200)
        port = listener.getsockname()[1]
        app = create_app(Settings(results=results.resolve(), port=port, **settings))
        server = Server(app, 500)
        loops: list[asyncio.AbstractEventLoop] = []

        async def serve() -> None:
            loops.append(asyncio.get_running_loop())
            await server.serve(sockets=[listener])

        thread = threading.Thread(target=lambda: asyncio.run(serve()))
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield Served(f"http://127.0.0.1:{port}", port, app)
        finally:
            loops[0].call_soon_threadsafe(server.handle_exit, signal.SIGTERM, None)
            thread.join(timeout=30)
            assert not thread.is_alive()
