"""A run folder with invented figures: real space, real candidates, real store, no training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...methods.groups import plan_pruning
from ...methods.layer_costs import LayerCosts
from ...methods.models.build import build_model
from ...methods.surgery import inside, layer_widths
from ..config import SearchConfig, dump_config, parse_config
from ..dense import Baseline
from ..environment import environment
from ..front import front_of
from ..records import Candidate, TrialResult, TrialStatus, with_provenance
from ..rows import trial_id
from ..runs import CONFIG, ENVIRONMENT, TIMES
from ..seeds import default_seeds
from ..space import Space
from ..store import BLOCKS, Store, atomic_write_bytes, write_json
from ..surrogate.variation import Variation

COMPACT_EVERY = 256
ORDER = ("layer1.1", "layer2.1", "layer3.1", "layer3.2", "layer2.2", "layer1.2")
START = 1.7e9  # seconds since the epoch
DENSE_ACCURACY, DENSE_MS = 0.9213, 0.925
FAILURES = (
    "out of memory: DefaultCPUAllocator: can't allocate memory. Lower data.batch_size.",
    "took longer than `resources.trial_timeout_s` (=30)",
    "FloatingPointError: the validation loss is nan (_report, line 262)",
)


@dataclass(frozen=True)
class _World:
    """What the invented figures depend on."""

    space: Space
    costs: LayerCosts
    dense: Mapping[str, int]
    macs: int
    num_params: int
    rng: np.random.Generator


def synthetic_run(folder: Path, trials: int, seed: int = 0) -> Path:
    """Writes a finished run of ResNet-20 with `trials` invented trials; returns its folder.

    Statuses of all kinds, controls, two named devices, a ladder with rungs.
    """
    config = _config(trials)
    model = build_model("resnet20", num_classes=10)
    example = torch.zeros(2, 3, 32, 32)
    plan = plan_pruning(model, example)
    drops = tuple(ORDER[:n] for n in range(len(ORDER) + 1))
    costs = LayerCosts(model, plan, example)
    num_params = sum(p.numel() for p in model.parameters())
    world = _World(
        Space(config.space, plan, drops), costs, layer_widths(model), costs.macs({}), num_params,
        np.random.default_rng(seed),
    )  # fmt: skip
    _describe(folder, config, world, drops)
    store = Store(folder)
    rows = []
    for row in _rows(config, world):
        rows.append(row)
        store.write_trial(row)
        if len(rows) % COMPACT_EVERY == 0:
            store.compact(new_only=True)
    front = front_of(rows, config.objectives)
    store.compact({member.trial_id for member in front})
    store.write_front(front)
    return folder


def _config(trials: int) -> SearchConfig:
    return parse_config(
        {
            "name": f"synthetic-{trials}",
            "model": {"name": "resnet20"},
            "data": {"name": "fashion_mnist"},
            "space": {
                "criteria": ["magnitude_l1", "fgp", "taylor", "random"],
                "blocks": {"mode": "mask", "order": "oneshot", "max_drop": 1.0},
                "keep": {"per": "stage", "low": 0.2, "high": 1.0},
                "select": ["ratio", "global"],
            },
            "recover": {"epochs": 1.0},
            "objectives": {"accuracy": "maximize", "latency_ms": "minimize"},
            "constraints": ["accuracy_drop <= 0.5"],
            "search": {"trials": trials, "early_stop": False},  # so that no trial waits
            "probes": {"edge": {"threads": 4}},
        }
    )


def _describe(
    folder: Path, config: SearchConfig, world: _World, drops: tuple[tuple[str, ...], ...]
) -> None:
    here = environment()
    probe = {key: here[key] for key in ("host", "cpu", "cores", "torch", "device")}
    probe |= {"batch_size": 1, "threads": 1, "runs": 200}
    atomic_write_bytes(folder / CONFIG, dump_config(config).encode())
    write_json(folder / ENVIRONMENT, here)
    write_json(folder / BLOCKS, {"drops": drops})
    write_json(folder / TIMES, {"load_s": 9.7, "dense_s": 41.2, "blocks_s": 2.0, "trials_s": 3e3})
    Baseline(
        DENSE_ACCURACY, 0.31, world.macs, world.num_params, 1.13, "invented", 30, 41.0,
        latency_ms=DENSE_MS, probe=probe,
        latency_by_probe={"edge": {"latency_ms": 4 * DENSE_MS, "probe": probe | {"threads": 4}}},
        widths=world.dense,
    ).write(folder)  # fmt: skip


def _rows(config: SearchConfig, world: _World) -> Iterator[TrialResult]:
    seeds = default_seeds(world.space, config)
    variation = Variation(world.space, world.rng)
    for number in range(config.search.trials):
        if number < min(len(seeds), config.search.trials // 5):
            origin, params = seeds[number].origin, seeds[number].params
        else:
            origin, params = "surrogate", variation.random()
        yield _row(number, origin, params, world)


def _row(number: int, origin: str, params: Mapping[str, Any], world: _World) -> TrialResult:
    rng, candidate = world.rng, world.space.candidate(params)
    provenance = {"origin": origin, "params": dict(params), "sampler_attrs": {}}
    began = START + 3.0 * number
    row = TrialResult(
        trial_id(number),
        TrialStatus.COMPLETED,
        criterion=candidate.criterion,
        candidate=with_provenance(candidate, provenance),
        dropped_blocks=list(candidate.dropped_blocks),
        fidelity=2,
        epochs=1.0,
        seed=number,
        host=("alpha", "beta")[number % 2],
        device="cpu",
        started_at=began,
        finished_at=began + 2.0 + 2.0 * float(rng.random()),
        score_s=0.1 + 0.1 * float(rng.random()),
        prune_s=0.02,
    )
    luck = float(rng.random())
    if luck < 0.02 and number:
        row.status, row.message = TrialStatus.FAILED, FAILURES[int(rng.integers(len(FAILURES)))]
        return row
    _measure(row, candidate, world)
    if luck < 0.06 and origin == "surrogate":
        row.status, row.message = TrialStatus.DUPLICATE, f"same as {trial_id(0)} (completed)"
        row.score_s = row.prune_s = row.finetune_s = row.measure_s = row.wait_s = 0.0
    elif luck < 0.4 and origin == "surrogate":
        _stop(row, 0 if luck < 0.3 else 1)
    elif row.accuracy_drop is not None and row.accuracy_drop > 0.5:
        row.status = TrialStatus.INFEASIBLE
        row.message = f"violates accuracy_drop <= 0.5 by {row.accuracy_drop - 0.5:.4g}"
    return row


def _measure(row: TrialResult, candidate: Candidate, world: _World) -> None:
    """More is kept, more accurate and slower; scores by chance are worse."""
    rng, plan = world.rng, world.space.plan
    uniform = candidate.k if candidate.k is not None else 1.0
    keep = dict(candidate.keep) or {group.name: uniform for group in plan.groups}
    dropped = candidate.dropped_blocks
    row.widths = {name: n for name, n in world.dense.items() if not inside(name, dropped)}
    for group in plan.groups:
        for layer in set(group.layers) & row.widths.keys():
            row.widths[layer] = max(1, round(keep.get(group.name, 1.0) * world.dense[layer]))
    row.macs, row.num_params = (
        count(keep, dropped) for count in (world.costs.macs, world.costs.num_params)
    )
    left = row.macs / world.macs
    damage = 0.3 * (1 - left) ** 3 + 0.01 * len(dropped) ** 1.5
    damage += 0.05 * (1 - left) * (candidate.criterion == "random")
    final = DENSE_ACCURACY - damage + 0.01 * float(rng.normal())
    row.accuracy = min(0.99, max(0.1, final))
    row.accuracy_drop = DENSE_ACCURACY - row.accuracy
    row.loss = 1.2 * (1 - row.accuracy) + 0.2
    short = max(0.1, row.accuracy - 0.05 - 0.02 * float(rng.random()))
    row.accuracy_before_finetune = max(0.1, short - 0.3 * (1 - left) * float(rng.random()))
    row.accuracy_by_fidelity = [row.accuracy_before_finetune, short, row.accuracy]
    noise = 1 + 0.03 * float(rng.normal())
    row.latency_ms = DENSE_MS * (0.15 + 0.85 * left**0.6) * (1 - 0.05 * len(dropped)) * noise
    row.latency_ms_p10, row.latency_ms_p90 = 0.97 * row.latency_ms, 1.06 * row.latency_ms
    row.speedup = DENSE_MS / row.latency_ms
    row.latency_ms_by_probe = {"edge": 4 * row.latency_ms * (1 + 0.05 * float(rng.normal()))}
    row.speedup_by_probe = {"edge": 4 * DENSE_MS / row.latency_ms_by_probe["edge"]}
    row.peak_memory_mib = 1.13 * left**0.8
    row.finetune_s, row.measure_s, row.wait_s = 1.2, 0.4, 0.1 * float(rng.random())


def _stop(row: TrialResult, rung: int) -> None:
    row.status, row.fidelity, row.epochs = TrialStatus.EARLY_STOPPED, rung, 0.25 * rung
    row.accuracy_by_fidelity = row.accuracy_by_fidelity[: rung + 1]
    row.accuracy = row.accuracy_by_fidelity[rung]
    row.accuracy_drop = DENSE_ACCURACY - (row.accuracy or 0.0)
    row.finetune_s = 0.2 + 0.3 * rung
