"""Finds the blocks that can be removed from a model, by tracing it, and removes them.

There is no list of names or classes. A block is residual when the model calls it once, it maps
one tensor to one of the same shape, and with all its weights at zero it returns its input (or the
ReLU of it); of nested ones the smallest counts. Such a block can be replaced by `nn.Identity`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd

from .names import unknown_name
from .trace import Call, eval_mode, forward_of, kept_whole, trace_calls

Valid = Literal["paper", "residual"]


@dataclass(frozen=True)
class Block:
    """A block, or another layer that one might want to remove.

    Attributes:
        name: Module name.
        removable: Whether it can be replaced by `nn.Identity`.
        reason: Why it is not removable; empty when it is.
        stage: Run of blocks it belongs to: neighbours in one parent that keep one shape. Named
            after the parent, or after its first block where the parent holds several stages.
        num_params: Parameters in it.
    """

    name: str
    removable: bool
    reason: str
    stage: str
    num_params: int


def find_blocks(model: nn.Module, example_input: Tensor, *, valid: Valid = "paper") -> list[Block]:
    """Lists every block, and every layer outside the blocks, with the reason it cannot go.

    Args:
        model: Run in eval mode on `example_input`; left as it was.
        example_input: Images, [B, C, H, W], on the model's device.
        valid: `paper` keeps the first block of every stage; `residual` lets it go where it keeps
            the shape.

    Returns:
        In the order in which the model calls them.

    Raises:
        ValueError: If `valid` is unknown.
    """
    if valid not in ("paper", "residual"):
        raise ValueError(unknown_name("space.blocks.valid", valid, ["paper", "residual"]))
    with eval_mode(model):
        calls = trace_calls(model, example_input, forward_of(model))
        residual = _residual_modules(model, calls, example_input)
        units = _units(model, calls, residual)
        stages = _stages([name for name in units if _is_block(model, name, residual)], calls)
        reasons = _reasons(model, units, calls, residual, stages, valid)
        free = [name for name in units if not reasons[name]]
        reasons.update(_indispensable(model, free, example_input))
    return [
        Block(
            name=name,
            removable=not reasons[name],
            reason=reasons[name],
            stage=stages.get(name, name.rpartition(".")[0]),
            num_params=sum(p.numel() for p in model.get_submodule(name).parameters()),
        )
        for name in units
    ]


def removable_blocks(
    model: nn.Module, example_input: Tensor, *, valid: Valid = "paper"
) -> list[str]:
    """Names of the removable blocks of `find_blocks`, in the order of their calls."""
    blocks = find_blocks(model, example_input, valid=valid)
    return [block.name for block in blocks if block.removable]


def remove_blocks(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """Replaces modules by `nn.Identity`, in place.

    Args:
        model: Changed in place.
        names: Names of modules inside it.

    Returns:
        The model.

    Raises:
        ValueError: If a name is not that of a module inside the model. Nothing is removed then.
    """
    names = list(names)
    modules = dict(model.named_modules())
    for name in names:
        if not name or name not in modules:
            known = [key for key in modules if key and any(modules[key].children())]
            raise ValueError(unknown_name("dropped_blocks", name, known))
    for name in names:
        parent, _, leaf = name.rpartition(".")
        setattr(modules[parent], leaf, nn.Identity())
    return model


def _residual_modules(
    model: nn.Module, calls: Mapping[str, Call], example_input: Tensor
) -> set[str]:
    """The innermost modules that return their input when all their weights are zero."""
    modules = dict(model.named_modules())
    found: set[str] = set()
    for name in sorted(calls, key=lambda name: -name.count(".")):
        if not name or not _keeps_shape(modules[name], calls[name]) or _contains(name, found):
            continue
        if _is_residual(modules[name], calls[name].input, example_input):
            found.add(name)
    return found


def _keeps_shape(module: nn.Module, call: Call) -> bool:
    """Whether it is a composite with kernels, called once, whose output fits as its input."""
    return (
        call.count == 1
        and call.single
        and call.input == call.output
        and any(module.children())
        and any(parameter.ndim > 1 for parameter in module.parameters())
    )


def _is_residual(module: nn.Module, shape: tuple[int, ...], like: Tensor) -> bool:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(like)
    state = chain(module.named_parameters(), module.named_buffers())  # FrozenBatchNorm: buffers
    zeros = {key: torch.zeros_like(t) for key, t in state if t.is_floating_point()}
    try:
        out = functional_call(module, zeros, (x.clone(),))
    except Exception:  # a foreign module that does not run alone, or without weights, is none
        return False
    return any(torch.allclose(out, expected, atol=1e-6) for expected in (x, x.relu()))


def _units(model: nn.Module, calls: Mapping[str, Call], residual: set[str]) -> list[str]:
    """Blocks, and the layers outside of blocks, in call order; those never called come last."""

    def walk(name: str, module: nn.Module) -> Iterator[str]:
        composite = name in calls and _keeps_shape(module, calls[name])
        layer = isinstance(module, (_ConvNd, nn.Linear))
        if name and not _contains(name, residual):
            if layer or composite or _is_block(model, name, residual):
                yield name
                return
        for key, child in module.named_children():
            yield from walk(f"{name}.{key}".lstrip("."), child)

    never = 10**9
    return sorted(walk("", model), key=lambda n: calls[n].start if n in calls else never)


def _is_block(model: nn.Module, name: str, residual: set[str]) -> bool:
    """Whether a module is of the type of one of the residual modules."""
    return type(model.get_submodule(name)) in {type(model.get_submodule(n)) for n in residual}


def _stages(blocks: list[str], calls: Mapping[str, Call]) -> dict[str, str]:
    """Stage of each block. A stage ends where the parent or the shape changes."""
    first: dict[str, str] = {}
    previous = ""
    for name in (name for name in blocks if name in calls and calls[name].single):
        call = calls[name]
        new = (
            not previous
            or _parent(name) != _parent(previous)
            or call.input != call.output
            or call.input != calls[previous].output
        )
        first[name] = name if new else first[previous]
        previous = name
    starts = [_parent(name) for name in set(first.values())]
    return {
        name: _parent(name) if _parent(name) and starts.count(_parent(name)) == 1 else start
        for name, start in first.items()
    }


def _reasons(
    model: nn.Module,
    units: list[str],
    calls: Mapping[str, Call],
    residual: set[str],
    stages: Mapping[str, str],
    valid: Valid,
) -> dict[str, str]:
    """Why each unit cannot go; empty where it can."""
    aliases = [name for name, _ in model.named_modules(remove_duplicate=False)]
    firsts = {stages[name]: name for name in reversed(list(stages))}
    ends = _stem_and_head([name for name in units if name in calls], residual)

    whole = kept_whole(model)

    def reason(name: str) -> str:
        if name not in calls and any(f"{name}.".startswith(f"{part}.") for part in whole):
            return "lies in a part that the model keeps whole"
        if trouble := ends.get(name) or _call_trouble(calls.get(name)):
            return trouble
        if name not in residual:
            return "is not residual: no path leads its input around it"
        module = model.get_submodule(name)
        if sum(model.get_submodule(alias) is module for alias in aliases) > 1:
            return "is registered under several names"
        if valid == "paper" and firsts[stages[name]] == name:
            return f"is the first block of stage {stages[name]} (`valid: residual` admits it)"
        return ""

    return {name: reason(name) for name in units}


def _stem_and_head(called: list[str], residual: set[str]) -> dict[str, str]:
    """Reasons of the first and the last unit, where these are no residual blocks."""
    reasons = {
        "is the stem: it makes the channels that all later layers work on": called[:1],
        "is the head: it makes the model's outputs": called[1:][-1:],
    }
    return {n: why for why, names in reasons.items() for n in names if n not in residual}


def _call_trouble(call: Call | None) -> str:
    """What in the way a module is called forbids an identity in its place."""
    if call is None:
        return "is not called when the model runs"
    if call.count > 1:
        return f"is called {call.count} times in one run"
    if not call.single:
        return "takes or returns something other than one tensor"
    if call.input != call.output:
        before, after = ("x".join(map(str, shape[1:])) for shape in (call.input, call.output))
        return f"changes the shape from {before} to {after}"
    return ""


def _indispensable(model: nn.Module, names: list[str], example_input: Tensor) -> dict[str, str]:
    """Blocks without which the model does not run, for instance because it reads an attribute."""
    if not names or not _failure(model, names, example_input):
        return {}
    failures = {name: _failure(model, [name], example_input) for name in names}
    return {n: f"is needed by the model: without it, {why}" for n, why in failures.items() if why}


def _failure(model: nn.Module, names: list[str], example_input: Tensor) -> str:
    """The error of the model with these blocks removed; empty when it runs. Model unchanged."""
    modules = {name: model.get_submodule(name) for name in names}
    try:
        forward_of(remove_blocks(model, names))(example_input.clone())
    except Exception as error:  # any failure of a foreign model is this block's reason
        return f"{type(error).__name__}: {error}"
    finally:
        for name, module in modules.items():
            setattr(model.get_submodule(_parent(name)), name.rpartition(".")[2], module)
    return ""


def _contains(name: str, others: Iterable[str]) -> bool:
    """Whether one of the other modules lies inside module `name`."""
    return any(not name or other.startswith(f"{name}.") for other in others)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
