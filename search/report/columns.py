"""What a report knows of each trial, as columns of plain values; and how its figures are shown."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..metrics import METRICS, direction_of, split
from ..records import Candidate, TrialResult, is_uniform

SIGNIFICANT = 6  # digits of a number that is shown; the ledger has them all
TIMES = ("score_s", "prune_s", "finetune_s", "measure_s", "wait_s")


@dataclass(frozen=True)
class Column:
    """A figure of a trial, and how it is shown.

    Attributes:
        name: Of the ledger, or `latency_ms@PROBE`.
        label: In words.
        unit: Behind the number; empty for none.
        scale: The number is multiplied by it first.
        digits: Decimals that are shown.
        better: `higher`, `lower`, or empty where neither is.
        objective: Whether the search optimised it.
    """

    name: str
    label: str
    unit: str = ""
    scale: float = 1.0
    digits: int = 3
    better: str = ""
    objective: bool = False


_COLUMNS = {
    column.name: column
    for column in (
        Column("accuracy", "Validation accuracy", "%", 100, 2),
        Column("accuracy_drop", "Accuracy drop", "points", 100, 2),
        Column("loss", "Validation loss", "nats", 1, 4),
        Column("latency_ms", "Latency", "ms", 1, 3),
        Column("speedup", "Speedup over dense", "×", 1, 2),
        Column("macs", "Multiply-adds an image", "M", 1e-6, 2),
        Column("num_params", "Parameters", "k", 1e-3, 1),
        Column("peak_memory_mib", "Peak memory", "MiB", 1, 2),
        Column("accuracy_before_finetune", "Accuracy before fine-tuning", "%", 100, 2, "higher"),
        Column("latency_ms_p10", "Latency, 10th percentile", "ms", 1, 3, "lower"),
        Column("latency_ms_p90", "Latency, 90th percentile", "ms", 1, 3, "lower"),
        Column("epochs", "Epochs of fine-tuning", "", 1, 2),
        Column("trial_s", "Time of the trial", "s", 1, 1, "lower"),
    )
}


@dataclass(frozen=True)
class Tried:
    """What a row tried: the candidate (None where no search wrote the row) and its origin."""

    candidate: Candidate | None
    origin: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, result: TrialResult) -> Tried:
        """Reads a row's `candidate`; a row of another hand gives an empty one."""
        data = json.loads(result.candidate)
        params = data.get("params")
        plain = params.items() if isinstance(params, dict) else ()
        found = (
            str(data.get("origin", "")),
            {name: value for name, value in plain if isinstance(value, str | int | float)},
        )
        try:
            return cls(Candidate.from_mapping(data), *found)
        except (ValueError, TypeError, KeyError, AttributeError):
            return cls(None, *found)


def columns_of(
    objectives: Mapping[str, str],
    probes: Iterable[str],
    further: Iterable[str] = (),
    metric: str = "accuracy",
) -> list[Column]:
    """The columns that may be an axis, the objectives first.

    Args:
        objectives: The run's.
        probes: Its named probes.
        further: Names of a task's own figures.
        metric: What the task means by accuracy.
    """
    named = [f"{metric}@{probe}" for probe in probes for metric in ("latency_ms", "speedup")]
    own = [name for name in further if name not in _COLUMNS]
    names = dict.fromkeys([*objectives, *_COLUMNS, *named, *own])
    return [_column(name, name in objectives, metric) for name in names]


def further_metrics(results: Iterable[TrialResult]) -> list[str]:
    """Names of the figures that a task reports beside the primary one, such as `map50`."""
    return sorted({name for result in results for name in result.metrics})


def value_of(result: TrialResult, name: str) -> float | None:
    """A trial's value of a column."""
    if name == "trial_s":
        return sum(float(getattr(result, part)) for part in TIMES)
    if name in result.metrics:
        return result.metrics[name]
    if split(name)[1] or hasattr(result, name):
        return result.metric(name)
    return None


def trial_columns(
    results: Sequence[TrialResult],
    tried: Sequence[Tried],
    columns: Sequence[Column],
    blocks: Sequence[str],
    layers: Sequence[str],
) -> dict[str, Any]:
    """All trials by column, in the ledger's order; `data.report_data` documents the keys."""
    start = min((r.started_at for r in results if r.started_at is not None), default=0.0)
    named = {group for t in tried if t.candidate for group, _ in t.candidate.keep}
    groups = [la for la in layers if la in named] + sorted(named - set(layers))
    place = {name: index for index, name in enumerate(blocks)}
    candidates = [t.candidate or Candidate() for t in tried]
    keeps = [dict(c.keep) for c in candidates]
    numbers = {c.name: [number(value_of(r, c.name)) for r in results] for c in columns}
    numbers |= {name: [number(getattr(r, name)) for r in results] for name in TIMES}
    numbers |= {
        name: [number(getattr(c, name)) for c in candidates]
        for name in ("k", "dsd_lambda", "dsd_q", "dsd_epochs")
    }
    for name in ("started", "finished"):
        stamps = [getattr(r, f"{name}_at") for r in results]
        numbers[f"{name}_s"] = [None if at is None else number(at - start) for at in stamps]
    return {
        "count": len(results),
        "id": [r.trial_id for r in results],
        "text": {
            "status": coded([str(r.status) for r in results]),
            "kind": coded([kind_of(r) for r in results]),
            "message": coded([r.message for r in results]),
            "criterion": coded([r.criterion for r in results]),
            "select": coded([c.select for c in candidates]),
            "origin": coded([t.origin for t in tried]),
            "host": coded([r.host for r in results]),
            "device": coded([r.device for r in results]),
        },
        "number": numbers,
        "fidelity": [r.fidelity for r in results],
        "by_fidelity": [[number(a) for a in r.accuracy_by_fidelity] for r in results],
        "dropped": [[place[name] for name in r.dropped_blocks] for r in results],
        "groups": groups,
        "keep": [[number(k.get(g), 4) for g in groups] if k else None for k in keeps],
        "widths": [[r.widths.get(la) for la in layers] if r.widths else None for r in results],
    }


def kind_of(result: TrialResult) -> str:
    """`random` or `uniform` for the controls, `search` for what was searched for."""
    if result.criterion == "random":
        return "random"
    return "uniform" if is_uniform(result) else "search"


def coded(values: Sequence[str | None]) -> dict[str, Any]:
    """Texts that repeat, once each: `values[codes[i]]` is the i-th; code -1 is none."""
    places: dict[str, int] = {}
    codes = [-1 if v is None else places.setdefault(v, len(places)) for v in values]
    return {"values": list(places), "codes": codes}


def number(value: Any, digits: int = SIGNIFICANT) -> float | int | None:
    """A number for JSON with so many significant digits; None where there is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, int):
        return value
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def _column(name: str, objective: bool, accuracy: str) -> Column:
    metric, probe = split(name)
    column = _COLUMNS.get(metric) or Column(metric, metric.replace("_", " "), digits=4)
    label = f"{column.label} on {probe}" if probe else column.label
    if metric.startswith("accuracy") and accuracy != "accuracy":
        label = label.replace("accuracy", accuracy).replace("Accuracy", accuracy)
    better = column.better
    if metric in METRICS:
        better = "higher" if direction_of(name) == "maximize" else "lower"
    return dataclasses.replace(column, name=name, label=label, better=better, objective=objective)
