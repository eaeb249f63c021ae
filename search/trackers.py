"""Experiment trackers that a search reports to: TensorBoard, MLflow, Weights & Biases.

They hear of every trial that has ended, in a thread of their own: a server that is slow or away
costs the search nothing but one warning. The ledger stays the truth.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from .config import ConfigError, SearchConfig
from .metrics import metrics_of
from .records import TrialResult
from .store import FRONT, atomic_write_bytes

KNOWN = "trackers.json"  # in the run folder: under which id each tracker knows the run
PROJECT = "prune-search"
LAST_WORDS_S = 30.0  # for what is still to be sent when the search is over

Say = Callable[[str], None]


class Tracker(Protocol):
    """What each tracker can do. Metrics are plain numbers; a step is a number of ended trials."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Adds a point to each metric's curve."""

    def close(self, front: Path) -> None:
        """The search is over, or stops for now.

        Args:
            front: The front's Parquet file; it may be missing.
        """


class TensorBoard:
    """Event files in the run folder: `tensorboard --logdir RESULTS_DIR` shows all runs."""

    def __init__(self, config: SearchConfig, folder: Path, run_id: str | None) -> None:
        from tensorboardX import SummaryWriter  # Ray Tune brings it

        self._writer = SummaryWriter(str(folder / "tensorboard"))
        if run_id is None:
            self._writer.add_text("config", f"```\n{json.dumps(_flat(config), indent=1)}\n```")
        self.run_id = "tensorboard"

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """One scalar each."""
        for name, value in metrics.items():
            self._writer.add_scalar(name.replace("@", "_at_"), value, step)

    def close(self, front: Path) -> None:
        """Writes what is buffered."""
        self._writer.close()


class MLflow:
    """A run in the experiment `prune-search` of the server that MLFLOW_TRACKING_URI names."""

    def __init__(self, config: SearchConfig, folder: Path, run_id: str | None) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient()
        if run_id is None:
            found = self._client.get_experiment_by_name(PROJECT)
            experiment = found.experiment_id if found else self._client.create_experiment(PROJECT)
            run = self._client.create_run(experiment, run_name=config.name)
            run_id = str(run.info.run_id)
            params = [Param(key, str(value)) for key, value in _flat(config).items()]
            self._client.log_batch(run_id, params=params[:100])  # the most that one call takes
        else:
            self._client.update_run(run_id, status="RUNNING")
        self.run_id = run_id

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """One batch."""
        import time

        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        names = {name: name.replace("@", "_at_") for name in metrics}
        points = [Metric(names[name], value, now, step) for name, value in metrics.items()]
        self._client.log_batch(self.run_id, metrics=points)

    def close(self, front: Path) -> None:
        """Adds the front as an artifact."""
        if front.exists():
            self._client.log_artifact(self.run_id, str(front))
        self._client.set_terminated(self.run_id)


class WeightsAndBiases:
    """A run in the project `prune-search`; WANDB_MODE=offline keeps it in the run folder."""

    def __init__(self, config: SearchConfig, folder: Path, run_id: str | None) -> None:
        import wandb

        self._run = wandb.init(
            project=PROJECT,
            name=config.name,
            id=run_id,
            resume="allow" if run_id else None,
            config=_flat(config),
            dir=str(folder),
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
        )
        self.run_id = str(self._run.id)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """One row."""
        self._run.log(dict(metrics), step=step)

    def close(self, front: Path) -> None:
        """Keeps the front as a file of the run."""
        if front.exists():
            self._run.save(str(front), base_path=str(front.parent), policy="now")
        self._run.finish()


TRACKERS: dict[str, tuple[type[Any], str]] = {  # with the module that each needs
    "tensorboard": (TensorBoard, "tensorboardX"),
    "mlflow": (MLflow, "mlflow"),
    "wandb": (WeightsAndBiases, "wandb"),
}


def check_trackers(config: SearchConfig) -> None:
    """Refuses a tracker that is not installed.

    Raises:
        ConfigError: With the extra that installs it.
    """
    for index, name in enumerate(config.trackers):
        module = TRACKERS[name][1]
        if importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"`trackers[{index}]` (={name}) must be installed: there is no module {module}. "
                f"Install it with `pip install 'prune-search[{name}]'`, or leave it out."
            )


class Reports:
    """Passes on how trials ended, to every tracker of a run.

    Args:
        config: Names the trackers.
        folder: The run folder.
        say: Told once when a tracker fails; it hears no more then.
    """

    def __init__(self, config: SearchConfig, folder: Path, say: Say) -> None:
        self._config, self._folder, self._say = config, folder, say
        self._trackers: dict[str, Tracker] = {}
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="trackers")
        self._pool.submit(self._open)

    def trial(self, result: TrialResult, front: Sequence[TrialResult], **totals: float) -> None:
        """One more trial has ended.

        Args:
            result: Its row.
            front: The front with it.
            **totals: `hypervolume` and `trials`, the number of rows.
        """
        if not self._config.trackers:
            return
        names = metrics_of(self._config.probes)
        values = {f"trial/{name}": result.metric(name) for name in names}
        metrics = {name: float(value) for name, value in values.items() if value is not None}
        metrics |= {"front/members": float(len(front)), "front/hypervolume": totals["hypervolume"]}
        step = int(totals["trials"])
        self._pool.submit(self._each, lambda tracker: tracker.log(metrics, step))

    def close(self) -> None:
        """Waits a while for what is still to be sent."""
        done = self._pool.submit(self._each, lambda tracker: tracker.close(self._folder / FRONT))
        try:
            done.result(timeout=LAST_WORDS_S)
        except TimeoutError:
            self._say(f"warning: trackers had not taken everything after {LAST_WORDS_S:g} s")
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _open(self) -> None:
        path = self._folder / KNOWN
        known: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
        for name in self._config.trackers:
            with self._forgiven(name):
                tracker = TRACKERS[name][0](self._config, self._folder, known.get(name))
                self._trackers[name] = tracker
                known[name] = tracker.run_id
        if known:
            atomic_write_bytes(path, json.dumps(known).encode())

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            with self._forgiven(name):
                act(tracker)

    @contextmanager
    def _forgiven(self, name: str) -> Iterator[None]:
        """Says what a tracker's own code or server did, and goes on without it."""
        try:
            yield
        except Exception as error:  # whatever a foreign service does
            self._trackers.pop(name, None)
            words = str(error).strip().splitlines() or [""]
            self._say(
                f"warning: {name} hears no more of this run: {type(error).__name__}: {words[0]}"
            )


def _flat(config: SearchConfig) -> dict[str, Any]:
    """The config's keys with dots."""
    found: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                walk(f"{prefix}.{key}".lstrip("."), inner)
        else:
            found[prefix] = value if isinstance(value, int | float | str) else json.dumps(value)

    walk("", config.model_dump(mode="json"))
    return found
