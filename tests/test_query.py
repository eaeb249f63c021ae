"""SQL over runs: it reads their rows and can reach nothing else."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from helpers import Invoke
from made_runs import ROWS, rows_run

from prunesearch.search import ConfigError, Run
from prunesearch.search.query import answer_rows, query, read_runs


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs: `one` with all rows, `two` with the dense one and more MACs."""
    folder = tmp_path_factory.mktemp("results")
    rows_run(folder / "one")
    rows_run(folder / "two", ROWS[:1], "search.seed=7", macs=2_000_000)
    return folder


def ask(place: Path, sql: str) -> list[tuple]:
    (_, rows), problems = query(place, sql)
    assert not problems
    return rows


def test_one_run_or_all_in_a_folder(results: Path) -> None:
    counts = "SELECT run, count(*) FROM trials GROUP BY run ORDER BY run"
    assert ask(results, counts) == [("one", 6), ("two", 1)]
    assert ask(results / "two", counts) == [("two", 1)]
    runs, problems = read_runs(results)
    assert [run.name for run in runs] == ["one", "two"] and not problems


def test_trials_hold_the_ledgers_columns(results: Path) -> None:
    (columns, rows), _ = query(results / "one", "FROM trials ORDER BY trial_id")
    ledger = list(Run(results / "one").trials().columns)
    assert columns == ["run", *ledger]
    assert [row[1] for row in rows] == [one.trial_id for one in ROWS]
    found = ask(
        results / "one",
        "SELECT candidate->>'criterion', year(started_at), widths FROM trials LIMIT 1",
    )
    assert found == [("magnitude_l1", 2001, {})]


def test_front_is_the_front(results: Path) -> None:
    names = [name for (name,) in ask(results / "one", "SELECT trial_id FROM front")]
    assert names == [one.trial_id for one in Run(results / "one").front_results()]
    assert len(names) == 4


def test_runs_say_what_they_are(results: Path) -> None:
    (columns, rows), _ = query(results, "FROM runs ORDER BY run")
    one, two = (dict(zip(columns, row, strict=True)) for row in rows)
    assert (one["seed"], two["seed"]) == (0, 7)
    assert (one["finished"], one["completed"], one["failed"]) == (6, 5, 1)
    assert (one["dense_macs"], two["dense_macs"]) == (1e6, 2e6)
    assert one["hypervolume"] == pytest.approx(Run(results / "one").hypervolume())
    assert one["objectives"] == ["accuracy", "latency_ms"] and one["model"] == "resnet20"


def test_tables_join(results: Path) -> None:
    sql = (
        "SELECT f.trial_id, f.macs / r.dense_macs AS share FROM front f JOIN runs r USING (run) "
        "WHERE r.run = 'two'"
    )
    assert ask(results, sql) == [("t00000", 0.5)]


def test_the_columns_are_described(results: Path) -> None:
    names = {row[0] for row in ask(results, "DESCRIBE trials")}
    assert {"run", "trial_id", "accuracy", "latency_ms", "widths"} <= names


REFUSED = {
    "a file": "SELECT * FROM read_csv('/etc/passwd', sep = ':')",
    "a text": "SELECT * FROM read_text('/etc/passwd')",
    "a file by its name": "SELECT * FROM '{parts}'",
    "the run's own parts": "SELECT * FROM read_parquet('{parts}')",
    "names of files": "SELECT * FROM glob('/*')",
    "the network": "SELECT * FROM read_csv('http://127.0.0.1:9/x.csv')",
    "a Python variable": "SELECT * FROM canary",
    "a file to be written": "COPY trials TO '{out}'",
    "a file hidden in a plan": "EXPLAIN ANALYZE COPY trials TO '{out}'",
    "a database": "ATTACH '{out}' AS other",
    "an exported database": "EXPORT DATABASE '{out}'",
    "an extension": "INSTALL httpfs",
    "an extension to load": "LOAD httpfs",
    "a setting": "SET enable_external_access = true",
    "a pragma": "PRAGMA enable_profiling",
    "a call": "CALL pragma_version()",
    "a table": "CREATE TABLE mine AS SELECT 1",
    "fewer rows": "DELETE FROM trials",
    "two statements": "SELECT 1; SELECT 2",
    "a second one behind": "SELECT 1; COPY trials TO '{out}'",
    "nothing": "",
    "a comment": "-- nothing",
    "no SQL": "which is best?",
    "an unknown column": "SELECT speed FROM trials",
    "an unknown table": "SELECT * FROM tirals",
}


