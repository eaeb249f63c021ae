"""From a model's name to an `nn.Module`, with weights from a checkpoint where one is given."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..names import unknown_name
from ..plugins import plugins
from ..shapes import load_state
from ..user_code import LIBRARIES, import_callable, names_code
from . import MODELS

# What the library's own defaults would do otherwise: download weights, or warn.
QUIET_DEFAULTS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}


def build_model(
    name: str,
    *,
    num_classes: int,
    kwargs: Mapping[str, Any] | None = None,
    checkpoint: str | Path | None = None,
) -> nn.Module:
    """Builds a model on the CPU, in eval mode, every parameter trainable.

    Pretrained weights are not downloaded. Without a checkpoint the weights are random: seed them
    with `torch.manual_seed`.

    Args:
        name: A zoo name (`MODELS`), one of a plug-in, `torchvision:NAME`, `timm:NAME`, or
            `package.module:callable`.
        num_classes: Passed on when the callable takes it, unless `kwargs` has it.
        kwargs: Arguments of the callable.
        checkpoint: A .safetensors or weights-only .pt file with the model's state dict.

    Returns:
        The model.

    Raises:
        ValueError: If the name is unknown, the arguments do not suit, what was built is no
            module, or the checkpoint does not fit.
    """
    builder, defaults = _find_builder(name)
    arguments = {**defaults, **(kwargs or {})}
    if _accepts(builder, "num_classes"):
        arguments.setdefault("num_classes", num_classes)
    try:
        model = builder(**arguments)
    except (Exception, SystemExit) as error:  # whatever a foreign constructor raises
        raise ValueError(
            f"`model.kwargs` (={dict(kwargs or {})}) must suit {name}{_signature(builder)}: "
            f"{type(error).__name__}: {error}. Correct the arguments."
        ) from error
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"`model.name` (={name}) must build a torch.nn.Module: it returned a "
            f"{type(model).__name__}. Name a class or a function that returns a module."
        )
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model.cpu().requires_grad_(True).eval()


def model_names() -> tuple[str, ...]:
    """The zoo, and the models of installed plug-ins."""
    return (*MODELS, *plugins("models", MODELS))


def is_known_source(name: str) -> bool:
    """Whether a name means what is installed, and no code that only a recipe names."""
    return not names_code(name)


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Loads a state dict strictly; nothing is loaded when it does not fit.

    Args:
        model: Receives the weights, in place.
        path: A .safetensors file, or a .pt or .pth file saved from a state dict (or from a
            mapping with the key `state_dict`). A `module.` before every key is taken off.

    Raises:
        ValueError: If the file is missing or unreadable, or its keys or shapes differ.
    """
    path = Path(path)
    state = _read_state(path)
    if state and all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    expected = model.state_dict()
    both = [(key, state[key], value) for key, value in expected.items() if key in state]
    wrong = [
        f"{key} has shape {list(given.shape)} in the file and {list(value.shape)} here"
        for key, given, value in both
        if given.shape != value.shape
    ]
    wrong += [
        f"{key} holds no such numbers" for key, given, value in both if not _alike(given, value)
    ]
    missing = [f"{key} is missing" for key in expected if key not in state]
    unexpected = [f"{key} is not in the model" for key in state if key not in expected]
    problems = wrong + missing + unexpected
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ValueError(
            f"`model.checkpoint` (={path}) must hold exactly the model's weights: "
            f"{'; '.join(problems[:3])}{more}. Use the `model.name`, `model.kwargs` and data set "
            "(number of classes, channels) that the checkpoint was trained with."
        )
    load_state(model, state)


def input_channels(model: nn.Module) -> int:
    """Channels of the images that the model takes: those of its first convolution, else 3.

    A model whose first convolution sees something else says it as `in_channels`.
    """
    if isinstance(own := getattr(model, "in_channels", None), int):
        return own
    convs = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    first = next(convs, None)
    return 3 if first is None else first.in_channels


