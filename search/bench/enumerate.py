"""Every candidate of a discrete space, measured once: the exact front that a search is held to."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ...methods.finetune import recalibrate_batch_norm
from ...methods.measure import count_macs, count_params
from ...methods.surgery import prune
from ..config import ConfigError, SearchConfig, parse_config
from ..context import TrialContext
from ..dense import prepare_dense
from ..environment import environment
from ..progress import Progress
from ..prune import make_recipe
from ..records import Candidate
from ..setup import (
    Problem,
    find_groups,
    find_removable,
    load_state,
    make_model,
    make_space,
    make_task,
    pack_images,
    pose,
    trial_device,
    unpack_images,
)
from ..space import Space
from ..store import atomic_write_bytes, read_json

MOST = 20_000  # candidates that one enumeration may have
CHUNK = 64
LINE_EVERY_S = 30.0
SCHEMA = pa.schema(
    [
        pa.field("candidate", pa.string(), nullable=False),
        pa.field("accuracy", pa.float64(), nullable=False),
        pa.field("loss", pa.float64(), nullable=False),
        pa.field("macs", pa.int64(), nullable=False),
        pa.field("num_params", pa.int64(), nullable=False),
    ]
)
_FACTS = b"prune_search.enumeration"


class Enumeration:
    """The measured table of a space: candidate -> accuracy, loss, MACs and parameters.

    Attributes:
        rows: By `Candidate.key`.
        facts: The dense model's metrics, the ranked path of the blocks, hardware, seconds.
    """

    def __init__(self, path: Path) -> None:
        table = pq.read_table(path)
        self.facts: dict[str, Any] = json.loads(table.schema.metadata[_FACTS])
        self.rows: dict[str, dict[str, Any]] = {}
        for row in table.to_pylist():
            key = Candidate.from_mapping(json.loads(row.pop("candidate"))).key
            self.rows[key] = row

    def space(self, config: SearchConfig) -> Space:
        """The enumerated space, without measuring anything."""
        model = make_model(config, len(self.facts["classes"]), trained=False)
        example = torch.zeros(2, *self.facts["image_shape"])
        # In forward order, the last first: a ranking would be measured, and cost evaluations.
        order = sorted(self.facts["drops"][-1], reverse=True)
        drops = tuple(tuple(order[:count]) for count in range(len(order) + 1))
        return Space(config.space, find_groups(config, model, example), drops)


def enumerate_space(
    config: SearchConfig, path: Path, progress: Progress, address: str | None = None
) -> Enumeration:
    """Measures every candidate on Ray and stores the table; reads it where it is stored.

    Accuracy and loss are on the validation split, after batch-norm recalibration and without
    fine-tuning. Every candidate is recalibrated on the same images.

    Args:
        config: Its space has discrete dimensions only, and its recovery no fine-tuning.
        path: The Parquet file.
        progress: Where to report.
        address: A Ray cluster; None starts a local Ray.

    Raises:
        ConfigError: If the space is continuous or too large.
    """
    from ..cluster import Result, connect, fan_out, share

    unknown = ", ".join(sorted(set(config.objectives) - set(SCHEMA.names)))
    if unknown:
        raise ConfigError(
            f"`objectives` (={unknown}) must be of {', '.join(SCHEMA.names[1:])}: nothing else is "
            "measured of every candidate. Use macs."
        )
    if path.exists():
        exact = Enumeration(path)
        if _stored_config(exact.facts["config"]) != _config(config):
            raise ConfigError(
                f"`--out` (={path}) must hold the enumeration of this config: it is of another "
                "one. Choose another --out."
            )
        return exact
    if config.recover.epochs > 0:
        raise ConfigError(
            f"`recover.epochs` (={config.recover.epochs:g}) must be 0: an enumeration scores "
            "every candidate after batch-norm recalibration alone. Set it to 0."
        )
    start = time.perf_counter()
    problem, folder = pose(config), path.with_suffix("")
    baseline = prepare_dense(problem, folder, progress.say)
    space = make_space(problem, folder, progress.say)
    candidates = list({space.candidate(params): None for params in space.every()})
    if len(candidates) > MOST:
        raise ConfigError(
            f"`space` (={len(candidates)} candidates) must have at most {MOST} to be "
            "enumerated. Use fewer criteria or a larger space.keep.step."
        )
    progress.say(f"enumerating {len(candidates)} candidates")
    state = {k: v.detach().cpu().numpy() for k, v in problem.model.state_dict().items()}
    chunks = [candidates[i : i + CHUNK] for i in range(0, len(candidates), CHUNK)]
    shared = {"images": pack_images(problem.task.data), "state": state}
    jobs: dict[str, Any] = {"shared": (share, (shared,))}
    for index, chunk in enumerate(chunks):
        texts = [candidate.to_json() for candidate in chunk]
        jobs[f"{index:05d}"] = (_measure, (config, Result("shared"), texts))
    rows: list[dict[str, Any]] = []
    said = time.monotonic()
    with connect(address):
        for name, value in fan_out(jobs, resources=config.resources):
            if isinstance(value, Exception):
                raise value
            if name == "shared":
                continue
            rows += value
            if time.monotonic() - said > LINE_EVERY_S:
                said = time.monotonic()
                left = (time.perf_counter() - start) / len(rows) * (len(candidates) - len(rows))
                progress.say(f"  {len(rows)}/{len(candidates)}, about {left / 60:.0f} min left")
    facts = {
        "config": _config(config),
        "baseline": {"accuracy": baseline.accuracy, "loss": baseline.loss}
        | {"macs": baseline.macs, "num_params": baseline.num_params},
        "drops": read_json(folder / "blocks.json")["drops"],
        "classes": list(problem.task.data.classes),
        "image_shape": list(problem.task.example_input(1).shape[1:]),
        "num_val": len(problem.task.data.val),
        "num_train": problem.task.num_train,
        "seconds": time.perf_counter() - start,
        "environment": environment(),
    }
    _write(sorted(rows, key=lambda row: str(row["candidate"])), facts, path)
    return Enumeration(path)


def _config(config: SearchConfig) -> dict[str, Any]:
    """What the table depends on."""
    others = {
        "name",
        "search",
        "objectives",
        "constraints",
        "resources",
        "latency",
        "cache",
        "ablate",
    }
    return config.model_dump(mode="json", exclude=others) | {"seed": config.search.seed}


def _stored_config(facts: Mapping[str, Any]) -> dict[str, Any]:
    """`_config` of a table that may be older than some keys; they have their defaults."""
    settings = {key: value for key, value in facts.items() if key != "seed"}
    return _config(parse_config(settings | {"search": {"seed": facts["seed"]}}))


def _write(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], path: Path) -> None:
    table = pa.Table.from_pylist(list(rows), schema=SCHEMA)
    table = table.replace_schema_metadata({_FACTS: json.dumps(facts).encode()})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    atomic_write_bytes(path, sink.getvalue().to_pybytes())


def _measure(
    config: SearchConfig, shared: Mapping[str, Any], texts: Sequence[str]
) -> list[dict[str, Any]]:
    """On a worker: the rows of some candidates."""
    context = _context(config, shared)
    return [_row(Candidate.from_mapping(json.loads(text)), text, context) for text in texts]


_CONTEXTS: dict[str, TrialContext] = {}  # one a worker process: scores are computed once


def _context(config: SearchConfig, shared: Mapping[str, Any]) -> TrialContext:
    name = config.model_dump_json()
    if name not in _CONTEXTS:
        device = trial_device(config)
        task = make_task(config, unpack_images(shared["images"]), device)
        model = make_model(config, task.num_classes, trained=False).to(device).eval()
        state: Mapping[str, np.ndarray[Any, Any]] = shared["state"]
        load_state(model, state)
        example = task.example_input(2)
        plan = find_groups(config, model, example)
        problem = Problem(config, task, model, plan, find_removable(config, model, example))
        _CONTEXTS[name] = TrialContext(config, task, problem.model, plan, 0.0, None)
    return _CONTEXTS[name]


def _row(candidate: Candidate, text: str, context: TrialContext) -> dict[str, Any]:
    task, seed = context.task, context.config.search.seed
    recipe, _ = make_recipe(candidate, context, seed)
    model = prune(context.dense, context.plan, recipe)
    generator = torch.Generator().manual_seed(seed)
    images = context.config.recover.recalibration_images
    recalibrate_batch_norm(model, task, generator=generator, num_images=images)
    metrics = task.evaluate(model, "val")
    return {
        "candidate": text,
        "accuracy": metrics["accuracy"],
        "loss": metrics["loss"],
        "macs": count_macs(model, task.example_input(1)),
        "num_params": count_params(model),
    }
