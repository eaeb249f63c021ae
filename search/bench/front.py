"""`prune-search bench front`: how much of the exact front each sampler finds, and how soon.

A space is enumerated once (enumerate.py). Then every sampler searches it, several times, and each
of its evaluations is a look into the table. What is reported is the hypervolume that it reached,
as a fraction of that of the exact front.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from ...methods.layer_costs import LayerCosts
from ..config import SearchConfig, parse_config
from ..costs import Costs
from ..environment import environment
from ..front import Front, reference_point
from ..progress import Progress
from ..records import Candidate, TrialResult, TrialStatus
from ..sampler import Sampler
from ..seeds import UNIFORM_KEEPS, Seed, default_seeds
from ..sensitivity import Entry, Level, SensitivityTable, levels, table_of
from ..setup import make_model
from ..space import Params, Space
from ..surrogate.hints import hints_of
from .common import markdown_row
from .enumerate import Enumeration, enumerate_space

ENOUGH = 0.95  # of the exact hypervolume
SHARE = 0.10  # of the evaluations
BUDGETS = (30, 60, 100, 200)
MOST_ASKS = 20  # an evaluation: a sampler that repeats itself ends
MOST_GP = 100  # trials: Optuna's GP takes seconds, then a minute a proposal
LABELS = ("search", "surrogate alone", "tpe", "gp", "nsga2", "random", "uniform")


def bench_front(
    config: SearchConfig, out: Path, progress: Progress, *, seeds: int = 5, budget: int = 200
) -> dict[str, Any]:
    """Enumerates the config's space (or reads what was) and lets every sampler search it.

    Args:
        config: A space with discrete dimensions and no fine-tuning.
        out: OUT.parquet keeps the enumeration.
        progress: Where to report.
        seeds: Searches a sampler.
        budget: Evaluations a search; at most `SHARE` of the candidates.

    Returns:
        The table's rows, the exact front's size and hypervolume, and the hardware.
    """
    exact = enumerate_space(config, out.with_suffix(".parquet"), progress)
    space = exact.space(config)
    volume = exact_hypervolume(exact, config)
    budget = min(budget, max(1, math.floor(SHARE * len(exact.rows))))
    rows = []
    for label in LABELS:
        progress.say(f"{label}: {seeds} searches of up to {budget} evaluations")
        most = min(budget, MOST_GP) if label == "gp" else budget
        searches = [_search(label, exact, space, config, seed, most) for seed in range(seeds)]
        rows.append(_row(label, [[v / volume for v in curve] for curve, _ in searches], searches))
    return {
        "name": config.name,
        "candidates": len(exact.rows),
        "front": len(_exact_front(exact, config).members),
        "hypervolume": volume,
        "budget": budget,
        "allowed": math.floor(SHARE * len(exact.rows)),
        "seeds": seeds,
        "objectives": dict(config.objectives),
        "rows": rows,
        "enumeration": exact.facts,
        "environment": environment(),
    }


def front_markdown(result: Mapping[str, Any]) -> str:
    """`bench_front` as a report, with hardware, data and what counts as an evaluation."""
    facts, dense = result["enumeration"], result["enumeration"]["baseline"]
    config = facts["config"]
    measured, replayed = facts["environment"], result["environment"]
    versions = ", ".join(f"{name} {v}" for name, v in replayed["libraries"].items())
    lines = [
        f"# {result['name']}: how soon each sampler finds the exact front",
        "",
        f"{config['model']['name']} on {config['data']['name']}, {facts['num_train']} training "
        f"and {facts['num_val']} validation images of {facts['image_shape'][-1]} px; dense "
        f"accuracy {dense['accuracy']:.4f}, {dense['macs'] / 1e6:.2f} M MACs. All "
        f"{result['candidates']} candidates ({', '.join(map(str, config['space']['criteria']))}"
        "; every subset of blocks; every choice of keep levels) were scored once after "
        f"batch-norm recalibration, without fine-tuning, in {facts['seconds'] / 60:.0f} minutes "
        f"on {measured['cores']} cores ({measured['cpu']}). Accuracy is on the validation split.",
        "",
        f"Hypervolume of {' and '.join(result['objectives'])} as a fraction of the exact front's "
        f"({result['front']} members); median and range of {result['seeds']} searches. A "
        "candidate that a sampler repeats is no evaluation. `search` is the product's default: "
        "the sensitivity table (its evaluations counted), knapsack seeds, then the surrogate. "
        "`surrogate alone` has neither table nor seeds. `uniform` keeps one fraction in all "
        f"layers and drops the last blocks. Optuna's GP was run to {MOST_GP} evaluations. The "
        f"tenth that a search may use is {result['allowed']} evaluations.",
        "",
    ]
    budgets = _budgets(result)
    columns = ["sampler", *(f"{b} evaluations" for b in budgets)]
    columns += [f"evaluations to {ENOUGH:.0%}", "ask ms"]
    rows = [[row["sampler"], *_cells(row, budgets)] for row in result["rows"]]
    lines += [
        markdown_row(columns),
        markdown_row(["---"] * len(columns)),
        *map(markdown_row, rows),
        "",
    ]
    lines += [
        f"Hardware of the searches: {replayed['cpu']}, {replayed['cores']} cores; {versions}."
    ]
    return "\n".join([*lines, ""])


def exact_hypervolume(exact: Enumeration, config: SearchConfig) -> float:
    """Hypervolume of the front of all candidates."""
    return _exact_front(exact, config).hypervolume


def front_table(result: Mapping[str, Any]) -> Table:
    """`bench_front` for people."""
    table = Table(
        title=f"{result['name']}: fraction of the exact hypervolume ({result['hypervolume']:.4f}, "
        f"{result['front']} of {result['candidates']} candidates on the exact front), median "
        f"(range) of {result['seeds']} searches; {result['environment']['cpu']}"
    )
    budgets = _budgets(result)
    for column in ("sampler", *(f"{b} evaluations" for b in budgets)):
        table.add_column(column)
    table.add_column(f"evaluations to {ENOUGH:.0%}")
    table.add_column("ask ms")
    for row in result["rows"]:
        table.add_row(row["sampler"], *_cells(row, budgets))
    return table


# --- one search ------------------------------------------------------------------------------


def _search(
    label: str, exact: Enumeration, space: Space, config: SearchConfig, seed: int, budget: int
) -> tuple[list[float], float]:
    """Hypervolume after each evaluation, and the seconds that an ask took.

    A candidate that was evaluated before is looked up again, and is no evaluation.
    """
    front, curve, known = _new_front(exact, config), list[float](), set[Candidate]()
    start, asked = time.perf_counter(), 0
    for candidate in _candidates(label, exact, space, config, seed):
        asked += 1
        if candidate not in known:
            known.add(candidate)
            front.add(_result(len(known), candidate, exact))
            curve.append(front.hypervolume)
        if len(curve) == budget or asked == MOST_ASKS * budget:
            break
    return curve, (time.perf_counter() - start) / max(1, asked)


def _candidates(
    label: str, exact: Enumeration, space: Space, config: SearchConfig, seed: int
) -> Iterator[Candidate]:
    """What is evaluated, one after another, without end."""
    if label == "uniform":
        yield from _uniform(space)
        return
    knowing = label in ("search", "surrogate alone")
    data = config.model_dump(mode="json")
    data["search"] |= {"sampler": "surrogate" if knowing else label, "seed": seed}
    table, costs, first = None, _costs(exact, config, space), list[Seed]()
    if label == "search":
        table, measured = _table(exact, space)
        yield from measured
        costs = Costs(space, costs.layers, table)
        first = default_seeds(space, parse_config(data), table, costs)
    hints = hints_of(costs, table) if knowing else None
    sampler = Sampler(space, parse_config(data), first, exact.facts["baseline"], hints)
    for number in itertools.count():
        candidate = sampler.ask(number).candidate
        yield candidate
        sampler.tell(number, _result(number, candidate, exact))


def _costs(exact: Enumeration, config: SearchConfig, space: Space) -> Costs:
    """MACs and parameters of any candidate, from the model's shapes alone."""
    model = make_model(config, len(exact.facts["classes"]), trained=False)
    image = torch.zeros(1, *exact.facts["image_shape"])
    return Costs(space, LayerCosts(model, space.plan, image))


