"""`prune-search check`: what can be removed, what cannot and why; runs no trial."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from ..methods.blocks import find_blocks, remove_blocks
from ..methods.measure import count_macs, count_params
from ..methods.surgery import Recipe, prune
from .config import SearchConfig, ignored_settings
from .setup import Problem, pose
from .space import Space, effective_widths

LEVELS = (1.0, 0.75, 0.5, 0.25)


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
    return {
        "model": config.model.name,
        "data": config.data.name,
        "image": "x".join(str(n) for n in data.image_shape),
        "split": {name: len(getattr(data, name)) for name in ("train", "val", "test")},
        "num_params": count_params(model),
        "macs": count_macs(model, example),
        "macs_range": [_smallest(problem.plan, space, model, example), count_macs(model, example)],
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

    def without(block: str) -> int:
        return count_macs(remove_blocks(copy.deepcopy(problem.model), [block]), example)

    order = sorted(problem.blocks, key=without)
    return tuple(tuple(order[:count]) for count in range(len(order) + 1))


def _smallest(plan: Any, space: Space, model: Any, example: Any) -> int:
    """MACs without the costliest blocks and with the fewest channels that a ratio admits."""
    dropped = tuple(sorted(space.drops[space.max_blocks]))
    kept = {}
    if "ratio" in space.config.select:
        keep = space.config.keep
        widths = effective_widths(plan.alive(dropped), keep.low, keep.round_to)
        for name, width in widths.items():
            group = plan[name]
            size, part = group.num_channels // group.parts, width // group.parts
            kept[name] = tuple(p * size + i for p in range(group.parts) for i in range(part))
    return count_macs(prune(model, plan, Recipe(dropped, kept)), example)
