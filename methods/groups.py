"""Finds the channels of a model that must be removed together, and proves that they can be.

torch-pruning's dependency graph says which tensors follow which channels; this is the only module
that imports it. Every group is then proven: the pruned model must equal the dense one with the
removed channels masked.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from .finetune import BATCH_NORMS
from .models.resnet_cifar import ZeroPadShortcut
from .surgery import PRODUCERS, ChannelGroup, Edit, PruningPlan, Recipe, apply, num_outputs


def _import_torch_pruning() -> Any:
    """torch-pruning without timm: it imports that, for seconds, to count what nobody asks for."""
    if "timm" in sys.modules:
        return import_module("torch_pruning")
    sys.modules["timm"] = None  # type: ignore[assignment]  # as if it were not installed
    try:
        return import_module("torch_pruning")
    finally:
        del sys.modules["timm"]


tp = _import_torch_pruning()

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)
PROOF_TOLERANCE = 1e-3  # of the largest output; float32 noise is below 1e-5
MIXING_NORMS = (nn.LayerNorm, nn.GroupNorm)  # a masked channel still counts in their statistics


def plan_pruning(model: nn.Module, example_input: Tensor, *, scope: str = "all") -> PruningPlan:
    """Finds the channel groups of `model`.

    The model is traced on a copy and stays untouched. A group that breaks the model, or whose
    removal is not the same as masking its channels, is excluded with the reason.

    Args:
        model: The dense model.
        example_input: A batch that the model accepts, [B, C, H, W].
        scope: `all`, or `internal` for groups that do not cross a residual add.

    Raises:
        ValueError: If the model cannot be traced by autograd.
    """
    groups, excluded = _trace_groups(model, example_input)
    if scope == "internal":
        for group in groups:
            if not group.internal:
                excluded[group.name] = "crosses a residual add (space.keep.scope = all admits it)"
        groups = [group for group in groups if group.internal]
    groups, broken = _provable(model, groups, example_input)
    return PruningPlan(tuple(groups), {**excluded, **broken})


class _ZeroPadPruner(tp.BasePruningFunc):  # type: ignore[misc, name-defined]
    """Edits the wiring of an option-A shortcut; its two sides are independent of each other."""

    TARGET_MODULES = ZeroPadShortcut

    def prune_out_channels(self, layer: ZeroPadShortcut, idxs: Sequence[int]) -> nn.Module:
        layer.dst, layer.src = _rewire(layer.dst, layer.src, idxs, layer.out_channels)
        layer.out_channels -= len(idxs)
        return layer

    def prune_in_channels(self, layer: ZeroPadShortcut, idxs: Sequence[int]) -> nn.Module:
        layer.src, layer.dst = _rewire(layer.src, layer.dst, idxs, layer.in_channels)
        layer.in_channels -= len(idxs)
        return layer

    def get_out_channels(self, layer: ZeroPadShortcut) -> int:
        return layer.out_channels

    def get_in_channels(self, layer: ZeroPadShortcut) -> int:
        return layer.in_channels


def _rewire(
    ends: Tensor, others: Tensor, removed: Sequence[int], size: int
) -> tuple[Tensor, Tensor]:
    """Drops the wires whose end is removed and renumbers the ends that stay."""
    stays = torch.ones(size, dtype=torch.bool, device=ends.device)
    stays[list(removed)] = False
    wires = stays[ends]
    return (stays.cumsum(0) - 1)[ends[wires]], others[wires]


def _trace_groups(
    model: nn.Module, example_input: Tensor
) -> tuple[list[ChannelGroup], dict[str, str]]:
    traced = copy.deepcopy(model).eval().requires_grad_(True)
    example_input = example_input[:1]
    spatial, outputs = _trace_shapes(traced, example_input)
    graph = tp.DependencyGraph()
    try:
        with torch.enable_grad():
            graph.build_dependency(
                traced,
                example_inputs=example_input,
                unwrapped_parameters=[],
                customized_pruners={ZeroPadShortcut: _ZeroPadPruner()},
                ignored_layers=[],
                verbose=False,
            )
    except (RuntimeError, IndexError, KeyError, ZeroDivisionError, AttributeError) as error:
        raise ValueError(
            "the model must be traceable by autograd to prune channels: torch-pruning stopped "
            f"with {type(error).__name__}: {error}. Search over blocks only (space.criteria: [])."
        ) from error
    names = {module: name for name, module in traced.named_modules()}
    names.update({parameter: name for name, parameter in traced.named_parameters()})
    levels = sorted({size for size in spatial.values()}, reverse=True)
    groups: list[ChannelGroup] = []
    excluded: dict[str, str] = {}
    seen: set[str] = set()
    for name, module in traced.named_modules():
        if not isinstance(module, PRODUCERS) or name in seen:
            continue
        if name not in spatial or module not in graph.module2node:
            excluded[name] = "does not reach the model's output in a forward pass"
            continue
        group, trouble = _read_group(graph, names, name, module)
        seen.update(group.layers)
        if outputs & set(group.layers):
            excluded[name] = "makes the model's output"
        elif trouble:
            excluded[name] = trouble
        else:
            stage = f"stage{levels.index(spatial[name]) + 1}"
            groups.append(
                ChannelGroup(
                    name,
                    group.num_channels,
                    group.layers,
                    group.internal,
                    group.parts,
                    stage,
                    group.edits,
                )
            )
    return groups, excluded


def _read_group(
    graph: Any, names: Mapping[Any, str], name: str, module: nn.Module
) -> tuple[ChannelGroup, str]:
    """The group of one layer's output channels, and why it cannot be pruned (or nothing)."""
    num_channels = num_outputs(module)
    prune_out = graph.get_pruner_of_module(module).prune_out_channels
    edits = []
    parts, crosses_add, trouble = 1, False, ""
    for item in graph.get_pruning_group(module, prune_out, list(range(num_channels))):
        target = item.dep.target.module
        crosses_add |= str(getattr(target, "_grad_fn", "")).startswith("AddBackward")
        if target not in names or not _holds_channels(target):
            continue  # an activation, a reshape, a split: nothing to edit
        is_output = graph.is_out_channel_pruning_fn(item.dep.handler)
        edits.append(
            Edit(
                target=names[target],
                prune=item.dep.handler,
                dim=item.dep.target.pruning_dim,
                produces=isinstance(target, PRODUCERS) and is_output,
                local=torch.as_tensor(item.idxs, dtype=torch.long),
                root=torch.as_tensor(item.root_idxs, dtype=torch.long),
            )
        )
        divisions = _divisions(target)
        parts = math.lcm(parts, divisions)
        if divisions > 1 and len(item.idxs) != _num_channels(target, is_output):
            trouble = f"shares {names[target]}, which divides its channels, with other layers"
    places = {target: index for index, target in enumerate(names.values())}
    edits.sort(key=lambda edit: places[edit.target])  # the graph's own order varies
    if num_channels % parts:
        trouble = f"its {num_channels} channels do not divide into the {parts} parts they must"
    layers = tuple(dict.fromkeys(edit.target for edit in edits if edit.produces))
    group = ChannelGroup(name, num_channels, layers, not crosses_add, parts, "", tuple(edits))
    return group, trouble


