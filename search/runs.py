"""One search from its config to its front, and the run folder as an object."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from .choose import Wish
from .config import (
    ConfigError,
    SearchConfig,
    check_names,
    dump_config,
    ignored_settings,
    load_config,
    parse_config,
)
from .early_stop import fidelities, ladder_of, settled
from .front import choose, front_hypervolume, front_of
from .interrupt import stopping_gently
from .metrics import dense_value
from .mirror import folder_of
from .plateau import has_ended
from .progress import Progress
from .records import TrialResult
from .remote import Remote, is_uri, join
from .storage import contents, driving, fetch, opened
from .store import Store, atomic_write_bytes, read_as, read_json, sweep_unfinished, write_json
from .trackers import Reports, check_trackers

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import RenderableType

    from .notebook import Picture


CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
TIMES = "times.json"
BASELINE = "baseline.json"
LOCAL = (None, "local")


_Number = Annotated[float | None, Field(strict=True)]


@dataclasses.dataclass
class _OfProbe:
    latency_ms: _Number
    probe: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class _Measured:
    """What a reader makes use of in `baseline.json`, where it is there."""

    accuracy: _Number = None
    loss: _Number = None
    macs: _Number = None
    num_params: _Number = None
    peak_memory_mib: _Number = None
    latency_ms: _Number = None
    probe: dict[str, Any] = dataclasses.field(default_factory=dict)
    latency_by_probe: dict[str, _OfProbe] = dataclasses.field(default_factory=dict)
    metrics: dict[str, _Number] = dataclasses.field(default_factory=dict)
    widths: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, init=False)
class Run:
    """A run folder: what was tried, what is on the front, and a way to take a member away.

    Args:
        place: The run folder, or its URI on an object store; what is new there is downloaded now.

    Attributes:
        place: As it was named.
        folder: On this machine: of a URI the working copy.
    """

    place: str
    folder: Path

    def __init__(self, place: str | Path) -> None:
        object.__setattr__(self, "place", str(place if is_uri(place) else Path(place)))
        object.__setattr__(self, "folder", opened(place))
        if not (self.folder / CONFIG).is_file():
            raise ConfigError(
                f"`RUN_DIR` (={place}) must be a run folder: it has no {CONFIG}. "
                "`prune-search list` shows the runs."
            )

    @property
    def config(self) -> SearchConfig:
        """The resolved config."""
        return load_config(self.folder / CONFIG)

    @property
    def baseline(self) -> dict[str, Any]:
        """The dense model's metrics (empty before it was measured)."""
        path = self.folder / BASELINE
        if not path.exists():
            return {}
        read_as(path, _Measured)  # or say what is wrong
        return dict(read_json(path))

    @property
    def environment(self) -> dict[str, Any]:
        """Versions and hardware of the machine that drove the run."""
        return read_as(self.folder / ENVIRONMENT, dict[str, Any])

    @property
    def times(self) -> dict[str, float]:
        """Seconds of each part of the run, over all its sessions."""
        path = self.folder / TIMES
        return read_as(path, dict[str, float]) if path.exists() else {}

    def results(self) -> list[TrialResult]:
        """All finished trials."""
        return Store(self.folder).read()

    @property
    def finished(self) -> bool:
        """Whether all trials were started and none waits to be promoted."""
        config, results = self.config, self.results()
        return len(results) >= config.search.trials and not ladder_of(config, results).promote()

    def trials(self) -> pd.DataFrame:
        """All finished trials as a data frame, one row each (columns: results/README.md)."""
        return Store(self.folder).frame()

    def front_results(self, objectives: Mapping[str, str] | None = None) -> list[TrialResult]:
        """The non-dominated completed trials, in the run's objectives or in others."""
        return front_of(self.results(), objectives or self.config.objectives)

    def front(self) -> pd.DataFrame:
        """The front as a data frame, sorted as the printed table."""
        frame = self.trials().set_index("trial_id", drop=False)
        return frame.loc[[result.trial_id for result in self.front_results()]]

    def hypervolume(self) -> float | None:
        """Hypervolume of the front against the run's fixed reference point."""
        baseline, objectives = self.baseline, self.config.objectives
        if not baseline or any(dense_value(baseline, m) is None for m in objectives):
            return None  # the dense model is not wholly measured yet
        try:
            return front_hypervolume(self.results(), baseline, objectives)
        except KeyError as error:
            raise ConfigError(
                f"`{self.folder / BASELINE}` must hold {error}: it was measured. Restore the file "
                "from a copy."
            ) from error

    def choose(
        self,
        *,
        minimize: str | None = None,
        maximize: str | None = None,
        knee: bool = False,
        phrase: str | None = None,
        where: Sequence[str] = (),
        objectives: Mapping[str, str] | None = None,
    ) -> TrialResult:
        """One front member, asked for in exactly one of four ways.

        Args:
            minimize: Metric of which it has the least.
            maximize: Metric of which it has the most.
            knee: Whether it is the best compromise between the objectives.
            phrase: Plain words, such as `fastest within 1 %` (search/choose.py).
            where: Bounds that it satisfies, such as `accuracy_drop <= 0.01`.
            objectives: Of the front; the run's own if None.

        Raises:
            ConfigError: If the wish is malformed, or no member is within the bounds.
        """
        wish = (
            Wish.of(minimize=minimize, maximize=maximize, knee=knee, phrase=phrase, where=where)
            or Wish()
        )
        objectives = objectives or self.config.objectives
        return choose(
            self.front_results(objectives),
            wish.minimize,
            wish.maximize,
            wish.where,
            objectives if wish.knee else None,
        )

    def plot(
        self, path: str | Path | None = None, x: str | None = None, y: str | None = None
    ) -> Picture:
        """Draws trials, front, dense baseline and controls; a notebook shows the picture.

        Args:
            path: Where it is written too; the ending says the format: png, svg or pdf.
            x: Metric of the horizontal axis; the first objective that is a cost by default.
            y: Metric of the vertical axis.

        Raises:
            ConfigError: If a metric or the format is unknown, or the path cannot be written.
        """
        from .notebook import Picture
        from .plot import front_figure

        config = self.config
        x, y = axes(config.objectives, x, y)
        if path is not None:
            check_writable(Path(path), "--plot")
        dense = {**self.baseline, "speedup": 1.0, "accuracy_drop": 0.0}
        figure = front_figure(self.results(), dense, x=x, y=y, title=config.name)
        picture = Picture(figure)
        if path is not None:
            picture.save(path)
        return picture

    def __rich__(self) -> RenderableType:
        """How far it is, and its front."""
        from .notebook import run_tables

        return run_tables(self)

    def _repr_html_(self) -> str:
        from .notebook import as_html, run_tables

        return as_html(run_tables(self))

    def export(
        self,
        out: str | Path,
        *,
        trial: str | None = None,
        minimize: str | None = None,
        maximize: str | None = None,
        knee: bool = False,
        phrase: str | None = None,
        where: Sequence[str] = (),
        formats: Sequence[str] = ("safetensors",),
    ) -> Path:
        """Writes one front member as a folder that `load_pruned` reads; returns the folder.

        Args:
            out: The new folder.
            trial: The member; None chooses one.
            minimize: As in `choose`, like the next four.
            maximize: See there.
            knee: See there.
            phrase: See there.
            where: See there.
            formats: `safetensors` (always written), `pt2`, `onnx`; `load.py` loads the first.

        Raises:
            ConfigError: If the member or the folder is not to be had.
            ExportError: If a form cannot be written or proven; nothing is left then.
        """
        from .dense import DENSE_WEIGHTS
        from .export import export_member
        from .portable import check_formats

        formats = check_formats(formats)
        if trial is not None:
            member = next((r for r in self.results() if r.trial_id == trial), None)
            if member is None:
                raise ConfigError(
                    f"`--trial` (={trial}) must be a trial of {self.folder}. `prune-search front` "
                    "shows the exportable ones."
                )
        else:
            member = self.choose(
                minimize=minimize, maximize=maximize, knee=knee, phrase=phrase, where=where
            )
        files = (member.recipe, member.weights, DENSE_WEIGHTS)
        fetch(self.place, [name for name in files if name])
        return export_member(self, member, Path(out), formats)


