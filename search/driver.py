"""Runs the trials on Ray Tune: asks the coordinator, fans out, hands results back.

The only importer of Ray. Tune schedules and retries; the coordinator's ledger is the truth, so
nothing of Tune's own state is kept and a resumed search starts a fresh Tuner.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # else Ray packages the folder
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")  # hide GPUs from CPU workers
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "86400")  # its snapshots are of no use to us
os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "86400")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")

import ray
import torch
from ray import tune
from ray.tune.search import Searcher
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from safetensors.torch import save

from ..methods.measure import Latency, paired_latency, reference_latency_ms
from ..methods.surgery import Recipe, apply, layer_widths
from .config import ConfigError, SearchConfig
from .coordinator import Coordinator
from .environment import fingerprint
from .records import Candidate, TrialResult, TrialStatus
from .setup import (
    Problem,
    find_groups,
    load_state,
    make_model,
    make_task,
    pack_images,
    trial_device,
    unpack_images,
)
from .store import atomic_write_bytes
from .trial import TrialContext, TrialSpec, run_trial

PROBE = "latency_probe"  # the custom resource of the node whose device is measured
TIMEOUT_GRACE_S = 10.0


def check_local(config: SearchConfig) -> None:
    """Refuses resources that this machine does not have, before a local Ray starts.

    Raises:
        ConfigError: If a trial or the probe can never run here.
    """
    cores, gpus = len(os.sched_getaffinity(0)), torch.cuda.device_count()
    for key, asked, have in (
        ("resources.cpu", config.resources.cpu, cores),
        ("resources.gpu", config.resources.gpu, gpus),
        ("latency.threads", config.latency.threads, cores),
    ):
        if asked > have:
            raise ConfigError(
                f"`{key}` (={asked:g}) must be at most {have}: this machine has no more. Lower it."
            )
    if config.latency.device == "cuda" and not gpus:
        raise ConfigError(
            "`latency.device` (=cuda) must be a device of this machine: torch sees no GPU. Set "
            "latency.device: cpu."
        )


@contextmanager
def connect(address: str | None) -> Iterator[None]:
    """Starts a local Ray, or connects to the cluster at `address`; disconnects at the end.

    Args:
        address: None or `local` for a Ray of one's own; `auto` or `HOST:PORT` for the cluster
            that this machine is a node of. A Ray that this process is connected to already is
            used and left running.

    Raises:
        ConfigError: If no cluster answers there.
    """
    if ray.is_initialized():
        yield
        return
    if address is not None and address.startswith("ray://"):
        raise ConfigError(
            f"`--address` (={address}) must be joined from inside the cluster: Ray Tune's hooks "
            "cannot run through a Ray client. Run the command on a node with --address auto."
        )
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address in (None, "local"):
        options |= {"address": "local", "include_dashboard": False, "resources": {PROBE: 1}}
    else:
        options |= {"address": address}
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ConfigError(
            f"`--address` (={address}) must be a running Ray cluster: {error}. Start one with "
            "`ray start --head --resources '{\"latency_probe\": 1}'`, or leave --address out."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def worker_package() -> str:
    """The folder that a Ray worker imports `prunesearch.methods` from."""

    def where() -> str:
        from prunesearch import methods

        return str(methods.__path__[0])

    return str(ray.get(ray.remote(where).options(num_cpus=0).remote()))


class Fleet:
    """The actors and shared objects of one run on the connected Ray."""

    def __init__(self, problem: Problem, baseline_accuracy: float, run_dir: Path) -> None:
        here = ray.get_runtime_context().get_node_id()
        on_driver = NodeAffinitySchedulingStrategy(node_id=here, soft=False)
        self.config = problem.config
        state = {k: v.detach().cpu().numpy() for k, v in problem.model.state_dict().items()}
        self._parts = {
            "config": problem.config,
            "images": ray.put(pack_images(problem.task.data)),
            "state": ray.put(state),
            "baseline_accuracy": baseline_accuracy,
        }
        self.keeper = (
            ray.remote(_Keeper)
            .options(
                num_cpus=0, scheduling_strategy=on_driver, max_restarts=-1, max_task_retries=-1
            )
            .remote(str(run_dir))
        )
        self.probe = (
            ray.remote(_LatencyProbe)
            .options(max_restarts=-1, max_task_retries=2, **_probe_resources(problem.config))
            .remote(ray.cloudpickle.dumps(self._parts))
        )  # sealed: Ray warns of references here

    def measure_reference(self) -> tuple[float, dict[str, Any]]:
        """The dense model's latency in ms on the probe, and the probe's fingerprint."""
        value: tuple[float, dict[str, Any]] = ray.get(self.probe.reference.remote())
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
        trainable = tune.with_resources(
            tune.with_parameters(_Worker, parts=parts),
            {"cpu": resources.cpu, "gpu": resources.gpu},
        )
        scratch = tempfile.mkdtemp(prefix="prune-search-")
        try:
            tune.Tuner(
                trainable,
                tune_config=tune.TuneConfig(
                    search_alg=_Asker(coordinator),
                    num_samples=-1,
                    max_concurrent_trials=slots,
                    reuse_actors=True,
                    trial_name_creator=lambda trial: trial.config["trial_id"],
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
            return dataclasses.asdict(spec) | {"candidate": spec.candidate.to_json()}
        return Searcher.FINISHED if self._coordinator.done else None

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """The recorder does this work."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the ledger is the truth."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Recorder(tune.Callback):
    """Tune's callback: hands each trial's end to the coordinator."""

    def __init__(self, coordinator: Coordinator, tick: Callable[[int], None]) -> None:
        self._coordinator = coordinator
        self._tick = tick

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        row = json.loads(trial.last_result["row"])
        row["status"] = TrialStatus(row["status"])
        self._coordinator.finish(TrialResult(**row))

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._coordinator.fail(trial.config["trial_id"], _death_message(trial))

    def on_step_end(self, iteration: int, trials: Any, **info: Any) -> None:
        self._tick(sum(trial.status == "RUNNING" for trial in trials))

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


