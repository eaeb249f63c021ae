"""What an ablation is made of: `Row`s, which jobs run, and the `Study` that they belong to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ...methods.surgery import PruningPlan
from ..config import AblateConfig, SearchConfig, check_names
from ..records import Candidate, TrialResult
from ..space import kept_channels

Work = Literal["dense", "trial", "blocks", "layers"]

TUNED = "Unpruned, fine-tuned alike"


@dataclass(frozen=True)
class Facts:
    """What the rows of a study depend on beside its config.

    Attributes:
        num_classes: Classes of the data.
        num_blocks: Blocks that may be dropped.
        num_layers: Layers that may be bypassed.
    """

    num_classes: int
    num_blocks: int = 0
    num_layers: int = 0


@dataclass(frozen=True)
class Row:
    """One row of a table, or one curve of a figure; a job is a row at a seed.

    Attributes:
        key: Its name in file names.
        label: Its name in the table.
        group: Rows of one group are compared with each other; the group's heading.
        work: What the job does: the dense model, one trial, or one trial for each number of
            removed blocks or layers.
        criterion: The channel criterion of a trial.
        options: The options of the criterion, of the block order or of the layer score.
        select: The selection rule.
        amount: What the rule keeps: a fraction of each group's channels (`ratio`), or the
            candidate's k; 1 - q for `dsd`.
        points: Numbers of removed blocks or layers, of a curve.
        x: Where a row stands in a figure, if that is not a number of removed units.
        series: The curve that a row belongs to, in a figure.
        settings: Keys of the config that the row overrides.
        num_classes: The data are cut down to the first so many classes; None keeps all.
        match: Another criterion, scored too: the row keeps the MACs that this one keeps under the
            row's rule, so that the two are compared at equal cost.
        paper: The paper's figures as printed, by column.
        control: The row is ours, not the paper's.
    """

    key: str
    label: str
    group: str = ""
    work: Work = "trial"
    criterion: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    select: str | None = None
    amount: float | None = None
    points: tuple[int, ...] = ()
    x: float | None = None
    series: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    num_classes: int | None = None
    match: str | None = None
    paper: Mapping[str, float] = field(default_factory=dict)
    control: bool = False

    def trial_ids(self, seed: int) -> tuple[str, ...]:
        """The ledger's names of what the job of this row stores."""
        if not self.points:
            return (f"{self.key}-s{seed}",)
        return tuple(f"{self.key}-n{point:02d}-s{seed}" for point in self.points)

    def config(self, config: SearchConfig, seed: int) -> SearchConfig:
        """The config that the row's job runs under: its criterion, its settings, its seed."""
        changes: dict[str, Any] = {"search": {"seed": seed}}
        if self.criterion is not None:
            known = {c.name: c.options for c in config.space.criteria}
            used = {self.criterion: {**known.get(self.criterion, {}), **self.options}}
            if self.match is not None:
                used[self.match] = known.get(self.match, {})
            changes["space"] = {"criteria": [{name: options} for name, options in used.items()]}
        return merged(merged(config, self.settings), changes)

    def candidate(self, plan: PruningPlan, ablate: AblateConfig) -> Candidate:
        """What the row's trial tries, `match` apart."""
        if self.criterion is None:
            return Candidate()
        if self.select == "ratio":
            assert self.amount is not None
            keep = {
                group.name: kept_channels(group, self.amount, 1) / group.num_channels
                for group in plan.groups
            }
            return Candidate(self.criterion, (), "ratio", keep=tuple(sorted(keep.items())))
        if self.criterion != "dsd":
            return Candidate(self.criterion, (), self.select, k=self.amount)
        assert self.amount is not None
        return Candidate(
            "dsd",
            (),
            self.select,
            k=self.amount,
            dsd_lambda=ablate.dsd_lambda,
            dsd_q=round(1 - self.amount, 6) if self.select == "global" else ablate.dsd_q,
            dsd_epochs=ablate.dsd_epochs,
        )


@dataclass(frozen=True)
class Picture:
    """How a figure is drawn.

    Attributes:
        x: `point` (removed units or `Row.x`), `macs` (fraction of the dense model's) or `bars`
            (one a row).
        x_label: What stands below it.
        position: What the positions of a curve count.
        gap: Whether the accuracy lost against the dense model is drawn, not the accuracy.
    """

    x: Literal["point", "macs", "bars"]
    x_label: str
    position: str
    gap: bool = False


@dataclass(frozen=True)
class Study:
    """A table or figure of a paper.

    Attributes:
        paper: Its short name on the command line.
        table: The table or figure.
        title: What it compares.
        setting: The paper's model, data and terms, and where the paper contradicts itself.
        rows: The rows, from the config and what the model and data offer.
        method: Label of the paper's own method in `rows`.
        compare: Our metrics (`accuracy_before_finetune`, `accuracy`) by which rows are ranked ->
            the paper's column of the same meaning; empty where it prints none.
        ranking: Labels, best first, those that it does not compare together, where the paper
            states an order but prints no figures.
        settings: Keys of the config that the whole study overrides.
        picture: How it is drawn; None for tables.
        notes: Sentences below the table.
        remarks: Sentences that the results give.
    """

    paper: str
    table: str
    title: str
    setting: str
    rows: Callable[[SearchConfig, Facts], tuple[Row, ...]]
    method: str
    compare: Mapping[str, str]
    ranking: tuple[tuple[str, ...], ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    picture: Picture | None = None
    notes: tuple[str, ...] = ()
    remarks: Callable[[Sequence[TrialResult]], list[str]] = lambda results: []

    @property
    def name(self) -> str:
        """Its name in file names and on the command line."""
        return f"{self.paper} {self.table}"

    def config(self, config: SearchConfig) -> SearchConfig:
        """The config with the study's own settings; constraints do not apply to an ablation."""
        return merged(config, {"constraints": [], **self.settings})

    def jobs(self, config: SearchConfig, facts: Facts) -> tuple[Row, ...]:
        """The rows, and the dense model trained on like the pruned ones.

        Raises:
            ConfigError: If a row's method does not take its options.
        """
        rows = list(self.rows(config, facts))
        for row in rows:
            check_names(row.config(self.config(config), 0))
        dense = [row for row in rows if row.work == "dense"]
        for row in dense:
            key = row.key.replace("dense", "tuned", 1)
            tuned = Row(key, TUNED, row.group, num_classes=row.num_classes, x=row.x, control=True)
            rows.insert(rows.index(row) + 1, tuned)
        return tuple(rows)


def merged(config: SearchConfig, changes: Mapping[str, Any]) -> SearchConfig:
    """The config with the keys of `changes`, section by section; lists are replaced."""
    return SearchConfig.model_validate(_merge(config.model_dump(mode="json"), changes))


def _merge(data: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(data)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(found.get(key), Mapping)
        found[key] = _merge(found[key], value) if both else value
    return found
