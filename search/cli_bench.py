"""`prune-search bench`: the benchmarks as commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .cli_common import (
    AsJson,
    ConfigFile,
    Overrides,
    checked,
    err,
    load,
    out,
    print_wide,
)

bench = typer.Typer(no_args_is_help=True, help="Benchmarks that print one table each.")


@bench.command("blocks")
def bench_blocks_command(
    model: str = "resnet56",
    images: Annotated[int, typer.Option(min=1)] = 1000,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    as_json: AsJson = False,
) -> None:
    """Time block ranking by suffix-only evaluation against full forwards."""
    from .bench.blocks import bench_blocks, blocks_table

    result = checked(lambda: bench_blocks(model=model, images=images, rounds=rounds))
    if as_json:
        out.print_json(json.dumps(result))
    else:
        print_wide(blocks_table(result))


@bench.command("criteria")
def bench_criteria_command(
    model: str = "resnet56",
    images: Annotated[int, typer.Option(min=1)] = 512,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    as_json: AsJson = False,
) -> None:
    """Time each channel criterion beside one pass over the calibration images."""
    from .bench.criteria import bench_criteria, criteria_table

    result = checked(lambda: bench_criteria(model=model, images=images, rounds=rounds))
    out.print_json(json.dumps(result)) if as_json else print_wide(criteria_table(result))


@bench.command("controls")
def bench_controls_command(
    config: ConfigFile,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder of the runs.")],
    set_: Overrides = None,
) -> None:
    """Compare a search with uniform and random pruning at the same budget."""
    search = load(config, set_ or [])
    from .bench.controls import bench_controls
    from .progress import Progress

    out.print(bench_controls(search, out_dir, Progress(err)), markup=False, highlight=False)
