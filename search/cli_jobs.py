"""Searches on a Ray cluster from any machine: submitted as jobs, followed, asked and stopped."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_common import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    AsJson,
    ConfigFile,
    JobServer,
    Overrides,
    Results,
    SpaceChange,
    Trials,
    complain,
    err,
    load,
    out,
    print_wide,
)
from .yaml_source import ConfigError, printable

if TYPE_CHECKING:
    from .jobs import SubmittedRun
    from .jobs_node import Answer

AtServer = Annotated[
    str, typer.Option("--address", metavar="http://HEAD:8265", help="The cluster's job server.")
]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="The run's name.")]


def submit(
    config: ConfigFile,
    address: AtServer,
    set_: Overrides = None,
    trials: Trials = None,
    results: Results = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run of this name and its own config.")
    ] = False,
    extend: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Add N trials to the run of this name.")
    ] = None,
    allow_space_change: SpaceChange = False,
    no_follow: Annotated[
        bool, typer.Option("--no-follow", help="Return as soon as the job is sent.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Send a search to a Ray cluster as a job and follow its log; Ctrl-C does not stop it.

    What is sent: the config, the modules of this folder that the model's module imports, and a
    checkpoint of at most 100 MiB. Data is read on the cluster.
    """
    from .job_server import check_address, is_open
    from .jobs import check_results, find_run
    from .parcel import pack

    check_address(address)
    check_results(results)
    _check_going_on(resume, extend, trials, allow_space_change)
    overrides = [*(set_ or []), *([f"search.trials={trials}"] if trials else [])]
    search = load(config, overrides)
    parcel = pack(config, search, overrides)
    for note in parcel.notes:
        complain(f"note: {note}")
    with _cluster_errors():
        run = find_run(search.name, address, results)
        if is_open(address):
            complain(
                f"warning: {address} answers without a token: WHOEVER REACHES IT CAN RUN CODE "
                "THERE. Start the cluster with RAY_AUTH_MODE=token."
            )
        going_on = resume or extend is not None
        asked = set_ or [] if going_on else parcel.overrides
        job = run.submit(parcel, *_command(asked, resume, extend, allow_space_change))
        if no_follow:
            _print_sent(run, job, as_json)
        else:
            _follow(run, job, as_json)


def follow(
    run: RunName, address: AtServer, results: Results = None, as_json: AsJson = False
) -> None:
    """Follow the log of a submitted search from its beginning; Ctrl-C does not stop the search."""
    from .jobs import find_run

    with _cluster_errors():
        found = find_run(run, address, results)
        if found.job is None:
            raise ConfigError(
                f"`RUN` (={run}) must be a run that was submitted to {address}: it knows none of "
                "that name. `ray job list` shows its jobs."
            )
        _follow(found, found.job.submission_id, as_json)


def stop(
    run: Annotated[
        str, typer.Argument(metavar="RUN_DIR", help="A run folder; with --address a run's name.")
    ],
    address: JobServer = None,
    results: Results = None,
    as_json: AsJson = False,
) -> None:
    """Stop a search as Ctrl-C does: running trials end first, and the run can be resumed.

    The same command again stops it at once.
    """
    if (server := job_server(address, results)) is not None:
        from .jobs import find_run

        with _cluster_errors():
            said = find_run(run, server, results).stop()
        document: dict[str, Any] = {"run": run, "address": server, "done": said}
    else:
        from .runs import Run
        from .stopping import stop as stop_here

        process = stop_here(Run(run).folder, run)
        said = (
            f"process {process.pid} was asked to stop: running trials end first; once more ends "
            f"them too. Continue with `prune-search resume {run}`"
        )
        document = {"run": run, "pid": process.pid, "host": process.host}
    out.print_json(json.dumps(document)) if as_json else complain(said)


# --- status, front and export of a run on a cluster ------------------------------------------


def job_server(address: str | None, results: str | None) -> str | None:
    """The job server to ask; None for a run folder of this machine."""
    if address is None and results is not None:
        raise ConfigError(
            f"`--results` (={results}) must be given with --address: it is a folder of the "
            "cluster's head. Add --address http://HEAD:8265, or name the run folder."
        )
    return address


def remote_status(name: str, address: str, results: str | None, as_json: bool) -> None:
    """`status` of a submitted run, with the job that drives it."""
    from .tables import status_table

    run, answer = _ask(name, address, results, "status", "{run}", "--json")
    found = json.loads(answer.out)
    if run.job is not None:
        found["job"] = {"id": run.job.submission_id, "status": run.job.status.value}
    if as_json:
        out.print_json(json.dumps(found))
        return
    table = status_table(found)
    if run.job is not None:
        table.add_row("job", f"{run.job.submission_id} {run.job.status.value}")
    out.print(table)


def remote_front(
    name: str,
    address: str,
    results: str | None,
    asked: Mapping[str, Any],
    plot: Path | None,
    as_json: bool,
) -> None:
    """`front` of a submitted run; the picture is drawn on the head and written here."""
    from .runs import check_writable
    from .tables import result_of, table_of_front

    options = _options(asked)
    if plot is not None:
        check_writable(plot, "--plot")
        options += ["--plot", f"{{files}}/front{plot.suffix}"]
    _, answer = _ask(name, address, results, "front", "{run}", "--json", *options)
    found = json.loads(answer.out)
    if plot is not None:
        plot.parent.mkdir(parents=True, exist_ok=True)
        plot.write_bytes(answer.files[f"front{plot.suffix}"])
        err.print(f"wrote {plot}", markup=False, highlight=False)
    if as_json:
        out.print_json(json.dumps(found))
    else:
        baseline, members = found["baseline"], [result_of(row) for row in found["front"]]
        probes = baseline.get("latency_by_probe", {})
        print_wide(table_of_front(name, baseline, members, probes))


