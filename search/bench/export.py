"""`prune-search bench export`: every form of an export on many architectures, pruned.

Each model loses 30 % of its channels and every second removable block. All that is written is
loaded, compared with the pruned model on real images and timed by one fresh process.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from safetensors.torch import save
from torch import Tensor, nn

from ...methods.blocks import removable_blocks
from ...methods.data import load_data
from ...methods.exported import FORMAT, RECIPE, WEIGHTS
from ...methods.finetune import recalibrate_batch_norm
from ...methods.groups import plan_pruning
from ...methods.measure import count_params
from ...methods.models.build import build_model
from ...methods.shapes import changed_attributes, copy_state
from ...methods.surgery import ChannelGroup, Recipe, prune
from ...methods.tasks import make_task
from ..environment import environment
from ..export_proof import Outcome, Proof, Timing, Unproven, prove
from ..portable import FORMATS, ExportError, check_formats, write_forms
from ..store import atomic_write_bytes, write_json
from .common import markdown_row

KEEP = 0.7
NUM_CLASSES = 10
IMAGES = 8  # compared
SIZES = {
    "resnet20": 32,
    "resnet56": 32,
    "vgg16_cifar": 32,
    "resnet50_cifar": 32,
    "torchvision:resnet18": 64,
    "torchvision:mobilenet_v2": 64,
    "torchvision:mobilenet_v3_small": 64,
    "torchvision:densenet121": 64,
    "torchvision:efficientnet_b0": 64,
    "torchvision:regnet_x_400mf": 64,
    "torchvision:googlenet": 64,
    "torchvision:convnext_tiny": 64,
}
"""The architectures, and the pixels a side of their images."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Cut:
    """A pruned model.

    Attributes:
        name: Of its constructor.
        dense: As constructed.
        pruned: In eval mode, its batch norms estimated.
        dropped: Blocks that are gone.
        channels: Of how many in all groups how many are left.
        images: Real ones, [IMAGES, 3, H, W].
    """

    name: str
    dense: nn.Module
    pruned: nn.Module
    dropped: tuple[str, ...]
    channels: tuple[int, int]
    images: Tensor