def run(
    config: SearchConfig | Mapping[str, Any] | str | Path,
    *,
    out: str | Path | None = None,
    address: str | None = None,
    progress: Progress | None = None,
) -> Run:
    """Runs a search to its end.

    Args:
        config: A config, its mapping, or its YAML file.
        out: The run folder, or a URI of an object store; `results/NAME` if None. It must not
            exist, or be empty.
        address: A Ray cluster; None starts a local Ray.
        progress: Where to report; None is silent.

    Raises:
        ConfigError: If the input is wrong. Nothing was trained or written then.
        KeyboardInterrupt: At Ctrl-C or SIGTERM: the first lets running trials end, the second
            does not. `resume` goes on.
    """
    if isinstance(config, str | Path):
        config = load_config(config)
    elif not isinstance(config, SearchConfig):
        config = parse_config(config)
    check_names(config)
    place = out if out is not None else Path("results") / config.name
    check_new_folder(place)
    return _execute(absolute(config), place, address, progress)


def resume(
    folder: str | Path,
    *,
    trials: int | None = None,
    overrides: Sequence[str] = (),
    allow_space_change: bool = False,
    address: str | None = None,
    progress: Progress | None = None,
) -> Run:
    """Finishes an interrupted run: runs what its ledger lacks, and nothing twice.

    Args:
        folder: The run folder, or its URI.
        trials: A new total number of trials (`extend`); None keeps the config's.
        overrides: `key.sub=value` assignments, applied to the config in order.
        allow_space_change: Whether another search space than the run began with is accepted.
        address: A Ray cluster; None starts a local Ray.
        progress: Where to report; None is silent.

    Raises:
        ConfigError: If the run would no longer be the same (search/changes.py).
        LedgerError: If the run folder cannot be written any more.
        KeyboardInterrupt: As `run` does.
    """
    one = Run(folder)
    config = load_config(one.folder / CONFIG, overrides)
    check_names(config, one.folder / CONFIG, overrides)
    if trials is not None:
        results = one.results()
        if trials < len(results):
            raise ConfigError(
                f"`trials` (={trials}) must be at least {len(results)}: so many are "
                "finished. Name a larger total."
            )
        data = config.model_dump(mode="json")
        changed = {"trials": trials, "plateau_after": sum(map(has_ended, results))}
        config = parse_config(data | {"search": data["search"] | changed})
    return _execute(
        absolute(config), one.place, address, progress, allow_space_change=allow_space_change
    )


