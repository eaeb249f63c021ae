"""Runs an ablation: one Ray fan-out over rows and seeds, stored job by job, resumable."""

from __future__ import annotations

import shlex
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from ...methods.layer_bypass import bypassable_layers
from ...methods.names import unknown_name
from ..config import ConfigError, SearchConfig, dump_config, load_config, parse_config
from ..environment import environment
from ..locks import locked
from ..progress import Progress
from ..records import TrialResult, TrialStatus
from ..runs import ENVIRONMENT, LOCAL, absolute, check_writable
from ..setup import Problem, pack_images, pose
from ..store import Store, atomic_write_bytes, read_json, to_table, write_json
from . import blocks, blockwipg, dsd, fgp
from .jobs import Dense, run_row, train_dense
from .pictures import draw
from .report import markdown
from .study import Facts, Row, Study, merged

STUDY = "study.json"
CONFIG = "ablation.yaml"  # not a run's config.yaml: an ablation is no run to resume or to export
IMAGES = "images"
LINE_EVERY_S = 5.0

ABLATIONS: dict[str, dict[str, Study]] = {}
for _study in (*dsd.STUDIES, *fgp.STUDIES, *blockwipg.STUDIES, *blocks.STUDIES):
    ABLATIONS.setdefault(_study.paper, {})[_study.table] = _study

DEFAULT_CONFIG: dict[str, Any] = {
    "name": "digits-resnet20",
    "model": {"name": "resnet20"},
    "data": {"name": "digits", "image_size": 16, "batch_size": 64, "calibration_size": 256},
    "baseline": {"epochs": 15, "lr": 0.1},
    "recover": {"epochs": 2, "lr": 0.02},
    "ablate": {"dsd_lambda": 0.12, "dsd_epochs": 9.0},  # 120 steps of phase 1 take tau to zero
}
"""ResNet-20 on scikit-learn's digits at 16 px: minutes on two cores, no files needed.

lambda is far above the paper's because the training is far shorter: what it takes away from a
scale is about lr lambda / (1 - momentum) a step.
"""


class NothingCompletedError(RuntimeError):
    """Every job of an ablation failed."""


def find_study(paper: str, table: str | None) -> Study:
    """The study called so on the command line; the table may be left out where there is one.

    Raises:
        ConfigError: If there is none; names those that there are.
    """
    if paper not in ABLATIONS:
        raise ConfigError(unknown_name("PAPER", paper, ABLATIONS))
    tables = ABLATIONS[paper]
    if table is None and len(tables) == 1:
        return next(iter(tables.values()))
    if table not in tables:
        raise ConfigError(unknown_name("TABLE", table, tables))
    return tables[table]


def ablate(
    paper: str,
    table: str | None = None,
    config: SearchConfig | None = None,
    out: str | Path | None = None,
    seeds: int | None = None,
    *,
    address: str | None = None,
    progress: Progress | None = None,
    command: str | None = None,
) -> str:
    """Re-runs a table of a paper on any model and data; finishes what an earlier call began.

    Jobs that ended are not run again; failed ones are. More seeds add jobs.

    Args:
        paper: A key of `ABLATIONS`.
        table: A key of `ABLATIONS[paper]`.
        config: Model, data, training; `DEFAULT_CONFIG` if None.
        out: Folder of the results, `results/ablate-PAPER-TABLE` if None. OUT.md, OUT.parquet and,
            for figures, OUT.png are written beside it.
        seeds: How many; the config's `ablate.seeds` if None.
        address: A Ray cluster; None starts a local Ray.
        progress: Where to report; None is silent.
        command: What re-runs it, for the report.

    Returns:
        The Markdown of OUT.md.

    Raises:
        ConfigError: If the input is wrong, or `out` holds another study or config.
        NothingCompletedError: If every row failed; the report is written all the same.
    """
    from ..cluster import check_local, connect
    from ..fleet import start_keeper

    study = find_study(paper, table)
    progress = progress or Progress.silent()
    config = absolute(study.config(config or parse_config(DEFAULT_CONFIG)))
    seeds = seeds or config.ablate.seeds
    folder = results_folder(study, out)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"`--out` (={folder}) must be a folder: it is a file. Choose another.")
    check_writable(folder)
    problem = pose(_with_criteria(study, config), prunable=study.paper != "layers")
    facts = _facts(study, problem)
    rows = study.jobs(config, facts)
    _check_rows(study, config, rows, facts)
    if address in LOCAL:
        check_local(config)
    with locked(folder, progress.say):
        _describe(study, config, folder)
        store = Store(folder)
        missing = _missing(rows, seeds, store.read())
        if missing:
            with connect(address):
                keeper = start_keeper(folder, config.cache)
                jobs = _jobs(config, rows, missing, problem, keeper)
                _run(jobs, missing, config, store, progress)
            store.compact()
    results = _of(rows, seeds, store.read())
    text = markdown(
        study, config, rows, results,
        environment=read_json(folder / ENVIRONMENT),
        command=command or _command(study, folder, seeds),
        seeds=seeds,
    )  # fmt: skip
    atomic_write_bytes(f"{folder}.md", text.encode())
    atomic_write_bytes(f"{folder}.parquet", _parquet(results))
    if study.picture is not None:
        title = f"{config.model.name} on {config.data.name}: {study.title}"
        draw(study, rows, results, f"{folder}.png", seeds=seeds, title=title)
    pruned = _of([row for row in rows if row.work != "dense"], seeds, results)
    if all(result.status is TrialStatus.FAILED for result in pruned):
        raise NothingCompletedError(
            f"no job was completed. {folder}.md shows the causes; repeat the command to retry."
        )
    return text


