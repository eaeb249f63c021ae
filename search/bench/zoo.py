"""`prune-search bench zoo`: what can be removed from many architectures, each one proven."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from rich.table import Table

from ...methods.names import unknown_name
from ..environment import environment
from ..store import atomic_write_bytes
from .common import markdown_row

CHECKS = {
    "finite": "the pruned model's outputs are not finite",
    "same_shape": "the pruned model's outputs have another shape",
    "masked_equal": "the pruned model is not the masked dense one",
    "replay_equal": "the replayed recipe gives other outputs",
    "reload_equal": "the reloaded export gives other outputs",
}


@dataclass(frozen=True)
class Case:
    """A model, and the smallest image that it works on.

    Attributes:
        name: What `build_model` takes.
        image_size: Height and width in pixels.
        kwargs: Arguments of the model.
    """

    name: str
    image_size: int
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def _cases(source: str, sizes: Mapping[int, str]) -> list[Case]:
    names = [(name, size) for size, text in sizes.items() for name in text.split()]
    return [Case(f"{source}{name}", size) for name, size in names]


CASES: tuple[Case, ...] = (
    *_cases(
        "",
        {
            32: "resnet20 resnet56 resnet110 resnet50_cifar vgg16_cifar segnet",
            64: "deeplabv3_cityscapes yolov5n yolov5m yolov8n",
            128: "fasterrcnn_resnet18_fpn fasterrcnn_convnext_tiny_fpn retinanet_resnet18_fpn",
            320: "ssdlite_mobilenet_v3",
        },
    ),
    *_cases(
        "torchvision:",
        {
            64: "alexnet vgg16_bn resnet18 resnet50 wide_resnet50_2 resnext50_32x4d mobilenet_v2 "
            "mobilenet_v3_small mobilenet_v3_large efficientnet_b0 efficientnet_v2_s "
            "regnet_x_400mf regnet_y_400mf mnasnet1_0 densenet121 googlenet squeezenet1_1 "
            "shufflenet_v2_x0_5 shufflenet_v2_x1_0 convnext_tiny swin_t swin_v2_t "
            "fcn_resnet50 deeplabv3_resnet50 lraspp_mobilenet_v3_large",
            96: "inception_v3",
        },
    ),
    Case("torchvision:vit_b_16", 32, {"image_size": 32}),
    Case("torchvision:maxvit_t", 224),
    *(
        Case(f"torchvision:{name}", 128, {"min_size": 128, "max_size": 128})
        for name in (
            "fasterrcnn_resnet50_fpn",
            "fasterrcnn_mobilenet_v3_large_320_fpn",
            "maskrcnn_resnet50_fpn",
            "keypointrcnn_resnet50_fpn",
            "retinanet_resnet50_fpn",
            "fcos_resnet50_fpn",
        )
    ),
    *_cases("torchvision:", {320: "ssdlite320_mobilenet_v3_large", 300: "ssd300_vgg16"}),
    *_cases(
        "timm:",
        {
            64: "resnet26d seresnet50 res2net50_26w_4s ghostnet_100 repvgg_a0 lcnet_050 "
            "rexnet_100 mobilenetv4_conv_small tf_efficientnetv2_b0 convnextv2_atto cspresnet50 "
            "cspdarknet53 dla34 dpn68 hrnet_w18_small selecsls42b ese_vovnet19b_dw "
            "xception41 poolformer_s12 edgenext_xx_small mobilevit_xxs regnety_002",
        },
    ),
    *(
        Case(f"timm:{name}", 32, {"img_size": 32, "patch_size": 8})
        for name in ("vit_tiny_patch16_224", "deit_tiny_patch16_224")
    ),
    Case("timm:mixer_b16_224", 32, {"img_size": 32}),
    Case("timm:swin_tiny_patch4_window7_224", 56, {"img_size": 56}),
)


def bench_zoo(
    out: Path,
    say: Callable[[str], None],
    *,
    models: Sequence[str] | None = None,
    timeout_s: float = 300.0,
    memory_gib: float = 8.0,
) -> dict[str, Any]:
    """Prunes each architecture in a process of its own; a crash is a row.

    Rows of `OUT.parquet` whose models are not asked for stay, so that the table can be made in
    portions.

    Args:
        out: `OUT.parquet` and `OUT.md` are written.
        say: Told each row as it comes.
        models: Names of cases; all by default.
        timeout_s: Of each model.
        memory_gib: Of each model.

    Returns:
        All rows and the hardware.

    Raises:
        ValueError: If a name is unknown.
    """
    known = {case.name: case for case in CASES}
    for name in models or ():
        if name not in known:
            raise ValueError(unknown_name("--models", name, known))
    path = out.with_suffix(".parquet")
    rows = _stored(path)
    for name in models or known:
        rows[name] = _run(known[name], timeout_s, memory_gib)
        say(_line(rows[name]))
        ordered = [rows[name] for name in known if name in rows]
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(path, pd.DataFrame(ordered).to_parquet())
    result = {"rows": [rows[n] for n in known if n in rows], "environment": environment()}
    atomic_write_bytes(out.with_suffix(".md"), zoo_markdown(result).encode())
    return result


def zoo_table(result: Mapping[str, Any]) -> Table:
    """`bench_zoo` for people."""
    table = Table(title=_title(result))
    for column in _COLUMNS:
        table.add_column(column)
    for row in result["rows"]:
        table.add_row(*_cells(row))
    return table


def zoo_markdown(result: Mapping[str, Any]) -> str:
    """`bench_zoo` as a page."""
    hardware = result["environment"]
    lines = [
        f"# {_title(result)}",
        "",
        "Made by `prune-search bench zoo`. Of each model 25 % of its removable blocks and 30 % of "
        "the channels of every group are removed, at random, with random weights. Then: the "
        "outputs are finite and have the dense shape; they equal those of the dense model with "
        "the removed channels masked (largest difference as a fraction of the largest output, at "
        "most 1e-3); the recipe, through JSON, on a newly built and newly traced model gives the "
        "same outputs to the last bit; so does the export after it is loaded. Detectors are "
        "compared before boxes are chosen, and then run to the end. "
        f"Hardware: {hardware['cpu']}, one thread, a busy machine: seconds are not a measurement "
        "of speed.",
        "",
        markdown_row(_COLUMNS),
        markdown_row(["---"] * len(_COLUMNS)),
        *(markdown_row(_cells(row)) for row in result["rows"]),
        "",
        "`keep` is the share of channels that stayed, of those in groups; 0.7 was asked for, and "
        "whole columns of grouped layers round it. `layers left` counts the layers whose output "
        "channels are left alone; the reasons are in the Parquet file (`left_alone_why`).",
    ]
    failed = [row for row in result["rows"] if row["reason"]]
    if failed:
        lines += ["", "## Failures", "", *(f"- {r['model']}: {r['reason']}" for r in failed)]
    return "\n".join(lines) + "\n"


_COLUMNS = (
    *("model", "px", "blocks", "groups", "layers left", "keep", "M MACs", "pruned"),
    *("difference", "replay", "reload", "s", "result"),
)


def _title(result: Mapping[str, Any]) -> str:
    rows = result["rows"]
    passed = sum(not row["reason"] for row in rows)
    return f"Zoo: {passed} of {len(rows)} architectures pass"


def _cells(row: Mapping[str, Any]) -> list[str]:
    def shown(key: str, form: str, factor: float = 1.0) -> str:
        value = row.get(key)
        return "" if value is None or value != value else format(value * factor, form)

    yes = {True: "equal", False: "NO"}
    blocks = f"{shown('blocks_dropped', '.0f')} of {shown('blocks', '.0f')}"
    return [
        row["model"],
        shown("image_size", ".0f"),
        blocks if shown("blocks", ".0f") else "",
        shown("groups", ".0f"),
        shown("left_alone", ".0f"),
        shown("keep", ".3f"),
        shown("macs", ",.1f", 1e-6),
        shown("macs_pruned", ",.1f", 1e-6),
        shown("difference", ".0e"),
        yes.get(row.get("replay_equal"), ""),  # type: ignore[arg-type]
        yes.get(row.get("reload_equal"), ""),  # type: ignore[arg-type]
        shown("seconds", ".1f"),
        "FAIL" if row["reason"] else "pass",
    ]


def _line(row: Mapping[str, Any]) -> str:
    verdict = f"FAIL: {row['reason']}" if row["reason"] else "pass"
    return f"{row['model']}: {verdict}"


def _stored(path: Path) -> dict[str, dict[str, Any]]:
    """Rows by model; absent values are None again."""
    if not path.exists():
        return {}
    frame = pd.read_parquet(path).astype(object)
    records = frame.where(frame.notna(), None).to_dict("records")
    return {str(row["model"]): {str(k): v for k, v in row.items()} for row in records}


def _run(case: Case, timeout_s: float, memory_gib: float) -> dict[str, Any]:
    """The row of one model; `reason` is empty when everything is right."""
    row: dict[str, Any] = {"model": case.name, "image_size": case.image_size, "reason": ""}
    given = json.dumps(asdict(case) | {"memory_gib": memory_gib})
    try:
        process = subprocess.run(
            [sys.executable, "-m", "prunesearch.search.bench.zoo_case", given],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    except subprocess.TimeoutExpired:
        return row | {"reason": f"took more than {timeout_s:g} s"}
    if process.returncode != 0:
        last = (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        return row | {"reason": last[:300]}
    row |= json.loads(process.stdout.strip().splitlines()[-1])
    return row | {"reason": _verdict(row)}


def _verdict(row: Mapping[str, Any]) -> str:
    """Everything that is wrong; a model of which nothing was removed does not pass."""
    wrong = [text for key, text in CHECKS.items() if not row[key]]
    if row["groups"] == 0 and row["blocks_dropped"] == 0:
        wrong.append("nothing can be removed")
    return "; ".join(wrong)
