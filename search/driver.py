"""Runs the trials on Ray Tune: asks the coordinator, fans out, hands results back.

Tune schedules; the coordinator retries and its ledger is the truth, so nothing of Tune's own state
is kept and a resumed search starts a fresh Tuner.
"""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
import time
from collections.abc import Callable
from typing import Any

from . import cluster  # noqa: F401  # first: it sets Ray's environment

# isort: split
from ray import tune
from ray.air.execution._internal import RayActorManager
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.tune.execution import tune_controller
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from .context import only_evaluates
from .coordinator import Coordinator
from .deaths import Death, read_tail
from .nodes import Room
from .records import TrialResult

Inquest = Callable[[str, str], Death]

TAKES = "takes"  # key in Tune's config of a trial: what it takes of a node, and of which
LOOK_S = 1.0


def run_trials(
    coordinator: Coordinator,
    trainable: Any,
    room: Callable[[], Room],
    tick: Callable[[int], None],
    inquest: Inquest,
) -> None:
    """Runs on Tune everything that the coordinator proposes; returns when it is done.

    Args:
        coordinator: Proposes and records.
        trainable: A Tune trainable class: its one step takes a trial to the fidelity asked for
            and returns its `row` (JSON). A trial that is promoted is another trial to Tune.
        room: What there is room for now: asked about once a second, as nodes come and go.
        tick: Called often with the number of running trials.
        inquest: How the worker of a trial (its name) died that ended with an error of Ray's.
    """
    scratch = tempfile.mkdtemp(prefix="prune-search-")
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a trial's row tells its death
    try:
        tune.Tuner(
            tune.with_resources(trainable, lambda spec: tune.PlacementGroupFactory(**spec[TAKES])),
            tune_config=tune.TuneConfig(
                search_alg=_Asker(coordinator, room),
                scheduler=_InOrder(),
                num_samples=-1,
                reuse_actors=True,
                trial_name_creator=lambda trial: "{trial_id}-{fidelity}".format(**trial.config),
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=scratch,
                callbacks=[_Recorder(coordinator, tick, inquest)],
                failure_config=tune.FailureConfig(max_failures=0),  # the coordinator tries again
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                verbose=0,
            ),
        ).fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


class _Actors(RayActorManager):
    """Tune's actors; whatever ends one ends its trial.

    Tune knows two kinds of errors and gives up the whole search at a third, such as that of Ray's
    memory monitor.
    """

    def _actor_task_failed(self, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, RayError) and not isinstance(
            exception, RayActorError | RayTaskError
        ):
            exception = RayActorError(error_msg=f"{type(exception).__name__}: {exception}")
        super()._actor_task_failed(tracked_actor_task, exception)


tune_controller.RayActorManager = _Actors


# --- in the driver: Tune's hooks -------------------------------------------------------------


class _Asker(Searcher):
    """Tune's searcher: whatever the coordinator proposes and there is room for."""

    def __init__(self, coordinator: Coordinator, room: Callable[[], Room]) -> None:
        super().__init__(metric="done", mode="max")
        self._coordinator = coordinator
        self._ask_room = room
        self._live: dict[str, bool] = {}  # Tune's name of a trial: whether it only evaluates
        self._looked = -math.inf

    def suggest(self, trial_id: str) -> Any:
        self._look()
        evaluating = sum(self._live.values())
        train, evaluate = self._room.admits(len(self._live) - evaluating, evaluating)
        spec = self._coordinator.next(train=train, evaluate=evaluate)
        if spec is None:
            return Searcher.FINISHED if self._coordinator.done else None
        self._live[trial_id] = only = only_evaluates(spec, self._coordinator.config)
        return spec.to_mapping() | {TAKES: self._takes(only)}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """There is room for another; the recorder does the rest."""
        self._live.pop(trial_id, None)

    def _look(self) -> None:
        if time.monotonic() - self._looked > LOOK_S:
            self._room, self._looked = self._ask_room(), time.monotonic()
            self._coordinator.expect(self._room.most)

    def _takes(self, only_evaluates: bool) -> dict[str, Any]:
        """What a trial takes, as Ray's placement groups say it."""
        share = self._coordinator.config.resources.share(only_evaluates)
        bundle = {"CPU": share.cpu, "GPU": share.gpu}
        takes: dict[str, Any] = {"bundles": [{k: v for k, v in bundle.items() if v > 0}]}
        if only_evaluates and self._room.evaluators:
            nodes = f"in({','.join(self._room.evaluators)})"
            takes["bundle_label_selector"] = [{"ray.io/node-id": nodes}]
        return takes

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

    def __init__(
        self, coordinator: Coordinator, tick: Callable[[int], None], inquest: Inquest
    ) -> None:
        self._coordinator = coordinator
        self._tick = tick
        self._inquest = inquest
        self._started: set[Any] = set()  # Tune keeps every trial: a look at each would grow

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._started.add(trial)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._started.discard(trial)
        self._coordinator.finish(TrialResult.from_json(trial.last_result["row"]))

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._started.discard(trial)
        name = trial.config["trial_id"]
        death = self._inquest(name, read_tail(trial.error_file or ""))
        if death.stop:
            self._coordinator.break_off(death.cause, name)
        else:
            self._coordinator.fail(name, death.cause, again=death.again)

    def on_step_end(self, iteration: int, trials: Any, **info: Any) -> None:
        self._tick(sum(trial.status == "RUNNING" for trial in self._started))

    def __getstate__(self) -> dict[str, Any]:
        return {}