def _table(exact: Enumeration, space: Space) -> tuple[SensitivityTable, list[Candidate]]:
    """The sensitivity table as the search measures it, and the evaluations that it takes."""
    chosen = [Candidate(), *(space.candidate(level.params) for level in levels(space))]

    def entry(level: Level, candidate: Candidate) -> Entry:
        row = exact.rows[candidate.key]
        return Entry(level.dimension, level.value, **row)

    measured = [entry(level, c) for level, c in zip(levels(space), chosen[1:], strict=True)]
    return table_of(space, entry(Level("", 0.0, {}), Candidate()), measured), chosen


def _uniform(space: Space) -> Iterator[Candidate]:
    """One fraction for all layers, every criterion, with the last 0, 1, 2, ... blocks dropped."""
    for num_dropped in range(space.max_blocks + 1):
        for keep in (1.0, *UNIFORM_KEEPS, *np.linspace(0.1, 1.0, 91).round(2).tolist()):
            for criterion in space.criteria:
                params: Params = space.block_params(num_dropped)
                params |= space.channel_params(criterion, keep)
                if space.admits(params):
                    yield space.candidate(params)


def _result(number: int, candidate: Candidate, exact: Enumeration) -> TrialResult:
    row = exact.rows[candidate.key]
    return TrialResult(
        trial_id=f"t{number:05d}",
        status=TrialStatus.COMPLETED,
        accuracy_before_finetune=row["accuracy"],
        accuracy_drop=exact.facts["baseline"]["accuracy"] - row["accuracy"],
        **row,
    )


