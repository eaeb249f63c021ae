"""SQL over runs: their rows in an in-memory DuckDB that can reach nothing else."""

from __future__ import annotations

import csv
import datetime
import decimal
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
from rich.table import Table

from .metrics import METRICS, dense_value
from .records import TrialResult
from .runs import Run, find_runs
from .store import to_table
from .yaml_source import ConfigError, printable, show

TABLES = ("trials", "front", "runs")
LOCKED = (  # in this order: after the last none can be changed
    "SET autoinstall_known_extensions = false",
    "SET autoload_known_extensions = false",
    "SET allow_community_extensions = false",
    "SET python_enable_replacements = false",
    "SET temp_directory = ''",
    "SET enable_external_access = false",
    "SET lock_configuration = true",
)
RUNS = pa.schema(
    [
        *(pa.field(name, pa.string()) for name in ("run", "place", "model", "data", "sampler")),
        pa.field("objectives", pa.list_(pa.string())),
        *(pa.field(name, pa.int64()) for name in ("seed", "trials", "finished", "completed")),
        *(pa.field(name, pa.int64()) for name in ("failed", "front_members")),
        pa.field("hypervolume", pa.float64()),
        *(pa.field(f"dense_{name}", pa.float64()) for name in METRICS),
    ]
)

Answer = tuple[list[str], list[tuple[Any, ...]]]


def query(place: str | Path, sql: str) -> tuple[Answer, list[str]]:
    """Answers one SELECT over a run, or over all runs in a folder.

    The tables are `trials` and `front` (the ledger's columns, and `run`; times are in UTC), and
    `runs` (one row a run). They are copies in memory: SQL can neither read nor write a file.

    Args:
        place: A run folder, a folder of runs, or the URI of either.
        sql: In DuckDB's dialect.

    Returns:
        Column names and rows, and what was wrong with runs that were left out.

    Raises:
        ConfigError: If DuckDB is missing, there is no run, or the SQL is no valid SELECT.
    """
    duckdb = _duckdb()
    runs, problems = read_runs(place)
    with duckdb.connect(":memory:") as connection:
        for name, table in tables_of(runs).items():
            connection.register("given", table)
            connection.execute(f"CREATE TABLE {name} AS SELECT * FROM given")
            connection.unregister("given")
        for setting in LOCKED:
            connection.execute(setting)
        try:
            _check_select(connection.extract_statements(sql), sql, duckdb)
            cursor = connection.execute(sql)
            return ([column[0] for column in cursor.description], cursor.fetchall()), problems
        except duckdb.Error as error:
            raise _refused(sql, f"be a query that DuckDB takes: {_reason(error)}") from error


@dataclass(frozen=True)
class ReadRun:
    """One run's rows.

    Attributes:
        name: Of its folder.
        trials: Its ledger.
        front: The members of its front.
        facts: Its row in the table `runs`.
    """

    name: str
    trials: Sequence[TrialResult]
    front: Sequence[TrialResult]
    facts: Mapping[str, Any]

    @classmethod
    def of(cls, run: Run) -> ReadRun:
        """Reads all that a query may ask for."""
        name = run.place.rstrip("/").rpartition("/")[2] or run.config.name
        trials, front = run.results(), run.front_results()
        return cls(name, trials, front, _facts(run, name, trials, front))


def read_runs(place: str | Path) -> tuple[list[ReadRun], list[str]]:
    """The run at `place`, or those in it; and why others there could not be read.

    Raises:
        ConfigError: If there is none.
    """
    try:
        one = Run(place)
    except ConfigError as error:
        folders, reason = find_runs(place), error
    else:
        return [ReadRun.of(one)], []
    runs, problems = [], []
    for folder in folders:
        try:
            runs.append(ReadRun.of(Run(folder)))
        except ConfigError as error:  # the others are asked
            problems.append(str(error))
    if not runs:
        raise ConfigError("\n".join(problems)) if problems else reason
    return runs, problems


