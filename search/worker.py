"""The actor that runs trials."""

from __future__ import annotations

import faulthandler
from collections.abc import Mapping, Sequence
from typing import Any

from . import cluster  # noqa: F401  # first: it sets Ray's environment

# isort: split
import ray
import torch
from ray import tune
from safetensors.torch import save

from ..methods.layout import prefer_channels_last
from ..methods.measure import Latency
from ..methods.surgery import Recipe
from .cache import user_shelf
from .config import SearchConfig
from .context import MeasureLatency, TrialContext, TrialSpec, only_evaluates
from .deaths import Place, own_log
from .finished import FinishedTrials
from .keeper import shares
from .setup import (
    further_devices,
    load_state,
    make_model,
    make_task,
    trial_device,
    unpack_images,
)
from .shelf import Packed
from .trial import run_trial
from .watchdog import STDERR, watchdog
from .work import Work, put_down, take_up

MOST_PAUSED = 4  # waiting trials in a worker's memory; each is a model and its momentum


class Worker(tune.Trainable):
    """One trial worker; reused from trial to trial."""

    def setup(self, config: dict[str, Any], parts: Mapping[str, Any] | None = None) -> None:
        """Builds what all trials of this worker share."""
        assert parts is not None
        self._spec = TrialSpec.from_mapping(config)
        self._paused: dict[str, Work] = {}  # the last few trials that wait at a rung
        self._keeper = parts["keeper"]
        self._place = Place(ray.get_runtime_context().get_node_id(), own_log())
        faulthandler.enable(file=STDERR, all_threads=False)
        search: SearchConfig = parts["config"]
        self._moves = only_evaluates(self._spec, search)  # as every trial of this worker
        takes = search.resources.share(self._moves)
        torch.set_num_threads(max(1, int(takes.cpu)))
        device = trial_device(search) if takes.gpu else torch.device("cpu")
        task = make_task(search, unpack_images(ray.get(parts["images"])), device)
        model = make_model(search, task.num_classes, trained=False).to(device)
        load_state(model, ray.get(parts["state"]))
        prefer_channels_last(model, task.example_input(2))
        self._context = TrialContext(
            config=search,
            task=task,
            dense=model.eval(),
            plan=parts["plan"],
            baseline_accuracy=parts["baseline_accuracy"],
            measure_latency=_asks(parts["probes"]),
            shared=shares(parts["keeper"]),
            data_digest=parts["data_digest"],
            finished=_finished(parts["keeper"], search),
            devices=further_devices(search),
        )

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Takes the next trial."""
        self._spec = TrialSpec.from_mapping(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Runs the trial to its next rung."""
        spec = self._spec
        ray.get(self._keeper.began.remote(spec.trial_id, self._place))
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
        if not self._moves:
            self._paused[trial_id] = work
        if len(self._paused) > MOST_PAUSED:
            del self._paused[next(iter(self._paused))]
        if work.worth_a_checkpoint or self._moves:
            pause = self._keeper.pause
            put_down(work, lambda *parts: ray.get(pause.remote(trial_id, *parts)), trial_id)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Checkpoints between rungs go to the keeper: Tune has no storage that all share."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """A retried trial goes on from its rung."""


def _asks(probes: Sequence[tuple[Any, Mapping[str, float]]]) -> MeasureLatency:
    """Asks all probe actors at once; each answers for the probes of its node."""

    def measure(recipe: Recipe) -> tuple[dict[str, Latency], float]:
        calls = [probe.measure.remote(recipe, references) for probe, references in probes]
        found: dict[str, Latency] = {}
        busy_s = 0.0
        for latencies, seconds in ray.get(calls):
            found |= latencies
            busy_s = max(busy_s, seconds)
        return found, busy_s

    return measure


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
