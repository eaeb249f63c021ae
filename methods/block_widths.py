"""Widths for pruning inside blocks, counted in channels, weights or multiply-adds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from .blocks import find_blocks
from .surgery import PRODUCERS, ChannelGroup, PruningPlan, num_outputs
from .trace import Call, eval_mode, trace_calls

RatioTarget = Literal["channels", "params", "macs"]
_ROUNDING = 1e-9


def inner_groups(
    model: nn.Module, groups: Iterable[ChannelGroup], example_input: Tensor
) -> dict[str, tuple[ChannelGroup, ...]]:
    """Those groups that lie inside a block, which keeps its output's shape whatever they lose.

    The block is the residual block that all layers of the group lie in, or else the smallest
    module that holds them, is called once, and takes and returns one tensor.

    Args:
        model: Left as it was.
        groups: Some of the model's channel groups.
        example_input: Images, [B, C, H, W].

    Returns:
        Block to its groups, in the order of the blocks' calls.
    """
    with eval_mode(model):
        calls = trace_calls(model, example_input)
        units = {block.name for block in find_blocks(model, example_input)}
    usable = [name for name, call in calls.items() if name and call.count == 1 and call.single]
    usable.sort(key=lambda name: (name not in units, -name.count(".")))
    found: dict[str, tuple[ChannelGroup, ...]] = {}
    for group in groups:
        block = next((name for name in usable if _holds(name, group)), None)
        if block is not None and group.internal:
            found[block] = (*found.get(block, ()), group)
    return dict(sorted(found.items(), key=lambda item: calls[item[0]].start))


def check_inner(
    groups: Iterable[ChannelGroup], blocks: Mapping[str, Sequence[ChannelGroup]]
) -> None:
    """Checks that every group lies inside a block.

    Raises:
        ValueError: If one does not.
    """
    known = {group.name for inside in blocks.values() for group in inside}
    for group in groups:
        if group.name not in known:
            why = "reaches beyond every block" if group.internal else "crosses a residual add"
            raise ValueError(
                f"`widths` (={group.name}) must name groups inside a block: this one {why}, so "
                "the block's output would change its shape and could not be compared with the "
                "dense one's. Leave it out."
            )


def widths_for_ratio(
    model: nn.Module,
    plan: PruningPlan,
    example_input: Tensor,
    ratio: float,
    *,
    ratio_target: RatioTarget = "channels",
) -> dict[str, int]:
    """Widths at which every block has lost the fraction `ratio`; its groups shrink alike.

    Args:
        model: The model that `plan` was made for.
        plan: Its channel groups; those not inside a block keep all channels and are left out.
        example_input: Images, [B, C, H, W].
        ratio: Fraction removed, in [0, 1).
        ratio_target: What is counted: the channels of the groups, or the weights or multiply-adds
            of all convolutions and linear layers of the block.

    Raises:
        ValueError: If `ratio` is out of range, or more than a block can lose.
    """
    if not 0 <= ratio < 1:
        raise ValueError(
            f"`ratio` (={ratio}) must be in [0, 1): it is the fraction that is removed. Use 0.2."
        )
    widths: dict[str, int] = {}
    for block, inside in inner_groups(model, plan.groups, example_input).items():
        removed = _removed_share(model, block, inside, example_input, ratio_target)
        least = {group.name: group.parts for group in inside}
        if removed(least) < ratio - _ROUNDING:
            raise ValueError(
                f"`ratio` (={ratio}) must be at most {removed(least):.3f}: block {block} has no "
                f"more {ratio_target} to lose inside it. Lower it."
            )
        widths |= _solve(inside, least, removed, ratio)
    return widths


def step_widths(
    model: nn.Module,
    blocks: Mapping[str, tuple[ChannelGroup, ...]],
    widths: Mapping[str, int],
    example_input: Tensor,
    steps: int,
    ratio_target: RatioTarget,
) -> list[dict[str, int]]:
    """Widths after each of `steps` steps, in which every block loses equal shares.

    Args:
        model: The model before the first step.
        blocks: Result of `inner_groups`.
        widths: The widths after the last step.
        example_input: Images, [B, C, H, W].
        steps: How many steps.
        ratio_target: What the shares are counted in.
    """
    schedule: list[dict[str, int]] = [{} for _ in range(steps)]
    for block, groups in blocks.items():
        removed = _removed_share(model, block, groups, example_input, ratio_target)
        last = {group.name: widths[group.name] for group in groups}
        for step in range(1, steps):
            wanted = removed(last) * step / steps
            schedule[step - 1] |= _solve(groups, last, removed, wanted)
        schedule[-1] |= last
    return schedule


def _holds(block: str, group: ChannelGroup) -> bool:
    return all(edit.target.startswith(f"{block}.") for edit in group.edits)


def _solve(
    groups: tuple[ChannelGroup, ...],
    last: Mapping[str, int],
    removed: Callable[[Mapping[str, int]], float],
    wanted: float,
) -> dict[str, int]:
    """The widths on the way from all channels to `last` at which about `wanted` is removed."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if removed(_between(groups, last, middle)) < wanted:
            low = middle
        else:
            high = middle
    ends = [_between(groups, last, way) for way in (low, high)]
    return min(ends, key=lambda widths: abs(removed(widths) - wanted))


