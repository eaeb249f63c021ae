"""What runs on Ray's workers: trials, the latency probe, and the keeper of the run folder."""

from __future__ import annotations

import copy
import dataclasses
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import cluster  # noqa: F401  # first: it sets Ray's environment

# isort: split
import ray
import torch
from ray import tune
from safetensors.torch import save

from ..methods.layout import prefer_channels_last
from ..methods.measure import Latency, paired_latency, reference_latency_ms
from ..methods.surgery import Recipe, layer_widths, prune
from .cache import LEASE_S, SHARED, Cache, Made, address
from .config import SearchConfig
from .context import Shared, TrialContext, TrialSpec
from .environment import fingerprint
from .records import Candidate
from .setup import find_groups, load_state, make_model, make_task, trial_device, unpack_images
from .store import atomic_write_bytes
from .trial import run_trial
from .watchdog import watchdog

POLL_S = 0.2  # between two questions whether another trial's result is there


class Worker(tune.Trainable):
    """One trial worker; reused from trial to trial."""

    def setup(self, config: dict[str, Any], parts: Mapping[str, Any] | None = None) -> None:
        """Builds what all trials of this worker share."""
        assert parts is not None
        self._spec = config
        self._keeper = parts["keeper"]
        search: SearchConfig = parts["config"]
        torch.set_num_threads(max(1, int(search.resources.cpu)))
        device = trial_device(search)
        task = make_task(search, unpack_images(ray.get(parts["images"])), device)
        model = make_model(search, task.num_classes, trained=False).to(device)
        load_state(model, ray.get(parts["state"]))
        prefer_channels_last(model, task.example_input(2))
        self._context = TrialContext(
            config=search,
            task=task,
            dense=model.eval(),
            plan=find_groups(search, model, task.example_input(2)),
            baseline_accuracy=parts["baseline_accuracy"],
            measure_latency=_asks(parts["probe"], parts["reference_ms"]),
            shared=shares(parts["keeper"]),
        )

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Takes the next trial."""
        self._spec = new_config
        return True

    def step(self) -> dict[str, Any]:
        """Runs the trial: its one step."""
        candidate = Candidate.from_mapping(json.loads(self._spec["candidate"]))
        spec = TrialSpec(
            self._spec["trial_id"], candidate, self._spec["candidate_json"], self._spec["seed"]
        )
        with watchdog(self._context.config.resources.trial_timeout_s):
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


def shares(keeper: Any) -> Shared:
    """Trials' access to the run's cache, which the keeper owns."""
    owner = uuid.uuid4().hex

    def shared(key: Mapping[str, Any], make: Callable[[], Made]) -> tuple[Made, float]:
        name, waited = address(key), 0.0
        while True:
            task, packed = ray.get(keeper.claim.remote(name, owner))
            if packed is not None:
                return Made.unpack(*packed), waited
            if task == "make":
                break
            time.sleep(POLL_S)
            waited += POLL_S
        try:
            with _lease(lambda: keeper.renew.remote(name, owner)):
                made = make()
                ray.get(keeper.put.remote(name, *made.pack()))
        except BaseException:
            ray.get(keeper.release.remote(name, owner))
            raise
        return made, waited

    return shared


@contextmanager
def _lease(renew: Callable[[], Any]) -> Iterator[None]:
    """Keeps saying that this worker is alive."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(LEASE_S / 4):
            renew()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class LatencyProbe:
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
        model = prune(self._dense, self._plan, recipe)
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


class Keeper(Cache):
    """Writes what trials leave behind into the run folder, on the driver's node."""

    def __init__(self, run_dir: str) -> None:
        super().__init__(Path(run_dir) / SHARED)
        self._run_dir = Path(run_dir)

    def keep(self, trial_id: str, recipe: str, weights: bytes) -> tuple[str, str]:
        """Stores both files atomically and returns their paths in the run folder."""
        paths = f"recipes/{trial_id}.json", f"weights/{trial_id}.safetensors"
        atomic_write_bytes(self._run_dir / paths[0], recipe.encode())
        atomic_write_bytes(self._run_dir / paths[1], weights)
        return paths
