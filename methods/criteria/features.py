"""Feature points: where a layer's channels are read in a forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..layers import get_layer

Observer = Callable[[str, Tensor], None]

_POINTWISE = frozenset(
    "batch_norm relu relu6 leaky_relu prelu elu selu celu gelu silu mish hardswish hardsigmoid "
    "hardtanh sigmoid tanh softplus softsign".split()
)


@contextlib.contextmanager
def observed(
    model: nn.Module,
    layers: Sequence[str],
    observer: Observer,
    activations: Mapping[str, Sequence[int]],
) -> Iterator[None]:
    """Calls `observer(layer, tensor)` with each feature while it is fresh in the forward pass.

    Later in-place operations change the tensor's values, but not what a gradient hook that the
    observer registers on it receives.

    Args:
        model: The model; one forward pass may be run in the context.
        layers: Names of the layers to observe.
        observer: Must not change the tensor.
        activations: Result of `find_activations`; a layer that is not in it is observed at its
            own output.
    """
    with contextlib.ExitStack() as stack:
        for name in layers:
            if name in activations:
                continue

            def hook(_: nn.Module, __: object, output: Tensor, name: str = name) -> None:
                observer(name, output)

            stack.callback(get_layer(model, name).register_forward_hook(hook).remove)
        if activations:
            owners = {index: name for name, indices in activations.items() for index in indices}
            stack.enter_context(_Observe(owners, observer))
        yield


def find_activations(
    model: nn.Module, layers: Sequence[str], images: Tensor
) -> dict[str, tuple[int, ...]]:
    """Finds the activation of each layer, by running `images`.

    From the layer's output on, batch norms and activation functions are followed while they are
    the only user of what they read; a sum, a product, a pooling or another layer ends the way.
    Modules and functional calls are treated alike.

    Returns:
        Layer name to the numbers, among the pointwise operations of a forward pass, of those
        whose result is the layer's activation (several where the layer is called several times).
        A layer with a call that nothing pointwise follows is left out.
    """
    trace = _Trace()
    with contextlib.ExitStack() as stack:
        for name in layers:

            def hook(_: nn.Module, __: object, output: Tensor, name: str = name) -> None:
                trace.start(name, output)

            stack.callback(get_layer(model, name).register_forward_hook(hook).remove)
        with torch.no_grad(), trace:
            model(images)
    found = {}
    for name, nodes in trace.starts.items():
        indices = [node.last().index for node in nodes]
        if None not in indices:
            found[name] = tuple(index for index in indices if index is not None)
    return found


@dataclass
class _Node:
    """A tensor on the way from a layer's output; `index` is the operation that made it."""

    index: int | None = None
    num_users: int = 0
    following: list[_Node] = field(default_factory=list)

    def last(self) -> _Node:
        if self.num_users == 1 and self.following:
            return self.following[0].last()
        return self


class _Trace(TorchFunctionMode):
    """Follows pointwise operations from the tensors given to `start`."""

    def __init__(self) -> None:
        super().__init__()
        self.starts: dict[str, list[_Node]] = {}
        self._nodes: dict[int, _Node] = {}
        self._held: list[Tensor] = []  # keeps the identities in `_nodes` unique
        self._count = 0

    def start(self, name: str, tensor: Tensor) -> None:
        node = _Node()
        self.starts.setdefault(name, []).append(node)
        self._add(tensor, node)

    def _add(self, tensor: Tensor, node: _Node) -> None:
        self._nodes[id(tensor)] = node
        self._held.append(tensor)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not isinstance(output, (Tensor, tuple, list)) or isinstance(output, torch.Size):
            return output  # asks for a property: not a use
        pointwise = _is_pointwise(func)
        for tensor in _tensors((*args, *(kwargs or {}).values())):
            node = self._nodes.get(id(tensor))
            if node is None:
                continue
            if pointwise and output is tensor and node.num_users == 0:  # in place
                node.index = self._count
                continue
            node.num_users += 1
            if pointwise and isinstance(output, Tensor) and output is not tensor:
                node.following.append(_Node(self._count))
                self._add(output, node.following[-1])
        self._count += pointwise
        return output


class _Observe(TorchFunctionMode):
    """Shows the results of the pointwise operations whose numbers are in `owners`."""

    def __init__(self, owners: Mapping[int, str], observer: Observer) -> None:
        super().__init__()
        self._owners = owners
        self._observer = observer
        self._count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if _is_pointwise(func):
            if (name := self._owners.get(self._count)) is not None:
                self._observer(name, output)
            self._count += 1
        return output


def _is_pointwise(func: Any) -> bool:
    return getattr(func, "__name__", "").rstrip("_") in _POINTWISE


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
