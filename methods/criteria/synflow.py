"""Synaptic flow (SynFlow). Tanaka et al. 2020, arXiv:2006.05467."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers import Layer, batch_norms_after, channel_factors, channel_rows, get_layer
from ..options import Bounds
from ..outputs import main_output
from .scoring import DataFreeTask


def synflow(
    model: nn.Module,
    task: DataFreeTask,
    layers: Sequence[str],
    *,
    generator: torch.Generator,
    rounds: Annotated[int, Bounds(1)] = 100,
    keep: Annotated[float, Bounds(0.001, 1)] = 0.1,
) -> dict[str, Tensor]:
    """Order in which channels leave when the weakest flow goes first (SynFlow).

    Every parameter is replaced by its size, the model runs in evaluation mode and float64 on an
    image of ones, and R is the sum of its output; the flow of a channel is the sum over its
    weights of |w dR/dw|. After round i = 0, 1, ... only the fraction keep^((i + 1) / rounds) of
    all channels of `layers` is left: those of the weakest flow are cut off, and R is another.

    The score is a channel's place in that order, and last that of the flow among those that stay.
    So scores compare between layers, but depend on which layers are scored together. They do not
    grow with the flow itself, which leaves the range of float32 in deep models.

    Args:
        model: The dense model; a copy is changed.
        task: Gives the shape of an image.
        layers: Names of the layers to score.
        generator: Not used.
        rounds: Rounds of cutting; each costs one forward and backward pass of one image.
        keep: Fraction of the channels left after the last round. Low by default: what is left at
            any larger fraction is then on the way.

    Returns:
        Layer name to scores, [out]: place / number of channels, from 1 / number (first to go) to
        1; zero for a channel through which nothing flows from the start.
    """
    with torch.inference_mode(False), torch.enable_grad():
        flow = _Flow(model, task.example_input(1), layers)
        first = flows = flow.measure()
        alive = torch.ones(len(flows), dtype=torch.bool)
        order: list[Tensor] = []
        for i in range(rounds):
            count = int(alive.sum()) - math.ceil(len(flows) * keep ** ((i + 1) / rounds))
            if count <= 0:
                continue
            weakest = _ascending(flows, alive)[:count]
            alive[weakest] = False
            order.append(weakest)
            flow.cut(alive)
            flows = flow.measure()
        order.append(_ascending(flows, alive))
    places = torch.empty(len(flows), dtype=torch.float64)
    places[torch.cat(order)] = torch.arange(1, len(flows) + 1, dtype=torch.float64) / len(flows)
    scores = torch.where(first.isfinite(), places * (first > 0), torch.nan).float()
    return dict(zip(layers, torch.split(scores, flow.widths), strict=True))


def _ascending(flows: Tensor, alive: Tensor) -> Tensor:
    """Indices of the channels that are alive, the weakest flow first."""
    indices = alive.nonzero()[:, 0]
    return indices[flows[indices].sort(stable=True).indices]


class _Flow:
    """The copy of a model that flow is measured on, and its layers."""

    def __init__(self, model: nn.Module, example: Tensor, layers: Sequence[str]) -> None:
        self._model = copy.deepcopy(model).double().eval()
        for parameter in self._model.parameters():
            parameter.data.abs_()
            parameter.requires_grad_(False)
        self._ones = torch.ones_like(example, dtype=torch.float64)
        self._layers = [get_layer(self._model, name) for name in layers]
        norms = batch_norms_after(self._model, layers, self._ones.clone())
        self._norms = [norms[name] for name in layers]
        for layer in self._layers:
            layer.weight.requires_grad_(True)
        self.widths = [len(channel_rows(layer, layer.weight)) for layer in self._layers]

    def measure(self) -> Tensor:
        """Flow of every channel, layer after layer, [sum of the widths], on the CPU."""
        total = main_output(self._model(self._ones.clone())).sum()
        weights = [layer.weight for layer in self._layers]
        gradients = torch.autograd.grad(total, weights, allow_unused=True)
        flows = [
            _flow(layer, gradient) for layer, gradient in zip(self._layers, gradients, strict=True)
        ]
        return torch.cat(flows).cpu()

    def cut(self, alive: Tensor) -> None:
        """Nothing comes out of the channels that are not alive any more."""
        parts = torch.split(alive.to(self._ones), self.widths)
        with torch.no_grad():
            for layer, norms, factors in zip(self._layers, self._norms, parts, strict=True):
                layer.weight.mul_(channel_factors(layer, factors))
                for tensor in _shifts(layer, norms):
                    tensor.mul_(factors)


def _flow(layer: Layer, gradient: Tensor | None) -> Tensor:
    weight = layer.weight.detach()
    flow = torch.zeros_like(weight) if gradient is None else (weight * gradient).abs()
    return channel_rows(layer, flow).sum(1)


def _shifts(layer: Layer, norms: Sequence[_BatchNorm]) -> list[Tensor]:
    """What could still come out of a channel without weights."""
    tensors = [layer.bias]
    tensors += [tensor for norm in norms for tensor in (norm.weight, norm.bias)]
    return [tensor for tensor in tensors if tensor is not None]