def find_runs(folder: str | Path) -> Sequence[str | Path]:
    """The run folders directly inside `folder`, by name; of a URI their URIs.

    Raises:
        ConfigError: If there is no such folder.
    """
    if is_uri(folder):
        remote = Remote(str(folder))
        return [join(remote.uri, name) for name in remote.folders_with(CONFIG)]
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(
            f"`RESULTS_DIR` (={folder}) must be a folder with runs. Start one with "
            "`prune-search run`, or name another."
        )
    return sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))


def check_new_folder(place: str | Path) -> None:
    """Refuses a run folder that is in use or cannot be written.

    Raises:
        ConfigError: Which names the folder and the fix.
    """
    folder = folder_of(place)
    if names := contents(place):
        if CONFIG in names and "baseline.json" not in names:
            return  # a run that ended before its dense model was there: nothing is lost
        if CONFIG in names:
            name = shlex.quote(str(place))
            fix = (
                f"Finish it with `prune-search resume {name}`, add trials with "
                f"`prune-search extend {name} --trials N`, or choose another --out."
            )
        else:
            fix = "Choose another --out."
        raise ConfigError(f"`--out` (={place}) must not exist yet or be empty. {fix}")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"`--out` (={folder}) must be a folder: it is a file. Choose another.")
    check_writable(folder)


def check_writable(path: Path, option: str = "--out") -> None:
    """Refuses a path that cannot be created.

    Raises:
        ConfigError: Which names the first folder that is in the way.
    """
    if re.match(r"[A-Za-z0-9+.-]{2,}:/", str(path)):
        raise ConfigError(
            f"`{option}` (={path}) must be a path on this machine, not a URI. Choose another."
        )
    parent = next(p for p in [path.absolute(), *path.absolute().parents] if p.exists())
    if not os.access(parent, os.W_OK | (os.X_OK if parent.is_dir() else 0)) or (
        parent != path.absolute() and not parent.is_dir()
    ):
        raise ConfigError(
            f"`{option}` (={path}) must be writable: {parent} is not. Choose another {option}."
        )


def axes(objectives: Mapping[str, str], x: str | None, y: str | None) -> tuple[str, str]:
    """The two metrics to plot: the asked ones, else the cost and the quality objective."""
    names = list(objectives)
    quality = next((n for n in names if objectives[n] == "maximize"), names[0])
    cost = next((n for n in names if n != quality), "macs")
    return x or cost, y or quality


