"""Which parameters of the search space decided a metric: permutation importance of a forest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..records import FULL_FIDELITY, TrialResult, TrialStatus
from ..space import DSD_LAMBDA
from .columns import Tried, number

Array = npt.NDArray[np.float64]

MOST_TRIALS = 1000  # more are drawn evenly: the forest is good enough, and takes seconds
FEWEST_TRIALS = 20
FEWEST_A_PARAMETER = 2  # trials
LEAST_R2 = 0.3  # of trials that the forest has not seen
FOLDS, SHUFFLES, TREES = 3, 3, 64
METHOD = (
    f"Permutation importance of a random forest ({TREES} trees, {FOLDS}-fold cross-validation): "
    "by how much R² on trials that the forest has not seen falls when the values of one parameter "
    "are shuffled among them, with the range over the folds. A conditional parameter counts "
    "where it is not set, too. Parameters that the sampler varied together share their importance."
)


def importance_of(
    results: Sequence[TrialResult], tried: Sequence[Tried], metrics: Sequence[str]
) -> dict[str, Any]:
    """Importance of each parameter that varied, for each metric.

    Over completed and infeasible trials of the full fidelity that no other trial repeats.

    Returns:
        `method`: in words; `metrics`: of each `metric`, `num_trials`, `num_used`, `r2`, `doubt`
        (why it means nothing; empty where it does) and `parameters`: `name`, `mean`, `low`,
        `high`, the most important first.
    """
    ended = (TrialStatus.COMPLETED, TrialStatus.INFEASIBLE)
    rows = [
        (result, one.params)
        for result, one in zip(results, tried, strict=True)
        if result.status in ended and result.fidelity == FULL_FIDELITY and one.params
    ]
    return {"method": METHOD, "metrics": [_of_metric(metric, rows) for metric in metrics]}


def _of_metric(
    metric: str, rows: Sequence[tuple[TrialResult, Mapping[str, Any]]]
) -> dict[str, Any]:
    measured = [(r, p) for r, p in rows if r.metric(metric) is not None]
    step = max(1.0, len(measured) / MOST_TRIALS)
    used = [measured[int(n * step)] for n in range(int(len(measured) / step))]
    y = np.array([r.metric(metric) for r, _ in used], dtype=np.float64)
    features = _features([params for _, params in used])
    found: dict[str, Any] = {
        "metric": metric, "num_trials": len(measured), "num_used": len(used), "r2": None,
        "doubt": "", "parameters": [],
    }  # fmt: skip
    fewest = max(FEWEST_TRIALS, FEWEST_A_PARAMETER * len(features))
    if not features or len(y) < 2 or np.ptp(y) == 0:
        found["doubt"] = "Nothing varied in the trials that were measured in full."
    elif len(y) < fewest:
        found["doubt"] = (
            f"Only {len(y)} trials were measured in full; with fewer than {fewest} "
            f"for {len(features)} parameters it means nothing."
        )
    if found["doubt"]:
        return found
    r2, effects = _permuted(features, y)
    found["r2"] = number(r2, 3)
    if r2 < LEAST_R2:
        found["doubt"] = (
            f"The forest explains only R² = {r2:.2f} of trials that it has not seen: below "
            f"{LEAST_R2} the order of the parameters means little."
        )
    rows_ = [
        {"name": name, "mean": number(e.mean(), 4), "low": number(e.min(), 4),
         "high": number(e.max(), 4)}
        for name, e in effects.items()
    ]  # fmt: skip
    found["parameters"] = sorted(rows_, key=lambda row: -float(row["mean"] or 0.0))
    return found


def _features(params: Sequence[Mapping[str, Any]]) -> dict[str, Array]:
    """Each parameter that varied as columns, [num_trials, width]; choices are one-hot."""
    names = dict.fromkeys(name for one in params for name in one)
    columns = {name: _encoded(name, [one.get(name) for one in params]) for name in names}
    return {name: c for name, c in columns.items() if c.size and np.ptp(c, axis=0).max() > 0}


def _encoded(name: str, values: Sequence[Any]) -> Array:
    if any(isinstance(value, str) for value in values):
        choices = sorted({str(value) for value in values})
        return np.array([[str(v) == choice for choice in choices] for v in values], dtype=float)
    numbers = np.array([np.nan if v is None else float(v) for v in values])
    if name == DSD_LAMBDA:
        numbers = np.log10(np.maximum(numbers, 1e-12))
    low = np.nanmin(numbers)
    away = low - 1.0 - (np.nanmax(numbers) - low)  # not set: apart from all values
    return np.where(np.isnan(numbers), away, numbers)[:, None]


def _permuted(features: Mapping[str, Array], y: Array) -> tuple[float, dict[str, Array]]:
    """R² on unseen trials, and its fall by parameter in each fold, [FOLDS]."""
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.model_selection import KFold

    x = np.hstack(list(features.values()))
    ends = np.cumsum([column.shape[1] for column in features.values()])
    places = {
        name: slice(end - features[name].shape[1], end)
        for name, end in zip(features, ends.tolist(), strict=True)
    }
    rng = np.random.default_rng(0)
    scores: list[float] = []
    falls: dict[str, list[float]] = {name: [] for name in features}
    for train, test in KFold(FOLDS, shuffle=True, random_state=0).split(x):
        forest = RandomForestRegressor(TREES, min_samples_leaf=2, max_features=0.5, random_state=0)
        forest.fit(x[train], y[train])
        copies = [x[test]]
        for place in places.values():
            for _ in range(SHUFFLES):
                copy = x[test].copy()
                copy[:, place] = copy[rng.permutation(len(test)), place]
                copies.append(copy)
        errors = (forest.predict(np.vstack(copies)).reshape(len(copies), -1) - y[test]) ** 2
        r2 = 1 - errors.mean(axis=1) / y.var()
        scores.append(float(r2[0]))
        for index, name in enumerate(places):
            first = 1 + SHUFFLES * index
            falls[name].append(float(r2[0] - r2[first : first + SHUFFLES].mean()))
    return float(np.mean(scores)), {name: np.array(each) for name, each in falls.items()}