def default_image_size(name: str) -> int | None:
    """Height and width in pixels that the model was designed for.

    Returns:
        32 for the zoo, 224 for torchvision (Inception 299), timm's own value; None for a user's
        callable: the size of the data.

    Raises:
        ValueError: If a timm name is unknown or timm is not installed.
    """
    source, _, rest = name.partition(":")
    if source == "torchvision":
        return 299 if rest == "inception_v3" else 224
    if source == "timm":
        config = _timm().get_pretrained_cfg(rest)
        return int(config.input_size[-1]) if config else 224
    return 32 if name in MODELS else None


Builder = Callable[..., Any]


def _find_builder(name: str) -> tuple[Builder, dict[str, Any]]:
    """The callable behind a name, and the arguments it gets unless the user sets them."""
    source, colon, rest = name.partition(":")
    if not colon:
        offered = plugins("models", MODELS)
        if name in offered:
            return offered[name].load(), {}
        if name not in MODELS:
            forms = [
                *model_names(),
                "torchvision:NAME",
                "timm:NAME",
                "package.module:callable",
            ]
            raise ValueError(unknown_name("model.name", name, forms))
        return MODELS[name], {}
    if source == "torchvision":
        return _torchvision_builder(rest)
    if source == "timm":
        return _timm_builder(rest)
    known = f"; the sources known by name are {', '.join(LIBRARIES)}"
    return import_callable(name, "model.name", "model", sources=known), {}


def _torchvision_builder(name: str) -> tuple[Builder, dict[str, Any]]:
    from torchvision import models  # imported here: the zoo does not need it

    if name not in models.list_models():
        raise ValueError(unknown_name("model.name", name, models.list_models()))
    builder = models.get_model_builder(name)
    defaults: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(builder).parameters:
        defaults["weights_backbone"] = None
    return builder, defaults | QUIET_DEFAULTS.get(name, {})


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise ValueError(
            "`model.name` (=timm:...) must name an installed library: timm is not installed. "
            "Install it with `pip install 'prune-search[timm]'`."
        ) from error
    return timm


def _timm_builder(name: str) -> tuple[Builder, dict[str, Any]]:
    timm = _timm()
    if not timm.is_model(name):
        near = timm.list_models(f"{name[:4]}*") or timm.list_models()[:10]
        raise ValueError(unknown_name("model.name", name, near))

    def create(**kwargs: Any) -> nn.Module:
        if "checkpoint_path" in kwargs:  # some versions of timm unpickle it
            raise ValueError("checkpoint_path is not read: name the file in model.checkpoint")
        model: nn.Module = timm.create_model(name, pretrained=False, **kwargs)
        return model

    return create, {}


def _accepts(builder: Builder, argument: str) -> bool:
    parameters = _parameters(builder).values()
    return any(p.name == argument or p.kind is p.VAR_KEYWORD for p in parameters)


def _signature(builder: Builder) -> str:
    """The names that the callable takes, as in (num_classes, in_channels)."""
    return f"({', '.join(_parameters(builder))})"


def _parameters(builder: Builder) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(builder).parameters
    except (ValueError, TypeError):  # of a function written in C
        return {}


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(
            f"`model.checkpoint` (={path}) must be a file: there is none. Correct the path, or "
            "leave it out and the dense model is trained."
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file, or one of something else, raises nearly anything
        raise _not_weights(path, f"it cannot be read ({_first_line(error)})") from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise _not_weights(path, "it is not a mapping of names to tensors")
    return dict(state)


def _not_weights(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"`model.checkpoint` (={path}) must hold weights only: {reason}. Save it again with "
        "`torch.save(model.state_dict(), path)` or as safetensors."
    )


def _alike(given: Tensor, wanted: Tensor) -> bool:
    """Whether it is an ordinary tensor, of real numbers where such are wanted."""
    ordinary = given.layout is torch.strided and not given.is_meta
    return ordinary and given.is_floating_point() == wanted.is_floating_point()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
