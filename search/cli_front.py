"""What a run has found: its front, one member chosen and exported, SQL over runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_common import (
    EXIT_FAILED,
    AsJson,
    JobServer,
    Results,
    RunDir,
    checked,
    complain,
    err,
    import_user_code,
    out,
    print_wide,
)
from .cli_jobs import job_server, remote_export, remote_front
from .yaml_source import ConfigError

if TYPE_CHECKING:
    from .config import SearchConfig
    from .runs import Run

Minimize = Annotated[
    str | None, typer.Option("--min", metavar="METRIC", help="The member with the least.")
]
Maximize = Annotated[
    str | None, typer.Option("--max", metavar="METRIC", help="The member with the most.")
]
Knee = Annotated[bool, typer.Option("--knee", help="The best compromise of the objectives.")]
Phrase = Annotated[
    str | None,
    typer.Option(
        "--choose", metavar="WORDS", help="In words: 'fastest within 1 %', 'knee under 3 ms'."
    ),
]
Where = Annotated[
    list[str] | None,
    typer.Option(metavar='"METRIC<=NUMBER"', help="Only members that satisfy this."),
]


def front(
    run_dir: RunDir,
    other: Annotated[
        str | None, typer.Argument(metavar="[OTHER]", help="With --diff, the other run.")
    ] = None,
    x: Annotated[str | None, typer.Option(help="Metric on the horizontal axis.")] = None,
    y: Annotated[str | None, typer.Option(help="Metric on the vertical axis.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw it.")] = None,
    diff: Annotated[
        bool, typer.Option("--diff", help="Compare two runs: front --diff A B.")
    ] = False,
    minimize: Minimize = None,
    maximize: Maximize = None,
    knee: Knee = False,
    choose: Phrase = None,
    where: Where = None,
    address: JobServer = None,
    results: Results = None,
    as_json: AsJson = False,
) -> None:
    """Print the Pareto front with the dense baseline beside it, or one member, or two fronts."""
    from .choose import Wish

    wish = Wish.of(
        minimize=minimize, maximize=maximize, knee=knee, phrase=choose, where=where or ()
    )
    if diff or other is not None:
        refused = wish is not None or plot is not None or address is not None
        return _front_diff(run_dir, other, diff, refused, x, y, as_json)
    if (server := job_server(address, results)) is not None:
        asked = {"--x": x, "--y": y, **_asked(minimize, maximize, knee, choose, where)}
        return remote_front(run_dir, server, results, asked, plot, as_json)
    from .runs import Run
    from .tables import table_of_front

    run = Run(run_dir)
    objectives = _axes(run.config, x, y)
    if plot is not None:
        run.plot(plot, x, y)
        err.print(f"wrote {plot}", markup=False, highlight=False)
    if wish is None:
        members = run.front_results(objectives)
    else:
        members = [run.choose(
            minimize=wish.minimize, maximize=wish.maximize, knee=wish.knee, where=wish.where,
            objectives=objectives,
        )]  # fmt: skip
    if as_json:
        out.print_json(json.dumps(_front_document(run, members)))
    else:
        config = run.config
        print_wide(table_of_front(config.name, run.baseline, members, config.probes))


def export(
    run_dir: RunDir,
    out_dir: Annotated[Path, typer.Option("--out", metavar="DIR", help="The new folder.")],
    trial: Annotated[str | None, typer.Option(metavar="ID", help="This front member.")] = None,
    minimize: Minimize = None,
    maximize: Maximize = None,
    knee: Knee = False,
    choose: Phrase = None,
    where: Where = None,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="safetensors (the default, always written), pt2 or onnx; repeatable.",
        ),
    ] = None,
    address: JobServer = None,
    results: Results = None,
    as_json: AsJson = False,
) -> None:
    """Write a front member as a folder that loads without the search; prove and test it."""
    from .choose import Wish

    wish = Wish.of(
        minimize=minimize, maximize=maximize, knee=knee, phrase=choose,
        where=() if trial is not None else where or (),
    )  # fmt: skip
    _check_one(trial, wish, where)
    if (server := job_server(address, results)) is not None:
        asked = {
            "--trial": trial,
            "--format": formats,
            **_asked(minimize, maximize, knee, choose, where),
        }
        summary = remote_export(run_dir, server, results, out_dir, asked)
    else:
        summary = _export_here(run_dir, out_dir, trial, wish, formats or ["safetensors"])
    if as_json:
        out.print_json(json.dumps(summary))
    else:
        for name, value in summary.items():
            out.print(f"{name:>18}  {value}", markup=False, highlight=False, soft_wrap=True)


def query(
    place: Annotated[
        str, typer.Argument(metavar="RUN_OR_RESULTS_DIR", help="A run, or a folder of runs.")
    ],
    sql: Annotated[
        str, typer.Argument(metavar="SQL", help="A SELECT over trials, front and runs.")
    ],
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
) -> None:
    """Ask one run or many with SQL (DuckDB); nothing can be written, no file read.

    Example: prune-search query results "SELECT run, max(accuracy) FROM front GROUP BY run"
    """
    if as_json and as_csv:
        raise ConfigError("`--json` and `--csv` must not be combined. Choose one.")
    from .query import answer_rows, answer_table, query, write_csv

    answer, problems = query(place, sql)
    for problem in problems:
        complain(problem)
    if as_json:
        out.print_json(json.dumps(answer_rows(answer)))
    elif as_csv:
        write_csv(answer, sys.stdout)
    else:
        print_wide(answer_table(answer))


# --- helpers ---------------------------------------------------------------------------------


def _asked(
    minimize: str | None,
    maximize: str | None,
    knee: bool,
    choose: str | None,
    where: list[str] | None,
) -> dict[str, Any]:
    """The wish as options, for a run on a cluster."""
    return {
        "--min": minimize, "--max": maximize, "--knee": knee, "--choose": choose, "--where": where,
    }  # fmt: skip


def _check_one(trial: str | None, wish: Any, where: list[str] | None) -> None:
    if trial is not None and wish is not None:
        raise ConfigError(
            "`--trial` must not be combined with `--min`, `--max`, `--knee` or `--choose`. Choose "
            "one."
        )
    if trial is not None and where:
        raise ConfigError("`--where` must not be combined with `--trial`: it would be ignored.")
    if trial is None and wish is None:
        raise ConfigError(
            "`--trial`, `--min`, `--max`, `--knee` or `--choose` must be given: it says which "
            "member is exported. Write for example --choose 'fastest within 1 %'."
        )


def _export_here(
    run_dir: str, out_dir: Path, trial: str | None, wish: Any, formats: list[str]
) -> dict[str, str]:
    from .portable import ExportError
    from .runs import Run
    from .tables import export_summary

    run = Run(run_dir)
    import_user_code(run.config)
    chosen: dict[str, Any] = {"trial": trial}
    if wish is not None:
        chosen = {
            "minimize": wish.minimize, "maximize": wish.maximize, "knee": wish.knee,
            "where": wish.where,
        }  # fmt: skip
    try:
        checked(lambda: run.export(out_dir, formats=formats, **chosen))
    except ExportError as error:
        complain(str(error))
        raise typer.Exit(EXIT_FAILED) from None
    return export_summary(out_dir)


def _front_document(run: Run, members: list[Any]) -> dict[str, Any]:
    import dataclasses

    return {"baseline": run.baseline, "front": [dataclasses.asdict(one) for one in members]}


def _front_diff(
    run_dir: str,
    other: str | None,
    diff: bool,
    refused: bool,
    x: str | None,
    y: str | None,
    as_json: bool,
) -> None:
    if not diff:
        raise ConfigError(
            f"`OTHER` (={other}) must be given with --diff: front shows one run. Write "
            f"prune-search front --diff {run_dir} {other}."
        )
    if other is None:
        raise ConfigError("`--diff` must have two runs. Write prune-search front --diff A B.")
    if refused:
        raise ConfigError(
            "`--diff` must not be combined with a choice of one member, --plot or --address: it "
            "compares two whole fronts of this machine. Leave them out."
        )
    from .front_diff import diff_fronts, diff_tables
    from .runs import Run

    a, b = Run(run_dir), Run(other)
    found = diff_fronts(a, b, _axes(a.config, x, y))
    if as_json:
        out.print_json(json.dumps(found))
        return
    for part in diff_tables(found):
        print_wide(part)


def _axes(config: SearchConfig, x: str | None, y: str | None) -> dict[str, str] | None:
    """The two asked metrics as objectives; None when neither is asked."""
    from ..methods.names import nearest
    from .metrics import direction_of, metrics_of
    from .runs import axes

    known = metrics_of(config.probes)
    for option, metric in (("--x", x), ("--y", y)):
        if metric is not None and metric not in known:
            raise ConfigError(
                f"`{option}` (={metric}) must be one of {', '.join(known)}. "
                f"{nearest(metric, known)}".rstrip()
            )
    if x is None and y is None:
        return None
    x, y = axes(config.objectives, x, y)
    return {y: direction_of(y), x: direction_of(x)}
