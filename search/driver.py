"""Runs the trials on Ray Tune: asks the coordinator, fans out, hands results back.

Tune schedules and retries; the coordinator's ledger is the truth, so nothing of Tune's own state
is kept and a resumed search starts a fresh Tuner.
"""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .cluster import PROBE  # first: it sets Ray's environment

# isort: split
import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..methods.layer_latency import LayerLatencies
from .actors import Keeper, LatencyProbe, Worker
from .cache import user_shelf
from .config import CacheConfig, ConfigError, ResourcesConfig, SearchConfig
from .coordinator import Coordinator
from .records import TrialResult
from .setup import Problem, pack_images


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
    """The actors and shared objects of one run on the connected Ray."""

    def __init__(self, problem: Problem, baseline_accuracy: float, run_dir: Path) -> None:
        self.config = problem.config
        state = {k: v.detach().cpu().numpy() for k, v in problem.model.state_dict().items()}
        self._parts = {
            "config": problem.config,
            "images": ray.put(pack_images(problem.task.data)),
            "state": ray.put(state),
            "baseline_accuracy": baseline_accuracy,
            "data_digest": problem.data_digest,
        }
        name = f"keeper-{uuid.uuid4().hex}"
        self.keeper = start_keeper(run_dir, problem.config.cache, name)
        data = problem.task.data
        self.probe = (
            ray.remote(LatencyProbe)
            .options(max_restarts=-1, max_task_retries=2, **_probe_resources(problem.config))
            .remote(problem.config, problem.task.num_classes, data.image_shape, name)
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
        resources = self.config.resources
        slots = min(_slots(self.config), resources.max_concurrent or 2**31)
        parts = self._parts | {
            "reference_ms": coordinator.baseline.latency_ms,
            "probe": self.probe,
            "keeper": self.keeper,
        }
        trainable = tune.with_parameters(Worker, parts=parts)
        run_trials(coordinator, trainable, slots, tick, resources)


def run_trials(
    coordinator: Coordinator,
    trainable: Any,
    slots: int,
    tick: Callable[[int], None],
    resources: ResourcesConfig,
) -> None:
    """Runs on Tune everything that the coordinator proposes; returns when it is done.

    Args:
        coordinator: Proposes and records.
        trainable: A Tune trainable class: its one step takes a trial to the fidelity asked for
            and returns its `row` (JSON). A trial that is promoted is another trial to Tune.
        slots: How many trials run at a time.
        tick: Called often with the number of running trials.
        resources: What a trial takes, and how often it is tried again.
    """
    coordinator.expect(slots)
    scratch = tempfile.mkdtemp(prefix="prune-search-")
    try:
        tune.Tuner(
            tune.with_resources(trainable, {"cpu": resources.cpu, "gpu": resources.gpu}),
            tune_config=tune.TuneConfig(
                search_alg=_Asker(coordinator),
                scheduler=_InOrder(),
                num_samples=-1,
                max_concurrent_trials=slots,
                reuse_actors=True,
                trial_name_creator=lambda trial: "{trial_id}-{fidelity}".format(**trial.config),
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=scratch,
                callbacks=[_Recorder(coordinator, tick)],
                failure_config=tune.FailureConfig(max_failures=resources.max_retries),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                verbose=0,
            ),
        ).fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


# --- in the driver: Tune's hooks -------------------------------------------------------------


class _Asker(Searcher):
    """Tune's searcher: whatever the coordinator proposes."""

    def __init__(self, coordinator: Coordinator) -> None:
        super().__init__(metric="done", mode="max")
        self._coordinator = coordinator

    def suggest(self, trial_id: str) -> Any:
        spec = self._coordinator.next()
        if spec is not None:
            return spec.to_mapping()
        return Searcher.FINISHED if self._coordinator.done else None

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """The recorder does this work."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the ledger is the truth."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _InOrder(FIFOScheduler):
    """Leaves pending trials to Tune, which starts them in order.

    The stock scheduler looks at every trial of the search, finished ones too, at each step.
    """

    def choose_trial_to_run(self, tune_controller: Any) -> None:
        """None in particular: no trial is ever paused."""


class _Recorder(tune.Callback):
    """Tune's callback: hands each trial's end to the coordinator."""

    def __init__(self, coordinator: Coordinator, tick: Callable[[int], None]) -> None:
        self._coordinator = coordinator
        self._tick = tick
        self._started: set[Any] = set()  # Tune keeps every trial: a look at each would grow

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._started.add(trial)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._started.discard(trial)
        self._coordinator.finish(TrialResult.from_json(trial.last_result["row"]))

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._started.discard(trial)
        self._coordinator.fail(trial.config["trial_id"], _death_message(trial))

    def on_step_end(self, iteration: int, trials: Any, **info: Any) -> None:
        self._tick(sum(trial.status == "RUNNING" for trial in self._started))

    def __getstate__(self) -> dict[str, Any]:
        return {}


def _death_message(trial: Any) -> str:
    lines = str(trial.get_error() or "").strip().splitlines()
    cause = next((line for line in reversed(lines) if line.strip()), "no reason given")
    return f"the worker died in trial {trial.config['trial_id']}: {cause.strip()[:300]}"


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
