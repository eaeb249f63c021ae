"""What each dimension of the space costs alone: measured before the first trial, kept in the run.

Every level (a block dropped, one keep fraction lowered) is tried by itself on the dense model,
with batch-norm recalibration and no training. The damages add up to a prediction of any
combination: a start for the search (seeds.py) and for its model of the accuracy.

Damage is the logarithm of (loss / dense loss). On digits with ResNet-20 its sum ranks random
combinations better than sums of loss increases, of accuracy drops or of log-odds do.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ..methods.layer_costs import LayerCosts
from ..methods.sensitivity import measure_edit
from ..methods.surgery import inside
from .cache import Say, Shared, open_cache, sharing_here
from .config import SearchConfig
from .context import TrialContext
from .early_stop import TRAINING, trained_share
from .prune import make_recipe
from .records import Candidate
from .setup import Problem
from .space import CRITERION, DSD, FRACTION_OF, NUM_BLOCKS, SELECT, Params, Space, block_name
from .store import read_as, write_json

SENSITIVITY = "sensitivity.json"
SHARE = 0.2  # of what the trials will cost, at most: so much fewer are seeds than without
IMAGES = 2000  # validation images of one evaluation, at most
LEVELS = (0.5, 0.0, 0.75)  # between a fraction's ends, in the order of their use
UNIFORM = 0.6  # where criteria are compared with each other
FLOOR = 1e-3  # accuracies this near to 0 or 1 have no finite log-odds
SMALLEST_LOSS = 1e-4


@dataclass(frozen=True)
class Entry:
    """One level of one dimension, alone.

    Attributes:
        dimension: Name of the parameter (`drop:BLOCK`, `num_blocks`, `keep:stage1`, `top_k`), or
            `select:RULE` for a rule without a parameter.
        value: Its value; 1 for a dropped block and for a rule.
        accuracy: On the validation images used.
        loss: Likewise.
        macs: Of the model that it makes.
        num_params: Likewise.
    """

    dimension: str
    value: float
    accuracy: float
    loss: float
    macs: int
    num_params: int


@dataclass(frozen=True)
class Prediction:
    """What the table expects of a candidate before any training."""

    accuracy: float
    loss: float


@dataclass(frozen=True)
class SensitivityTable:
    """Every level measured alone, beside the dense model.

    Attributes:
        accuracy: The dense model's, on the same images.
        loss: Likewise.
        macs: Of the dense model.
        num_params: Likewise.
        criterion: The criterion that the levels were measured with; None without channels.
        entries: The levels.
        factors: Criterion -> its damage where all keep fractions are alike, relative to that of
            `criterion`; 1 where it was not measured.
        blocks: The removable blocks, the one to remove first in front.
        max_blocks: How many of them may go.
        lost: Dimension -> block -> the fraction of the dimension's channel groups that vanish
            with the block.
        seconds: What the measurement took.
    """

    accuracy: float
    loss: float
    macs: int
    num_params: int
    criterion: str | None
    entries: tuple[Entry, ...]
    factors: Mapping[str, float] = field(default_factory=dict)
    blocks: tuple[str, ...] = ()
    max_blocks: int = 0
    lost: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    seconds: float = 0.0

    def predict(self, params: Mapping[str, Any]) -> Prediction:
        """Accuracy and loss of a candidate after batch-norm recalibration, before training.

        Args:
            params: As `Space.suggest` returns them.
        """
        damage = self.damage(params)
        accuracy = _accuracy(_log_odds(self.accuracy) - self._odds_per_damage * damage)
        return Prediction(accuracy, self.loss * math.exp(damage))

    def damage(self, params: Mapping[str, Any]) -> float:
        """log(loss / dense loss) that the dimensions of a candidate add up to.

        A dimension without entries adds none. Between two levels, and beyond the last one, damage
        grows with the square of what is removed; it never falls as more is.
        """
        dropped = self.dropped(params)
        total = sum(self.level_damage(block_name(block), 1.0) for block in dropped)
        if NUM_BLOCKS in params:
            total += self.level_damage(NUM_BLOCKS, float(params[NUM_BLOCKS]))
        factor = self.factors.get(str(params.get(CRITERION)), 1.0)
        for name, value in params.items():
            if name in self._channel_dimensions:
                weight = factor * self._alive(name, dropped)
                total += weight * self.level_damage(name, float(value))
        return total + factor * self.level_damage(f"{SELECT}:{params.get(SELECT)}", 1.0)

    def level_damage(self, dimension: str, value: float) -> float:
        """The damage of one level alone; 0 where the dimension has no entries."""
        curve = self._curves.get(dimension)
        return 0.0 if curve is None else curve(value)

    @property
    def dimensions(self) -> frozenset[str]:
        """Those that have entries."""
        return frozenset(self._curves)

    def dropped(self, params: Mapping[str, Any]) -> tuple[str, ...]:
        """The blocks that a mask drops, as `Space.candidate` sees them."""
        chosen = [block for block in self.blocks if params.get(block_name(block))]
        return tuple(chosen[: self.max_blocks])

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)

    def _alive(self, dimension: str, dropped: Sequence[str]) -> float:
        lost = self.lost.get(dimension)
        return 1.0 - sum(lost.get(block, 0.0) for block in dropped) if lost else 1.0

    @cached_property
    def _channel_dimensions(self) -> frozenset[str]:
        return frozenset(name for name in self._curves if neutral(name) == 1.0)

    @cached_property
    def _curves(self) -> dict[str, _Curve]:
        levels: dict[str, list[tuple[float, float]]] = {}
        for entry in self.entries:
            levels.setdefault(entry.dimension, []).append((entry.value, self._damage_of(entry)))
        return {name: _Curve(neutral(name), found) for name, found in levels.items()}

    @cached_property
    def _odds_per_damage(self) -> float:
        """How far the accuracy's log-odds fall with the damage: least squares over the entries."""
        damages = [self._damage_of(entry) for entry in self.entries]
        falls = [_log_odds(self.accuracy) - _log_odds(entry.accuracy) for entry in self.entries]
        squares = sum(damage**2 for damage in damages)
        product = sum(damage * fall for damage, fall in zip(damages, falls, strict=True))
        return max(0.0, product / squares) if squares else 1.0

    def _damage_of(self, entry: Entry) -> float:
        return _log_ratio(entry.loss, self.loss)


