"""Loads an exported model: needs torch and the constructor, and nothing of the search.

An export is a folder with `recipe.json` (constructor, dropped blocks, changed shapes, kept
channels, metrics) and `model.safetensors`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn

from .models.build import build_model, is_known_source
from .shapes import rebuild

RECIPE = "recipe.json"
WEIGHTS = "model.safetensors"
FORMAT = "prune-search/1"


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
