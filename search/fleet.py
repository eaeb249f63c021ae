"""The actors of a run: latency probe and keeper from the start, then the trials' workers."""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import cluster  # noqa: F401  # first: it sets Ray's environment

# isort: split
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..methods.layer_latency import LayerLatencies
from .cache import Say, user_shelf
from .config import CacheConfig
from .deaths import Death, Place, cause_of_death, read_tail
from .keeper import Keeper
from .nodes import await_nodes, find_room, place_probes
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
        say: Told what is waited for.

    Raises:
        ConfigError: If the cluster has no room for trials or no node for a probe.
    """

    def __init__(self, problem: Problem, run_dir: Path, say: Say = lambda message: None) -> None:
        self.config = problem.config
        await_nodes(problem.config, say)
        self._problem = problem
        name = f"keeper-{uuid.uuid4().hex}"
        self.keeper = start_keeper(run_dir, problem.config.cache, name)
        data = problem.task.data
        arguments = problem.config, problem.task.num_classes, data.image_shape, problem.plan, name
        self._places = place_probes(problem.config)
        self._probes = [
            ray.remote(LatencyProbe)
            .options(max_restarts=-1, max_task_retries=2, **place.options)
            .remote(*arguments, place.probes)
            for place in self._places
        ]

    def measure_references(self) -> dict[str, tuple[float, dict[str, Any]]]:
        """The dense model's latency in ms and the fingerprint of the device, by probe."""
        found: dict[str, tuple[float, dict[str, Any]]] = {}
        for measured in ray.get([probe.references.remote() for probe in self._probes]):
            found |= measured
        return found

    def measure_layers(self) -> LayerLatencies:
        """The dense model's layers, each measured alone on the default probe."""
        value: LayerLatencies = ray.get(self._probes[0].layers.remote())
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

        problem = self._problem
        references = coordinator.baseline.references
        state = {k: v.detach().cpu().numpy() for k, v in problem.model.state_dict().items()}
        parts = {
            "config": self.config,
            "images": ray.put(pack_images(problem.task.data)),
            "state": ray.put(state),
            "plan": problem.plan,
            "data_digest": problem.data_digest,
            "baseline_accuracy": coordinator.baseline.accuracy,
            "probes": [
                (probe, {name: references[name] for name in place.probes})
                for probe, place in zip(self._probes, self._places, strict=True)
            ],
            "keeper": self.keeper,
        }
        trainable = tune.with_parameters(Worker, parts=parts)
        room = functools.partial(find_room, self.config, self._places)
        run_trials(coordinator, trainable, room, tick, self._inquest)

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
