"""One model of `prune-search bench zoo`, in a process of its own.

`python -m prunesearch.search.bench.zoo_case CASE` prints one line of JSON; CASE is JSON too.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ...methods.blocks import removable_blocks, remove_blocks
from ...methods.groups import plan_pruning
from ...methods.measure import count_macs, count_params
from ...methods.models.build import build_model, input_channels
from ...methods.outputs import tensors_of
from ...methods.proof import difference, enliven, masked
from ...methods.select import num_kept
from ...methods.shapes import changed_attributes, copy_state, load_state
from ...methods.surgery import PruningPlan, Recipe, apply, prune, whole_columns
from ...methods.trace import forward_of
from ..export import FORMAT, RECIPE, WEIGHTS, load_pruned
from ..store import write_json

KEEP, DROP = 0.7, 0.25
NUM_CLASSES = 10
TOLERANCE = 1e-3  # of the largest output, against the masked dense model


def run_case(name: str, image_size: int, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Finds, removes, replays, exports and reloads; weights and choice of channels are random.

    Args:
        name: What `build_model` takes.
        image_size: Height and width in pixels.
        kwargs: Arguments of the model.

    Returns:
        The row of the table, without its verdict.
    """
    start = time.perf_counter()
    torch.manual_seed(0)
    model = build_model(name, num_classes=NUM_CLASSES, kwargs=kwargs)
    enliven(model)
    images = torch.randn(2, input_channels(model), image_size, image_size)
    blocks = removable_blocks(model, images)
    plan = plan_pruning(model, images)
    recipe = _recipe(plan, blocks)
    pruned = prune(model, plan, recipe).eval()
    found, wanted = _outputs(pruned, images), _outputs(model, images)
    alive = plan.alive(recipe.dropped_blocks)
    kept = sum(len(recipe.kept[group.name]) for group in alive)
    row: dict[str, Any] = {
        "num_params": count_params(model),
        "num_params_pruned": count_params(pruned),
        "macs": count_macs(_Traced(model), images),
        "macs_pruned": count_macs(_Traced(pruned), images),
        "blocks": len(blocks),
        "blocks_dropped": len(recipe.dropped_blocks),
        "groups": len(plan.groups),
        "keep_requested": KEEP if alive else None,
        "keep": kept / sum(group.num_channels for group in alive) if alive else None,
        "left_alone": len(plan.excluded),
        "left_alone_why": _why(plan),
        "finite": all(bool(t.isfinite().all()) for t in found),
        "same_shape": [t.shape for t in found] == [t.shape for t in wanted],
    }
    reference = remove_blocks(copy.deepcopy(model), recipe.dropped_blocks)
    reference = masked(reference, alive, recipe)
    pairs = zip(found, _outputs(reference, images), strict=True)
    row["difference"] = max(difference(*pair) for pair in pairs)
    row["masked_equal"] = row["difference"] <= TOLERANCE
    row["replay_equal"] = _same(
        found, _outputs(_replay(name, kwargs, model, images, recipe), images)
    )
    row["reload_equal"] = _same(
        found, _outputs(_reload(name, kwargs, model, pruned, recipe), images)
    )
    if not isinstance(
        forward_of(pruned), nn.Module
    ):  # what was traced ends before boxes are chosen
        with torch.inference_mode():
            row["finite"] &= all(bool(t.isfinite().all()) for t in tensors_of(pruned(images)))
    return row | {"seconds": time.perf_counter() - start}


class _Traced(nn.Module):
    """The forward pass that is traced, as a module."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        return forward_of(self.model)(images)


def _recipe(plan: PruningPlan, blocks: list[str]) -> Recipe:
    """Every fourth block goes, and of each group's columns a random share stays."""
    count = math.floor(DROP * len(blocks))
    dropped = tuple(sorted(blocks[len(blocks) * (2 * i + 1) // (2 * count)] for i in range(count)))
    generator = torch.Generator().manual_seed(0)
    kept = {}
    for group in plan.alive(dropped):
        size = group.num_channels // group.parts
        columns = torch.randperm(size, generator=generator)[: num_kept(size, KEEP)]
        kept[group.name] = whole_columns(group, columns.sort().values)
    return Recipe(dropped, kept)


def _why(plan: PruningPlan) -> str:
    """The reasons of the layers that are left alone, with how many each, the commonest first."""
    counts = Counter(
        reason.partition(":")[0].partition(" (")[0] for reason in plan.excluded.values()
    )
    return "; ".join(f"{reason} ({count})" for reason, count in counts.most_common())


def _outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    with torch.inference_mode():
        return list(tensors_of(forward_of(model.eval())(images.clone())))


def _same(found: list[Tensor], again: list[Tensor]) -> bool:
    return len(found) == len(again) and all(map(torch.equal, found, again))


def _replay(
    name: str, kwargs: dict[str, Any], model: nn.Module, images: Tensor, recipe: Recipe
) -> nn.Module:
    """The recipe, through JSON, on a model that is built and looked at anew."""
    fresh = build_model(name, num_classes=NUM_CLASSES, kwargs=kwargs)
    load_state(fresh, model.state_dict())
    return apply(fresh, plan_pruning(fresh, images), Recipe.from_json(recipe.to_json()))


def _reload(
    name: str, kwargs: dict[str, Any], model: nn.Module, pruned: nn.Module, recipe: Recipe
) -> nn.Module:
    """Written as an export is, and loaded from there."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        document = {
            "format": FORMAT,
            "model": {"name": name, "kwargs": kwargs, "num_classes": NUM_CLASSES},
            "dropped_blocks": list(recipe.dropped_blocks),
            "attributes": changed_attributes(model, pruned),
        }
        write_json(folder / RECIPE, document)
        save_file(copy_state(pruned), folder / WEIGHTS)
        return load_pruned(folder)


if __name__ == "__main__":
    case = json.loads(sys.argv[1])
    limit = int(case["memory_gib"] * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(sys.stderr):  # what libraries print is no result
        found_row = run_case(case["name"], case["image_size"], case["kwargs"])
    print(json.dumps(found_row))