def remote_export(
    name: str,
    address: str,
    results: str | None,
    folder: Path,
    options: Mapping[str, Any],
) -> dict[str, str]:
    """`export` of a submitted run into a folder of this machine; returns its summary."""
    from .runs import check_writable

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"`--out` (={folder}) must not exist yet or be empty. Choose another.")
    check_writable(folder)
    _, answer = _ask(
        name, address, results, "export", "{run}", "--json", "--out", "{files}/exported",
        *_options(options),
    )  # fmt: skip
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder.parent) as scratch:
        for path, data in answer.files.items():
            target = Path(scratch) / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        (Path(scratch) / "exported").replace(folder)
    summary: dict[str, str] = json.loads(answer.out)
    return summary | {"folder": str(folder)}


# --- helpers ---------------------------------------------------------------------------------


def _check_going_on(
    resume: bool, extend: int | None, trials: int | None, allow_space_change: bool
) -> None:
    if sum((resume, extend is not None, trials is not None)) > 1:
        raise ConfigError(
            "`--resume`, `--extend` and `--trials` must not be combined. Choose one."
        )
    if allow_space_change and not resume and extend is None:
        raise ConfigError(
            "`--allow-space-change` must be given with --resume or --extend: a new run has no "
            "other space. Leave it out."
        )


def _command(
    set_: Sequence[str], resume: bool, extend: int | None, allow_space_change: bool
) -> list[str]:
    """What the job runs on the head; a run that goes on has its own config there."""
    sets = [f"--set={override}" for override in set_]
    if not resume and extend is None:
        return ["run", "config.yaml", "--out", "{run}", "--address", "auto", *sets]
    command = ["resume", "{run}"] if resume else ["extend", "{run}", "--trials", str(extend)]
    command += ["--allow-space-change"] if allow_space_change else []
    return [*command, "--address", "auto", *sets]


def _options(values: Mapping[str, Any]) -> list[str]:
    """`{"--x": "macs"}` as arguments; None is left out, a list is repeated, True is a flag."""
    flags = [name for name, value in values.items() if value is True]
    given = {
        k: [v] if isinstance(v, str) else v or [] for k, v in values.items() if k not in flags
    }
    return flags + [f"{name}={value}" for name, items in given.items() for value in items]


def _ask(
    name: str, address: str, results: str | None, *command: str
) -> tuple[SubmittedRun, Answer]:
    """Runs a command on the head; what it says of mistakes is said here, with its exit code."""
    from .jobs import find_run

    with _cluster_errors():
        run = find_run(name, address, results)
        answer = run.ask(*command)
    if answer.version != (here := version("prune-search")):
        complain(f"note: the cluster has prune-search {answer.version}, this machine {here}")
    for line in answer.err.splitlines():
        if not line.startswith("wrote "):  # of a file on the head
            print(printable(line), file=sys.stderr)
    if answer.code:
        if run.active:
            complain(f"job {run.job.submission_id} is {run.job.status.value}")
        raise typer.Exit(answer.code)
    return run, answer


def _follow(run: SubmittedRun, job: str, as_json: bool) -> None:
    from .jobs import exit_code, follow, reason_of

    def write(text: str) -> None:
        try:
            print(text, end="", flush=True, file=sys.stderr if as_json else sys.stdout)
        except OSError:  # nobody reads it any more
            raise KeyboardInterrupt from None

    here = f"{run.name} --address {run.address}"
    try:
        info = follow(run, job, write, complain)
    except KeyboardInterrupt:
        complain(
            f"No longer following; the search goes on. Follow it again with `prune-search follow "
            f"{here}`, stop it with `prune-search stop {here}`."
        )
        raise typer.Exit(EXIT_INTERRUPTED) from None
    code = exit_code(info)
    if info.status.value == "FAILED" and info.driver_exit_code in (None, 127):
        complain(f"the job failed: {reason_of(info)}")
    if as_json:
        _print_job(run, job, info.status.value, code)
    else:
        complain(
            f"job {job} {info.status.value}; the run is {run.place}. "
            f"See its front with `prune-search front {here}`."
        )
    raise typer.Exit(code)


def _print_sent(run: SubmittedRun, job: str, as_json: bool) -> None:
    here = f"{run.name} --address {run.address}"
    if as_json:
        _print_job(run, job, "SUBMITTED", None)
    else:
        complain(f"job {job} is sent. Follow it with `prune-search follow {here}`.")


def _print_job(run: SubmittedRun, job: str, status: str, code: int | None) -> None:
    document = {
        "run": run.name,
        "job": job,
        "address": run.address,
        "results": run.results,
        "status": status,
        "exit_code": code,
    }
    out.print_json(json.dumps(document))


@contextmanager
def _cluster_errors() -> Iterator[None]:
    """What the cluster fails to do is one message and exit code 1."""
    from .job_server import JobsError

    try:
        yield
    except JobsError as error:
        complain(f"{error}.")
        raise typer.Exit(EXIT_FAILED) from None
