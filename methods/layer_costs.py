"""MACs and parameters of a pruned model from its widths alone, without building it.

Every layer's share is a product of the fractions of its output and input channels that stay, so
one dense forward pass is enough to know the cost of any combination of widths and dropped blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .measure import count_macs
from .surgery import PRODUCERS, Edit, PruningPlan, inside
from .trace import evaluating

Array = NDArray[np.float64]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)


@dataclass(frozen=True)
class LayerCall:
    """One convolution or linear layer of the dense model, as an example image meets it.

    Attributes:
        name: Module name.
        macs: Multiply-adds of one image, over all calls.
        input: Shape of its last input without the batch dimension.
        depthwise: Whether every output channel has an input channel of its own.
    """

    name: str
    macs: int
    input: tuple[int, ...]
    depthwise: bool


class LayerCosts:
    """What each layer costs at any widths.

    Exact where each channel of a group stands for equally many indices of every tensor that
    follows it. What is no convolution or linear layer (attention products) keeps its dense MACs.

    Args:
        model: The dense model; left as it was.
        plan: Its channel groups.
        example_input: Images [B, C, H, W]; one is run.

    Attributes:
        calls: The layers that an image meets, in module order.
        groups: Names of the channel groups, in the plan's order.
    """

    def __init__(self, model: nn.Module, plan: PruningPlan, example_input: Tensor) -> None:
        self.calls = layer_calls(model, example_input[:1])
        self.groups = tuple(group.name for group in plan.groups)
        self._layers = tuple(call.name for call in self.calls)
        self._macs = np.array([call.macs for call in self.calls], dtype=np.float64)
        self._fixed_macs = count_macs(model, example_input) - int(self._macs.sum())
        modules = dict(model.named_modules())
        self._outputs = np.zeros((len(self.calls), len(self.groups)))
        self._inputs = np.zeros_like(self._outputs)
        params = dict(model.named_parameters())
        self._params = tuple(params)
        self._numel = np.array([p.numel() for p in params.values()], dtype=np.float64)
        self._by_dim = [np.zeros((len(params), len(self.groups))) for _ in range(2)]
        rows = {name: row for row, name in enumerate(self._layers)}
        param_rows = {name: row for row, name in enumerate(params)}
        for column, group in enumerate(plan.groups):
            for edit in group.edits:
                if edit.target not in modules and edit.target not in params:
                    continue  # a buffer: it costs nothing
                share = len(edit.local) / _dimension(edit, modules, params)
                dim = 1 if _of_inputs(edit) else 0
                if edit.target in rows:
                    side = self._inputs if dim else self._outputs
                    side[rows[edit.target], column] += share
                for name, own_dim in _params_of(edit, modules, params, dim):
                    self._by_dim[own_dim][param_rows[name], column] += share
        for row, call in enumerate(self.calls):
            if call.depthwise:
                self._inputs[row] = 0  # its inputs are its outputs
        self._alive: dict[tuple[str, ...], tuple[Array, Array]] = {}

    def macs(self, keep: Mapping[str, float], dropped: Sequence[str] = ()) -> int:
        """Multiply-adds of one image.

        Args:
            keep: Group name -> fraction of its channels that stay; 1 where it is not named.
            dropped: Removed blocks.
        """
        outputs, inputs = self.layer_fractions(keep)
        return self._fixed_macs + round(
            float((self._macs * outputs * inputs) @ self._living(dropped)[0])
        )

    def num_params(self, keep: Mapping[str, float], dropped: Sequence[str] = ()) -> int:
        """Parameters of the model; arguments as in `macs`."""
        gone = self._gone(keep)
        fractions = (1 - self._by_dim[0] @ gone) * (1 - self._by_dim[1] @ gone)
        return round(float((self._numel * fractions) @ self._living(dropped)[1]))

    def layer_fractions(self, keep: Mapping[str, float]) -> tuple[Array, Array]:
        """The fractions of output and of input channels that stay, [layers] each."""
        gone = self._gone(keep)
        return 1 - self._outputs @ gone, 1 - self._inputs @ gone

    def living(self, dropped: Iterable[str]) -> Array:
        """1 for each layer that is still there without the blocks `dropped`, else 0; [layers]."""
        return self._living(tuple(dropped))[0]

    def _gone(self, keep: Mapping[str, float]) -> Array:
        return np.array([1.0 - keep.get(name, 1.0) for name in self.groups])

    def _living(self, dropped: Sequence[str]) -> tuple[Array, Array]:
        key = tuple(dropped)
        if key not in self._alive:
            if len(self._alive) > 4096:
                self._alive.clear()
            self._alive[key] = (_outside(self._layers, key), _outside(self._params, key))
        return self._alive[key]


def layer_calls(model: nn.Module, image: Tensor) -> tuple[LayerCall, ...]:
    """The convolutions and linear layers that `image`, [1, C, H, W], meets, in module order."""
    macs: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (*PRODUCERS, nn.Conv3d))}

    def watch(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            macs[name] = macs.get(name, 0) + _call_macs(layer, args[0], output)
            shapes[name] = tuple(args[0].shape[1:])

        return hook

    with ExitStack() as stack, evaluating(model), torch.inference_mode():
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(watch(name)).remove)
        model(image)
    return tuple(
        LayerCall(name, macs[name], shapes[name], _is_depthwise(layer))
        for name, layer in layers.items()
        if name in macs
    )


def _call_macs(layer: nn.Module, given: Tensor, output: Tensor) -> int:
    if isinstance(layer, nn.Linear):
        return output.numel() * layer.in_features
    assert isinstance(layer, CONVOLUTIONS)
    kernel = int(np.prod(layer.kernel_size))
    if isinstance(layer, nn.ConvTranspose2d):
        return given.numel() * layer.out_channels * kernel // layer.groups
    return output.numel() * layer.in_channels * kernel // layer.groups


def _is_depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, CONVOLUTIONS) and layer.groups == layer.in_channels > 1


def _of_inputs(edit: Edit) -> bool:
    """Whether the edit removes a layer's input channels."""
    return "in_channels" in getattr(edit.prune, "__name__", "")


def _dimension(edit: Edit, modules: Mapping[str, nn.Module], params: Mapping[str, Tensor]) -> int:
    if edit.target in params:
        return params[edit.target].shape[edit.dim]
    layer = modules[edit.target]
    if _of_inputs(edit):
        return int(getattr(layer, "in_features", 0) or getattr(layer, "in_channels", 0))
    for name in ("out_features", "out_channels", "num_features", "num_channels"):
        if hasattr(layer, name):
            return int(getattr(layer, name))
    return int(next(layer.parameters(recurse=False)).shape[0])


def _params_of(
    edit: Edit, modules: Mapping[str, nn.Module], params: Mapping[str, Tensor], dim: int
) -> list[tuple[str, int]]:
    """The parameters that the edit shortens, and whether it is their first (0) or second side."""
    if edit.target in params:
        return [(edit.target, 0)]
    own = [name for name, _ in modules[edit.target].named_parameters(recurse=False)]
    if dim:
        own = [name for name in own if name == "weight"]
        if _is_depthwise(modules[edit.target]):
            return []
    return [(f"{edit.target}.{name}", dim) for name in own]


def _outside(names: Sequence[str], dropped: Sequence[str]) -> Array:
    return np.array([0.0 if inside(name, dropped) else 1.0 for name in names])
