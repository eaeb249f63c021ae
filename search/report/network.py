"""The dense network as a report draws it: its layers in order, their widths, their blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..records import TrialResult
from ..store import BLOCKS, FIXED, read_as


@dataclass(frozen=True)
class _Space:
    removable_blocks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Fixed:
    """What a report needs of `fixed.json`."""

    space: _Space = field(default_factory=_Space)


@dataclass(frozen=True)
class _Ranked:
    """What it needs of `blocks.json`."""

    drops: list[list[str]] = field(default_factory=list)


def network_of(
    folder: Path, baseline: Mapping[str, Any], results: Sequence[TrialResult]
) -> dict[str, Any]:
    """The layers and removable blocks of a run's dense model.

    Args:
        folder: The run folder.
        baseline: The dense model's metrics; without its widths (runs of earlier versions, and
            before it was measured) the largest of any trial stand in.
        results: The trials.

    Returns:
        `layers`: a list of `name`, `dense` (output channels, or None where nothing tells them)
        and `group` (the removable block that it lies in, else its parent module). `blocks`: the
        removable blocks in forward order. `exact`: whether the dense widths are known.
    """
    known = baseline.get("widths") or {}
    widths = dict(known) or _largest(results)
    blocks = _blocks(folder, results)
    layers = [
        {"name": name, "dense": width, "group": _group(name, blocks)}
        for name, width in widths.items()
    ]
    found = {layer["group"] for layer in layers}
    layers += [{"name": b, "dense": None, "group": b} for b in blocks if b not in found]
    order = {layer["group"]: place for place, layer in reversed(list(enumerate(layers)))}
    return {
        "layers": layers,
        "blocks": sorted(blocks, key=lambda block: order[block]),
        "exact": bool(known),
    }


def _largest(results: Iterable[TrialResult]) -> dict[str, int]:
    """Every layer of any trial with its largest width, each behind the one before it."""
    order: list[str] = []
    widths: dict[str, int] = {}
    for result in sorted(results, key=lambda r: -len(r.widths)):
        before, complete = -1, result.widths.keys() <= widths.keys()
        for name, width in result.widths.items():
            if not complete:
                if name not in widths:
                    order.insert(before + 1, name)
                before = order.index(name)
            widths[name] = max(width, widths.get(name, 0))
    return {name: widths[name] for name in order}


def _blocks(folder: Path, results: Iterable[TrialResult]) -> list[str]:
    """The removable blocks: as the run began with them, and whatever a trial dropped."""
    stored: list[str] = []
    if (folder / FIXED).exists():
        stored = read_as(folder / FIXED, _Fixed).space.removable_blocks
    elif (folder / BLOCKS).exists():
        stored = [name for names in read_as(folder / BLOCKS, _Ranked).drops[-1:] for name in names]
    dropped = sorted({name for result in results for name in result.dropped_blocks})
    return list(dict.fromkeys([*stored, *dropped]))


def _group(layer: str, blocks: Sequence[str]) -> str:
    inside = [block for block in blocks if layer == block or layer.startswith(f"{block}.")]
    return max(inside, key=len) if inside else layer.rpartition(".")[0]
