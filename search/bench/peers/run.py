"""Runs every method for every seed under the protocol; what is finished is not run again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...config import ConfigError, SearchConfig
from ...digests import package_digest
from ...environment import environment
from ...progress import Progress
from ...runs import absolute
from ...store import read_json, write_json
from .log import count_failures, read_log
from .problem import PeerProblem, pose_problem
from .registry import METHODS, check_methods, command

PROTOCOL = "protocol.json"
DONE = "done.json"
OUTPUT = "output.txt"
TAIL = 2000  # characters of a failed method's output that are shown


def bench_peers(
    config: SearchConfig,
    out: Path,
    progress: Progress,
    *,
    seconds: float,
    seeds: int,
    methods: Sequence[str] = tuple(METHODS),
) -> dict[str, Any]:
    """Runs (or finishes, or only reads) the benchmark and writes what came out.

    Args:
        config: Model, data, recovery, and the space of this search.
        out: Folder of the runs, one a seed and method; OUT.md, OUT.parquet and OUT.png are
            written beside it.
        progress: Where to report.
        seconds: The budget of each method.
        seeds: How many seeds, from the config's on.
        methods: Names from `METHODS`.

    Returns:
        The Markdown of OUT.md, and its numbers, as `write_report` gives them.

    Raises:
        ConfigError: If a method cannot be run, or `out` holds another benchmark.
    """
    from .report import write_report

    check_methods(methods)
    config = absolute(config)
    chosen = range(config.search.seed, config.search.seed + seeds)
    done = all((out / f"seed{seed}" / name / DONE).exists() for seed in chosen for name in methods)
    _claim(out, config, seconds, done)
    for seed in chosen:
        folder = out / f"seed{seed}"
        problem = _problem(config, seed, folder, progress)
        for name in rotated(methods, seed - config.search.seed):
            if not (folder / name / DONE).exists():
                progress.say(f"== seed {seed}: {METHODS[name].label}, {seconds:g} s")
                entry = _run_method(name, problem, folder / name, seconds)
                progress.say(f"   {entry['candidates']} candidates, {entry['failures']} failed")
    return write_report(out, config, seconds=seconds, seeds=seeds, methods=methods)


def rotated(methods: Sequence[str], by: int) -> list[str]:
    """The order of the methods: each seed begins with the next one."""
    start = by % len(methods)
    return [*methods[start:], *methods[:start]]


def _claim(out: Path, config: SearchConfig, seconds: float, done: bool) -> None:
    """Refuses a folder of another benchmark: its runs could not be compared.

    When all runs are `done`, they are only reported: code and machine may have changed.
    """
    mine = {
        "config": config.model_dump(mode="json"),
        "seconds": seconds,
        "code": package_digest(),
        "environment": environment(),
    }
    path = out / PROTOCOL
    if not path.exists():
        if out.exists() and any(out.iterdir()):
            raise ConfigError(f"`--out` (={out}) must not exist yet or be empty. Choose another.")
        write_json(path, mine)
        return
    stored = read_json(path)
    binding = {"config", "seconds"} if done else mine.keys()
    other = [key for key in mine if key in binding and stored.get(key) != mine[key]]
    if other:
        raise ConfigError(
            f"`--out` (={out}) must hold a benchmark of the same config, seconds, code and "
            f"machine: it differs in {' and '.join(other)}. Choose another --out."
        )


def _problem(config: SearchConfig, seed: int, folder: Path, progress: Progress) -> PeerProblem:
    path = folder / "problem"
    if not (path / "config.yaml").exists():
        seeded = config.search.model_copy(update={"seed": seed})
        pose_problem(config.model_copy(update={"search": seeded}), path, progress.say)
    return PeerProblem(path)


def _run_method(name: str, problem: PeerProblem, folder: Path, seconds: float) -> dict[str, Any]:
    """Runs a method from nothing; a half-finished run of it is thrown away."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    method = METHODS[name]
    workers = problem.workers if method.shared else 1
    started = time.time()
    processes = []
    cache = folder / "cache"  # empty: nothing is known beforehand
    settings = os.environ | {"PRUNE_SEARCH_CACHE": str(cache.absolute())}
    try:
        with (folder / OUTPUT).open("wb") as output:
            for worker in range(workers):
                line = command(
                    name,
                    problem.folder.absolute(),
                    folder.absolute(),
                    started=started,
                    seconds=seconds,
                    worker=worker,
                )
                processes.append(
                    subprocess.Popen(
                        line,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        env=settings,
                        start_new_session=True,
                    )
                )
        for process in processes:
            left = None if method.ends else max(0.0, started + seconds - time.time())
            try:
                _check(name, folder, process.wait(timeout=left), ended=method.ends)
            except subprocess.TimeoutExpired:
                continue  # the time is over
    finally:
        for process in processes:
            _stop(process)
    summary = {
        "candidates": len(read_log(folder, seconds)),
        "failures": count_failures(folder),
        "workers": problem.workers,
        "seconds": time.time() - started,
    }
    write_json(folder / DONE, summary)
    return summary


def _check(name: str, folder: Path, code: int, *, ended: bool) -> None:
    if code == 0 and ended:
        return
    text = (folder / OUTPUT).read_text(encoding="utf-8", errors="replace")
    raise RuntimeError(
        f"{name} ended before its time with code {code}; {folder / OUTPUT} ends with:\n"
        f"{text[-TAIL:]}"
    )


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a method's process and those that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
