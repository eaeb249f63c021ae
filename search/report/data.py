"""What a report shows of a run, as one dict of plain values; no HTML."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from ...methods.tasks import TASKS, task_of
from ..early_stop import rank_correlations
from ..front import front_of
from ..metrics import dense_value
from ..records import TrialResult, probes_of
from ..runs import CONFIG, ENVIRONMENT, Run
from ..yaml_source import ConfigError
from .columns import Column, Tried, columns_of, further_metrics, number, trial_columns, value_of
from .history import failures_of, hypervolume_of, state_of, times_of
from .importance import importance_of
from .network import network_of
from .notes import notes_of

TOLERATED = 0.01  # accuracy drop of the member that is shown first


def report_data(run: Run, *, trial: str | None = None, importance: bool = True) -> dict[str, Any]:
    """All that a report or a live page shows of a run, in any state, fit for JSON.

    Args:
        run: The run; its ledger is read once.
        trial: The trial to be shown first; a front member if None.
        importance: Whether to fit the forests of `importance`, which takes seconds.

    Returns:
        `version`, `made_at` (ISO 8601, UTC);
        `run`: `name`, `place`, `model`, `data`, `task`;
        `state`: see `history.state_of`;
        `objectives`: metric -> direction;
        `columns`: of each figure `name`, `label`, `unit`, `scale`, `digits`, `better`,
        `objective`;
        `axes`: the two columns that are drawn first;
        `dense`: column -> the dense model's value, those that were measured;
        `trials`: `count`, `id`; `text`: `status`, `kind` (search, random, uniform), `message`,
        `criterion`, `select`, `origin`, `host`, `device`, each as `values` and `codes` (-1: none);
        `number`: every column, `score_s`, `prune_s`, `finetune_s`, `measure_s`, `wait_s`, `k`,
        `dsd_lambda`, `dsd_q`, `dsd_epochs`, `started_s`, `finished_s` (since the first trial
        began), each a list with None where there is none; `fidelity`; `by_fidelity`: accuracies;
        `dropped`: indices into `network.blocks`; `groups` and `keep`: fraction kept of each group,
        or None; `widths`: channels of each of `network.layers`, None where it is gone;
        `front`: indices of the trials on the front, the best in the second objective first;
        `chosen`: index of the trial shown first, or None;
        `hypervolume`, `importance` (None if not asked for), `failures`, `times`, `network`: see
        the functions that make them;
        `rungs`: of each two fidelities `low`, `high`, `spearman`, `num_trials`, `warning`;
        `environment`: `driver` (hardware and versions), `probes`: name -> its fingerprint (the
        default probe's name is empty), `hosts`: `host`, `device`, `trials`;
        `config`: the YAML text; `notes`: sentences that a reader of the figures should know.

    Raises:
        ConfigError: If there is no such trial, or a file of the run is damaged.
    """
    config, results, baseline = run.config, run.results(), run.baseline
    tried = [Tried.of(result) for result in results]
    network = network_of(run.folder, baseline, results)
    measured_by = sorted({*config.probes, *probes_of(results)})
    task = config.task.name if config.task else task_of(config.data.name)
    columns = columns_of(
        config.objectives, measured_by, further_metrics(results), _accuracy_of(task)
    )
    columns = [c for c in columns if c.objective or _is_known(c.name, results)]
    front = front_of(results, config.objectives)
    place = {result.trial_id: index for index, result in enumerate(results)}
    dense = {c.name: number(_dense(baseline, c.name)) for c in columns}
    data = {
        "version": metadata.version("prune-search"),
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "run": {
            "name": config.name,
            "place": run.place,
            "model": config.model.name,
            "data": config.data.name,
            "task": task,
        },
        "state": state_of(run, results),
        "objectives": dict(config.objectives),
        "columns": [dataclasses.asdict(column) for column in columns],
        "axes": _axes(config.objectives, columns),
        "dense": {name: value for name, value in dense.items() if value is not None},
        "trials": trial_columns(
            results, tried, columns, network["blocks"], [la["name"] for la in network["layers"]]
        ),
        "front": [place[member.trial_id] for member in front],
        "chosen": _chosen(trial, front, place),
        "hypervolume": hypervolume_of(results, baseline, config.objectives),
        "importance": importance_of(results, tried, [*config.objectives]) if importance else None,
        "failures": failures_of(results),
        "times": times_of(run, results),
        "network": network,
        "rungs": [
            dataclasses.asdict(one) | {"warning": one.warning}
            for one in rank_correlations(results)
        ],
        "environment": _environment(run, baseline, results),
        "config": (run.folder / CONFIG).read_text(encoding="utf-8"),
    }
    return data | {"notes": notes_of(config, data)}


def _accuracy_of(task: str) -> str:
    """What a task of ours means by accuracy; a user's is not imported for a word."""
    metric = getattr(TASKS.get(task), "metric", None)
    return metric if isinstance(metric, str) and metric != "top-1" else "accuracy"


def _is_known(name: str, results: Sequence[TrialResult]) -> bool:
    return any(value_of(result, name) is not None for result in results)


def _dense(baseline: Mapping[str, Any], name: str) -> float | None:
    if not baseline:
        return None
    found = dense_value(baseline, name)
    return (baseline.get("metrics") or {}).get(name) if found is None else found


def _axes(objectives: Mapping[str, str], columns: Sequence[Column]) -> list[str]:
    """A cost to the right and a quality upwards."""
    quality = next((n for n in objectives if objectives[n] == "maximize"), next(iter(objectives)))
    known = [column.name for column in columns]
    others = [*objectives, "latency_ms", "macs", *known]
    cost = next((n for n in others if n in known and n != quality), quality)
    return [cost, quality]


def _chosen(
    trial: str | None, front: Sequence[TrialResult], place: Mapping[str, int]
) -> int | None:
    """The asked trial, else the member with the least cost whose accuracy is about dense."""
    if trial is not None:
        if trial not in place:
            raise ConfigError(
                f"`--trial` (={trial}) must be a trial of the run: it has {len(place)}. "
                "`prune-search front` shows the names of the front's."
            )
        return place[trial]
    if not front:
        return None
    for member in front:
        if member.accuracy_drop is not None and member.accuracy_drop <= TOLERATED:
            return place[member.trial_id]
    drops = [m for m in front if m.accuracy_drop is not None]
    best = min(drops, key=lambda m: m.accuracy_drop or 0.0) if drops else front[len(front) // 2]
    return place[best.trial_id]


def _environment(
    run: Run, baseline: Mapping[str, Any], results: Sequence[TrialResult]
) -> dict[str, Any]:
    hosts: dict[tuple[str, str], int] = {}
    for result in results:
        if result.host:
            hosts[result.host, result.device] = hosts.get((result.host, result.device), 0) + 1
    named = baseline.get("latency_by_probe") or {}
    probes = {"": baseline.get("probe") or {}} | {n: one.get("probe") for n, one in named.items()}
    return {
        "driver": run.environment if (run.folder / ENVIRONMENT).exists() else {},
        "probes": {name: found for name, found in probes.items() if found},
        "hosts": [
            {"host": host, "device": device, "trials": count}
            for (host, device), count in sorted(hosts.items())
        ],
    }
