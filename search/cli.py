"""The command line. Heavy libraries are imported inside the commands that need them."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_bench import bench
from .cli_cache import cache
from .cli_common import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_WRONG_INPUT,
    Address,
    AsJson,
    ConfigFile,
    JobServer,
    Overrides,
    Results,
    RunDir,
    SpaceChange,
    Trials,
    checked,
    complain,
    err,
    import_user_code,
    load,
    out,
    print_wide,
)
from .cli_front import export, front, query
from .cli_jobs import follow, job_server, remote_status, stop, submit
from .cli_names import datasets, doctor, methods, models, schema
from .cli_report import report
from .cli_serve import serve
from .yaml_source import ConfigError

if TYPE_CHECKING:
    from .config import SearchConfig
    from .runs import Run

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Structured pruning of vision models as a multi-objective search on Ray.",
)
app.add_typer(bench, name="bench")


def main() -> None:
    """Entry point: turns errors into messages and exit codes."""
    try:
        app(standalone_mode=True)
    except ConfigError as error:
        complain(str(error))
        sys.exit(EXIT_WRONG_INPUT)
    except KeyboardInterrupt:
        complain("Interrupted.")
        sys.exit(EXIT_INTERRUPTED)
    except OSError as error:  # a file that cannot be read or written
        complain(f"{error}.")
        sys.exit(EXIT_FAILED)


@app.command("run")
def run_command(
    config: ConfigFile,
    set_: Overrides = None,
    out_dir: Annotated[
        str | None, typer.Option("--out", help="The run folder, or its URI on an object store.")
    ] = None,
    trials: Trials = None,
    address: Address = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, run nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Search: train or load the dense model, run the trials, print the front."""
    from .runs import check_new_folder

    overrides = [*(set_ or []), *([f"search.trials={trials}"] if trials else [])]
    search = load(config, overrides)
    folder = out_dir or Path("results") / search.name
    check_new_folder(folder)
    if dry_run:
        _print_check(search, as_json)
        return
    from .runs import run

    _finish(folder, as_json, lambda progress: run(
        search, out=folder, address=address, progress=progress
    ))  # fmt: skip


