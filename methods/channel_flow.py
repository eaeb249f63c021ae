"""Follows every channel of a model through one forward pass.

Each tensor of the pass has labels (labels.py) that say which channel its elements belong to. What
moves data (a reshape, a concatenation, a split, a channel shuffle) moves the labels in the same
way; what combines tensors element by element couples the channels that meet; a convolution or
linear layer takes channels in and makes new ones. What is not understood takes the channels it
reads out of the game, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

from .flow import Division, Flow, Port
from .flow_moves import MOVES, Moves
from .labels import along, overlay, spread, varies
from .models.resnet_cifar import ZeroPadShortcut
from .outputs import tensors_of
from .trace import forward_of

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)
_LAYERS = (_ConvNd, nn.Linear, *NORMS, nn.PReLU, nn.MultiheadAttention, ZeroPadShortcut)

_CONVOLUTIONS = {f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)}
_NORM_CALLS = {"batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm"}
_ADDS = {"add", "iadd", "radd", "sub", "isub", "rsub"}
_COMBINES = _ADDS | {
    *("mul", "imul", "rmul", "div", "true_divide", "truediv", "itruediv", "rtruediv", "pow"),
    *("maximum", "minimum", "where", "addcmul", "addcdiv", "lerp", "max_unpool2d"),
}
_REDUCTIONS = {
    *("mean", "sum", "amax", "amin", "max", "min", "std", "var", "norm", "vector_norm", "prod"),
    *("logsumexp", "median"),
}
_ALONG_ONE = {
    *("softmax", "log_softmax", "normalize", "cumsum", "local_response_norm", "sort", "topk"),
}
_PRODUCTS = {
    *("matmul", "rmatmul", "bmm", "mm", "mv", "baddbmm", "addmm", "einsum", "tensordot", "cdist"),
    *("scaled_dot_product_attention", "multi_head_attention_forward"),
}
_FACTORIES = {
    *("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor", "zeros_like", "ones_like"),
    *("empty_like", "full_like", "rand_like", "randn_like"),
}


def follow_channels(model: nn.Module, example_input: Tensor) -> Flow:
    """Runs the model once and follows its channels.

    Args:
        model: In eval mode; hooks are put on it and taken off again.
        example_input: One image, [1, C, H, W].

    Returns:
        What was seen.
    """
    follower = _Follower(model)
    with ExitStack() as stack, torch.no_grad():
        for handle in follower.hooks(model):
            stack.callback(handle.remove)
        with follower:
            output = forward_of(model)(example_input.clone())
    for tensor in tensors_of(output):
        follower.lose([tensor], "makes the model's output")
    return follower.flow


class _Follower(Moves):
    """Labels the result of every torch function that is called while it is active."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._muted = 0
        self._owners: dict[int, tuple[str, nn.Module]] = {}
        for name, module in model.named_modules():
            if isinstance(module, (_ConvNd, nn.Linear)):
                self._owners.setdefault(id(module.weight), (name, module))
            if not isinstance(module, _LAYERS):
                self._label_bare(name, module)
        self.num_bare = self.flow.num_labels

    def _label_bare(self, name: str, module: nn.Module) -> None:
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for key, tensor in own:
            if tensor.is_floating_point() and tensor.numel() > 1:
                labels = self.flow.fresh(tensor.numel()).view(tensor.shape)
                self.flow.bare[f"{name}.{key}".lstrip(".")] = self.labels[tensor] = labels

    def hooks(self, model: nn.Module) -> Iterator[Any]:
        """Hooks that tell in which module the pass is."""
        for name, module in model.named_modules():
            if name:
                yield module.register_forward_pre_hook(self._enter(name))
                yield module.register_forward_hook(self._leave(name))

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            self.inside.append((name, module))
            self._muted += isinstance(module, ZeroPadShortcut)

        return hook

    def _leave(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.inside.pop()
            if isinstance(module, ZeroPadShortcut):
                self._muted -= 1
                self._layer(name, module, args[0], output, 1, module.out_channels)

        return hook

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self._muted:
            self._follow(func, args, kwargs, result)
        return result

    def _follow(self, func: Any, args: tuple[Any, ...], kwargs: Any, result: Any) -> None:
        name = getattr(func, "__name__", "").strip("_")
        if name == "setitem":
            return self.set_items(*args)
        if name == "iter":
            return self.lose(args, f"is taken apart row by row (in {self.where})")
        results = list(tensors_of(result))
        if not results or name in _FACTORIES:
            return
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and self.has(t)]
        if name in _CONVOLUTIONS or name == "linear":
            self._weighted(name, args, kwargs, results[0], given)
        elif not given:
            return
        elif name in _NORM_CALLS:
            self._normalise(name, given, results[0])
        elif name == "prelu":
            self._prelu(given, results[0])
        elif name in _PRODUCTS:
            why = "feeds a matrix product, as attention does: its width stays"
            self.lose(given, f"{why} ({name} in {self.where})")
        elif name in MOVES:
            self.move(name, func, args, kwargs, results)
        elif name in _REDUCTIONS and not (name in ("max", "min") and len(given) > 1):
            self._reduce(name, given[0], args, kwargs, results)
        elif name in _ALONG_ONE and self._is_mixed(name, given[0], args, kwargs):
            self.lose(given, f"is mixed over its channels ({name} in {self.where})")
        elif name == "max_unpool2d":
            self._unpool(given, results[0])
        elif name in _COMBINES or len(given) > 1:
            self._combine(name, given, results)
        else:
            self._keep(name, given[0], results)

    # --- layers ------------------------------------------------------------------------------

    def _weighted(
        self, name: str, args: Sequence[Any], kwargs: Any, result: Tensor, given: Sequence[Tensor]
    ) -> None:
        """A convolution or linear operation: the layer's own, or a bare one."""
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        owner, module = self._owners.get(id(weight), self.inside[-1])
        if not isinstance(module, (_ConvNd, nn.Linear)):
            return self.lose(given, f"feeds weights that lie in no layer ({name} in {self.where})")
        x = args[0] if args else kwargs["input"]
        dim = x.ndim - 1 if name == "linear" else x.ndim - module.weight.ndim + 1
        width = module.out_features if isinstance(module, nn.Linear) else module.out_channels
        self._layer(owner, module, x, result, dim, width)

    def _layer(
        self, name: str, module: nn.Module, x: Tensor, result: Tensor, dim: int, width: int
    ) -> None:
        made = self.flow.made.get(name)
        if made is None:
            made = self.flow.made[name] = self.flow.fresh(width)
            self.flow.ports[Port(name, "out")] = made
        self.flow.pixels[name] = _num_pixels(module, result)
        taken = None
        if self.has(x):
            labels = self.labels[x]
            taken = along(labels, dim)
            if taken is None and not varies(labels, dim):  # works on positions, channel by channel
                self.flow.lost.append((made, "makes new positions of an image, not channels"))
                self.labels[result] = labels.narrow(dim, 0, 1).expand(result.shape)
                return
            if taken is None:
                self.lose([x], f"reaches {name} with channels and positions mixed")
        self.labels[result] = spread(made, result.shape, dim)
        groups = getattr(module, "groups", 1)
        if groups > 1 and groups == module.in_channels == module.out_channels:
            if taken is not None:
                self.couple(made, taken)
            return
        if taken is not None:
            self.flow.enter(Port(name, "in"), taken)
        if groups > 1:
            reason = f"shares {name}, which divides its channels, with other layers"
            parts = [made] if taken is None else [made, taken]
            self.flow.divisions += [Division(labels, int(groups), reason) for labels in parts]

    def _normalise(self, name: str, given: Sequence[Tensor], result: Tensor) -> None:
        target, module = self.inside[-1]
        layer_norm = isinstance(module, nn.LayerNorm)
        known = isinstance(module, NORMS) and (
            not layer_norm or len(module.normalized_shape) == 1  # type: ignore[arg-type]
        )
        taken = along(self.labels[given[0]], -1 if layer_norm else 1) if known else None
        if taken is None:
            return self.lose(
                given, f"is normalised by code and not by a layer ({name} in {self.where})"
            )
        self.flow.enter(Port(target, "both"), taken)
        if isinstance(module, nn.GroupNorm) and module.num_groups > 1:
            reason = f"shares {target}, which divides its channels, with other layers"
            self.flow.divisions.append(Division(taken, module.num_groups, reason))
        self.labels[result] = self.labels[given[0]]

    def _prelu(self, given: Sequence[Tensor], result: Tensor) -> None:
        target, module = self.inside[-1]
        if not isinstance(module, nn.PReLU):
            return self._combine("prelu", given, [result])
        taken = along(self.labels[given[0]], 1)
        if module.num_parameters > 1 and taken is not None:
            self.flow.enter(Port(target, "both"), taken)
        self.labels[result] = self.labels[given[0]]

    # --- operations --------------------------------------------------------------------------

    def _keep(self, name: str, x: Tensor, results: Sequence[Tensor]) -> None:
        """Any other function: element by element, or channel by channel (pooling, resizing)."""
        labels = self.labels[x]
        vector = along(labels, 1) if x.ndim > 2 else None
        for result in results:
            if result.shape == x.shape:
                self.labels[result] = labels
            elif vector is not None and _alike(result, x):
                self.labels[result] = spread(vector, result.shape, 1)
            elif result.is_floating_point():
                self.lose(
                    [x],
                    f"is read by code that is not understood ({name or 'code'} in {self.where})",
                )

    def _combine(self, name: str, given: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        """Element by element: the channels that meet are one."""
        shape = results[0].shape
        if len(results) > 1 or any(not _broadcasts(t.shape, shape) for t in given):
            return self.lose(
                given, f"is read by code that is not understood ({name or 'code'} in {self.where})"
            )
        total: Tensor | None = None
        for tensor in sorted(given, key=self.is_bare):  # a parameter follows what it meets
            labels = self.labels[tensor]
            if self._is_repeated(tensor, given, shape):
                self.lose([tensor], f"weighs several channels at once (in {self.where})")
            elif total is None:
                total = labels.expand(shape)
            else:
                total, pairs = overlay(total, labels, shape)
                self.flow.pairs.append(pairs)
                if name in _ADDS and not self.is_bare(tensor):
                    self.flow.added.append(pairs[0])
        if total is not None:
            self.labels[results[0]] = total

    def _is_repeated(self, tensor: Tensor, given: Sequence[Tensor], shape: torch.Size) -> bool:
        """Whether broadcasting makes it meet several channels of another tensor."""
        others = [self.labels[t] for t in given if t is not tensor and not self.is_bare(t)]
        sizes = [1] * (len(shape) - tensor.ndim) + list(tensor.shape)
        wide = [dim for dim, size in enumerate(sizes) if size == 1 < shape[dim]]
        return any(varies(other.expand(shape), dim) for other in others for dim in wide)

    def _unpool(self, given: Sequence[Tensor], result: Tensor) -> None:
        """Unpooling: the indices of a pooling belong to its channels."""
        vectors = [along(self.labels[tensor], 1) for tensor in given]
        first = vectors[0]
        if first is None or any(v is None or v.shape != first.shape for v in vectors):
            return self.lose(given, f"meets other channels (in {self.where})")
        for vector in vectors[1:]:
            assert vector is not None
            self.couple(first, vector)
        self.labels[result] = spread(first, result.shape, 1)

    def _reduce(
        self, name: str, x: Tensor, args: Sequence[Any], kwargs: Any, results: Sequence[Tensor]
    ) -> None:
        if not any(result.is_floating_point() for result in results):
            return
        place = 2 if name in ("norm", "vector_norm") else 1
        dims = kwargs.get("dim", args[place] if len(args) > place else None)
        dims = [dims] if isinstance(dims, int) else dims
        labels = self.labels[x]
        if not isinstance(dims, list | tuple) or any(varies(labels, dim) for dim in dims):
            return self.lose([x], f"is reduced over its channels ({name} in {self.where})")
        reduced = labels.amax(tuple(dims), keepdim=results[0].ndim == x.ndim)
        for result in results:
            self.labels[result] = reduced

    def _is_mixed(self, name: str, x: Tensor, args: Sequence[Any], kwargs: Any) -> bool:
        default = 1 if name in ("normalize", "local_response_norm") else -1
        second = args[1] if len(args) > 1 and name.endswith(("softmax", "cumsum")) else default
        return varies(self.labels[x], int(kwargs.get("dim", second)))


def _alike(result: Tensor, x: Tensor) -> bool:
    """Whether both are images, or volumes, of equally many channels."""
    return result.ndim == x.ndim > 2 and result.shape[1] == x.shape[1]


def _broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    pairs = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(a in (1, b) for a, b in pairs)


def _num_pixels(module: nn.Module, output: Tensor) -> int:
    if isinstance(module, nn.Linear):  # channels last
        return math.prod(output.shape[1:-1])
    return math.prod(output.shape[2:])
