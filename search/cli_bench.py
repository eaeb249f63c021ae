"""`prune-search bench`: the benchmarks as commands."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
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
from .yaml_source import ConfigError

OutFile = Annotated[
    Path | None, typer.Option("--out", metavar="FILE.md", help="Where the table goes, too.")
]
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


@bench.command("trial")
def bench_trial_command(
    model: str = "resnet20",
    image_size: Annotated[int, typer.Option(min=8, help="Pixels of the digits.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Seeds.")] = 5,
    limit: Annotated[int | None, typer.Option(min=100, help="The most images to use.")] = None,
    as_json: AsJson = False,
) -> None:
    """Time a trial beside the same steps with torch-pruning and no caches; profile it."""
    from .bench.trial import bench_trial, trial_tables

    result = checked(
        lambda: bench_trial(model=model, image_size=image_size, rounds=rounds, limit=limit)
    )
    if as_json:
        out.print_json(json.dumps(result))
    else:
        for table in trial_tables(result):
            print_wide(table)


@bench.command("recalibration")
def bench_recalibration_command(
    config: ConfigFile,
    candidates: Annotated[int, typer.Option(min=8, help="Random candidates.")] = 40,
    seeds: Annotated[int, typer.Option(min=1, help="Draws of the images.")] = 5,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Show how many images batch-norm recalibration needs to rank candidates."""
    search = load(config, set_ or [])
    from .bench.recalibration import bench_recalibration, recalibration_table
    from .progress import Progress

    result = checked(
        lambda: bench_recalibration(search, Progress(err), candidates=candidates, seeds=seeds)
    )
    out.print_json(json.dumps(result)) if as_json else print_wide(recalibration_table(result))


