"""Proves that channels can be removed: pruned equals dense with the removed channels masked."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .models.resnet_cifar import ZeroPadShortcut
from .outputs import tensors_of
from .surgery import PRODUCERS, ChannelGroup, Edit, PruningPlan, Recipe, apply, whole_columns
from .trace import eval_mode, forward_of

PROOF_TOLERANCE = 1e-3  # of the largest output; float32 noise is below 1e-5


def provable(
    model: nn.Module, groups: Sequence[ChannelGroup], example_input: Tensor
) -> tuple[list[ChannelGroup], dict[str, str]]:
    """Proves all groups at once; if that fails, each half, and the good ones together."""
    with eval_mode(model):
        dense = [t.shape for t in tensors_of(forward_of(model)(example_input.clone()))]

    def divide(some: Sequence[ChannelGroup]) -> tuple[list[ChannelGroup], dict[str, str]]:
        reason = _failure(model, some, example_input, dense)
        if reason is None:
            return list(some), {}
        if len(some) <= 1:
            return [], {group.name: reason for group in some}
        half = len(some) // 2
        (good, broken), (more, others) = divide(some[:half]), divide(some[half:])
        return good + more, {**broken, **others}

    good, broken = divide(groups)
    if len(good) < len(groups):
        reason = _failure(model, good, example_input, dense)
        if reason is not None:
            return [], {**broken, **{g.name: f"together with others, {reason}" for g in good}}
    return good, broken


def enliven(model: nn.Module) -> None:
    """Gives weights that are all the same other values, as after some training, in place.

    The ones and zeros of fresh norms, scales and heads would hide a mistake: nothing can be proven
    on a model whose last layer is zero.
    """
    generator = torch.Generator().manual_seed(0)
    for tensor in [*model.parameters(), *model.buffers()]:
        if not tensor.is_floating_point() or tensor.numel() < 2 or tensor.min() < tensor.max():
            continue
        value = float(tensor.detach().flatten()[0])
        if value == 0:
            other = torch.randn(tensor.shape, generator=generator).mul_(0.1)
        else:  # a layer scale of 1e-6 hides its block
            other = torch.rand(tensor.shape, generator=generator).add_(0.5)
            other *= value if abs(value) > 0.01 else 1.0
        tensor.data.copy_(other)


def _failure(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    example_input: Tensor,
    dense: Sequence[torch.Size],
) -> str | None:
    """Removes every third channel (scattered, an odd width); why that is wrong, or None."""
    kept = {}
    for group in groups:
        columns = [i for i in range(group.num_channels // group.parts) if i % 3 != 1]
        kept[group.name] = whole_columns(group, columns)
    recipe = Recipe((), kept)
    plan = PruningPlan(tuple(groups), {})
    try:
        with torch.no_grad():
            smaller = apply(copy.deepcopy(model), plan, recipe)
            pruned = list(tensors_of(forward_of(smaller)(example_input.clone())))
            reference = masked(copy.deepcopy(model), groups, recipe)
            wanted = list(tensors_of(forward_of(reference)(example_input.clone())))
    except Exception as error:  # any failure of a foreign model is this group's reason
        return f"the model breaks without channels of it: {type(error).__name__}: {error}"
    if [t.shape for t in pruned] != list(dense):
        return "the model's output changes its shape without channels of it"
    if any(difference(*pair) > PROOF_TOLERANCE for pair in zip(pruned, wanted, strict=True)):
        return "removing channels of it is not the same as masking them"
    return None


def difference(one: Tensor, other: Tensor) -> float:
    """Largest difference of two tensors of one shape, as a fraction of the largest value."""
    if one.numel() == 0:
        return 0.0
    scale = float(other.double().abs().max()) + 1e-12
    return float((one.double() - other.double()).abs().max()) / scale


def masked(model: nn.Module, groups: Sequence[ChannelGroup], recipe: Recipe) -> nn.Module:
    """The dense model whose layers take nothing from the removed channels, in place.

    It is the reference that a pruned model must equal: every convolution and linear layer ignores
    those channels, and every norm over channels leaves them out of its statistics.
    """
    modules = dict(model.named_modules())
    spared: dict[str, list[Tensor]] = {}
    for group in groups:
        removed = torch.ones(group.num_channels, dtype=torch.bool)
        removed[list(recipe.kept.get(group.name, range(group.num_channels)))] = False
        for edit in group.edits:
            layer = modules.get(edit.target)
            gone = edit.local[removed[edit.root]]
            if isinstance(layer, ZeroPadShortcut):
                _cut_wires(layer, edit, gone)
            elif isinstance(layer, nn.LayerNorm | nn.GroupNorm):
                spared.setdefault(edit.target, []).append(gone)
            elif isinstance(layer, PRODUCERS) and not edit.produces:
                _ignore_inputs(layer, gone)
    for name, parts in spared.items():
        norm = modules[name]
        norm.forward = _left_out(norm.forward, torch.cat(parts))
    return model


def _ignore_inputs(layer: nn.Module, indices: Tensor) -> None:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if isinstance(layer, nn.ConvTranspose2d):
        weight.data[indices] = 0
        return
    parts = int(getattr(layer, "groups", 1))
    for part in range(parts):
        rows = slice(part * len(weight) // parts, (part + 1) * len(weight) // parts)
        inside = indices[indices // weight.shape[1] == part] if parts > 1 else indices
        weight.data[rows, inside % weight.shape[1]] = 0


def _cut_wires(layer: ZeroPadShortcut, edit: Edit, gone: Tensor) -> None:
    """Only the input side: its outputs are masked where they are taken in."""
    if edit.prune.__name__ == "prune_in_channels":
        stays = ~torch.isin(layer.src, gone.to(layer.src))
        layer.src, layer.dst = layer.src[stays], layer.dst[stays]


def _left_out(forward: Callable[..., Tensor], gone: Tensor) -> Callable[..., Tensor]:
    """The forward of a norm over channels without the channels `gone`, which become zero."""

    def restricted(*args: Any, **kwargs: Any) -> Tensor:
        with _NormsWithout(gone):
            return forward(*args, **kwargs)

    return restricted


class _NormsWithout(TorchFunctionMode):
    """Layer and group norms over the channels that stay; the others' places become zero."""

    def __init__(self, gone: Tensor) -> None:
        super().__init__()
        self._gone = gone

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name not in ("layer_norm", "group_norm"):
            return func(*args, **kwargs)
        given = dict(zip(("input", "size", "weight", "bias", "eps"), args, strict=False)) | kwargs
        x, dim = given["input"], -1 if name == "layer_norm" else 1
        stays = torch.ones(x.shape[dim], dtype=torch.bool)
        stays[self._gone] = False
        index = stays.nonzero().flatten().to(x.device)
        weight, bias = (None if (v := given.get(k)) is None else v[index] for k in _AFFINE)
        part, eps = x.index_select(dim, index), given.get("eps", 1e-5)
        if name == "layer_norm":
            small = F.layer_norm(part, (len(index),), weight, bias, eps)
        else:
            small = F.group_norm(part, given["size"], weight, bias, eps)
        return torch.zeros_like(x).index_copy(dim % x.ndim, index, small)


_AFFINE = ("weight", "bias")
