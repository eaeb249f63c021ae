"""The actors of a run: latency probe and keeper from the start, then the trials' workers."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cluster import PROBE  # first: it sets Ray's environment

# isort: split
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..methods.layer_latency import LayerLatencies
from .cache import user_shelf
from .config import CacheConfig, ConfigError, SearchConfig
from .deaths import Death, Place, cause_of_death, read_tail
from .keeper import Keeper
from .probe import LatencyProbe
from .setup import Problem, pack_images

if TYPE_CHECKING:
    from .coordinator import Coordinator

LOG_TIMEOUT_S = 10.0


def start_keeper(run_dir: Path, config: CacheConfig, name: str | None = None) -> Any:
    """The actor, on this node, that writes into `run_dir` and serves what trials share.

    Args:
        run_dir: The run folder.
        config: Whether other runs share it too.
        name: What other actors can find it by.
    """
    user = user_shelf(config)
    arguments = str(run_dir), str(user) if user else None, config.max_gib * 2**30
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "name": name}
    return ray.remote(Keeper).options(scheduling_strategy=here, **options).remote(*arguments)


class Fleet:
    """The actors of one run on the connected Ray; they start while the driver goes on.

    Args:
        problem: What is searched; the weights may still be untrained.
        run_dir: The run folder.
    """

    def __init__(self, problem: Problem, run_dir: Path) -> None:
        self.config = problem.config
        self._problem = problem
        name = f"keeper-{uuid.uuid4().hex}"
        self.keeper = start_keeper(run_dir, problem.config.cache, name)
        data = problem.task.data
        self.probe = (
            ray.remote(LatencyProbe)
            .options(max_restarts=-1, max_task_retries=2, **_probe_resources(problem.config))
            .remote(problem.config, problem.task.num_classes, data.image_shape, problem.plan, name)
        )

    def measure_reference(self) -> tuple[float, dict[str, Any]]:
        """The dense model's latency in ms on the probe, and the probe's fingerprint."""
        value: tuple[float, dict[str, Any]] = ray.get(self.probe.reference.remote())
        return value

    def measure_layers(self) -> LayerLatencies:
        """The dense model's layers, each measured alone on the probe."""
        value: LayerLatencies = ray.get(self.probe.layers.remote())
        return value

    def run(self, coordinator: Coordinator, tick: Callable[[int], None]) -> None:
        """Runs everything that the coordinator proposes; returns when it is done.

        Args:
            coordinator: Proposes and records.
            tick: Called often with the number of running trials.
        """
        from ray import tune  # seconds to import: the actors start before

        from .driver import run_trials
        from .worker import Worker

        resources = self.config.resources
        slots = min(_slots(self.config), resources.max_concurrent or 2**31)
        problem = self._problem
        state = {k: v.detach().cpu().numpy() for k, v in problem.model.state_dict().items()}
        parts = {
            "config": self.config,
            "images": ray.put(pack_images(problem.task.data)),
            "state": ray.put(state),
            "plan": problem.plan,
            "data_digest": problem.data_digest,
            "baseline_accuracy": coordinator.baseline.accuracy,
            "reference_ms": coordinator.baseline.latency_ms,
            "probe": self.probe,
            "keeper": self.keeper,
        }
        trainable = tune.with_parameters(Worker, parts=parts)
        run_trials(coordinator, trainable, slots, tick, resources, self._inquest)

    def _inquest(self, trial_id: str, error: str) -> Death:
        """How a trial's worker died: by what Ray says, and by the worker's log on its node."""
        place: Place | None = ray.get(self.keeper.place.remote(trial_id))
        log = "" if place is None else _read_log(place)
        return cause_of_death(error, log, limit_s=self.config.resources.trial_timeout_s)


def _read_log(place: Place) -> str:
    """The end of a dead worker's log, wherever it lies; empty where its node is gone too."""
    if place.node_id not in {node["NodeID"] for node in ray.nodes() if node["Alive"]}:
        return ""
    if place.node_id == ray.get_runtime_context().get_node_id():
        return read_tail(place.log)
    there = NodeAffinitySchedulingStrategy(place.node_id, soft=False)
    read = ray.remote(read_tail).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
    try:
        return str(ray.get(read.remote(place.log), timeout=LOG_TIMEOUT_S))
    except ray.exceptions.RayError:
        return ""


# --- resources ----------------------------------------------------------------------------------


def _slots(config: SearchConfig) -> int:
    """How many trials fit on the cluster at once, beside the probe."""
    have = ray.cluster_resources()
    probe = _probe_resources(config)
    fits = [
        (have.get(name, 0) - probe[option]) / need
        for name, option, need in (
            ("CPU", "num_cpus", config.resources.cpu),
            ("GPU", "num_gpus", config.resources.gpu),
        )
        if need > 0
    ]
    slots = int(min(fits) + 1e-9) if fits else 1
    if slots < 1:
        raise ConfigError(
            f"`resources` (cpu={config.resources.cpu}, gpu={config.resources.gpu}) must fit on "
            f"the cluster beside the latency probe: it has {have.get('CPU', 0):g} CPUs and "
            f"{have.get('GPU', 0):g} GPUs. Lower resources.cpu or resources.gpu, or add nodes."
        )
    return slots


def _probe_resources(config: SearchConfig) -> dict[str, Any]:
    """The probe's own node if one is named so; else any node with the device it needs.

    A GPU is the probe's alone where there is one to spare, and shared with trials where not.
    """
    have = ray.cluster_resources()
    gpu = 0.0
    if config.latency.device == "cuda":
        spare = round(have.get("GPU", 0) - config.resources.gpu, 4)
        gpu = 1.0 if spare >= 1 else min(spare, config.resources.gpu)
        if gpu <= 0:
            raise ConfigError(
                f"`latency.device` (={config.latency.device}) must have a share of a GPU: the "
                f"cluster has {have.get('GPU', 0):g} and a trial takes {config.resources.gpu:g}. "
                "Set resources.gpu: 0.5, or latency.device: cpu."
            )
    if PROBE in have:
        return {"num_cpus": 0, "num_gpus": gpu, "resources": {PROBE: 1}}
    return {"num_cpus": 0 if gpu else config.latency.threads, "num_gpus": gpu}