def results_folder(study: Study, out: str | Path | None = None) -> Path:
    """The folder of a study's results; its report and rows lie beside it, as .md and .parquet."""
    return Path(out or f"results/ablate-{study.paper}-{study.table}").absolute()


# --- what is to do ---------------------------------------------------------------------------


def _with_criteria(study: Study, config: SearchConfig) -> SearchConfig:
    """The config with all criteria of the rows, so that what none of them can prune is refused."""
    used = {row.criterion for row in study.rows(config, Facts(2, 1, 1)) if row.criterion}
    return merged(config, {"space": {"criteria": sorted(used)}}) if used else config


def _facts(study: Study, problem: Problem) -> Facts:
    layers: Mapping[str, Any] = {}
    if study.paper == "layers":
        layers = bypassable_layers(problem.model, problem.task.example_input(2))
    return Facts(problem.task.num_classes, len(problem.blocks), len(layers))


def _check_rows(study: Study, config: SearchConfig, rows: Sequence[Row], facts: Facts) -> None:
    if study.paper == "layers" and not facts.num_layers:
        raise ConfigError(
            f"`model.name` (={config.model.name}) must have a layer that keeps its input's shape: "
            "no other can be bypassed. Use another model."
        )
    if config.model.checkpoint and any(row.num_classes is not None for row in rows):
        raise ConfigError(
            f"`model.checkpoint` (={config.model.checkpoint}) must be null for {study.name}: it "
            "trains a model for each number of classes. Delete it."
        )


def _describe(study: Study, config: SearchConfig, folder: Path) -> None:
    """Writes what the folder holds, or refuses a folder that holds something else."""
    identity = {"paper": study.paper, "table": study.table}
    if (folder / CONFIG).exists():
        known = read_json(folder / STUDY) if (folder / STUDY).exists() else {}
        if known != identity:
            raise ConfigError(
                f"`--out` (={folder}) must hold the results of {study.name}: it holds those of "
                f"{known.get('paper', 'a search')} {known.get('table', '')}. Choose another --out."
            )
        if _fixed(load_config(folder / CONFIG)) != _fixed(config):
            raise ConfigError(
                f"`--out` (={folder}) must hold results of this config: they are of another one "
                f"({folder / CONFIG}). Choose another --out."
            )
        return
    if any(path.name not in (".lock", STUDY, ENVIRONMENT) for path in folder.iterdir()):
        raise ConfigError(
            f"`--out` (={folder}) must be empty, or hold an unfinished ablation. Choose another."
        )
    write_json(folder / STUDY, identity)
    write_json(folder / ENVIRONMENT, environment())
    atomic_write_bytes(folder / CONFIG, dump_config(config).encode())


def _fixed(config: SearchConfig) -> dict[str, Any]:
    """The config without what may differ when an ablation goes on."""
    data = config.model_dump(mode="json")
    data["ablate"].pop("seeds")
    # Threads and device decide the last digits of the dense weights.
    data["resources"] = {name: data["resources"][name] for name in ("cpu", "gpu")}
    return data