@app.command()
def resume(
    run_dir: RunDir,
    set_: Overrides = None,
    allow_space_change: SpaceChange = False,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Finish an interrupted run; no completed trial is run again."""
    from .runs import Run, resume

    import_user_code(Run(run_dir).config)
    _finish(run_dir, as_json, lambda progress: resume(
        run_dir, overrides=set_ or (), allow_space_change=allow_space_change,
        address=address, progress=progress,
    ))  # fmt: skip


@app.command()
def extend(
    run_dir: RunDir,
    trials: Annotated[int, typer.Option(min=1, help="How many trials to add.")],
    set_: Overrides = None,
    allow_space_change: SpaceChange = False,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Add trials to a run."""
    from .runs import Run, resume

    config = Run(run_dir).config
    import_user_code(config)
    total = config.search.trials + trials
    _finish(run_dir, as_json, lambda progress: resume(
        run_dir, trials=total, overrides=set_ or (), allow_space_change=allow_space_change,
        address=address, progress=progress,
    ))  # fmt: skip


@app.command()
def status(
    run_dir: RunDir,
    address: JobServer = None,
    results: Results = None,
    as_json: AsJson = False,
) -> None:
    """Show how far a run is and where its time went."""
    from .runs import Run
    from .tables import status_of, status_table

    if (server := job_server(address, results)) is not None:
        return remote_status(run_dir, server, results, as_json)
    found = status_of(Run(run_dir))
    out.print_json(json.dumps(found)) if as_json else out.print(status_table(found))


@app.command("list")
def list_command(
    results_dir: Annotated[str, typer.Argument(metavar="[RESULTS_DIR]")] = "results",
    as_json: AsJson = False,
) -> None:
    """List the runs in a folder."""
    from .runs import Run, find_runs
    from .tables import runs_table, status_of

    found = []
    for folder in find_runs(results_dir):
        try:
            found.append(status_of(Run(folder)))
        except ConfigError as error:  # the others are shown
            complain(str(error))
    out.print_json(json.dumps(found)) if as_json else out.print(runs_table(found, results_dir))


@app.command()
def journal(run_dir: RunDir) -> None:
    """Write RUN_DIR/study.journal, which optuna-dashboard opens."""
    from .journal import write_journal
    from .runs import Run

    out.print(
        str(checked(lambda: write_journal(Run(run_dir)))),
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def ablate(
    paper: Annotated[
        str, typer.Argument(metavar="PAPER", help="dsd, fgp, blockwipg, blocks or layers.")
    ],
    table: Annotated[
        str | None,
        typer.Argument(
            metavar="[TABLE]",
            help="dsd: 5 to 12; fgp: 1, 3, fig3a, fig3b, fig4; blockwipg: 2a, 3; blocks: fig2.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="CONFIG.yaml", help="Model and data; ResNet-20 on digits if none."),
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="How many seeds.")] = None,
    out_dir: Annotated[Path | None, typer.Option("--out", help="Folder of the results.")] = None,
    set_: Overrides = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Re-run an ablation table of a paper; the same command again finishes what is missing."""
    from .ablate.run import (
        DEFAULT_CONFIG,
        NothingCompletedError,
        ablate,
        find_study,
        results_folder,
    )
    from .config import parse_config
    from .progress import Progress
    from .store import read_results

    study = find_study(paper, table)
    overrides = set_ or []
    if config is not None:
        search = load(config, overrides)
    else:
        search = parse_config(DEFAULT_CONFIG, overrides)
        import_user_code(search)

    command = shlex.join(["prune-search", *sys.argv[1:]])
    try:
        text = ablate(
            paper, table, search, out_dir, seeds,
            address=address, progress=Progress(err), command=command,
        )  # fmt: skip
    except KeyboardInterrupt:
        complain("Interrupted. Every finished job is stored: repeat the command to go on.")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except NothingCompletedError as error:
        complain(str(error))
        raise typer.Exit(EXIT_FAILED) from None
    if as_json:
        rows = read_results(f"{results_folder(study, out_dir)}.parquet")
        out.print_json(json.dumps([dataclasses.asdict(row) for row in rows]))
    else:
        out.print(text, markup=False, highlight=False, soft_wrap=True)


@app.command()
def sparse(
    run_dir: RunDir,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the histograms of the scales.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the sparse trainings of a run or an ablation, and how batch-norm scales moved."""
    from .runs import check_writable
    from .sparse import plot_sparse, sparse_table, sparse_trainings
    from .storage import opened

    trainings = sparse_trainings(opened(run_dir))
    if plot is not None:
        check_writable(plot, "--plot")
        plot_sparse(trainings, plot)
        err.print(f"wrote {plot}", markup=False, highlight=False)
    out.print_json(json.dumps(trainings)) if as_json else out.print(sparse_table(trainings))


@app.command()
def check(config: ConfigFile, set_: Overrides = None, as_json: AsJson = False) -> None:
    """Show what can be removed, what cannot and why; run no trial."""
    _print_check(load(config, set_ or []), as_json)


for _command in (
    front, export, query, submit, follow, stop, serve, cache, methods, models, datasets, schema,
    doctor, report,
):  # fmt: skip
    app.command()(_command)


# --- helpers ---------------------------------------------------------------------------------


def _finish(folder: str | Path, as_json: bool, work: Callable[[Any], Run]) -> None:
    """Does the work with progress shown, prints the front; an interrupt says how to resume."""
    from .locks import StorageError
    from .mirror import folder_of
    from .progress import Progress
    from .store import LedgerError
    from .tables import correlation_rows, front_rows, front_table, status_of, time_table

    again = f"prune-search resume {shlex.quote(str(folder))}"
    try:
        run = work(Progress(err))
    except KeyboardInterrupt:
        if (folder_of(folder) / "config.yaml").exists():
            complain(f"Interrupted. Every finished trial is stored. Continue with `{again}`.")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except (LedgerError, OSError) as error:
        complain(
            f"{error}. Every trial that finished before is stored. Make room or access, then "
            f"continue with `{again}`."
        )
        raise typer.Exit(EXIT_FAILED) from None
    except StorageError as error:
        complain(str(error))
        raise typer.Exit(EXIT_FAILED) from None
    if as_json:
        out.print_json(
            json.dumps({"run": str(folder), "baseline": run.baseline, "front": front_rows(run)})
        )
    else:
        print_wide(front_table(run))
        out.print(time_table(run))
        for label, text in correlation_rows(status_of(run)["rank_correlations"]):
            out.print(f"{label}: {text}", markup=False, highlight=False, soft_wrap=True)
        out.print(
            f"run folder: {folder}\nexport the fastest within 1 %: prune-search export "
            f"{shlex.quote(str(folder))} "
            '--min latency_ms --where "accuracy_drop<=0.01" --out exported',
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    if not any(result.status == "completed" for result in run.results()):
        complain("No trial was completed. `prune-search status` shows the causes.")
        raise typer.Exit(EXIT_FAILED)


def _print_check(config: SearchConfig, as_json: bool) -> None:
    from .checks import check_report
    from .tables import check_tables

    report = check_report(config)
    if as_json:
        out.print_json(json.dumps(report))
        return
    for part in check_tables(report):
        print_wide(part)


if __name__ == "__main__":
    main()
