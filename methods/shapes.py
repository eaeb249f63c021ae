"""Rebuilds a pruned model from its constructor, its shapes and its weights.

This is what an export needs: no indices, no dependency graph, no torch-pruning.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Attributes = dict[str, dict[str, Any]]


def changed_attributes(dense: nn.Module, pruned: nn.Module) -> Attributes:
    """Integer attributes (`in_channels`, `groups`, ...) that pruning made smaller, by module name.

    Args:
        dense: The model as its constructor makes it.
        pruned: The same model after surgery.
    """
    before = dict(dense.named_modules())
    changed: Attributes = {}
    for name, module in pruned.named_modules():
        if type(before[name]) is not type(module):
            continue  # a removed block
        new = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in vars(module).items()
            if _is_smaller(value, getattr(before[name], key, None))
        }
        if new:
            changed[name] = new
    return changed


def rebuild(
    model: nn.Module,
    dropped_blocks: Sequence[str],
    attributes: Mapping[str, Mapping[str, Any]],
    state: Mapping[str, Tensor],
) -> nn.Module:
    """Turns a freshly constructed dense model into the pruned one, in place.

    Args:
        model: What the constructor returns.
        dropped_blocks: Module names to replace by `nn.Identity`.
        attributes: What `changed_attributes` returned.
        state: Weights and buffers of the pruned model.

    Returns:
        The model in eval mode, with `state` loaded.

    Raises:
        ValueError: If a name does not exist in the model or the weights do not fit.
    """
    modules = dict(model.named_modules())
    unknown = sorted({*dropped_blocks, *attributes} - modules.keys())
    if unknown or "" in dropped_blocks:
        shown = ", ".join(unknown[:5]) or "one without a name"
        raise ValueError(
            f"the recipe names modules that the model does not have: {shown}. "
            "Use the constructor that the recipe was made with."
        )
    for name in dropped_blocks:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Identity())
    for name, values in attributes.items():
        _shrink(name, modules[name], values)
    try:
        _check_numbers(model.state_dict(), state)
        _resize(model, state)
        load_state(model, state)
        _check_widths(model)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"the weights must fit the recipe: {error}. Export the member again."
        ) from error
    return model.eval()


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads a state dict strictly, also into a model that asks for the version of its layout.

    Files of weights hold no versions (torchvision's MNASNet asks for one): they are the model's.

    Raises:
        RuntimeError: If keys or shapes differ.
    """
    versioned = OrderedDict(state)
    versioned._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
    model.load_state_dict(versioned)


def copy_state(model: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers on the CPU; no two share memory, as safetensors demands."""
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
    }


def _is_smaller(new: Any, old: Any) -> bool:
    """Whether `new` is a shape that pruning can make of `old`: whole numbers, none larger."""
    if isinstance(new, tuple) and isinstance(old, tuple) and len(new) == len(old):
        return new != old and all(
            _is_smaller(a, b) or a == b for a, b in zip(new, old, strict=True)
        )
    return type(new) is int and type(old) is int and 0 < new < old


def _shrink(name: str, module: nn.Module, values: Mapping[str, Any]) -> None:
    """Sets widths; nothing else of a module can be changed in this way, no method for example."""
    for key, value in values.items():
        new = tuple(value) if isinstance(value, list) else value
        if not _is_smaller(new, vars(module).get(key)):
            raise ValueError(
                f"`attributes.{name}.{key}` (={value}) must be a width that pruning makes: "
                f"{type(module).__name__} has {vars(module).get(key)} there. Export again."
            )
        setattr(module, key, new)


def _check_numbers(dense: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    for name, value in state.items():
        real = value.is_floating_point()
        if name in dense and real != dense[name].is_floating_point():
            raise ValueError(f"{name} holds {value.dtype}, the model {dense[name].dtype}")
        if real and not value.isfinite().all():
            raise ValueError(f"{name} holds numbers that are not finite")


def _check_widths(model: nn.Module) -> None:
    """Compares the weights of ordinary layers with the widths that the layers tell."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            told: tuple[int, ...] = (module.out_features, module.in_features)
        elif isinstance(module, (nn.Conv1d, nn.Conv2d)):
            told = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
        elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and module.affine:
            told = (module.num_features,)
        else:
            continue
        if tuple(module.weight.shape) != told:
            raise ValueError(
                f"{name}.weight has shape {list(module.weight.shape)}, and its layer {list(told)}"
            )


def _resize(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    for module_name, module in model.named_modules():
        prefix = f"{module_name}." if module_name else ""
        for key, parameter in list(module.named_parameters(recurse=False)):
            new = state.get(prefix + key)
            if new is not None and new.shape != parameter.shape:
                empty = torch.empty_like(new, dtype=parameter.dtype, device=parameter.device)
                setattr(module, key, nn.Parameter(empty, requires_grad=parameter.requires_grad))
        for key, buffer in list(module.named_buffers(recurse=False)):
            new = state.get(prefix + key)
            if new is not None and new.shape != buffer.shape:
                setattr(module, key, torch.empty_like(new, device=buffer.device))
