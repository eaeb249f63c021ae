"""Gradients of an objective of each block's output with respect to that block's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import find_blocks
from ..layers import Layer, get_layer
from ..trace import eval_mode, trace_calls
from .features import find_activations, observed
from .scoring import check_batch

Gradients = dict[str, Tensor]  # layer -> gradient, shaped like its weight


def blocks_of(
    model: nn.Module, layers: Sequence[str], example_input: Tensor
) -> dict[str, tuple[str, ...]]:
    """The block that each layer belongs to.

    That is the smallest block that the layer lies in, as `find_blocks` has them: residual ones,
    also the first of a stage, and other units that keep their input's shape. A layer outside of
    all is a block of its own.

    Args:
        model: Left as it was.
        layers: Names of layers.
        example_input: Images, [B, C, H, W].

    Returns:
        Block to its layers, in the order of the first calls.
    """
    with eval_mode(model):
        calls = trace_calls(model, example_input)
        units = [block.name for block in find_blocks(model, example_input)]
    usable = [unit for unit in units if unit in calls and calls[unit].count == 1]
    usable = [unit for unit in usable if calls[unit].single]
    found: dict[str, tuple[str, ...]] = {}
    for layer in layers:
        block = next((unit for unit in usable if layer.startswith(f"{unit}.")), layer)
        found[block] = (*found.get(block, ()), layer)
    order = list(calls)
    return dict(sorted(found.items(), key=lambda item: _place(item[0], order)))


def _place(name: str, order: Sequence[str]) -> int:
    return order.index(name) if name in order else len(order)


@dataclass
class _Call:
    """One call of a layer: its input, and zeros that were added to its output."""

    layer: str
    input: Tensor
    probe: Tensor


class BlockGradients:
    """Runs a model and takes gradients block by block, each while its output is fresh.

    The features that enter a block are constants. Only the layers' outputs take part in a block's
    backward pass; a layer's input and its output's gradient then give the weight's gradient for
    any part of the batch. The output of a layer that is a block of its own is taken behind the
    batch norms and activations that follow it.

    Args:
        model: In evaluation mode, frozen, with gradients on, as long as this object is used.
        layers: Names of the layers whose gradients are wanted.
        example_input: Images, [B, C, H, W].
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], example_input: Tensor) -> None:
        self._model = model
        self._layers = {name: get_layer(model, name) for name in layers}
        self._blocks = blocks_of(model, layers, example_input)
        self._alone = [block for block in self._blocks if block in self._layers]
        self._activations = find_activations(model, self._alone, example_input.clone())
        with eval_mode(model):
            calls = trace_calls(model, example_input)
        self._num_ends = sum(calls[block].count for block in self._blocks if block in calls)

    def run(
        self,
        images: Tensor,
        objective: Callable[[Tensor], Tensor],
        receive: Callable[[Iterator[Gradients]], None],
        *,
        size: int,
    ) -> None:
        """Runs the model once, up to the end of the last block.

        Args:
            images: [B, C, H, W]; blocks must not mix them.
            objective: Takes a block's output, [B, channels, ...], to a scalar: a sum over the
                batch. Channels come second, also where the block has them last.
            receive: Called at each block's end (a layer that is called several times ends as
                often), with the gradients of each `size` images in turn. It must use them up.
            size: A divisor of B.
        """
        calls: dict[str, list[_Call]] = {block: [] for block in self._blocks}
        ends = 0

        def finish(block: str, output: Tensor) -> None:
            nonlocal ends
            taken, calls[block] = calls[block], []
            if taken and output.requires_grad:
                probes = [call.probe for call in taken]
                loss = objective(self._channels_second(block, output))
                gradients = torch.autograd.grad(loss, probes, allow_unused=True)
                receive(self._split(taken, gradients, size))
            ends += 1
            if ends == self._num_ends:
                raise _Finished

        def probe(block: str, name: str) -> Callable[..., Tensor]:
            def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
                check_batch(name, args[0], len(images))
                zeros = torch.zeros_like(output, requires_grad=True)
                calls[block].append(_Call(name, args[0].detach().clone(), zeros))
                return output + zeros  # a new tensor: what follows may work in place

            return hook

        def end(block: str) -> Callable[..., None]:
            return lambda module, args, output: finish(block, output)

        with ExitStack() as stack:
            for block, layers in self._blocks.items():
                module = self._model.get_submodule(block)
                stack.callback(module.register_forward_pre_hook(_detach).remove)
                for name in layers:
                    layer = self._layers[name]
                    stack.callback(layer.register_forward_hook(probe(block, name)).remove)
                if block not in self._layers:
                    stack.callback(module.register_forward_hook(end(block)).remove)
            stack.enter_context(observed(self._model, self._alone, finish, self._activations))
            try:
                self._model(images.clone())  # a model may overwrite its input
            except _Finished:
                pass

    def _split(
        self, calls: Sequence[_Call], gradients: Sequence[Tensor | None], size: int
    ) -> Iterator[Gradients]:
        pairs = [(c, g) for c, g in zip(calls, gradients, strict=True) if g is not None]
        for start in range(0, len(pairs[0][1]) if pairs else 0, size):
            rows = slice(start, start + size)
            sums: Gradients = {}
            for call, gradient in pairs:
                each = _weight_gradient(self._layers[call.layer], call.input[rows], gradient[rows])
                known = sums.get(call.layer)
                sums[call.layer] = each if known is None else known + each
            yield sums

    def _channels_second(self, block: str, output: Tensor) -> Tensor:
        last = [m for m in self._model.get_submodule(block).modules() if isinstance(m, Layer)][-1]
        if not isinstance(last, nn.Linear) or output.shape[1] == last.out_features:
            return output  # a squeeze-and-excitation block ends in linear layers, too
        return output.movedim(-1, 1) if output.shape[-1] == last.out_features else output


class _Finished(Exception):  # noqa: N818  # not an error: the last block has ended
    pass


def _weight_gradient(layer: Layer, given: Tensor, gradient: Tensor) -> Tensor:
    """Gradient of sum(output * gradient) with respect to the layer's weight."""
    layer.weight.requires_grad_(True)
    try:
        output = layer.forward(given)  # not a call: hooks are for the model's own
        return torch.autograd.grad(output, layer.weight, gradient)[0]
    finally:
        layer.weight.requires_grad_(False)


def _detach(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args)