def tables_of(runs: Sequence[ReadRun]) -> dict[str, pa.Table]:
    """`trials`, `front` and `runs` as Arrow tables."""
    return {
        "trials": pa.concat_tables([_table(run.name, run.trials) for run in runs]),
        "front": pa.concat_tables([_table(run.name, run.front) for run in runs]),
        "runs": pa.Table.from_pylist([dict(run.facts) for run in runs], schema=RUNS),
    }


def answer_table(answer: Answer) -> Table:
    """The answer for people."""
    columns, rows = answer
    table = Table()
    for name in columns:
        table.add_column(printable(name))
    for row in rows:
        table.add_row(*map(_shown, row))
    return table


def answer_rows(answer: Answer) -> list[dict[str, Any]]:
    """The answer as JSON's values, one mapping a row."""
    columns, rows = answer
    return [dict(zip(columns, map(_plain, row), strict=True)) for row in rows]


def write_csv(answer: Answer, file: TextIO) -> None:
    """The answer as CSV with a header; lists and maps in it are JSON."""
    columns, rows = answer
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(value) for value in row] for row in rows)


def _duckdb() -> Any:
    try:
        import duckdb
    except ImportError as error:
        raise ConfigError(
            "`query` must have DuckDB, not installed here. Run "
            "`pip install 'prune-search[query]'`."
        ) from error
    return duckdb


def _check_select(statements: Sequence[Any], sql: str, duckdb: Any) -> None:
    if len(statements) != 1:
        raise _refused(sql, f"be one statement: it holds {len(statements)}")
    if statements[0].type != duckdb.StatementType.SELECT:
        raise _refused(sql, f"be a SELECT, not {statements[0].type.name}: runs are only read")


def _reason(error: Exception) -> str:
    """DuckDB's message in one line, without its drawing of the place."""
    return " ".join(str(error).partition("\n\nLINE ")[0].split()).rstrip(".")


def _refused(sql: str, rule: str) -> ConfigError:
    return ConfigError(
        f"`SQL` (={show(sql)}) must {rule}. The tables are {', '.join(TABLES)}; `DESCRIBE trials` "
        "lists the columns of one."
    )


def _table(name: str, results: Sequence[TrialResult]) -> pa.Table:
    """Rows of one run, its name first; times without a zone, in UTC."""
    table = to_table(results)
    for column in ("started_at", "finished_at"):
        place = table.schema.get_field_index(column)
        # Python's values of times with a zone would need another library.
        table = table.set_column(place, column, table[column].cast(pa.timestamp("us")))
    return table.add_column(0, "run", pa.array([name] * len(table), pa.string()))


def _facts(
    run: Run, name: str, trials: Sequence[TrialResult], front: Sequence[TrialResult]
) -> dict[str, Any]:
    config, baseline = run.config, run.baseline
    dense = {metric: dense_value(baseline, metric) if baseline else None for metric in METRICS}
    return {
        "run": name,
        "place": run.place,
        "model": config.model.name,
        "data": config.data.name,
        "sampler": config.search.sampler,
        "objectives": list(config.objectives),
        "seed": config.search.seed,
        "trials": config.search.trials,
        "finished": len(trials),
        "completed": sum(result.status == "completed" for result in trials),
        "failed": sum(result.status == "failed" for result in trials),
        "front_members": len(front),
        "hypervolume": run.hypervolume(),
        **{f"dense_{metric}": value for metric, value in dense.items()},
    }


def _plain(value: Any) -> Any:
    """A value of DuckDB as one of JSON; what JSON cannot hold becomes a text, not finite null."""
    if isinstance(value, (float, decimal.Decimal)):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int, bool)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.isoformat() if isinstance(value, datetime.datetime) else str(value)


def _cell(value: Any) -> Any:
    plain = _plain(value)
    return json.dumps(plain) if isinstance(plain, (list, dict)) else plain


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    return printable(str(_cell(value)))