class _Curve:
    """Damage over the levels of one dimension, zero at the neutral level.

    Linear in the square of the distance from the neutral level. What noise made smaller than the
    damage of a lesser removal is raised to it.
    """

    def __init__(self, neutral: float, levels: Sequence[tuple[float, float]]) -> None:
        self._neutral = neutral
        self._places, self._damages = [0.0], [0.0]
        for place, damage in sorted(((value - neutral) ** 2, damage) for value, damage in levels):
            if place > self._places[-1]:
                self._places.append(place)
                self._damages.append(max(damage, self._damages[-1]))

    def __call__(self, value: float) -> float:
        place = (value - self._neutral) ** 2
        if place == 0 or len(self._places) == 1:
            return 0.0
        right = min(bisect.bisect_left(self._places, place), len(self._places) - 1)
        (x0, x1), (y0, y1) = (v[right - 1 : right + 1] for v in (self._places, self._damages))
        return y0 + (place - x0) / (x1 - x0) * (y1 - y0)


def neutral(dimension: str) -> float:
    """The value at which a dimension removes nothing."""
    no_keep = dimension == NUM_BLOCKS or dimension.startswith((block_name(""), f"{SELECT}:"))
    return 0.0 if no_keep else 1.0


# --- measuring -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Level:
    """One edit to measure: a dimension's value with everything else dense."""

    dimension: str
    value: float
    params: Params

    @property
    def needed(self) -> bool:
        """Whether a table without its dimension has a hole."""
        return not self.dimension.startswith((f"{CRITERION}:", f"{SELECT}:"))


