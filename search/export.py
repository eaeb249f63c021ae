"""Writes a front member as a folder, and loads such a folder.

The folder holds `recipe.json` (constructor, dropped blocks, changed shapes, kept channels,
metrics) and `model.safetensors`. Loading needs torch and the constructor; neither Ray, Optuna nor
torch-pruning.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field, TypeAdapter, ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..methods.models.build import build_model, is_known_source
from ..methods.shapes import changed_attributes, rebuild
from .records import TrialResult, TrialStatus
from .store import atomic_write_bytes, write_json
from .yaml_source import ConfigError

if TYPE_CHECKING:
    from .runs import Run

RECIPE = "recipe.json"
WEIGHTS = "model.safetensors"
FORMAT = "prune-search/1"
TOLERANCE = 1e-5


@dataclasses.dataclass
class _Model:
    name: str
    kwargs: dict[str, Any]
    num_classes: Annotated[int, Field(ge=1, le=10**6)]


@dataclasses.dataclass
class _Recipe:
    """What loading needs of a recipe, for the check of its types."""

    model: _Model
    dropped_blocks: list[str]
    attributes: dict[str, dict[str, Any]]


def load_pruned(
    folder: str | Path, *, model: nn.Module | None = None, run_code: bool = False
) -> nn.Module:
    """Loads an exported model.

    Args:
        folder: What `prune-search export` wrote.
        model: The dense model, freshly constructed. None constructs the one that the recipe
            names.
        run_code: Whether a recipe that names `module:callable` may import and call it, with the
            arguments in the recipe. Only for a recipe that you trust as you trust a program.

    Returns:
        The pruned model in eval mode, on the CPU.

    Raises:
        ValueError: If the folder is incomplete, if recipe, constructor and weights do not agree,
            or if code would have to run that `run_code` does not allow.
    """
    recipe = read_recipe(folder)
    state = read_weights(Path(folder) / WEIGHTS)
    if model is None:
        spec = recipe["model"]
        if not (run_code or is_known_source(spec["name"])):
            raise ValueError(
                f"`run_code` (=False) must be True to load this: the recipe in {folder} runs "
                f"{spec['name']} with the arguments {spec['kwargs']}. If you trust it, pass "
                "run_code=True, or build the dense model yourself and pass it as model."
            )
        model = build_model(
            spec["name"], num_classes=int(spec["num_classes"]), kwargs=spec["kwargs"]
        )
    return rebuild(model, recipe["dropped_blocks"], recipe["attributes"], state)


def read_recipe(folder: str | Path) -> dict[str, Any]:
    """The recipe of an exported folder.

    Raises:
        ValueError: If it is missing or is not a recipe.
    """
    path = Path(folder) / RECIPE
    try:
        recipe = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"`{path}` must be an exported recipe: {error}. Export again.") from error
    keys = {"format", "model", "dropped_blocks", "attributes"}
    if not isinstance(recipe, dict) or not keys <= recipe.keys() or recipe["format"] != FORMAT:
        raise ValueError(
            f"`{path}` must be an exported recipe of format {FORMAT} with "
            f"{', '.join(sorted(keys))}. "
            "Export again with this version."
        )
    try:
        TypeAdapter(_Recipe).validate_python(recipe)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(
            f"`{place}` of {path} must be of another kind: {first['msg']}. Export again."
        ) from None
    return recipe


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ValueError: If it is missing or damaged.
    """
    try:
        return load_file(path)
    except Exception as error:  # of a damaged file the library raises several kinds
        raise ValueError(f"`{path}` must hold weights: {error}. Export again.") from error


def export_member(run: Run, member: TrialResult, out: Path) -> Path:
    """Writes one trial's pruned model to `out`, proves it by reloading, and tests it once.

    The reloaded model must give the outputs of the pruned one, and only then is it evaluated on
    the test split; the test accuracy goes into the recipe.

    Raises:
        ConfigError: If the trial's weights are not kept, or `out` is in use.
    """
    from ..methods.surgery import Recipe, apply
    from .runs import check_writable
    from .setup import find_groups, load_images, make_model, make_task

    if member.recipe is None or member.weights is None:
        kept = ", ".join(r.trial_id for r in run.front_results() if r.weights) or "none"
        raise ConfigError(
            f"`--trial` (={member.trial_id}) must be a front member: only their weights are kept "
            f"({TrialStatus(member.status)} here). Choose one of {kept}."
        )
    lost = [p for p in (member.recipe, member.weights) if not (run.folder / p).is_file()]
    if lost:
        raise ConfigError(
            f"`RUN_DIR` (={run.place}) must hold {' and '.join(lost)}: the files of trial "
            f"{member.trial_id} are gone. `prune-search resume {run.place}` repairs the front."
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"`--out` (={out}) must not exist yet or be empty. Choose another.")
    check_writable(out)
    config = run.config
    task = make_task(config, load_images(config), "cpu")
    dense = make_model(config, task.num_classes, trained=False)
    recipe = Recipe.from_json((run.folder / member.recipe).read_text(encoding="utf-8"))
    pruned = make_model(config, task.num_classes, trained=False)
    apply(pruned, find_groups(config, dense, task.example_input(2)), recipe)
    weights = (run.folder / member.weights).read_bytes()
    try:
        pruned.load_state_dict(read_weights(run.folder / member.weights))
    except RuntimeError as error:
        raise ValueError(
            f"`{run.folder / member.weights}` must hold the weights of {member.recipe}: {error}. "
            "Choose another --trial."
        ) from error
    document: dict[str, Any] = {
        "format": FORMAT,
        "model": {
            "name": config.model.name,
            "kwargs": config.model.kwargs,
            "num_classes": task.num_classes,
        },
        "dropped_blocks": list(recipe.dropped_blocks),
        "attributes": changed_attributes(dense, pruned),
        "kept": {name: list(kept) for name, kept in recipe.kept.items()},
        "input": {
            "shape": list(task.data.image_shape),
            "mean": list(task.data.mean),
            "std": list(task.data.std),
        },
        "classes": list(task.data.classes),
        "trial": _facts(member),
        "baseline": run.baseline,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=out.parent) as scratch:
        unproven = Path(scratch) / out.name
        atomic_write_bytes(unproven / WEIGHTS, weights)
        write_json(unproven / RECIPE, document)
        loaded = load_pruned(unproven, run_code=True)  # as the config says
        document["parity"] = _parity(pruned.eval(), loaded, task.example_input(64))
        document["test"] = task.evaluate(loaded, "test")
        write_json(unproven / RECIPE, document)
        unproven.replace(out)
    return out


def _parity(pruned: nn.Module, loaded: nn.Module, images: torch.Tensor) -> float:
    """Largest absolute difference of the two models' outputs on real images."""
    with torch.inference_mode():
        difference = float((pruned(images) - loaded(images)).abs().max())
    if difference > TOLERANCE:
        raise RuntimeError(f"the export differs from the trial's model by {difference:.2e}")
    return difference


def _facts(member: TrialResult) -> dict[str, Any]:
    facts = dataclasses.asdict(member)
    return {k: v for k, v in facts.items() if k not in ("candidate", "recipe", "weights")} | {
        "candidate": json.loads(member.candidate)
    }