def _missing(
    rows: Sequence[Row], seeds: int, results: Sequence[TrialResult]
) -> dict[str, tuple[Row, int]]:
    """The jobs whose results are not all there."""
    done = {r.trial_id for r in results if r.status is not TrialStatus.FAILED}
    return {
        f"{row.key}-s{seed}": (row, seed)
        for seed in range(seeds)
        for row in rows
        if not done.issuperset(row.trial_ids(seed))
    }


def _jobs(
    config: SearchConfig,
    rows: Sequence[Row],
    missing: Mapping[str, tuple[Row, int]],
    problem: Problem,
    keeper: Any,
) -> dict[str, Any]:
    """The missing jobs, behind the data and the dense models that they need."""
    from ..cluster import Result, share

    dense = {row.num_classes: row for row in rows if row.work == "dense"}
    jobs: dict[str, Any] = {IMAGES: (share, (pack_images(problem.task.data),))}
    for row, seed in missing.values():
        made = dense[row.num_classes]
        key = f"{made.key}-s{seed}"
        jobs.setdefault(key, (train_dense, (config, made, seed, Result(IMAGES))))
    for name, (row, seed) in missing.items():
        if row.work != "dense":
            state = Result(f"{dense[row.num_classes].key}-s{seed}")
            jobs[name] = (run_row, (config, row, seed, Result(IMAGES), state, keeper))
    return jobs


# --- running ---------------------------------------------------------------------------------


def _run(
    jobs: Mapping[str, Any],
    missing: Mapping[str, tuple[Row, int]],
    config: SearchConfig,
    store: Store,
    progress: Progress,
) -> None:
    from ..cluster import fan_out

    counter = _Counter(len(missing), progress)
    jobs_done = cast(Generator[tuple[str, Any]], fan_out(jobs, resources=config.resources))
    with closing(jobs_done) as ended:
        for name, value in ended:
            if name not in missing:  # the data, or a dense model that is stored already
                continue
            row, seed = missing[name]
            for result in _results(row, seed, value):
                store.write_trial(result)
                if result.status is TrialStatus.FAILED:
                    progress.say(f"{result.trial_id} failed: {result.message}")
            counter.finished(name)


def _results(row: Row, seed: int, value: Any) -> Iterator[TrialResult]:
    if isinstance(value, Dense):
        yield value.result
    elif isinstance(value, Exception):
        message = " ".join(f"{type(value).__name__}: {value}".split())
        for trial_id in row.trial_ids(seed):
            yield TrialResult(
                trial_id,
                TrialStatus.FAILED,
                message=message[:1000],
                criterion=row.criterion,
                seed=seed,
                finished_at=time.time(),
            )
    else:
        yield from value


class _Counter:
    """Says how many jobs are done, and about how long the others will take."""

    def __init__(self, total: int, progress: Progress) -> None:
        self._total, self._progress = total, progress
        self._done = 0
        self._started = self._said = time.monotonic()
        progress.say(f"{total} {'job' if total == 1 else 'jobs'} to run")

    def finished(self, name: str) -> None:
        self._done += 1
        now = time.monotonic()
        if now - self._said < LINE_EVERY_S and self._done < self._total:
            return
        self._said = now
        spent = now - self._started
        left = spent / self._done * (self._total - self._done)
        word = f"about {left:.0f} s left" if self._done > 1 else "time left unknown yet"
        self._progress.say(
            f"{self._done} of {self._total} jobs, {spent:.0f} s, {word} (last: {name})"
        )


def _parquet(results: Sequence[TrialResult]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(to_table(results), sink, compression="zstd")
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _of(rows: Sequence[Row], seeds: int, results: Sequence[TrialResult]) -> list[TrialResult]:
    """The results of these rows and seeds, in the order of the rows."""
    by_id = {result.trial_id: result for result in results}
    ids = [i for row in rows for seed in range(seeds) for i in row.trial_ids(seed)]
    return [by_id[i] for i in ids if i in by_id]


def _command(study: Study, folder: Path, seeds: int) -> str:
    words = ["prune-search", "ablate", study.paper, study.table]
    words += ["--config", str(folder / CONFIG), "--seeds", str(seeds), "--out", str(folder)]
    return shlex.join(words)