def _num_channels(target: nn.Module | nn.Parameter, is_output: bool) -> Any:
    """All channels on one side of a grouped convolution or group norm."""
    if isinstance(target, nn.GroupNorm):
        return target.num_channels
    return getattr(target, "out_channels" if is_output else "in_channels")


def _divisions(target: nn.Module | nn.Parameter) -> int:
    """In how many parts a layer divides its channels (a depthwise convolution: none)."""
    if isinstance(target, CONVOLUTIONS):
        return target.groups if target.groups < target.out_channels else 1
    if isinstance(target, nn.GroupNorm):
        return target.num_groups
    return 1


def _holds_channels(target: nn.Module | nn.Parameter) -> bool:
    if isinstance(target, nn.Parameter | ZeroPadShortcut):
        return True
    tensors = [*target.parameters(recurse=False), *target.buffers(recurse=False)]
    return bool(tensors) or isinstance(target, BATCH_NORMS)


def _trace_shapes(model: nn.Module, example_input: Tensor) -> tuple[dict[str, int], set[str]]:
    """Pixels of each layer's output, and the layers whose output is the model's own."""
    spatial: dict[str, int] = {}
    order: list[str] = []
    made: dict[int, str] = {}

    def hook(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                spatial[name] = _num_pixels(module, output)
                order.append(name)
                made[id(output)] = name
                keep.append(output)

        return record

    keep: list[Tensor] = []  # so that no id is used twice
    handles = [
        module.register_forward_hook(hook(name))
        for name, module in model.named_modules()
        if isinstance(module, PRODUCERS)
    ]
    try:
        with torch.no_grad():
            result = model(example_input)
    finally:
        for handle in handles:
            handle.remove()
    outputs = {made[id(t)] for t in _tensors(result) if id(t) in made}
    return spatial, outputs or set(order[-1:])


def _num_pixels(module: nn.Module, output: Tensor) -> int:
    if isinstance(module, nn.Linear):  # channels last
        return output.shape[1:-1].numel()
    return output.shape[2:].numel()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _provable(
    model: nn.Module, groups: Sequence[ChannelGroup], example_input: Tensor
) -> tuple[list[ChannelGroup], dict[str, str]]:
    """Proves all groups at once; if that fails, each one alone and then the good ones together."""
    example_input = example_input[:2]
    with torch.no_grad():
        dense = copy.deepcopy(model).eval()(example_input)
    if _failure(model, groups, example_input, dense) is None:
        return list(groups), {}
    good, broken = [], {}
    for group in groups:
        reason = _failure(model, [group], example_input, dense)
        if reason is None:
            good.append(group)
        else:
            broken[group.name] = reason
    reason = _failure(model, good, example_input, dense)
    if reason is not None:
        return [], {**broken, **{g.name: f"together with others, {reason}" for g in good}}
    return good, broken


def _failure(
    model: nn.Module, groups: Sequence[ChannelGroup], example_input: Tensor, dense: Any
) -> str | None:
    """Removes every third channel (scattered, an odd width); why that is wrong, or None."""
    kept = {}
    for group in groups:
        size = group.num_channels // group.parts
        columns = [i for i in range(size) if i % 3 != 1]
        kept[group.name] = tuple(p * size + i for p in range(group.parts) for i in columns)
    recipe = Recipe((), kept)
    try:
        plan = PruningPlan(tuple(groups), {})
        with torch.no_grad():
            pruned = list(
                _tensors(apply(copy.deepcopy(model).eval(), plan, recipe)(example_input))
            )
            masked_model = _masked(copy.deepcopy(model).eval(), groups, recipe)
            masked = list(_tensors(masked_model(example_input)))
    except Exception as error:  # any failure of a foreign model is this group's reason
        return f"the model breaks without channels of it: {type(error).__name__}: {error}"
    if [t.shape for t in pruned] != [t.shape for t in _tensors(dense)]:
        return "the model's output changes its shape without channels of it"
    if any(_mixes(model, group) for group in groups):
        return None  # masking is not the same there, and need not be
    for one, other in zip(pruned, masked, strict=True):
        scale = float(other.abs().max()) + 1e-12
        if float((one - other).abs().max()) > PROOF_TOLERANCE * scale:
            return "removing channels of it is not the same as masking them"
    return None


def _masked(model: nn.Module, groups: Sequence[ChannelGroup], recipe: Recipe) -> nn.Module:
    """The dense model whose layers take nothing from the removed channels, in place."""
    for group in groups:
        removed = torch.ones(group.num_channels, dtype=torch.bool)
        removed[list(recipe.kept[group.name])] = False
        for edit in group.edits:
            layer = dict(model.named_modules()).get(edit.target)
            if isinstance(layer, ZeroPadShortcut):
                _cut_wires(layer, edit, removed)
            elif isinstance(layer, PRODUCERS) and not edit.produces:
                _ignore_inputs(layer, edit.local[removed[edit.root]])
    return model


def _ignore_inputs(layer: nn.Module, indices: Tensor) -> None:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    parts = _divisions(layer) if isinstance(layer, CONVOLUTIONS) else 1
    if isinstance(layer, nn.ConvTranspose2d):
        weight.data[indices] = 0
        return
    for part in range(parts):
        rows = slice(part * len(weight) // parts, (part + 1) * len(weight) // parts)
        inside = indices[indices // weight.shape[1] == part] if parts > 1 else indices
        weight.data[rows, inside % weight.shape[1]] = 0


def _cut_wires(layer: ZeroPadShortcut, edit: Edit, removed: Tensor) -> None:
    """Only the input side: its outputs are masked where they are taken in."""
    if edit.prune.__name__ != "prune_in_channels":
        return
    stays = ~torch.isin(layer.src, edit.local[removed[edit.root]].to(layer.src))
    layer.src, layer.dst = layer.src[stays], layer.dst[stays]


def _mixes(model: nn.Module, group: ChannelGroup) -> bool:
    """Whether a norm over the channels, or a bare parameter, follows them."""
    modules = dict(model.named_modules())
    return any(
        edit.target not in modules or isinstance(modules[edit.target], MIXING_NORMS)
        for edit in group.edits
    )
