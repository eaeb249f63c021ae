"""What runs on Ray's workers: trials, the latency probe, and the keeper of the run folder."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import cluster  # noqa: F401  # first: it sets Ray's environment

# isort: split
import ray
import torch
from ray import tune
from safetensors.torch import save
from torch import nn

from ..methods.layer_costs import layer_calls
from ..methods.layer_latency import LayerLatencies, measure_layers
from ..methods.layout import prefer_channels_last
from ..methods.measure import Latency, paired_latency, reference_latency_ms
from ..methods.surgery import Recipe, layer_widths, prune
from .cache import SHARED, Cache, Made, Shared, sharing, user_shelf
from .config import SearchConfig
from .context import TrialContext, TrialSpec
from .digests import latency_basis
from .environment import fingerprint
from .finished import FinishedTrials
from .setup import find_groups, load_state, make_model, make_task, trial_device, unpack_images
from .shelf import Packed, address
from .store import RUNGS, atomic_write_bytes
from .trial import run_trial
from .watchdog import watchdog
from .work import Work, put_down, take_up

MOST_PAUSED = 4  # waiting trials in a worker's memory; each is a model and its momentum


class Worker(tune.Trainable):
    """One trial worker; reused from trial to trial."""

    def setup(self, config: dict[str, Any], parts: Mapping[str, Any] | None = None) -> None:
        """Builds what all trials of this worker share."""
        assert parts is not None
        self._spec = config
        self._paused: dict[str, Work] = {}  # the last few trials that wait at a rung
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
            data_digest=parts["data_digest"],
            finished=_finished(parts["keeper"], search),
        )

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Takes the next trial."""
        self._spec = new_config
        return True

    def step(self) -> dict[str, Any]:
        """Runs the trial to its next rung."""
        spec = TrialSpec.from_mapping(self._spec)
        with watchdog(self._context.config.resources.trial_timeout_s):
            outcome = run_trial(spec, self._context, self._take_up(spec))
        if outcome.work is not None:
            self._pause(spec.trial_id, outcome.work)
        if outcome.state is not None and outcome.recipe is not None:
            call = self._keeper.keep.remote(
                spec.trial_id, outcome.recipe.to_json(), save(outcome.state)
            )
            outcome.result.recipe, outcome.result.weights = ray.get(call)
        return {"done": True, "row": outcome.result.to_json()}

    def _take_up(self, spec: TrialSpec) -> Work | None:
        """Where a waiting trial goes on: this worker's memory or its checkpoint, if any."""
        work = self._paused.pop(spec.trial_id, None)
        if spec.row is None:
            return None
        if work is not None and work.fidelity == spec.row.fidelity:
            return work
        paused = self._keeper.paused

        def read() -> tuple[str, bytes] | None:
            found: tuple[str, bytes] | None = ray.get(paused.remote(spec.trial_id))
            return found

        return take_up(read, spec.trial_id, spec.row.fidelity, self._context)

    def _pause(self, trial_id: str, work: Work) -> None:
        self._paused[trial_id] = work
        if len(self._paused) > MOST_PAUSED:
            del self._paused[next(iter(self._paused))]
        if work.worth_a_checkpoint:
            pause = self._keeper.pause
            put_down(work, lambda *parts: ray.get(pause.remote(trial_id, *parts)), trial_id)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Checkpoints between rungs go to the keeper: Tune has no storage that all share."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """A retried trial goes on from its rung."""


def _asks(probe: Any, reference_ms: float) -> Callable[[Recipe], tuple[Latency, float]]:
    def measure(recipe: Recipe) -> tuple[Latency, float]:
        answer: tuple[Latency, float] = ray.get(probe.measure.remote(recipe, reference_ms))
        return answer

    return measure


def shares(keeper: Any) -> Shared:
    """Trials' access to the run's cache, which the keeper owns."""
    return sharing(lambda method, *arguments: ray.get(getattr(keeper, method).remote(*arguments)))


def _finished(keeper: Any, config: SearchConfig) -> FinishedTrials | None:
    """Trials' access to those that other runs have finished."""
    if user_shelf(config.cache) is None:
        return None

    def find(name: str) -> Packed | None:
        packed: Packed | None = ray.get(keeper.published.remote(name))
        return packed

    def add(name: str, packed: Packed) -> None:
        ray.get(keeper.publish.remote(name, packed))

    return FinishedTrials(find, add, config.name)