def bench_export(
    models: Sequence[str] | None = None,
    *,
    runs: int = 200,
    threads: int = 1,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Exports pruned architectures in every form and proves all of them.

    Args:
        models: Names in `SIZES`; all of them if None.
        runs: Timed runs of each form, and of the eager model beside it.
        threads: Of torch and of the runtime.
        say: Told what is under way.

    Returns:
        `rows`, one a model, with the proof of each form or the reason why there is none, and
        what it was measured on.

    Raises:
        ValueError: If a model is not among them, or a library is missing.
    """
    check_formats(FORMATS)
    load_before = os.getloadavg()[0]
    unknown = sorted(set(models or ()) - SIZES.keys())
    if unknown:
        raise ValueError(
            f"`--models` (={', '.join(unknown)}) must be among {', '.join(SIZES)}. Leave it out "
            "for all."
        )
    with tempfile.TemporaryDirectory(prefix="prune-search-") as scratch:
        rows, exports = [], []
        for index, name in enumerate(models or SIZES):
            say(f"{name}: pruning and writing")
            cut = cut_model(name, SIZES[name])
            export, refused = write_cut(cut, Path(scratch) / str(index))
            rows.append(_row(cut) | {"forms": refused})
            exports.append(export)
        say("proving all of them in a fresh process")
        for row, outcomes in zip(rows, prove(exports, Timing(1, threads, runs)), strict=True):
            row["forms"] = {**_plain(outcomes), **row["forms"]}
    return {
        "rows": rows,
        "runs": runs,
        "threads": threads,
        "images": IMAGES,
        "load_before": load_before,
        "environment": environment(),
    }


def cut_model(name: str, size: int) -> Cut:
    """A model without 30 % of its channels and every second removable block; seeded.

    Args:
        name: Of a constructor.
        size: Pixels a side of its images, the digits.
    """
    data = load_data("digits", image_size=size, limit=200)
    task = make_task(None, data, batch_size=32, calibration_size=64)
    torch.manual_seed(0)
    dense = build_model(name, num_classes=NUM_CLASSES)
    images = task.example_input(IMAGES)
    plan = plan_pruning(dense, images[:2])
    dropped = tuple(removable_blocks(dense, images[:2])[::2])
    kept = {group.name: _some(group) for group in plan.alive(dropped)}
    pruned = prune(dense, plan, Recipe(tuple(sorted(dropped)), kept))
    # Of untrained batch norms the outputs would be all but zero, and any difference small.
    recalibrate_batch_norm(pruned, task, generator=torch.Generator().manual_seed(0), num_images=64)
    channels = sum(group.num_channels for group in plan.alive(dropped))
    left = sum(map(len, kept.values()))
    return Cut(name, dense, pruned.eval(), dropped, (channels, left), images)


def write_cut(cut: Cut, folder: Path) -> tuple[Unproven, dict[str, str]]:
    """Writes all forms; what is to be proven, and why a form could not be written."""
    atomic_write_bytes(folder / WEIGHTS, save(copy_state(cut.pruned)))
    recipe = {
        "format": FORMAT,
        "model": {"name": cut.name, "kwargs": {}, "num_classes": NUM_CLASSES},
        "dropped_blocks": list(cut.dropped),
        "attributes": changed_attributes(cut.dense, cut.pruned),
    }
    write_json(folder / RECIPE, recipe)
    try:
        write_forms(cut.pruned, FORMATS, folder, cut.images)
    except ExportError as error:
        return Unproven(folder, ("safetensors",), cut.pruned, cut.images), {
            name: str(error) for name in FORMATS if name != "safetensors"
        }
    return Unproven(folder, FORMATS, cut.pruned, cut.images), {}


def export_table(result: Mapping[str, Any]) -> Table:
    """`bench_export` for people."""
    table = Table(title=f"Exports, pruned: {_how(result)}")
    for index, column in enumerate(_COLUMNS):
        table.add_column(column, justify="right" if index else "left")
    for row in result["rows"]:
        table.add_row(*_cells(row))
    return table


def export_markdown(result: Mapping[str, Any]) -> str:
    """`bench_export` as a report."""
    libraries = result["environment"]["libraries"]
    versions = ", ".join(f"{name} {v}" for name, v in libraries.items() if v)
    runtimes = sorted({f["runtime"] for row in result["rows"] for f in _proofs(row).values()})
    lines = [
        "# Exports of pruned architectures",
        "",
        f"`prune-search bench export`: {_how(result)}. Each model lost 30 % of the channels of "
        "each group and every second removable block; its images are digits. Every file was "
        f"loaded in a fresh process and compared with the pruned model on {result['images']} "
        "images, one alone and the others together. Difference: the largest, of the largest "
        "output. Eager: beside ONNX Runtime, in turns.",
        "",
        f"The machine's load average before was {result['load_before']:.1f}. {versions}; "
        f"{', '.join(runtimes)}.",
        "",
        markdown_row(_COLUMNS),
        markdown_row(["---"] * len(_COLUMNS)),
        *(markdown_row(_cells(row)) for row in result["rows"]),
    ]
    for row in result["rows"]:
        reasons = {name: form for name, form in row["forms"].items() if isinstance(form, str)}
        lines += [f"\n{row['model']}, {name}: {reason}" for name, reason in reasons.items()]
    return "\n".join(lines) + "\n"


_COLUMNS = [
    "model", "px", "params M", "blocks dropped", "channels", "MiB safetensors", "MiB pt2",
    "MiB onnx", "difference pt2", "difference onnx", "eager ms", "pt2 ms", "onnx ms",
]  # fmt: skip


def _cells(row: Mapping[str, Any]) -> list[str]:
    forms = _proofs(row)
    onnx, pt2 = forms.get("onnx"), forms.get("pt2")
    apart = [f"{f['difference'] / f['largest_output']:.0e}" if f else "no" for f in (pt2, onnx)]
    beside = (onnx or pt2 or {}).get("eager_ms")
    return [
        row["model"],
        str(row["pixels"]),
        f"{row['dense_params'] / 1e6:.2f} -> {row['params'] / 1e6:.2f}",
        str(row["dropped_blocks"]),
        f"{row['channels']} -> {row['channels_left']}",
        *(
            f"{forms[name]['num_bytes'] / 2**20:.2f}" if name in forms else "no"
            for name in FORMATS
        ),
        *apart,
        "" if beside is None else f"{beside:.2f}",
        *(f"{form['latency_ms']:.2f}" if form else "no" for form in (pt2, onnx)),
    ]


def _proofs(row: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {name: form for name, form in row["forms"].items() if not isinstance(form, str)}


def _how(result: Mapping[str, Any]) -> str:
    return (
        f"{result['environment']['cpu']}, {result['threads']} thread(s), batch size 1, "
        f"{result['runs']} runs, median"
    )


def _row(cut: Cut) -> dict[str, Any]:
    return {
        "model": cut.name,
        "pixels": cut.images.shape[-1],
        "dense_params": count_params(cut.dense),
        "params": count_params(cut.pruned),
        "dropped_blocks": len(cut.dropped),
        "channels": cut.channels[0],
        "channels_left": cut.channels[1],
    }


def _plain(outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    return {
        name: dataclasses.asdict(one) if isinstance(one, Proof) else one
        for name, one in outcomes.items()
    }


def _some(group: ChannelGroup) -> tuple[int, ...]:
    """70 % of a group's channels, drawn; the same ones in each of its parts."""
    size = group.num_channels // group.parts
    chosen = torch.randperm(size)[: max(1, round(KEEP * size))].sort().values.tolist()
    return tuple(part * size + index for part in range(group.parts) for index in chosen)
