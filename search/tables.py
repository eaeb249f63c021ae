"""What the command line prints: the front, the state of runs, where time went, names."""

from __future__ import annotations

import collections
import dataclasses
import inspect
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from ..methods.plugins import Kind
from .early_stop import ladder_of, rank_correlations
from .metrics import dense_value, metrics_of, split
from .records import Candidate, TrialResult
from .runs import Run
from .yaml_source import printable

PARTS = {
    "load_s": "load libraries, data and model",
    "dense_s": "dense model",
    "blocks_s": "block ranking",
    "sensitivity_s": "single edits",
    "ray_start_s": "start Ray",
    "reference_s": "dense latency",
    "trials_s": "trials (wall clock)",
}
TRIAL_PARTS = {
    "score_s": "score channels",
    "prune_s": "prune",
    "finetune_s": "recover and evaluate",
    "measure_s": "measure",
    "wait_s": "wait for the probe",
}


def front_rows(run: Run, objectives: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """The front as plain values, every column of the ledger."""
    return [dataclasses.asdict(result) for result in run.front_results(objectives)]


def front_table(run: Run, objectives: Mapping[str, str] | None = None) -> Table:
    """The front in the run's objectives or in others, with the dense baseline first."""
    config, members = run.config, run.front_results(objectives)
    return table_of_front(config.name, run.baseline, members, config.probes)


def table_of_front(
    name: str, baseline: Mapping[str, Any], members: Iterable[TrialResult], probes: Iterable[str]
) -> Table:
    """The members of a run's front with the dense baseline first, and its named probes."""
    table = Table(title=f"Pareto front of {name} (validation split)")
    probes = list(probes)
    by_probe = [f"{column}@{probe}" for probe in probes for column in ("latency ms", "speedup")]
    further = [name for name in baseline.get("metrics", {}) if not name.startswith(_OF_A_CLASS)]
    for column in (
        "trial", "accuracy", *further, "drop", "before ft", "latency ms", "speedup", *by_probe,
        "MACs M", "params k", "memory MiB", "criterion", "blocks dropped", "channels kept",
    ):  # fmt: skip
        table.add_column(column, justify="left" if column in _TEXT else "right")
    if baseline:
        numbers = _numbers(_dense_row(baseline), probes, further)
        table.add_row("dense", *numbers, "", "", "", style="bold")
    for result in members:
        numbers = _numbers(result, probes, further)
        table.add_row(result.trial_id, *numbers, *_choices(result))
    return table


def result_of(row: Mapping[str, Any]) -> TrialResult:
    """One of `front_rows` that has been JSON; a column of another version is left out."""
    known = {field.name for field in dataclasses.fields(TrialResult)}
    return TrialResult(**{name: value for name, value in row.items() if name in known})


def status_of(run: Run) -> dict[str, Any]:
    """How far a run is, as plain values."""
    results, config = run.results(), run.config
    counts = collections.Counter(str(result.status) for result in results)
    failures = collections.Counter(r.message for r in results if r.status == "failed")
    return {
        "run": run.place,
        "name": config.name,
        "model": config.model.name,
        "data": config.data.name,
        "trials": config.search.trials,
        "finished": len(results),
        "waiting": ladder_of(config, results).num_promotable,
        "by_status": dict(counts),
        "front": len(run.front_results()),
        "hypervolume": run.hypervolume(),
        "dense_latency_ms": {
            metric: dense_value(run.baseline, metric)
            for metric in metrics_of(config.probes)
            if split(metric)[0] == "latency_ms"
        },
        "failures": dict(failures.most_common(5)),
        "rank_correlations": [
            dataclasses.asdict(c) | {"warning": c.warning} for c in rank_correlations(results)
        ],
        "times": run.times,
        "trial_times": _trial_seconds(results),
    }


def status_table(status: Mapping[str, Any]) -> Table:
    """`status_of` for people."""
    table = Table(title=status["run"], show_header=False)
    table.add_row("model on data", f"{status['model']} on {status['data']}")
    states = ", ".join(f"{count} {name}" for name, count in status["by_status"].items())
    table.add_row("trials", f"{status['finished']} of {status['trials']} ({states or 'none yet'})")
    if status["waiting"]:
        todo = f"{_wait(status['waiting'])} to go on: prune-search resume {status['run']}"
        table.add_row("not finished", todo)
    volume = status["hypervolume"]
    table.add_row("front", f"{status['front']} members")
    table.add_row("hypervolume", "not yet" if volume is None else f"{volume:.4f}")
    for metric, latency_ms in status["dense_latency_ms"].items():
        if split(metric)[1] and latency_ms is not None:
            table.add_row(f"dense {metric}", f"{latency_ms:.3f}")
    for message, count in status["failures"].items():
        table.add_row("failed", f"{count} x {printable(message)}")
    for row in correlation_rows(status["rank_correlations"]):
        table.add_row(*row)
    for part, label in PARTS.items():
        if part in status["times"]:
            table.add_row(label, f"{status['times'][part]:.1f} s")
    return table


def correlation_rows(found: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """`RankCorrelation`s in words: a label and a text each, with a warning where one is poor."""
    rows = []
    for one in found:
        value = "undefined" if one["spearman"] is None else f"{one['spearman']:.2f}"
        label = f"rank correlation {one['low']}-{one['high']}"
        rows.append((label, f"{value} (accuracy of {one['num_trials']} trials)"))
        if one["warning"]:
            rows.append(("warning", one["warning"]))
    return rows


def runs_table(statuses: Sequence[Mapping[str, Any]], folder: str | Path) -> Table:
    """One line a run."""
    table = Table(title=f"Runs in {folder}")
    for name in ("run", "model", "data", "trials", "front", "hypervolume"):
        table.add_column(name)
    for s in statuses:
        volume = "" if s["hypervolume"] is None else f"{s['hypervolume']:.4f}"
        done = f"{s['finished']}/{s['trials']}"
        if s["waiting"]:
            done += f", {_wait(s['waiting'])} to go on"
        table.add_row(s["name"], s["model"], s["data"], done, str(s["front"]), volume)
    return table


def time_table(run: Run) -> Table:
    """Where a run's time went: its parts, and the seconds inside trials over all workers."""
    times, inside = run.times, _trial_seconds(run.results())
    table = Table(title="Where the time went", show_header=False)
    for part, label in PARTS.items():
        table.add_row(label, f"{times.get(part, 0.0):.1f} s")
    for part, label in TRIAL_PARTS.items():
        table.add_row(f"  in trials: {label}", f"{inside[part]:.1f} s")
    table.add_row("total", f"{sum(times.get(part, 0.0) for part in PARTS):.1f} s", style="bold")
    return table


def export_summary(folder: Path) -> dict[str, str]:
    """What an export is, in a few lines."""
    from ..methods.exported import read_recipe  # torch: seconds that other tables need not wait
    from .export import read_export

    recipe, export = read_recipe(folder), read_export(folder)
    trial, baseline, test = recipe["trial"], recipe["baseline"], recipe["test"]
    forms = {
        name: _form(form) for name, form in export.get("forms", {}).items() if form["latency_ms"]
    }
    return {
        "folder": str(folder),
        "trial": trial["trial_id"],
        "test accuracy": _tested(test),
        "val accuracy": f"{trial['accuracy']:.4f} (dense {baseline['accuracy']:.4f})",
        "latency": f"{trial['latency_ms']:.3f} ms ({trial['speedup']:.2f}x dense)",
        "MACs": f"{trial['macs'] / baseline['macs']:.1%} of dense",
        "parameters": f"{trial['num_params'] / baseline['num_params']:.1%} of dense",
        "reload difference": f"{recipe['parity']:.1e}",
        **forms,
    }


def _tested(figures: Mapping[str, Any]) -> str:
    low, high = figures.get("interval_95", (None, None))
    interval = "" if low is None else f" (95 % interval {low:.4f} to {high:.4f})"
    return f"{figures['accuracy']:.4f}{interval}"


def _form(form: Mapping[str, Any]) -> str:
    """One further form: what its proof measured."""
    opset = f", opset {form['opset']}" if form["opset"] else ""
    return (
        f"{form['file']}{opset}: difference {form['difference']:.1e}, "
        f"{form['latency_ms']:.3f} ms (eager beside it {form['eager_ms']:.3f} ms)"
    )


def names_table(groups: Mapping[str, Mapping[str, str]]) -> Table:
    """Names with a line each, by kind."""
    table = Table(show_header=False)
    for kind, names in groups.items():
        for index, (name, line) in enumerate(names.items()):
            table.add_row(kind if index == 0 else "", name, line)
        table.add_section()
    return table


_NEEDED = {"nothing": "no data", "images": "images", "labels": "images and labels"}


def known_methods() -> dict[str, dict[str, str]]:
    """Criteria, rules, block orders, samplers and tasks with a line each."""
    from ..methods.criteria import CRITERIA, NEEDS, describe
    from ..methods.sparse_training import SPARSE_TRAINING
    from ..methods.tasks import TASKS

    return {
        "criterion": {
            name: f"{describe(name)} Needs {_NEEDED[NEEDS[name]]}." for name in CRITERIA
        },
        **_with_plugins("criteria", {*CRITERIA, *SPARSE_TRAINING}),
        "sparse training": {name: describe(name) for name in SPARSE_TRAINING},
        "select": {
            "ratio": "keep a fraction of each group's channels",
            "cumulative": "keep the fewest channels that hold a fraction k of the group's score",
            "global": "keep a fraction of all channels, ranked across the groups",
            "macs": "cumulative, with the largest k that meets a budget of multiply-adds",
            "peak30": "the best 30 % of each group's channels (FGP, Fig. 4)",
            "peak50_rand30": "30 % at random from the better half",
            "bot50_rand30": "30 % at random from the worse half",
            "rand30": "30 % at random",
        },
        "blocks.order": {
            "greedy": "remove the block that costs the least accuracy, measure the rest again",
            "oneshot": "measure each block's removal alone, once",
            "exhaustive": "the best of all subsets of each size; up to 12 blocks",
            "sequential": "from the end of the network",
            "sr_init": "the block whose re-initialisation costs the least goes first",
            "attribution": "the block with the least gradient x activation goes first",
            "random": "a seeded permutation: a control",
        },
        "sampler": {
            "tpe": "multivariate tree-structured Parzen estimator over the conditional space",
            "nsga2": "genetic, non-dominated sorting",
            "gp": "Gaussian process; best for short searches of few dimensions",
            "random": "a control",
        },
        "task": {name: _first_line(TASKS[name]) for name in TASKS},
        **_with_plugins("tasks", TASKS),
    }


def known_models() -> dict[str, dict[str, str]]:
    """The zoo with a line each, and the other ways to name a model."""
    from ..methods.models import MODELS

    return {
        "zoo": {name: _first_line(MODELS[name]) for name in MODELS},
        **_with_plugins("models", MODELS),
        "others": {
            "torchvision:NAME": "any classifier of torchvision",
            "timm:NAME": "any model of timm (the extra `timm`)",
            "module:callable": "your own: a callable that returns an nn.Module; it is imported",
        },
    }


def known_datasets() -> dict[str, dict[str, str]]:
    """The data sets with a line each."""
    from ..methods.data import DATASETS

    own = {name: entry.description for name, entry in DATASETS.items()}
    others = {
        "module:callable": "your own: a callable that returns a DatasetEntry; it is imported"
    }
    return {"data set": own, **_with_plugins("datasets", DATASETS), "others": others}


def _with_plugins(kind: Kind, taken: Collection[str]) -> dict[str, dict[str, str]]:
    """A section of the installed plug-ins of a kind; none where there are none."""
    from ..methods.plugins import listed

    lines, _ = listed(kind, taken)
    return {f"plug-in {kind}": lines} if lines else {}


def plugin_troubles() -> list[str]:
    """What is wrong with installed plug-ins, a sentence each."""
    from ..methods.criteria import CRITERIA
    from ..methods.data import DATASETS
    from ..methods.models import MODELS
    from ..methods.plugins import listed
    from ..methods.sparse_training import SPARSE_TRAINING
    from ..methods.tasks import TASKS

    own: dict[Kind, Collection[str]] = {
        "models": MODELS,
        "datasets": DATASETS,
        "tasks": TASKS,
        "criteria": {*CRITERIA, *SPARSE_TRAINING},
    }
    return [text for kind, taken in own.items() for text in listed(kind, taken)[1]]


def check_tables(report: Mapping[str, Any]) -> Iterable[Any]:
    """`checks.check_report` for people."""
    yield (
        f"{report['model']} on {report['data']} {report['image']}: {report['num_params']:,} "
        f"parameters, {report['macs'] / 1e6:.2f} M MACs; train {report['split']['train']:,}, "
        f"val {report['split']['val']:,}, test {report['split']['test']:,} images"
    )
    blocks = Table(title="Blocks")
    for name in ("unit", "stage", "params", "removable"):
        blocks.add_column(name)
    for block in report["blocks"]:
        reason = "yes" if block["removable"] else f"no: {block['reason']}"
        blocks.add_row(block["name"], block["stage"], f"{block['num_params']:,}", reason)
    yield blocks
    groups = Table(title="Channel groups: requested keep -> effective width")
    groups.add_column("group")
    groups.add_column("stage")
    groups.add_column("layers")
    groups.add_column("channels", justify="right")
    levels = list(report["groups"][0]["widths"]) if report["groups"] else []
    for level in levels:
        groups.add_column(f"{level}", justify="right")
    for group in report["groups"]:
        widths = [str(group["widths"][level]) for level in levels]
        layers = f"{len(group['layers'])} coupled" if len(group["layers"]) > 1 else "1"
        groups.add_row(group["name"], group["stage"], layers, str(group["channels"]), *widths)
    yield groups
    yield from _left_alone(report["excluded"])
    for line in report["warnings"]:
        yield f"warning: {line}"
    low, high = report["macs_range"]
    guess = "" if report["macs_range_exact"] else " (estimated with the L1 norms of the weights)"
    yield (f"MACs from {low / 1e6:.2f} M to {high / 1e6:.2f} M{guess}; space: {report['space']}")


def _left_alone(excluded: Mapping[str, str]) -> Iterable[str]:
    """The layers whose output channels stay, a line for each reason."""
    reasons: dict[str, dict[str, str]] = {}
    for name, reason in excluded.items():  # "(... in MODULE)" differs from layer to layer
        reasons.setdefault(reason.partition(" (")[0], {})[name] = reason
    for text, named in reasons.items():
        names = list(named)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        told = named[names[0]] if len(set(named.values())) == 1 else text
        yield f"not prunable: {', '.join(names[:3])}{more}: {told}"


_TEXT = ("trial", "criterion", "blocks dropped", "channels kept")
_OF_A_CLASS = "ap_"  # such figures are in the ledger: a column each would be too many


def _dense_row(baseline: Mapping[str, Any]) -> TrialResult:
    names = ("accuracy", "latency_ms", "macs", "num_params", "peak_memory_mib")
    further = baseline.get("metrics", {})
    known = {name: baseline.get(name) for name in names}
    probes = baseline.get("latency_by_probe", {})
    known["latency_ms_by_probe"] = {name: found["latency_ms"] for name, found in probes.items()}
    known["speedup_by_probe"] = dict.fromkeys(probes, 1.0)
    fixed = {"status": "completed", "accuracy_drop": 0.0, "speedup": 1.0, "metrics": further}
    return TrialResult("dense", **fixed, **known)  # type: ignore[arg-type]


def _numbers(row: TrialResult, probes: Iterable[str], further: Iterable[str]) -> list[str]:
    by_probe = [(row.metric(f"latency_ms@{p}"), row.metric(f"speedup@{p}")) for p in probes]
    return [
        _number(row.accuracy, ".4f"),
        *(_number(row.metrics.get(name), ".4f") for name in further),
        _number(row.accuracy_drop, "+.4f"),
        _number(row.accuracy_before_finetune, ".4f"),
        _number(row.latency_ms, ".3f"),
        _number(row.speedup, ".2f"),
        *(text for ms, x in by_probe for text in (_number(ms, ".3f"), _number(x, ".2f"))),
        _number(row.macs, ".2f", 1e-6),
        _number(row.num_params, ".1f", 1e-3),
        _number(row.peak_memory_mib, ".2f"),
    ]


def _number(value: float | None, form: str, scale: float = 1.0) -> str:
    return "" if value is None else format(value * scale, form)


def _choices(result: TrialResult) -> list[str]:
    return [result.criterion or "", ", ".join(result.dropped_blocks) or "none", _kept(result)]


def _kept(result: TrialResult) -> str:
    try:
        return _channels(Candidate.from_mapping(json.loads(result.candidate)))
    except (ValueError, TypeError, KeyError, AttributeError):
        return "not known"  # no search wrote the row


def _channels(one: Candidate) -> str:
    keep = dict(one.keep).values()
    if one.dsd_lambda is not None:
        return f"{one.k:.2f} after λ = {one.dsd_lambda:.1g}"
    if one.select not in (None, "ratio"):
        return f"{one.select}" if one.k is None else f"{one.select} {one.k:.2f}"
    return f"{min(keep):.2f} to {max(keep):.2f}" if keep else "all"


def _wait(count: int) -> str:
    return "1 trial waits" if count == 1 else f"{count} trials wait"


def _trial_seconds(results: Sequence[TrialResult]) -> dict[str, float]:
    return {part: sum(getattr(result, part) for result in results) for part in TRIAL_PARTS}


def _first_line(thing: Any) -> str:
    return (inspect.getdoc(getattr(thing, "build", thing)) or "").split("\n")[0]