def _between(
    groups: tuple[ChannelGroup, ...], last: Mapping[str, int], way: float
) -> dict[str, int]:
    widths = {}
    for group in groups:
        columns = (group.num_channels - last[group.name]) * way / group.parts
        widths[group.name] = group.num_channels - group.parts * math.floor(columns + 0.5)
    return widths


@dataclass(frozen=True)
class _Size:
    """Weights or multiply-adds of a layer, and the shares of its dimensions a group has."""

    total: float
    outputs: Mapping[str, float]
    inputs: Mapping[str, float]

    def left(self, removed: Mapping[str, float]) -> float:
        """What is left once these fractions of the groups are removed."""
        outputs = 1 - sum(share * removed[name] for name, share in self.outputs.items())
        inputs = 1 - sum(share * removed[name] for name, share in self.inputs.items())
        return self.total * outputs * inputs


def _removed_share(
    model: nn.Module,
    block: str,
    groups: tuple[ChannelGroup, ...],
    example_input: Tensor,
    ratio_target: RatioTarget,
) -> Callable[[Mapping[str, int]], float]:
    """The fraction of a block that is gone, as a function of its groups' widths."""
    channels = {group.name: group.num_channels for group in groups}
    if ratio_target == "channels":
        return lambda widths: 1 - sum(widths[n] for n in channels) / sum(channels.values())
    with eval_mode(model):
        calls = trace_calls(model, example_input[:1])
    sizes = {
        f"{block}.{name}": _size(layer, calls.get(f"{block}.{name}"), ratio_target)
        for name, layer in model.get_submodule(block).named_modules()
        if isinstance(layer, PRODUCERS)
    }
    for group in groups:
        for edit in group.edits:
            layer = model.get_submodule(edit.target) if edit.target in sizes else None
            if layer is None:
                continue
            size, local = sizes[edit.target], len(edit.local)
            if edit.produces:
                shares = {**size.outputs, group.name: local / num_outputs(layer)}
                sizes[edit.target] = replace(size, outputs=shares)
            elif not _is_depthwise(layer):
                shares = {**size.inputs, group.name: local / _num_inputs(layer)}
                sizes[edit.target] = replace(size, inputs=shares)
    total = sum(size.total for size in sizes.values())

    def share(widths: Mapping[str, int]) -> float:
        removed = {name: 1 - widths[name] / count for name, count in channels.items()}
        return 1 - sum(size.left(removed) for size in sizes.values()) / total

    return share


def _size(layer: nn.Module, call: Call | None, ratio_target: RatioTarget) -> _Size:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if ratio_target == "params":
        return _Size(weight.numel(), {}, {})
    if call is None:
        return _Size(0, {}, {})
    shape = call.input if isinstance(layer, nn.ConvTranspose2d) else call.output
    pixels = shape[1:-1] if isinstance(layer, nn.Linear) else shape[2:]
    return _Size(weight.numel() * math.prod(pixels) * call.count, {}, {})


def _is_depthwise(layer: nn.Module) -> bool:
    groups = getattr(layer, "groups", 1)
    return bool(groups > 1 and groups == getattr(layer, "in_channels", None))


def _num_inputs(layer: nn.Module) -> int:
    inputs = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    assert isinstance(inputs, int)
    return inputs