class LatencyProbe:
    """Owns the device that latency is measured on and answers one request at a time.

    Its models are fresh ones: no latency depends on what the weights are.

    Args:
        config: The run's config.
        num_classes: Outputs of the classifier.
        image_shape: (channels, height, width).
        keeper: Name of the actor that remembers what was measured, also for other runs. (Ray warns
            of a handle here: a lost one would keep the probe from restarting.)
    """

    def __init__(
        self, config: SearchConfig, num_classes: int, image_shape: Sequence[int], keeper: str
    ) -> None:
        self._config = config
        self._shared = shares(ray.get_actor(keeper))
        torch.set_num_threads(config.latency.threads)
        self._device = torch.device(config.latency.device)
        self._dense = make_model(config, num_classes, trained=False).eval()
        self._on_device = copy.deepcopy(self._dense).to(self._device)
        generator = torch.Generator().manual_seed(0)
        example = torch.randn(config.latency.batch_size, *image_shape, generator=generator)
        self._plan = find_groups(config, self._dense, example[:1].expand(2, -1, -1, -1))
        self._example = example.to(self._device)
        self._fingerprint = fingerprint(self._device)
        self._basis = latency_basis(config, num_classes, image_shape, self._fingerprint)
        self._known: dict[str, Mapping[str, float]] = {}

    def reference(self) -> tuple[float, dict[str, Any]]:
        """The dense model's latency in ms, and this device's fingerprint."""
        latency = self._config.latency

        def measure() -> Made:
            reference = reference_latency_ms(
                self._on_device, self._example, threads=latency.threads, runs=latency.runs
            )
            return Made(info={"reference_ms": reference, "host": self._fingerprint["host"]})

        made, _ = self._shared({"kind": "reference", **self._basis}, measure)
        return made.info["reference_ms"], self._fingerprint | latency.model_dump()

    def layers(self) -> LayerLatencies:
        """The dense model's layers, each measured alone at several widths."""
        latency = self._config.latency
        image = self._example[:1]
        return measure_layers(
            self._on_device,
            layer_calls(self._on_device, image),
            batch_size=latency.batch_size,
            threads=latency.threads,
        )

    def measure(self, recipe: Recipe, reference_ms: float) -> tuple[Latency, float]:
        """Latency of the recipe's architecture and the seconds it took; known ones take few."""
        start = time.perf_counter()
        model = prune(self._dense, self._plan, recipe)
        key = {"kind": "latency", **self._basis} | {
            "dropped_blocks": list(recipe.dropped_blocks),
            "widths": layer_widths(model),
        }
        name = address(key)
        if name not in self._known:
            made, _ = self._shared(key, lambda: self._measure(model))
            self._known[name] = made.info
        found = {field: self._known[name][field] for field in Latency.__dataclass_fields__}
        return Latency(**found).at(reference_ms), time.perf_counter() - start

    def _measure(self, model: nn.Module) -> Made:
        latency = paired_latency(
            model.to(self._device),
            self._on_device,
            self._example,
            reference_ms=1.0,
            threads=self._config.latency.threads,
            runs=self._config.latency.runs,
        )
        return Made(info=dataclasses.asdict(latency) | {"host": self._fingerprint["host"]})


class Keeper(Cache):
    """Writes what trials leave behind into the run folder, on the driver's node.

    Args:
        run_dir: The run folder.
        user: The folder of results that other runs share; None where they do not.
        max_bytes: What that folder may hold.
    """

    def __init__(self, run_dir: str, user: str | None = None, max_bytes: float = math.inf) -> None:
        super().__init__(Path(run_dir) / SHARED, Path(user) if user else None, max_bytes)
        self._run_dir = Path(run_dir)

    def keep(self, trial_id: str, recipe: str, weights: bytes) -> tuple[str, str]:
        """Stores both files atomically and returns their paths in the run folder."""
        paths = f"recipes/{trial_id}.json", f"weights/{trial_id}.safetensors"
        atomic_write_bytes(self._run_dir / paths[0], recipe.encode())
        atomic_write_bytes(self._run_dir / paths[1], weights)
        return paths

    def pause(self, trial_id: str, recipe: str, tensors: bytes) -> None:
        """Stores where a trial waits; the recipe is the same each time, so no pair is mixed."""
        paths = self._paused_paths(trial_id)
        atomic_write_bytes(paths[0], recipe.encode())
        atomic_write_bytes(paths[1], tensors)

    def paused(self, trial_id: str) -> tuple[str, bytes] | None:
        """Where a trial waits; None if it is not known."""
        paths = self._paused_paths(trial_id)
        if not all(path.exists() for path in paths):
            return None
        return paths[0].read_text(), paths[1].read_bytes()

    def _paused_paths(self, trial_id: str) -> tuple[Path, Path]:
        folder = self._run_dir / RUNGS
        return folder / f"{trial_id}.json", folder / f"{trial_id}.safetensors"
