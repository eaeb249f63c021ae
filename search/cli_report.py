"""`prune-search report`: a run as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_common import RunDir, checked, out


def report(
    run_dir: RunDir,
    out_file: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE.html", help="RUN_DIR/report.html by default."),
    ] = None,
    trial: Annotated[
        str | None, typer.Option(metavar="ID", help="The trial that is shown first.")
    ] = None,
) -> None:
    """Write a run, in any state, as one HTML file that needs no network."""
    from .report import write_report
    from .runs import Run

    place = checked(lambda: write_report(Run(run_dir), out_file, trial=trial))
    out.print(place, markup=False, highlight=False, soft_wrap=True)