def _execute(
    config: SearchConfig,
    place: str | Path,
    address: str | None,
    progress: Progress | None,
    *,
    allow_space_change: bool | None = None,
) -> Run:
    """Runs a new search, or (where `allow_space_change` is not None) goes on with one."""
    from .cluster import check_local, connecting, probe_resources

    progress = progress or Progress.silent()
    place = place if is_uri(place) else Path(place).absolute()  # Ray's workers start elsewhere
    folder = folder_of(place)
    check_trackers(config)
    clock, warnings = _Clock(), ignored_settings(config)
    new = allow_space_change is None
    resources = probe_resources(config).values()
    with ExitStack() as run_folder, connecting(address, resources) as wait_for_ray:
        with clock("load_s"):  # the imports too: they take seconds
            from .changes import remember, settle_changes
            from .fleet import Fleet
            from .setup import make_space, pose

            problem = pose(config)
            task = problem.task
            asked, config = config, settled(config, task.num_train, len(task.data.val))
            problem = dataclasses.replace(problem, config=config)
            if address in LOCAL:
                check_local(config)
        if address not in LOCAL:
            wait_for_ray()  # before anything is written
        session = run_folder.enter_context(driving(place, progress.say, new=new))
        sweep_unfinished(folder)
        run_folder.callback(_add_times, folder, clock.seconds)
        for line in warnings if new else ():
            progress.say(f"warning: {line}")
        if asked != config and config.recover.epochs > 0 and not config.search.early_stop:
            progress.say(
                "every trial is fine-tuned to the end: too short for stopping early to pay "
                "(search.early_stop: auto)"
            )
        if config.resources.evaluate and len(fidelities(config)) == 1:
            progress.say(
                "warning: resources.evaluate is ignored: no trial waits at fidelity 0. Set "
                "search.early_stop: true, and recover.epochs"
            )
        if allow_space_change is None:
            remember(folder, problem)
        else:
            changes = settle_changes(folder, problem, allow_space_change=allow_space_change)
            for line in changes:
                progress.say(f"search space changed: {line}")
        _describe(config, folder, new=new)
        with clock("ray_start_s"):
            wait_for_ray()
            fleet = Fleet(problem, folder, progress.say)
        with clock("load_s"):  # the rest, while the probe starts
            from . import driver  # noqa: F401  # Tune's, the slowest
            from .coordinator import Coordinator
            from .costs import costs_of
            from .dense import prepare_dense, with_references
            from .seeds import default_seeds
            from .sensitivity import measure_sensitivity
            from .surrogate.hints import hints_of

        with clock("dense_s"):
            baseline = prepare_dense(problem, folder, progress.say)
        with clock("blocks_s"):
            space = make_space(problem, folder, progress.say)
        progress.say(f"space: {space.size_hint}")
        with clock("sensitivity_s"):
            table = measure_sensitivity(problem, space, baseline.accuracy, folder, progress.say)
        with clock("reference_s"):
            measured = fleet.measure_references()
            baseline = with_references(baseline, measured, folder, progress.say)
        with clock("sensitivity_s"):
            costs = costs_of(problem, space, table, folder, fleet.measure_layers)
            seeds = default_seeds(space, config, table, costs)
        hints = hints_of(costs, table)

        reports = Reports(config, folder, progress.say)
        run_folder.callback(reports.close)

        def recorded(result: TrialResult) -> None:
            session.changed()
            progress.finished(result)
            reports.trial(
                result,
                coordinator.front,
                hypervolume=coordinator.hypervolume,
                trials=len(coordinator.results),
            )

        coordinator = Coordinator(config, space, baseline, folder, recorded, seeds, hints)
        session.then(coordinator.abandon)
        with (
            clock("trials_s"),
            stopping_gently(coordinator.stop) as signals,
            progress.live(coordinator),
        ):
            try:
                fleet.run(coordinator, progress.running)
            finally:
                coordinator.close()
        if signals and coordinator.stopped is not None:
            raise KeyboardInterrupt  # something is left to do
    return Run(place)


def _describe(config: SearchConfig, folder: Path, *, new: bool) -> None:
    from .environment import environment

    if new:
        write_json(folder / ENVIRONMENT, environment())
    atomic_write_bytes(folder / CONFIG, dump_config(config).encode())


def absolute(config: SearchConfig) -> SearchConfig:
    """Paths made absolute, so that the run can be resumed from any folder."""
    model, data = config.model, config.data
    if model.checkpoint is not None:
        path = str(Path(model.checkpoint).expanduser().absolute())
        model = model.model_copy(update={"checkpoint": path})
    if data.root is not None:
        data = data.model_copy(update={"root": str(Path(data.root).expanduser().absolute())})
    return config.model_copy(update={"model": model, "data": data})


class _Clock:
    """Adds up seconds by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start


def _add_times(folder: Path, seconds: Mapping[str, float]) -> None:
    path = folder / TIMES
    before = read_as(path, dict[str, float]) if path.exists() else {}
    with suppress(OSError):  # a full disk: what ended the run is the error to be told
        write_json(path, before | {k: before.get(k, 0.0) + v for k, v in seconds.items()})