@pytest.mark.parametrize("name", REFUSED)
def test_nothing_else_can_be_reached(
    name: str, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # DuckDB would find it by its name, among the variables of the module that calls it.
    monkeypatch.setattr(
        "prunesearch.search.query.canary", pa.table({"secret": [1]}), raising=False
    )
    parts, out = results / "one" / "trials" / "t00000.parquet", tmp_path / "out"
    with pytest.raises(ConfigError, match="`SQL` ") as caught:
        query(results, REFUSED[name].format(parts=parts, out=out))
    assert "The tables are trials, front, runs" in str(caught.value)
    assert not list(tmp_path.iterdir())
    assert len(ask(results / "one", "FROM trials")) == 6


def test_where_there_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be a run folder"):
        query(tmp_path, "SELECT 1")
    with pytest.raises(ConfigError, match="RESULTS_DIR"):
        query(tmp_path / "nothing", "SELECT 1")


def test_a_run_that_cannot_be_opened_is_named_and_left_out(
    results: Path, tmp_path: Path, invoke: Invoke
) -> None:
    (tmp_path / "one").symlink_to(results / "one")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.yaml").write_text("model: {name: resnet20")
    code, out, err = invoke("query", tmp_path, "SELECT DISTINCT run FROM trials", "--json")
    assert code == 0 and json.loads(out) == [{"run": "one"}]
    assert "broken" in err and "Traceback" not in err


def test_json_csv_and_a_table(results: Path, invoke: Invoke) -> None:
    sql = "SELECT trial_id, accuracy, message, widths FROM trials ORDER BY 1 DESC LIMIT 2"
    code, out, err = invoke("query", results / "one", sql, "--json")
    assert code == 0, err
    assert json.loads(out) == [
        {
            "trial_id": "t00005",
            "accuracy": 0.99,
            "message": "loss\x1b is NaN",
            "widths": {},
        },
        {"trial_id": "t00004", "accuracy": 0.9, "message": "", "widths": {}},
    ]
    code, out, _ = invoke("query", results / "one", sql, "--csv")
    assert code == 0
    assert list(csv.reader(io.StringIO(out))) == [
        ["trial_id", "accuracy", "message", "widths"],
        ["t00005", "0.99", "loss\x1b is NaN", "{}"],
        ["t00004", "0.9", "", "{}"],
    ]
    code, out, _ = invoke("query", results / "one", sql)
    assert code == 0 and "loss\\x1b is NaN" in out and "\x1b is" not in out
    code, _, err = invoke("query", results / "one", sql, "--csv", "--json")
    assert code == 2 and "must not be combined" in err


def test_values_that_json_does_not_have(results: Path) -> None:
    sql = (
        "SELECT 'nan'::DOUBLE AS a, 1.5::DECIMAL(4, 2) AS b, DATE '2026-01-02' AS c, "
        "MAP {1: 2} AS d"
    )
    answer, _ = query(results, sql)
    assert answer_rows(answer) == [{"a": None, "b": 1.5, "c": "2026-01-02", "d": {"1": 2}}]


def test_duckdb_is_an_extra(monkeypatch: pytest.MonkeyPatch, results: Path) -> None:
    monkeypatch.setitem(sys.modules, "duckdb", None)  # as if it were not installed
    with pytest.raises(ConfigError, match=r"prune-search\[query\]"):
        query(results, "SELECT 1")
