"""Takes whole layers or blocks out of a model: by an identity in their place, or by zeros."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .blocks import find_blocks, remove_blocks
from .names import unknown_name
from .trace import Call, eval_mode, evaluating, trace_calls


def bypassable_layers(model: nn.Module, example_input: Tensor) -> dict[str, tuple[str, ...]]:
    """Finds the units that keep the shape and may become identities.

    Units never overlap. A removable block of `find_blocks` (`valid="residual"`) is one unit.
    Elsewhere a composite that keeps the shape is one (ShuffleNet's blocks), unless it is a plain
    `nn.Sequential` or holds removable blocks: then what is inside counts, down to single
    convolutions and linear layers. A layer takes along the batch norm that reads its output, whose
    statistics would not fit what an identity passes on. Not among the units: the first and the
    last layer, modules called more than once or registered under several names, and units without
    which the model does not run, forward or backward.

    Args:
        model: Run in eval mode; left as it was.
        example_input: Images, [B, C, H, W], on the model's device.

    Returns:
        Unit -> names of the modules to give to `bypass` or `zero` (the unit, and its batch
        norm), in the order of their calls.
    """
    blocks = find_blocks(model, example_input, valid="residual")
    with eval_mode(model):
        calls = trace_calls(model, example_input)
        norms = _norms(model, calls, example_input)
    residual = {block.name for block in blocks if block.removable}
    found = sorted(_walk(model, "", calls, residual), key=lambda name: calls[name].start)
    units = {name: (name, *norms.get(name, ())) for name in found}
    trial = _out_of_place(copy.deepcopy(model))
    return {n: modules for n, modules in units.items() if _works(trial, modules, example_input)}


def bypass(model: nn.Module, modules: Iterable[str]) -> nn.Module:
    """Puts `nn.Identity` in place of modules, in place: the model becomes really faster.

    Modules that work in place (`inplace=True`) no longer do: behind an identity they would
    overwrite what other layers still need. Values do not change by that.

    Args:
        model: Changed in place.
        modules: Names from `bypassable_layers`, batch norms included. One that lies inside
            another of them goes with it.

    Returns:
        The model.

    Raises:
        ValueError: If a name is not that of a module inside the model. Nothing changes then.
    """
    remove_blocks(model, _outermost(model, modules))
    return _out_of_place(model)


def zero(model: nn.Module, modules: Iterable[str]) -> nn.Module:
    """Sets all weights and buffers of modules to zero, in place.

    A layer with its batch norm then returns zeros; a residual block adds nothing to its shortcut.
    The architecture stays, and so does the time that the dense model takes: this is no speed-up.
    The zeros are in the model's state, and fine-tuning leaves them: the weights are frozen.

    Args:
        model: Changed in place.
        modules: Names from `bypassable_layers`, batch norms included.

    Returns:
        The model.

    Raises:
        ValueError: If a name is not that of a module inside the model. Nothing changes then.
    """
    for name in _outermost(model, modules):
        module = model.get_submodule(name)
        with torch.no_grad():
            for tensor in chain(module.parameters(), module.buffers()):
                if tensor.is_floating_point():
                    tensor.zero_()
        module.requires_grad_(False)
    return model


def _out_of_place(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]
    return model


def _outermost(model: nn.Module, names: Iterable[str]) -> list[str]:
    names = list(dict.fromkeys(names))
    known = dict(model.named_modules())
    for name in names:
        if not name or name not in known:
            raise ValueError(unknown_name("modules", name, [key for key in known if key]))
    return [n for n in names if not any(n.startswith(f"{other}.") for other in names)]


def _walk(
    model: nn.Module, name: str, calls: Mapping[str, Call], residual: set[str]
) -> Iterator[str]:
    """The outermost units in module `name`."""
    module = model.get_submodule(name)
    if name and (name in residual or _is_unit(model, name, calls, residual)):
        yield name
        return
    for key, _ in module.named_children():
        yield from _walk(model, f"{name}.{key}".lstrip("."), calls, residual)


def _is_unit(model: nn.Module, name: str, calls: Mapping[str, Call], residual: set[str]) -> bool:
    module, call = model.get_submodule(name), calls.get(name)
    if call is None or call.count > 1 or not call.single or call.input != call.output:
        return False
    layers = sorted((n for n in calls if _is_layer(model, n)), key=lambda n: calls[n].start)
    inside = [n for n in layers if n == name or n.startswith(f"{name}.")]
    if not inside or layers[0] in inside or layers[-1] in inside:  # the stem, the head
        return False
    if any(n.startswith(f"{name}.") for n in residual) or _is_shared(model, module):
        return False
    return inside == [name] or not isinstance(module, (nn.Sequential, _ConvNd, nn.Linear))


def _is_layer(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name), (_ConvNd, nn.Linear))


def _is_shared(model: nn.Module, module: nn.Module) -> bool:
    return sum(m is module for _, m in model.named_modules(remove_duplicate=False)) > 1


def _norms(
    model: nn.Module, calls: Mapping[str, Call], example_input: Tensor
) -> dict[str, list[str]]:
    """For each convolution or linear layer: the batch norm, called once, that takes its output."""
    made: list[tuple[str, Tensor]] = []  # the tensors are held, so their identity is unique
    found: dict[str, list[str]] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda module, args, output: made.append((name, output))

    def match(norm: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            for name, output in made:
                if args and output is args[0]:
                    found.setdefault(name, []).append(norm)

        return hook

    with ExitStack() as stack:
        for name, call in calls.items():
            module = model.get_submodule(name)
            if call.count > 1:
                continue
            if _is_layer(model, name):
                stack.callback(module.register_forward_hook(note(name)).remove)
            elif hasattr(module, "running_mean"):  # torchvision's frozen one has no common base
                stack.callback(module.register_forward_pre_hook(match(name)).remove)
        model(example_input.clone())
    return found


class _Copy(nn.Module):
    """An identity whose output may be overwritten."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


def _works(model: nn.Module, modules: tuple[str, ...], example_input: Tensor) -> bool:
    """Whether the model runs without the modules, forward and backward. Changed back at the end.

    And whether nothing is overwritten: an addition in place behind an identity would change what
    the identity was given.
    """
    own = {name: model.get_submodule(name) for name in modules}
    outputs = []
    try:
        for identity in (nn.Identity, _Copy):
            for name in modules:
                model.set_submodule(name, identity())
            outputs.append(_run(model, example_input))
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False
    finally:
        for name, module in own.items():
            model.set_submodule(name, module)
    return all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def _run(model: nn.Module, images: Tensor) -> list[Tensor]:
    with evaluating(model), torch.inference_mode(False), torch.enable_grad():
        source = images.detach().clone().requires_grad_()
        outputs = list(_tensors(model(source.clone())))
        sums = [output.sum() for output in outputs if output.requires_grad]
        if sums:
            torch.autograd.grad(torch.stack(sums).sum(), source, allow_unused=True)
    return outputs


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, Mapping)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)