# --- the exact front and the table's rows ----------------------------------------------------


def _new_front(exact: Enumeration, config: SearchConfig) -> Front:
    reference = reference_point(exact.facts["baseline"], config.objectives)
    return Front(config.objectives, reference)


def _exact_front(exact: Enumeration, config: SearchConfig) -> Front:
    front = _new_front(exact, config)
    for number, row in enumerate(exact.rows.values()):
        front.add(TrialResult(f"t{number:05d}", TrialStatus.COMPLETED, **row))
    return front


def _row(
    label: str, curves: Sequence[Sequence[float]], searches: Sequence[tuple[Any, float]]
) -> dict[str, Any]:
    reached = {}
    for budget in sorted({*BUDGETS, max(map(len, curves))}):
        values = [curve[min(budget, len(curve)) - 1] for curve in curves]
        if budget <= max(map(len, curves)) or label == "uniform":
            reached[str(budget)] = _summary(values)
    needed = [next((n for n, v in enumerate(curve, 1) if v >= ENOUGH), None) for curve in curves]
    return {
        "sampler": label,
        "reached": reached,
        "needed": needed,
        "ask_ms": 1000 * statistics.median(seconds for _, seconds in searches),
    }


def _summary(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def _budgets(result: Mapping[str, Any]) -> list[int]:
    return [b for b in BUDGETS if b <= result["budget"]] or [result["budget"]]


def _cells(row: Mapping[str, Any], budgets: Sequence[int]) -> list[str]:
    reached = [_spread(row["reached"].get(str(budget))) for budget in budgets]
    return [*reached, _needed(row["needed"]), f"{row['ask_ms']:.0f}"]


def _spread(summary: Mapping[str, float] | None) -> str:
    if summary is None:
        return ""
    return f"{summary['median']:.3f} ({summary['low']:.3f} to {summary['high']:.3f})"


def _needed(counts: Sequence[int | None]) -> str:
    """The median, where a search that never got there counts as endless."""
    reached = sorted(count for count in counts if count is not None)
    if not reached:
        return "never"
    middle = (len(counts) - 1) // 2
    median = str(reached[middle]) if middle < len(reached) else "never"
    highest = str(reached[-1]) if len(reached) == len(counts) else "never"
    return f"{median} ({reached[0]} to {highest})"