@bench.command("controls")
def bench_controls_command(
    config: ConfigFile,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder of the runs.")],
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Compare a search with uniform and random pruning at the same budget."""
    search = load(config, set_ or [])
    from .bench.controls import bench_controls, figures, report
    from .progress import Progress

    runs = bench_controls(search, out_dir, Progress(err))
    if as_json:
        out.print_json(json.dumps({name: figures(one) for name, one in runs.items()}))
    else:
        out.print(report(runs), markup=False, highlight=False)


@bench.command("engine")
def bench_engine_command(
    trials: Annotated[
        str, typer.Option(help="Numbers of no-op trials, ascending: one run, looked at there.")
    ] = "100,1000,5000",
    default_trials: Annotated[
        str, typer.Option(help="The same with the default sampler; an empty text for none.")
    ] = "100,1000",
    pair_s: Annotated[
        float, typer.Option(min=0, help="Seconds with one worker, and with two; 0 for none.")
    ] = 20.0,
    cluster: Annotated[bool, typer.Option(help="Also simulate a cluster.")] = False,
    slots: Annotated[int, typer.Option(min=1, help="Slots of the simulated cluster.")] = 64,
    as_json: AsJson = False,
) -> None:
    """Measure the overhead of a trial and its growth, two workers, and a cluster's busy share."""
    sizes = _numbers("--trials", trials, 10, 99_999, "100,1000,5000")
    default_sizes = _numbers("--default-trials", default_trials, 10, 99_999, "100,1000", none=True)
    from .bench.engine import bench_engine, engine_tables

    with contextlib.redirect_stdout(sys.stderr):  # Ray's warnings do not belong into the JSON
        result = bench_engine(
            sizes=sizes,
            default_sizes=default_sizes,
            pair_s=pair_s,
            slots=slots if cluster else None,
            say=lambda text: err.print(text, markup=False, highlight=False, soft_wrap=True),
        )
    if as_json:
        out.print_json(json.dumps(result))
    else:
        for table in engine_tables(result):
            print_wide(table)


@bench.command("slots")
def bench_slots_command(
    config: ConfigFile,
    slots: Annotated[str, typer.Option(help="How many trials at a time.")] = "1,2,4,8",
    seconds: Annotated[
        float, typer.Option(min=5, help="For each, the start of workers included.")
    ] = 120.0,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Measure trials an hour with several trials at a time on one GPU, or on CPU cores."""
    search = load(config, set_ or [])
    counts = _numbers("--slots", slots, 1, 64, "1,2,4,8")
    from .bench.slots import bench_slots, slots_table
    from .progress import Progress

    result = bench_slots(search, Progress(err), slots=counts, seconds=seconds)
    out.print_json(json.dumps(result)) if as_json else print_wide(slots_table(result))


@bench.command("kills")
def bench_kills_command(
    config: ConfigFile,
    out_dir: Annotated[
        Path, typer.Option("--out", help="Folder of the two runs; OUT.md gets the table.")
    ],
    kills: Annotated[int, typer.Option(min=1, help="How many.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the moments and the targets.")] = 0,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Kill a search's processes at random and compare its ledger with that of one in peace."""
    search = load(config, set_ or [])
    from .bench.kills import bench_kills, kills_markdown
    from .progress import Progress
    from .store import atomic_write_bytes

    result = bench_kills(search, out_dir, Progress(err), kills=kills, seed=seed)
    text = kills_markdown(result, f"prune-search bench kills {config} --kills {kills}")
    atomic_write_bytes(out_dir.with_suffix(".md"), text.encode())
    out.print_json(json.dumps(result)) if as_json else out.print(text)


@bench.command("serve")
def bench_serve_command(
    config: ConfigFile,
    clients: Annotated[int, typer.Option(min=1, help="Readers.")] = 200,
    streams: Annotated[int, typer.Option(min=1, max=64, help="Event streams.")] = 20,
    rounds: Annotated[int, typer.Option(min=1, help="Searches alone and with readers.")] = 3,
    pause_s: Annotated[
        float, typer.Option(min=0.1, help="Seconds between two requests of a reader.")
    ] = 5.0,
    out_file: OutFile = None,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Load the live page with readers while a search runs, beside the same search alone."""
    search = load(config, set_ or [])
    from .bench.serve import bench_serve, serve_markdown, serve_table
    from .runs import check_writable
    from .store import atomic_write_bytes

    if out_file is not None:
        check_writable(out_file)
    result = bench_serve(
        search,
        lambda text: err.print(text, markup=False, highlight=False, soft_wrap=True),
        clients=clients,
        streams=streams,
        rounds=rounds,
        pause_s=pause_s,
    )
    if out_file is not None:
        text = serve_markdown(result, shlex.join(["prune-search", *sys.argv[1:]]))
        atomic_write_bytes(out_file, text.encode())
    out.print_json(json.dumps(result)) if as_json else print_wide(serve_table(result))


@bench.command("front")
def bench_front_command(
    config: ConfigFile,
    out_dir: Annotated[
        Path,
        typer.Option(
            "--out", help="OUT.parquet keeps every candidate of the space, OUT.md the table."
        ),
    ],
    seeds: Annotated[int, typer.Option(min=1, help="Searches a sampler.")] = 5,
    budget: Annotated[int, typer.Option(min=10, help="Evaluations a search.")] = 200,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Compare the samplers with the exact front of a space that is enumerated once."""
    search = load(config, set_ or [])
    from .bench.front import bench_front, front_markdown, front_table
    from .progress import Progress
    from .store import atomic_write_bytes

    result = bench_front(search, out_dir, Progress(err), seeds=seeds, budget=budget)
    atomic_write_bytes(out_dir.with_suffix(".md"), front_markdown(result).encode())
    out.print_json(json.dumps(result)) if as_json else print_wide(front_table(result))


@bench.command("peers")
def bench_peers_command(
    config: ConfigFile,
    out_dir: Annotated[Path, typer.Option("--out", help="Folder of the runs.")],
    seconds: Annotated[float, typer.Option(min=1, help="Seconds of each method.")] = 120.0,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds.")] = 5,
    methods: Annotated[
        str | None, typer.Option(help="Comma-separated methods; all by default.")
    ] = None,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Compare this search with other tools in hypervolume against seconds."""
    search = load(config, set_ or [])
    from .bench.peers.registry import METHODS
    from .bench.peers.run import bench_peers
    from .progress import Progress

    chosen = list(METHODS) if methods is None else [m.strip() for m in methods.split(",")]
    result = bench_peers(
        search, out_dir, Progress(err), seconds=seconds, seeds=seeds, methods=chosen
    )
    text = result.pop("markdown")
    if as_json:
        out.print_json(json.dumps(result))
    else:
        out.print(text, markup=False, highlight=False)


@bench.command("zoo")
def bench_zoo_command(
    models: Annotated[
        str | None, typer.Option(help="Comma-separated models; all by default.")
    ] = None,
    out_dir: Annotated[
        Path, typer.Option("--out", help="OUT.parquet keeps the rows, OUT.md the table.")
    ] = Path("results/bench-zoo"),
    timeout_s: Annotated[float, typer.Option(min=1, help="Seconds of each model.")] = 300.0,
    memory_gib: Annotated[float, typer.Option(min=1, help="Memory of each model.")] = 8.0,
    as_json: AsJson = False,
) -> None:
    """Remove blocks and channels from many architectures, each proven in its own process."""
    from .bench.zoo import bench_zoo, zoo_table

    chosen = None if models is None else [name.strip() for name in models.split(",")]
    result = checked(
        lambda: bench_zoo(
            out_dir,
            lambda text: err.print(text, markup=False, highlight=False, soft_wrap=True),
            models=chosen,
            timeout_s=timeout_s,
            memory_gib=memory_gib,
        )
    )
    out.print_json(json.dumps(result)) if as_json else print_wide(zoo_table(result))


@bench.command("export")
def bench_export_command(
    models: Annotated[
        str | None, typer.Option(help="Comma-separated models; all by default.")
    ] = None,
    out_file: OutFile = None,
    runs: Annotated[int, typer.Option(min=10, help="Timed runs of each form.")] = 200,
    threads: Annotated[int, typer.Option(min=1, help="Of torch and of the runtime.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Prune many architectures, export each in every form, prove and time them."""
    from .bench.export import bench_export, export_markdown, export_table
    from .runs import check_writable
    from .store import atomic_write_bytes

    if out_file is not None:
        check_writable(out_file)
    chosen = None if models is None else [name.strip() for name in models.split(",")]
    result = checked(
        lambda: bench_export(
            chosen,
            runs=runs,
            threads=threads,
            say=lambda text: err.print(text, markup=False, highlight=False, soft_wrap=True),
        )
    )
    if out_file is not None:
        atomic_write_bytes(out_file, export_markdown(result).encode())
    out.print_json(json.dumps(result)) if as_json else print_wide(export_table(result))


@bench.command("report")
def bench_report_command(
    trials: Annotated[int, typer.Option(min=10, max=99_999, help="Invented trials.")] = 10_000,
    rounds: Annotated[int, typer.Option(min=1, help="How often the page is opened.")] = 5,
    out_file: OutFile = None,
    as_json: AsJson = False,
) -> None:
    """Measure how soon report and live page of many trials show, and how fast they answer."""
    from .bench.report import bench_report, report_markdown
    from .runs import check_writable
    from .store import atomic_write_bytes

    if out_file is not None:
        check_writable(out_file)
    result = bench_report(trials, rounds)
    text = report_markdown(result)
    if out_file is not None:
        atomic_write_bytes(out_file, text.encode())
    if as_json:
        out.print_json(json.dumps(result))
    else:
        out.print(text, markup=False, highlight=False, soft_wrap=True)


def _numbers(
    option: str, text: str, low: int, high: int, example: str, *, none: bool = False
) -> list[int]:
    """The numbers of a comma-separated text, ascending; `none` allows an empty one."""
    words = [word for word in text.split(",") if word]
    if all(word.strip().isdigit() for word in words):
        numbers = [int(word) for word in words]
        ascending = numbers == sorted(set(numbers)) and all(low <= n <= high for n in numbers)
        if ascending and (numbers or none):
            return numbers
    raise ConfigError(
        f"`{option}` (={text}) must be ascending numbers from {low} to {high}. Write {example}."
    )