def measure_sensitivity(
    problem: Problem, space: Space, baseline_accuracy: float, run_dir: Path, say: Say
) -> SensitivityTable | None:
    """The table of a run: read where it was measured before, else measured and stored.

    Args:
        problem: With the dense weights in its model.
        space: The space.
        baseline_accuracy: The dense model's validation accuracy.
        run_dir: The run folder.
        say: Told what is done.

    Returns:
        The table; None when it is switched off, when nothing can be scored alone, or when one
        level of every dimension would cost too much beside the trials.
    """
    config, path = problem.config, run_dir / SENSITIVITY
    if path.exists():
        return read_as(path, SensitivityTable)
    if not (config.search.seeds and config.search.sensitivity):
        return None
    if any((run_dir / "trials").glob("*.parquet")):
        return None  # resumed: its trials began without a table, and must go on alike
    every = levels(space)
    chosen = every[: max(0, max_evaluations(config, problem) - 1)]
    if not chosen or not {e.dimension for e in every if e.needed} <= {e.dimension for e in chosen}:
        return None  # a table with holes would prune what it knows and nothing else
    shared = sharing_here(open_cache(config.cache, run_dir, say))
    table = _measure(problem, space, baseline_accuracy, chosen, shared)
    write_json(path, table.to_json())
    say(f"sensitivity: {len(chosen)} edits measured alone ({table.seconds:.1f} s)")
    return table


def max_evaluations(config: SearchConfig, problem: Problem) -> int:
    """How many evaluations cost `SHARE` of the trials: in images that are run forward."""
    num_train, num_val = problem.task.num_train, len(problem.task.data.val)
    recover = config.recover
    recalibration = min(recover.recalibration_images, num_train) * recover.recalibrate_bn
    trial = TRAINING * trained_share(config) * recover.epochs * num_train + recalibration
    trial += num_val * (1 + (recover.epochs > 0))
    one = min(IMAGES, num_val) + recalibration
    return int(SHARE * config.search.trials * trial / one)


def levels(space: Space) -> list[Level]:
    """What to measure, the most telling first: blocks and middle widths, criteria, the rest."""
    criterion = reference_criterion(space)
    blocks = _block_levels(space, criterion)
    if criterion is None:
        return blocks
    rounds: list[list[Level]] = [[] for _ in LEVELS]
    for rule in space.config.select:
        for index, level in enumerate(LEVELS):
            rounds[index] += _rule_levels(space, criterion, rule, level)
    ordered = [one for pair in zip_longest(rounds[0], blocks) for one in pair if one is not None]
    ordered += _criterion_levels(space, criterion) + rounds[1] + rounds[2]
    return _distinct(space, ordered)


def reference_criterion(space: Space) -> str | None:
    """The first criterion that is no control and trains nothing, else the first."""
    able = [name for name in space.criteria if name != DSD]
    return next((name for name in able if name != "random"), able[0] if able else None)


def _block_levels(space: Space, criterion: str | None) -> list[Level]:
    if not space.max_blocks:
        return []
    dense = _dense(space, criterion)
    if space.config.blocks.mode == "ranked":
        counts = range(1, space.max_blocks + 1)
        return [Level(NUM_BLOCKS, n, space.block_params(n) | dense) for n in counts]
    names = map(block_name, space.block_order)
    return [Level(name, 1.0, space.block_params(0) | {name: True} | dense) for name in names]


def _rule_levels(space: Space, criterion: str, rule: str, level: float) -> list[Level]:
    base = space.block_params(0) | {CRITERION: criterion, SELECT: rule}
    if rule == "ratio":
        names = space.keep_names()
        value = _between(space, rule, level)
        dense = dict.fromkeys(names, 1.0)
        return [Level(name, value, base | dense | {name: value}) for name in names]
    if rule not in FRACTION_OF:
        return [Level(f"{SELECT}:{rule}", 1.0, base)] if level == LEVELS[0] else []
    name = FRACTION_OF[rule]
    value = _between(space, rule, level)
    return [Level(name, value, base | {name: value})]


def _criterion_levels(space: Space, reference: str) -> list[Level]:
    """Every criterion where all keep fractions are alike."""
    able = [name for name in space.criteria if name != DSD]
    if "ratio" not in space.config.select or len(able) < 2:
        return []
    keep = _between(space, "ratio", UNIFORM)
    alike = dict.fromkeys(space.keep_names(), keep) | space.block_params(0) | {SELECT: "ratio"}
    return [
        Level(f"{CRITERION}:{name}", keep, alike | {CRITERION: name})
        for name in sorted(able, key=lambda name: name != reference)
    ]


def _dense(space: Space, criterion: str | None) -> Params:
    """Every channel kept."""
    if criterion is None:
        return {}
    return {CRITERION: criterion, SELECT: "ratio"} | dict.fromkeys(space.keep_names(), 1.0)


def _between(space: Space, rule: str, share: float) -> float:
    bounds = space.fraction_bounds(rule)
    return space.on_grid(rule, bounds.low + share * (bounds.high - bounds.low))


