"""What a reader of a report's figures should know, in sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from ..config import SearchConfig
from ..metrics import split

FEW = 20  # trials


def notes_of(config: SearchConfig, data: Mapping[str, Any]) -> list[str]:
    """Plain sentences on where the figures come from and how far they carry.

    Args:
        config: The run's.
        data: `report_data` without its notes.
    """
    return [*_accuracy(data), *_latency(config, data), *_controls(data), *_rest(config, data)]


def _accuracy(data: Mapping[str, Any]) -> Iterator[str]:
    yield (
        "Accuracy and loss are those of the validation split, by which the search also chose: "
        "expect a member to be a little worse on images that nobody chose by. The test split is "
        "used once, by `prune-search export`."
    )
    if data["trials"]["count"] < FEW:
        yield (
            f"There are {data['trials']['count']} trials: too few to conclude much from the "
            "shape of the front."
        )


def _latency(config: SearchConfig, data: Mapping[str, Any]) -> Iterator[str]:
    for name, probe in data["environment"]["probes"].items():
        what = f"Latency at the probe {name}" if name else "Latency"
        device = probe.get("gpu") or probe.get("cpu") or "an unknown device"
        yield (
            f"{what} was measured on {probe.get('host', 'an unknown machine')} ({device}, device "
            f"{probe.get('device')}, batch size {probe.get('batch_size')}, "
            f"{probe.get('threads')} CPU threads, {probe.get('runs')} runs), in turns with the "
            "dense model: the speedup is the median of paired ratios, and the latency is the "
            "dense model's divided by it. Another machine, batch size or runtime gives others."
        )
    timed = any(split(metric)[0] in ("latency_ms", "speedup") for metric in config.objectives)
    if timed and not data["environment"]["probes"]:
        yield "The dense model's latency has not been measured yet."


def _controls(data: Mapping[str, Any]) -> Iterator[str]:
    kinds = data["trials"]["text"]["kind"]
    counts = Counter(kinds["values"][code] for code in kinds["codes"])
    random, uniform = counts["random"], counts["uniform"]
    if random or uniform:
        yield (
            f"Controls among the trials: {uniform} with uniform pruning, {random} with random "
            "channels. They share the search's budget; `prune-search bench controls` gives them "
            "one of their own."
        )
    elif data["trials"]["count"]:
        yield (
            "No trial is a control (uniform pruning or random channels): add `random` to "
            "space.criteria, or run `prune-search bench controls`."
        )


def _rest(config: SearchConfig, data: Mapping[str, Any]) -> Iterator[str]:
    if data["hypervolume"] is not None:
        yield (
            "Seconds are wall clock since the first trial began; the pauses of a run that was "
            "interrupted and resumed are in them."
        )
    if data["network"]["layers"] and not data["network"]["exact"]:
        yield (
            "The dense widths were not stored: the largest width of any trial stands in for "
            "each layer's."
        )
    if data["state"]["name"] == "running":
        yield f"The run was going on when this was made ({data['made_at']})."
    if data["state"]["name"] == "stopped":
        waiting = data["state"]["waiting"]
        yield (
            f"{data['state']['finished']} of {config.search.trials} trials have ended"
            f"{f' and {waiting} wait to go on' if waiting else ''}. `prune-search resume` goes on."
        )
