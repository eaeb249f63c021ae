"""Content addresses of what results depend on: data, weights, code."""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import methods
from ..methods.data import Data
from ..methods.user_code import names_code
from .config import SearchConfig

LIBRARIES = ("torch", "torchvision", "torch-pruning")


def common_key(
    kind: str, config: SearchConfig, *, weights: str, data: str, device: torch.device
) -> dict[str, Any]:
    """What every result depends on that is made from a model and images.

    Args:
        kind: The first word of the result's address.
        config: Names the model and says how the data are used.
        weights: From `weights_digest`.
        data: From `data_digest`.
        device: What it is made on; a GPU rounds in another way than a CPU.
    """
    return {
        "kind": kind,
        "model": model_key(config),
        "weights": weights,
        "data": data,
        "batches": config.data.model_dump(
            mode="json", include={"batch_size", "calibration_size", "seed", "augment"}
        ),
        "seed": config.search.seed,
        "device": device.type,
        "threads": torch.get_num_threads(),  # which decide how sums are rounded
        "code": code_digest(),
        "libraries": library_versions(config),
        **task_key(config),
    }


def library_versions(config: SearchConfig) -> dict[str, str]:
    """Versions of the libraries that compute what this project does not compute itself."""
    foreign = ["timm"] if config.model.name.startswith("timm:") else []
    return {name: metadata.version(name) for name in (*LIBRARIES, *foreign)}


def latency_basis(
    config: SearchConfig,
    num_classes: int,
    image_shape: Sequence[int],
    fingerprint: Mapping[str, Any],
) -> dict[str, Any]:
    """What the latencies of all architectures depend on.

    Args:
        config: Names the model and says how latency is measured.
        num_classes: Outputs of the classifier.
        image_shape: (channels, height, width).
        fingerprint: Of the device, from `environment.fingerprint`. Machines that differ in
            nothing but their name are one.
    """
    return {
        "model": model_key(config),
        "num_classes": num_classes,
        "image_shape": list(image_shape),
        "settings": config.latency.model_dump(mode="json"),
        "device": {name: value for name, value in fingerprint.items() if name != "host"},
        "code": code_digest(),
        "libraries": library_versions(config),
    }


def model_key(config: SearchConfig) -> dict[str, Any]:
    """The model's constructor; for `module:callable` with the source of all that it may import."""
    name = config.model.name
    return {"name": name, "kwargs": config.model.kwargs} | _source_of(name)


def task_key(config: SearchConfig) -> dict[str, Any]:
    """The task, likewise, where the config names one; the data's own needs no words."""
    task = config.task
    if task is None:
        return {}
    return {"task": {"name": task.name, "options": task.options} | _source_of(task.name)}


def _source_of(name: str) -> dict[str, Any]:
    """The source behind `module:callable`.

    That is the package of the module, or the files beside a module that is in none.
    """
    if not names_code(name):
        return {}
    module = name.partition(":")[0]
    top = sys.modules.get(module.partition(".")[0])
    if folders := list(getattr(top, "__path__", [])):
        return {"source": _source_digest(tuple(folders), "**/*.py")}
    if path := getattr(top, "__file__", None):
        return {"source": _source_digest((str(Path(path).parent),), "*.py")}
    return {}


def data_digest(data: Data) -> str:
    """Content address of the images that training, scores and accuracies see, and of their use.

    The test split does not count: no result of a trial depends on it.
    """
    digest = hashlib.sha256()
    for part in data.parts():
        if isinstance(part, Tensor):
            _add(digest, part)
        else:
            digest.update(part)
    return digest.hexdigest()


def weights_digest(model: nn.Module) -> str:
    """Content address of a model's weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        _add(digest, tensor)
    return digest.hexdigest()


@functools.cache
def code_digest(*, search: bool = False) -> str:
    """Content address of the code that makes results: all of `methods`.

    Args:
        search: Whether `search`, which puts a trial together, counts too.
    """
    found = _source_digest((next(iter(methods.__path__)),), "**/*.py")
    return found + _source_digest((str(Path(__file__).parent),), "*.py") if search else found


def package_digest() -> str:
    """Content address of all code."""
    own = _source_digest((str(Path(__file__).parent),), "**/*.py")
    return code_digest() + own


@functools.cache
def _source_digest(folders: tuple[str, ...], pattern: str) -> str:
    digest = hashlib.sha256()
    for folder in map(Path, folders):
        for path in sorted(folder.glob(pattern)):
            digest.update(path.relative_to(folder).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _add(digest: Any, tensor: Tensor) -> None:
    digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
    array = tensor.detach().cpu().contiguous().reshape(-1)
    digest.update(array.view(torch.uint8).numpy() if array.numel() else b"")
