"""`prune-search check`: what can be removed, what cannot and why; runs no trial."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from torch import Tensor

from ..methods.blocks import find_blocks
from ..methods.criteria import score_channels
from ..methods.layer_costs import LayerCosts
from ..methods.measure import count_macs, count_params
from ..methods.select import (
    RETAINED,
    Retain,
    select_cumulative,
    select_global,
    select_ratio,
)
from ..methods.surgery import Recipe, group_scores, prune, whole_columns
from .config import SearchConfig, ignored_settings
from .setup import Problem, pose
from .space import DSD, Space, effective_widths

LEVELS = (1.0, 0.75, 0.5, 0.25)
RETAIN = get_args(Retain)


def check_report(config: SearchConfig) -> dict[str, Any]:
    """Loads data and model and lists what the config's space may remove, as plain values.

    Raises:
        ConfigError: If the config cannot be run.
    """
    problem = pose(config)
    model, task = problem.model, problem.task
    example = task.example_input(2)
    space = Space(config.space, problem.plan, _drops(problem, example))
    round_to = config.space.keep.round_to
    widths = {k: effective_widths(problem.plan.groups, k, round_to) for k in LEVELS}
    data = task.data
    dense = count_macs(model, example)
    macs_range, exact = _macs_range(problem, space, example, dense)
    return {
        "model": config.model.name,
        "data": config.data.name,
        "task": task.name,
        "image": "x".join(str(n) for n in data.image_shape),
        "split": {name: len(getattr(data, name)) for name in ("train", "val", "test")},
        "num_params": count_params(model),
        "macs": dense,
        "macs_range": macs_range,
        "macs_range_exact": exact,
        "blocks": [
            {
                "name": block.name,
                "stage": block.stage,
                "num_params": block.num_params,
                "removable": block.removable,
                "reason": block.reason,
            }
            for block in find_blocks(model, example, valid=config.space.blocks.valid)
        ],
        "groups": [
            {
                "name": group.name,
                "stage": group.stage,
                "layers": list(group.layers),
                "channels": group.num_channels,
                "parts": group.parts,
                "widths": {f"{level:g}": widths[level][group.name] for level in LEVELS},
            }
            for group in problem.plan.groups
        ],
        "excluded": dict(problem.plan.excluded),
        "space": space.size_hint,
        "warnings": ignored_settings(config),
    }


def _drops(problem: Problem, example: Tensor) -> tuple[tuple[str, ...], ...]:
    """The removable blocks by the multiply-adds that go with them, the costliest first."""
    costs = LayerCosts(problem.model, problem.plan, example)
    order = sorted(problem.blocks, key=lambda block: costs.macs({}, [block]))
    return tuple(tuple(order[:count]) for count in range(len(order) + 1))


def _macs_range(
    problem: Problem, space: Space, example: Tensor, dense: int
) -> tuple[list[int], bool]:
    """The least and the most MACs in the space, and whether they are exact.

    How much the rules that rank scores keep depends on the scores: with them it is an estimate,
    from the L1 norms of the weights as they are.
    """
    most = tuple(sorted(space.drops[space.max_blocks]))
    if not space.criteria:
        return [count_macs(prune(problem.model, problem.plan, Recipe(most)), example), dense], True
    norms = score_channels("magnitude_l1", problem.model, problem.task, problem.plan.layers)

    def macs(dropped: tuple[str, ...], rule: str, fraction: float) -> int:
        if rule == "macs":  # a budget, whatever is dropped
            return round(fraction * dense)
        groups = {group.name: group for group in problem.plan.alive(dropped)}
        scores = {
            name: group_scores(group, norms, dropped)[: group.num_channels // group.parts]
            for name, group in groups.items()
        }
        columns = _columns(rule, fraction, scores, space.config.keep.round_to)
        kept = {name: whole_columns(groups[name], chosen) for name, chosen in columns.items()}
        return count_macs(prune(problem.model, problem.plan, Recipe(dropped, kept)), example)

    ends = [_ends(rule, space) for rule in _rules(space)]
    low = min(macs(most, rule, least) for rule, least, _ in ends)
    high = max(macs((), rule, top) if top < 1 else dense for rule, _, top in ends)
    return [min(low, high), high], all(rule == "ratio" for rule, _, _ in ends)


def _rules(space: Space) -> list[str]:
    """The rules that the space's criteria are used with; sparse training ranks globally."""
    rules = list(space.config.select) if set(space.criteria) != {DSD} else []
    return rules + [DSD] * (DSD in space.criteria)


def _ends(rule: str, space: Space) -> tuple[str, float, float]:
    """The rule, and the smallest and the largest fraction that it is used with."""
    config = space.config
    if rule in RETAIN:
        return "ratio", RETAINED, RETAINED
    if rule == DSD:
        return "global", 1 - config.dsd_q.high, 1 - config.dsd_q.low
    bounds = space.fraction_bounds(rule)
    return rule, bounds.low, bounds.high


def _columns(
    rule: str, fraction: float, scores: Mapping[str, Tensor], round_to: int
) -> Mapping[str, Tensor]:
    if rule == "global":
        return select_global(scores, fraction, round_to=round_to, normalize=True)
    select = select_ratio if rule == "ratio" else select_cumulative
    return {name: select(values, fraction, round_to=round_to) for name, values in scores.items()}