def _distinct(space: Space, found: Sequence[Level]) -> list[Level]:
    """Without levels that remove nothing, or the same as an earlier one."""
    known = {Candidate()}
    kept = []
    for level in found:
        candidate = space.candidate(level.params)
        if candidate not in known:
            known.add(candidate)
            kept.append(level)
    return kept


def _measure(
    problem: Problem,
    space: Space,
    baseline_accuracy: float,
    chosen: Sequence[Level],
    shared: Shared,
) -> SensitivityTable:
    start = time.perf_counter()
    config = problem.config
    context = TrialContext(
        config,
        problem.task,
        problem.model,
        problem.plan,
        baseline_accuracy,
        None,
        shared=shared,  # the trials read these scores
        data_digest=problem.data_digest,
    )
    costs = LayerCosts(problem.model, problem.plan, problem.task.example_input())
    dense = _entry(Level("", 0.0, {}), Candidate(), context, costs)
    measured = [_entry(one, space.candidate(one.params), context, costs) for one in chosen]
    return table_of(space, dense, measured, time.perf_counter() - start)


def table_of(
    space: Space, dense: Entry, measured: Sequence[Entry], seconds: float = 0.0
) -> SensitivityTable:
    """The table of what was measured.

    Args:
        space: The space.
        dense: The dense model on the same images.
        measured: The levels, those of `criterion:NAME` too.
        seconds: What it took.
    """
    reference = reference_criterion(space)
    return SensitivityTable(
        accuracy=dense.accuracy,
        loss=dense.loss,
        macs=dense.macs,
        num_params=dense.num_params,
        criterion=reference,
        entries=tuple(e for e in measured if not e.dimension.startswith(f"{CRITERION}:")),
        factors=_factors(dense, measured, reference),
        blocks=space.block_order if space.max_blocks else (),
        max_blocks=space.max_blocks,
        lost=_lost(space),
        seconds=seconds,
    )


def _entry(level: Level, candidate: Candidate, context: TrialContext, costs: LayerCosts) -> Entry:
    config = context.config
    recipe, _ = make_recipe(candidate, context, config.search.seed)
    effect = measure_edit(
        context.dense,
        context.plan,
        recipe,
        context.task,
        seed=config.search.seed,
        recalibrate_bn=config.recover.recalibrate_bn,
        recalibration_images=config.recover.recalibration_images,
        num_images=IMAGES,
    )
    keep = {
        name: len(kept) / context.plan[name].num_channels for name, kept in recipe.kept.items()
    }
    return Entry(
        level.dimension,
        level.value,
        effect.accuracy,
        effect.loss,
        costs.macs(keep, recipe.dropped_blocks),
        costs.num_params(keep, recipe.dropped_blocks),
    )


def _factors(dense: Entry, measured: Sequence[Entry], reference: str | None) -> dict[str, float]:
    start = len(f"{CRITERION}:")
    damages = {
        entry.dimension[start:]: _log_ratio(entry.loss, dense.loss)
        for entry in measured
        if entry.dimension.startswith(f"{CRITERION}:")
    }
    base = damages.get(str(reference), 0.0)
    if base <= 0:
        return {}
    return {name: min(max(damage / base, 0.25), 4.0) for name, damage in damages.items()}


def _lost(space: Space) -> dict[str, dict[str, float]]:
    groups: dict[str, list[tuple[str, ...]]] = {}
    for group in space.plan.groups if space.criteria else ():
        groups.setdefault(space.keep_name(group), []).append(group.layers)
    found: dict[str, dict[str, float]] = {}
    for name, layers in groups.items():
        for block in space.block_order:
            gone = sum(all(inside(layer, (block,)) for layer in group) for group in layers)
            if gone:
                found.setdefault(name, {})[block] = gone / len(layers)
    return found


def _log_ratio(loss: float, dense: float) -> float:
    return math.log(max(loss, SMALLEST_LOSS) / max(dense, SMALLEST_LOSS))


def _log_odds(accuracy: float) -> float:
    clipped = min(max(accuracy, FLOOR), 1 - FLOOR)
    return math.log(clipped / (1 - clipped))


def _accuracy(log_odds: float) -> float:
    return 1 / (1 + math.exp(-max(-50.0, min(50.0, log_odds))))
