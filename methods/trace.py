"""Runs a model once and records which module was called when, with what shapes.

What is run is the part of a model in which blocks and channels may go: `forward_of`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Call:
    """What a trace saw of one module.

    Attributes:
        start: Position of the first call among all starts and ends of calls.
        end: Position of the end of the last call.
        count: How often the module was called.
        single: Whether every call took one positional argument, a tensor, and returned a tensor.
        returns_tensor: Whether every call returned a tensor.
        input: Shape of the last input, if `single`.
        output: Shape of the last output, if `returns_tensor`.
    """

    start: int
    end: int = -1
    count: int = 0
    single: bool = True
    returns_tensor: bool = True
    input: tuple[int, ...] = ()
    output: tuple[int, ...] = ()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, and every module back in its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """`evaluating` without gradients, on tensors that autograd may still use afterwards."""
    with evaluating(model), torch.inference_mode(False), torch.no_grad():
        yield


def forward_of(model: nn.Module) -> Callable[[Tensor], Any]:
    """The forward pass in which blocks and channels are looked for, and proven to be removable.

    It is the model's `prunable_forward(images)` where it has one, and else its own forward. One of
    torchvision's detectors gets a forward here that ends before boxes are chosen: what is chosen
    depends on the weights, and no two passes could be compared.
    """
    own: Callable[[Tensor], Any] | None = getattr(model, "prunable_forward", None)
    if own is not None:
        return own
    if any(kind.__module__.startswith(_DETECTION) for kind in type(model).__mro__):
        return lambda images: _detect(model, images)
    return model


def kept_whole(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules whose layers lose no output channels, because the model says so."""
    return tuple(getattr(model, "keep_whole", ()))


def trace_calls(
    model: nn.Module, example_input: Tensor, forward: Callable[[Tensor], Any] | None = None
) -> dict[str, Call]:
    """Runs the model once and records the calls of its modules.

    Args:
        model: In eval mode.
        example_input: Images, [B, C, H, W].
        forward: Runs the model; the model itself by default.

    Returns:
        Module name -> what was seen, in the order of the first calls. A module that is registered
        under several names has the first of them.
    """
    calls: dict[str, Call] = {}
    clock = count()

    def watch(name: str, module: nn.Module) -> Iterator[Any]:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            call = calls.setdefault(name, Call(next(clock)))
            call.count += 1
            call.single &= len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
            call.input = tuple(args[0].shape) if call.single else ()

        def after(module: nn.Module, args: Any, output: Any) -> None:
            call = calls[name]
            call.end = next(clock)
            call.returns_tensor &= isinstance(output, Tensor)
            call.single &= call.returns_tensor
            call.output = tuple(output.shape) if call.returns_tensor else ()

        yield module.register_forward_pre_hook(before, with_kwargs=True)
        yield module.register_forward_hook(after)

    with ExitStack() as stack:
        for name, module in model.named_modules():
            for handle in watch(name, module):
                stack.callback(handle.remove)
        (forward or model)(example_input.clone())  # a model may overwrite its input
    return calls


_DETECTION = "torchvision.models.detection."


def _detect(model: Any, images: Tensor) -> list[Any]:
    """What the heads of one of torchvision's detectors return, for boxes that never change."""
    features = model.backbone(images)
    named = features if isinstance(features, Mapping) else {"0": features}
    if not hasattr(model, "rpn"):
        return [model.head(list(named.values()))]
    height, width = images.shape[-2:]
    box = images.new_tensor([[0, 0, width / 2, height / 2], [width / 4, 0, width, height]])
    heads = model.roi_heads
    outputs: list[Any] = [model.rpn.head(list(named.values()))]
    for kind in ("box", "mask", "keypoint"):
        pool = getattr(heads, f"{kind}_roi_pool", None)
        if pool is not None:
            regions = pool(named, [box] * len(images), [(height, width)] * len(images))
            regions = getattr(heads, f"{kind}_head")(regions)
            outputs.append(getattr(heads, f"{kind}_predictor")(regions))
    return outputs
