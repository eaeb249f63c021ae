"""Results of a study by row, position and seed: means and ranges that reports and pictures use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..records import TrialResult, TrialStatus
from .study import TUNED, Row

METRICS = {
    "accuracy_before_finetune": "pruned (%)",
    "accuracy": "fine-tuned (%)",
    "gap": "accuracy lost (points)",
    "macs": "MACs (% of dense)",
    "num_params": "params (% of dense)",
}


@dataclass(frozen=True)
class Cell:
    """The results of one row at one position, over the seeds.

    Attributes:
        row: The row.
        position: Number of removed units, or `Row.x`; None in a table.
        results: By seed, completed ones.
        dense: The dense models of the same seeds and classes.
        num_failed: How many failed.
    """

    row: Row
    position: float | None
    results: dict[int, TrialResult]
    dense: dict[int, TrialResult]
    num_failed: int

    def values(self, metric: str) -> dict[int, float]:
        """A metric of `METRICS` by seed; seeds without it are left out."""
        found = {seed: self._value(metric, seed) for seed in self.results}
        return {seed: value for seed, value in found.items() if value is not None}

    def _value(self, metric: str, seed: int) -> float | None:
        result, dense = self.results[seed], self.dense.get(seed)
        if metric == "gap":
            return None if result.accuracy_drop is None else 100 * result.accuracy_drop
        value = result.metric(metric)
        if value is None or not metric.startswith("accuracy") and dense is None:
            return None
        if metric.startswith("accuracy"):
            return 100 * value
        assert dense is not None
        whole = dense.metric(metric)
        return 100 * value / whole if whole else None


def cells(rows: Sequence[Row], results: Sequence[TrialResult], seeds: int) -> list[Cell]:
    """All cells, in the order of the rows."""
    by_id = {result.trial_id: result for result in results}
    dense = {
        row.num_classes: {
            seed: by_id[row.trial_ids(seed)[0]]
            for seed in range(seeds)
            if _is_done(by_id.get(row.trial_ids(seed)[0]))
        }
        for row in rows
        if row.work == "dense"
    }
    found = []
    for row in rows:
        for index, position in enumerate(row.points or (row.x,)):
            here = {seed: by_id.get(row.trial_ids(seed)[index]) for seed in range(seeds)}
            done = {seed: r for seed, r in here.items() if r is not None and _is_done(r)}
            failed = sum(r is not None and not _is_done(r) for r in here.values())
            found.append(Cell(row, position, done, dense[row.num_classes], failed))
    return found


@dataclass(frozen=True)
class Entry:
    """What is ranked: a row of a table, or a curve, by the mean over its positions.

    Attributes:
        label: Of the row or curve.
        row: The row; the curve's first one.
        values: By seed.
    """

    label: str
    row: Row
    values: dict[int, float]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return sum(self.values.values()) / len(self.values)

    def clearly_above(self, other: Entry) -> bool:
        """Whether its worst seed is better than the other's best; one seed shows nothing."""
        several = min(len(self.values), len(other.values)) > 1
        return several and min(self.values.values()) > max(other.values.values())


def entries(group: Sequence[Cell], metric: str) -> Iterator[Entry]:
    """What is ranked among cells of one group: all but the dense model's, without gaps."""
    by_label: dict[str, list[Cell]] = {}
    for cell in group:
        if cell.row.work != "dense" and cell.row.label != TUNED:
            by_label.setdefault(series_of(cell), []).append(cell)
    for label, members in by_label.items():
        values = [cell.values(metric) for cell in members]
        seeds = set(values[0]).intersection(*values[1:])
        mean = {seed: sum(v[seed] for v in values) / len(values) for seed in sorted(seeds)}
        if mean:
            yield Entry(label, members[0].row, mean)


def series_of(cell: Cell) -> str:
    """The curve that a cell belongs to; its row's label in a table."""
    return cell.row.label if cell.position is None else cell.row.series or cell.row.label


def is_matrix(found: Sequence[Cell]) -> bool:
    """Whether the cells are curves over positions."""
    return any(cell.position is not None for cell in found)


def _is_done(result: TrialResult | None) -> bool:
    return result is not None and result.status is not TrialStatus.FAILED
