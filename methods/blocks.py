"""Finds the blocks of a model that can be removed, by tracing, and removes them.

A removable block is a module that a residual connection carries past: with all its parameters at
zero it returns its input (or the input's ReLU). No class or attribute names are looked at.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .names import unknown_name

Valid = Literal["paper", "residual"]
LAYERS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


@dataclass(frozen=True)
class Block:
    """A unit of a model and whether it can be removed.

    Attributes:
        name: Module name.
        removable: Whether `remove_blocks` may take it.
        reason: Why not; empty if it is removable.
        stage: `stem`, `stage1` and so on, `head`, or empty for a layer between.
        num_params: Parameters that go with it.
    """

    name: str
    removable: bool
    reason: str
    stage: str
    num_params: int


def find_blocks(
    model: nn.Module, example_input: Tensor, *, valid: Valid = "paper"
) -> list[Block]:
    """Every block of the model in forward order, and every layer outside blocks, with reasons.

    Args:
        model: Traced in eval mode; its mode is restored.
        example_input: A batch that the model accepts.
        valid: `paper` spares the first block of every stage (Wu et al., Block Pruning, section
            III-C); `residual` admits a first block that keeps its input's shape. A stage is a run
            of sibling blocks of one type; a block that changes the shape begins a new one.

    Returns:
        Blocks and layers in the order in which a forward pass reaches them.
    """
    calls = trace_calls(model, example_input)
    residual = _residual_blocks(model, calls)
    kinds = {type(model.get_submodule(name)) for name in residual}
    units = [n for n, call in calls.items() if type(model.get_submodule(n)) in kinds and call.once]
    units = [n for n in units if not any(_contains(n, other) for other in units)]
    stages = _stages(model, units, calls)
    firsts = {names[0] for names in stages}
    stage_of = {n: f"stage{i}" for i, names in enumerate(stages, start=1) for n in names}
    found = []
    for name in calls:
        if name in stage_of:
            reason = _block_reason(name, calls[name], name in residual, name in firsts, valid)
            found.append(_block(model, name, reason, stage_of[name]))
        elif _is_layer_outside(model, name, units):
            found.append(_block(model, name, "plain layer: no shortcut carries past it", ""))
    return _mark_ends(found)


def removable_blocks(
    model: nn.Module, example_input: Tensor, *, valid: Valid = "paper"
) -> list[str]:
    """Names of the blocks that may be removed, in forward order."""
    return [b.name for b in find_blocks(model, example_input, valid=valid) if b.removable]


def remove_blocks(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """Replaces each named block by `nn.Identity`, in place, and returns the model.

    Raises:
        ValueError: If the model has no such module.
    """
    for name in names:
        known = dict(model.named_modules())
        if not name or name not in known:
            blocks = [n for n, module in known.items() if n and list(module.children())]
            raise ValueError(unknown_name("dropped_blocks", name, blocks))
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Identity())
    return model


@dataclass
class Call:
    """What a forward pass did with one module.

    Attributes:
        count: How often it was called.
        input_shape: Shape of its only tensor argument; None if it had others.
        output_shape: Shape of the tensor that it returned; None if it returned something else.
    """

    count: int = 0
    input_shape: torch.Size | None = None
    output_shape: torch.Size | None = None

    @property
    def once(self) -> bool:
        """Called once, from one tensor to one tensor."""
        return self.count == 1 and None not in (self.input_shape, self.output_shape)

    @property
    def keeps_shape(self) -> bool:
        """The output has the shape of the input."""
        return self.once and self.input_shape == self.output_shape


def trace_calls(model: nn.Module, example_input: Tensor) -> dict[str, Call]:
    """One forward pass: each called module (but the root) in the order of the calls' starts."""
    calls: dict[str, Call] = {}
    handles = []

    def before(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            call = calls.setdefault(name, Call())
            call.count += 1
            single = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
            call.input_shape = args[0].shape if single else None

        return hook

    def after(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            calls[name].output_shape = output.shape if isinstance(output, Tensor) else None

        return hook

    modes = [(module, module.training) for module in model.modules()]
    try:
        for name, module in model.named_modules():
            if name:
                handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
                handles.append(module.register_forward_hook(after(name)))
        with torch.no_grad():
            model.eval()(example_input)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    return calls


def _residual_blocks(model: nn.Module, calls: dict[str, Call]) -> list[str]:
    """The smallest modules that pass the residual test."""
    passed = [
        name
        for name, call in calls.items()
        if call.keeps_shape
        and call.input_shape is not None
        and _is_residual(model.get_submodule(name), call.input_shape)
    ]
    return [n for n in passed if not any(_contains(n, other) for other in passed)]


def _is_residual(module: nn.Module, shape: torch.Size) -> bool:
    """With its parameters at zero, a residual block returns x or relu(x); others a constant."""
    if not list(module.children()) or not list(module.parameters()):
        return False
    probe = copy.deepcopy(module).eval()
    device = next(probe.parameters()).device
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.zero_()
        try:
            y = probe(x.clone())
        except (RuntimeError, TypeError, ValueError):
            return False
    return bool(torch.equal(y, x) or torch.equal(y, x.relu()))


def _stages(
    model: nn.Module, units: Sequence[str], calls: dict[str, Call]
) -> list[list[str]]:
    stages: list[list[str]] = []
    previous: tuple[str, type] | None = None
    for name in units:
        kin = (name.rpartition(".")[0], type(model.get_submodule(name)))
        if kin == previous and calls[name].keeps_shape:
            stages[-1].append(name)
        else:
            stages.append([name])
        previous = kin
    return stages


def _block_reason(name: str, call: Call, residual: bool, first: bool, valid: Valid) -> str:
    if not call.keeps_shape:
        assert call.input_shape is not None and call.output_shape is not None
        return f"changes the shape: {_text(call.input_shape)} -> {_text(call.output_shape)}"
    if not residual:
        return "has no shortcut past it"
    if first and valid == "paper":
        return "first block of its stage (space.blocks.valid: residual admits it)"
    return ""


def _block(model: nn.Module, name: str, reason: str, stage: str) -> Block:
    num_params = sum(p.numel() for p in model.get_submodule(name).parameters())
    return Block(name, not reason, reason, stage, num_params)


def _mark_ends(found: list[Block]) -> list[Block]:
    """Names the stem and the head: the plain layers at the two ends."""
    marked = list(found)
    for index, stage, reason in (
        (0, "stem", "stem: everything after needs its channels"),
        (len(found) - 1, "head", "head: makes the model's output"),
    ):
        if found and not found[index].stage:
            block = found[index]
            marked[index] = Block(block.name, False, reason, stage, block.num_params)
    return marked


def _is_layer_outside(model: nn.Module, name: str, units: Sequence[str]) -> bool:
    inside = any(_contains(unit, name) for unit in units)
    return isinstance(model.get_submodule(name), LAYERS) and not inside


def _contains(outer: str, inner: str) -> bool:
    return inner.startswith(outer + ".")


def _text(shape: torch.Size) -> str:
    return "x".join(str(n) for n in shape[1:])