# --- in the workers --------------------------------------------------------------------------


class _Worker(tune.Trainable):
    """One trial worker; reused from trial to trial."""

    def setup(self, config: dict[str, Any], parts: Mapping[str, Any] | None = None) -> None:
        assert parts is not None
        self._spec = config
        self._keeper = parts["keeper"]
        search: SearchConfig = parts["config"]
        torch.set_num_threads(max(1, int(search.resources.cpu)))
        device = trial_device(search)
        task = make_task(search, unpack_images(ray.get(parts["images"])), device)
        model = make_model(search, task.num_classes, trained=False).to(device)
        load_state(model, ray.get(parts["state"]))
        self._context = TrialContext(
            config=search,
            task=task,
            dense=model.eval(),
            plan=find_groups(search, model, task.example_input(2)),
            baseline_accuracy=parts["baseline_accuracy"],
            measure_latency=_asks(parts["probe"], parts["reference_ms"]),
        )

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._spec = new_config
        return True

    def step(self) -> dict[str, Any]:
        candidate = Candidate.from_mapping(json.loads(self._spec["candidate"]))
        spec = TrialSpec(
            self._spec["trial_id"], candidate, self._spec["candidate_json"], self._spec["seed"]
        )
        with _watchdog(self._context.config.resources.trial_timeout_s):
            outcome = run_trial(spec, self._context)
        if outcome.state is not None and outcome.recipe is not None:
            call = self._keeper.keep.remote(
                spec.trial_id, outcome.recipe.to_json(), save(outcome.state)
            )
            outcome.result.recipe, outcome.result.weights = ray.get(call)
        return {"done": True, "row": json.dumps(dataclasses.asdict(outcome.result))}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """A trial is one step: there is nothing between."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """A retried trial starts afresh."""


def _asks(probe: Any, reference_ms: float) -> Callable[[Recipe], tuple[Latency, float]]:
    def measure(recipe: Recipe) -> tuple[Latency, float]:
        answer: tuple[Latency, float] = ray.get(probe.measure.remote(recipe, reference_ms))
        return answer

    return measure


@contextmanager
def _watchdog(limit_s: float | None) -> Iterator[None]:
    """Ends a trial that takes too long: an exception where Python runs, else the process."""
    if limit_s is None:
        yield
        return

    def stop(signum: int, frame: Any) -> None:
        raise TimeoutError(f"took longer than `resources.trial_timeout_s` (={limit_s:g})")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    killer = threading.Timer(limit_s + TIMEOUT_GRACE_S, os._exit, args=(124,))
    killer.daemon = True
    killer.start()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        killer.cancel()


class _LatencyProbe:
    """Owns the device that latency is measured on and answers one request at a time."""

    def __init__(self, sealed_parts: bytes) -> None:
        parts = ray.cloudpickle.loads(sealed_parts)
        self._config: SearchConfig = parts["config"]
        torch.set_num_threads(self._config.latency.threads)
        self._device = torch.device(self._config.latency.device)
        task = make_task(self._config, unpack_images(ray.get(parts["images"])), "cpu")
        dense = make_model(self._config, task.num_classes, trained=False)
        load_state(dense, ray.get(parts["state"]))
        self._plan = find_groups(self._config, dense, task.example_input(2))
        self._dense = dense.eval()
        self._on_device = copy.deepcopy(dense).to(self._device)
        self._example = task.example_input(self._config.latency.batch_size).to(self._device)
        self._known: dict[str, Latency] = {}

    def reference(self) -> tuple[float, dict[str, Any]]:
        """The dense model's latency in ms, and this device's fingerprint."""
        latency = self._config.latency
        reference = reference_latency_ms(
            self._on_device, self._example, threads=latency.threads, runs=latency.runs
        )
        return reference, fingerprint(self._device) | latency.model_dump()

    def measure(self, recipe: Recipe, reference_ms: float) -> tuple[Latency, float]:
        """Latency of the recipe's architecture and the seconds it took; known ones take none."""
        start = time.perf_counter()
        model = apply(copy.deepcopy(self._dense), self._plan, recipe)
        key = json.dumps([list(recipe.dropped_blocks), layer_widths(model)])
        if key not in self._known:
            self._known[key] = paired_latency(
                model.to(self._device),
                self._on_device,
                self._example,
                reference_ms=reference_ms,
                threads=self._config.latency.threads,
                runs=self._config.latency.runs,
            )
        return self._known[key], time.perf_counter() - start


class _Keeper:
    """Writes trials' recipes and weights into the run folder, on the driver's node."""

    def __init__(self, run_dir: str) -> None:
        self._run_dir = Path(run_dir)

    def keep(self, trial_id: str, recipe: str, weights: bytes) -> tuple[str, str]:
        """Stores both files atomically and returns their paths in the run folder."""
        paths = f"recipes/{trial_id}.json", f"weights/{trial_id}.safetensors"
        atomic_write_bytes(self._run_dir / paths[0], recipe.encode())
        atomic_write_bytes(self._run_dir / paths[1], weights)
        return paths
