"""Rebuilds a pruned model from its constructor, its shapes and its weights.

This is what an export needs: no indices, no dependency graph, no torch-pruning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Attributes = dict[str, dict[str, Any]]


def changed_attributes(dense: nn.Module, pruned: nn.Module) -> Attributes:
    """Integer attributes (`in_channels`, `groups`, ...) that pruning changed, by module name.

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
            if _is_shape(value) and value != getattr(before[name], key, value)
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
    if unknown:
        raise ValueError(
            f"the recipe names modules that the model does not have: {', '.join(unknown[:5])}. "
            "Use the constructor that the recipe was made with."
        )
    for name in dropped_blocks:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Identity())
    for name, values in attributes.items():
        for key, value in values.items():
            setattr(modules[name], key, tuple(value) if isinstance(value, list) else value)
    _resize(model, state)
    try:
        model.load_state_dict(dict(state), strict=True)
    except RuntimeError as error:
        raise ValueError(
            f"the weights must fit the recipe: {error}. Export the member again."
        ) from error
    return model.eval()


def copy_state(model: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers on the CPU; no two share memory, as safetensors demands."""
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
    }


def _is_shape(value: Any) -> bool:
    if isinstance(value, tuple):
        return bool(value) and all(_is_shape(item) for item in value)
    return isinstance(value, int) and not isinstance(value, bool)


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
