"""The ledger: nothing is lost, whatever dies; every reader sees the documented columns."""

import dataclasses
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prunesearch.search.records import TrialResult, TrialStatus
from prunesearch.search.store import (
    SCHEMA,
    Store,
    atomic_write_bytes,
    read_json,
    read_results,
    sweep_unfinished,
    to_table,
    write_json,
)

README = Path(__file__).parents[1] / "results" / "README.md"


def result(number: int, **changes: object) -> TrialResult:
    made = TrialResult(
        trial_id=f"trial-{number:05d}",
        status=TrialStatus.COMPLETED,
        criterion="fgp",
        candidate='{"criterion": "fgp"}',
        dropped_blocks=["layer1.1", "layer2.2"],
        widths={"layer1.0.conv1": 7, "fc": 10},
        accuracy=0.9 + number / 1000,
        macs=2**40 + number,
        seed=number,
        started_at=1_700_000_000.123456 + number,
        finished_at=1_700_000_005.654321 + number,
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def fill(store: Store, count: int = 3) -> list[TrialResult]:
    rows = [result(number) for number in range(count)]
    for row in rows:
        store.write_trial(row)
    return rows


def test_schema_records_and_readme_agree() -> None:
    assert SCHEMA.names == [field.name for field in dataclasses.fields(TrialResult)]
    assert SCHEMA.metadata == {b"prune_search.schema_version": b"4"}
    text = README.read_text(encoding="utf-8")
    columns, statuses = text.split("## Columns")[1].split("## Statuses")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in columns.splitlines()]
    table = {row[0]: row for row in rows if len(row) == 5 and row[0] in SCHEMA.names}
    assert list(table) == SCHEMA.names
    for field in SCHEMA:
        _, kind, _, meaning, null_when = table[field.name]
        assert kind == re.sub(r"(element|item): ", "", str(field.type))
        assert meaning and null_when.startswith("never") == (not field.nullable)
    assert re.findall(r"^\| (\w+) \|", statuses, re.M)[1:] == [str(s) for s in TrialStatus]


def test_round_trip_of_full_and_empty_rows(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.read() == [] and store.compact() is None and not store.trials_dir.exists()
    full = result(2, loss=0.5, message="é\n", peak_memory_mib=1.5, recipe="recipes/x.json")
    bare = TrialResult("trial-00001", TrialStatus.FAILED, message="boom")
    store.write_trial(full)
    store.write_trial(bare)
    assert store.read() == [bare, full]
    store.write_trial(dataclasses.replace(bare, loss=float("nan"), accuracy=float("inf")))
    assert store.read()[0] == bare  # what was not measured is null


def test_other_readers(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store)
    store.compact()
    store.write_trial(result(7, accuracy=None, macs=None))
    (store.trials_dir / "_left-over.parquet.0123.tmp").write_bytes(b"PAR1")
    frame = pd.read_parquet(store.trials_dir)
    assert list(frame.columns) == SCHEMA.names and len(frame) == 4
    glob = store.trials_dir / "*.parquet"
    rows = duckdb.sql(
        f"select trial_id, widths['fc'], len(dropped_blocks), year(started_at), accuracy"
        f" from read_parquet('{glob}') order by 1"
    ).fetchall()
    assert rows[0] == ("trial-00000", 10, 2, 2023, 0.9) and rows[3][4] is None
    ours = store.frame()
    assert ours["widths"][0] == {"layer1.0.conv1": 7, "fc": 10}
    assert ours["macs"].tolist()[:3] == [2**40, 2**40 + 1, 2**40 + 2] and ours["macs"].isna()[3]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "foreign", "no time"])
def test_a_damaged_part_is_set_aside_and_costs_no_other(tmp_path: Path, damage: str) -> None:
    store = Store(tmp_path)
    rows = fill(store)
    path = store.trials_dir / "trial-00001.parquet"
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        data[40] ^= 0xFF  # inside the first page: only its checksum can tell
        path.write_bytes(data)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "no time":
        table = pq.read_table(path)
        place = table.schema.get_field_index("finished_at")
        late = pa.array([2**62]).cast(SCHEMA.field("finished_at").type)
        pq.write_table(table.set_column(place, "finished_at", late), path)
    else:
        pq.write_table(pa.table({"a": [1]}), path)
    with pytest.warns(UserWarning, match=r"trial-00001\.parquet .*_corrupt-trial-00001"):
        assert store.read() == [rows[0], rows[2]]
    assert len(list(store.trials_dir.glob("_corrupt-trial-00001.*"))) == 1
    assert store.read() == [rows[0], rows[2]]  # warned once only
    assert len(pd.read_parquet(store.trials_dir)) == 2


def test_of_two_rows_the_completed_then_the_later_wins(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write_trial(result(0))
    store.compact()
    store.write_trial(result(0, status=TrialStatus.FAILED, finished_at=1.8e9))
    assert store.read() == [result(0)]
    store.write_trial(result(0, recipe="recipes/trial-00000.json"))
    assert store.read()[0].recipe == "recipes/trial-00000.json"


def test_a_failure_is_newer_than_the_wait_before_it_whatever_the_clocks(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write_trial(result(0, status=TrialStatus.EARLY_STOPPED, fidelity=1, finished_at=1.8e9))
    store.compact()
    failed = result(0, status=TrialStatus.FAILED, fidelity=1, finished_at=1.7e9)
    store.write_trial(failed)
    assert store.read() == [failed]


def test_compacting_new_parts_leaves_earlier_compactions_alone(tmp_path: Path) -> None:
    store = Store(tmp_path)
    rows = fill(store)
    assert store.compact(new_only=True) == store.trials_dir / "compact-1.parquet"
    assert store.compact(new_only=True) is None
    earlier = (store.trials_dir / "compact-1.parquet").read_bytes()
    changed = dataclasses.replace(rows[0], message="later")
    store.write_trial(changed)
    store.write_trial(result(9))
    store.compact(new_only=True)
    assert sorted(p.name for p in store.trials_dir.iterdir()) == [
        "compact-1.parquet", "compact-2.parquet",
    ]  # fmt: skip
    assert (store.trials_dir / "compact-1.parquet").read_bytes() == earlier
    assert store.read() == [changed, *rows[1:], result(9)]


def test_compaction_keeps_every_row_and_marks_the_front(tmp_path: Path) -> None:
    store = Store(tmp_path)
    rows = fill(store)
    assert store.compact() == store.trials_dir / "compact-1.parquet"
    assert [p.name for p in store.trials_dir.iterdir()] == ["compact-1.parquet"]
    store.write_trial(result(9))
    store.compact(on_front={"trial-00009"})
    assert [p.name for p in store.trials_dir.iterdir()] == ["compact-2.parquet"]
    assert [row.trial_id for row in store.read() if row.on_front] == ["trial-00009"]
    assert store.read()[:3] == rows


@pytest.mark.parametrize("step", range(7))
def test_compaction_survives_a_crash_at_any_step(
    tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    rows = fill(store)
    calls = iter(range(100))

    def dying(original):  # type: ignore[no-untyped-def]
        def call(*args, **kwargs):  # type: ignore[no-untyped-def]
            if next(calls) == step:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("fsync", "replace"):
            patch.setattr(os, name, dying(getattr(os, name)))
        patch.setattr(Path, "unlink", dying(Path.unlink))
        try:
            store.compact()
            assert step >= 6
        except KeyboardInterrupt:
            pass
    assert store.read() == rows
    store.compact()
    assert store.read() == rows and len(list(store.trials_dir.glob("*.parquet"))) == 1


def test_a_killed_writer_leaves_whole_rows(tmp_path: Path) -> None:
    code = (
        "import sys; from prunesearch.search.store import Store;"
        "from prunesearch.search.records import TrialResult, TrialStatus\n"
        "store = Store(sys.argv[1])\n"
        "for n in range(100000):\n"
        "    store.write_trial(TrialResult(f't{n:06d}', TrialStatus.COMPLETED))\n"
        "    print(n, flush=True)\n"
        "    if n % 7 == 6: store.compact()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        while int(writer.stdout.readline()) < 30:
            Store(tmp_path).read()  # a reader meanwhile sees no error
        writer.send_signal(signal.SIGKILL)
        last = max([int(line) for line in writer.stdout.read().splitlines()], default=30)
    rows = Store(tmp_path).read()
    assert [row.trial_id for row in rows[: last + 1]] == [f"t{n:06d}" for n in range(last + 1)]
    assert len(rows) in (last + 1, last + 2)


def test_what_killed_writers_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    fill(Store(tmp_path))
    (tmp_path / "weights").mkdir()
    for name in ("trials/_t9.parquet.0123.tmp", "weights/_t9.safetensors.0123.tmp"):
        (tmp_path / name).write_text("half")
    (tmp_path / "notes.tmp").write_text("the user's own")
    before = set(tmp_path.rglob("*"))
    sweep_unfinished(tmp_path)
    gone = {path.name for path in before - set(tmp_path.rglob("*"))}
    assert gone == {"_t9.parquet.0123.tmp", "_t9.safetensors.0123.tmp"}
    assert len(Store(tmp_path).read()) == 3


def test_older_files_get_defaults_and_newer_ones_are_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write_trial(result(0))
    path = store.trials_dir / "trial-00001.parquet"
    pq.write_table(
        to_table([result(1)]).drop_columns(["wait_s", "speedup", "accuracy_by_fidelity"]), path
    )
    assert store.read() == [result(0), result(1)]
    newer = SCHEMA.with_metadata({b"prune_search.schema_version": b"5"})
    pq.write_table(to_table([result(1)]).cast(newer), path)
    with pytest.raises(ValueError, match=r"`schema_version` \(=5\).*must be at most 4"):
        store.read()
    assert path.exists()


def test_further_figures_of_a_task_and_files_from_before_them(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write_trial(result(0, metrics={"pixel_accuracy": 0.5, "odd": math.nan}))
    before = to_table([result(1)]).drop_columns(["metrics"])
    before = before.replace_schema_metadata({b"prune_search.schema_version": b"3"})
    pq.write_table(before, store.trials_dir / "trial-00001.parquet")
    first, second = store.read()
    assert first.metrics == {"pixel_accuracy": 0.5} and second == result(1)
    assert TrialResult.from_json(first.to_json()) == first
    store.compact()
    assert store.read() == [first, second]


def test_front_file_and_bad_ids(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = store.write_front([result(3), result(1)])
    assert path == tmp_path / "front.parquet"
    assert read_results(path) == [result(3, on_front=True), result(1, on_front=True)]
    for bad in ("../x", "_x", "", "a/b"):
        with pytest.raises(ValueError, match="`trial_id`"):
            store.write_trial(TrialResult(bad, TrialStatus.FAILED))


def test_json_is_atomic_and_errors_name_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep" / "baseline.json"
    write_json(path, {"accuracy": 0.5})
    assert read_json(path) == {"accuracy": 0.5}
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(OSError, match="full"):
            atomic_write_bytes(path, b"other")
    assert read_json(path) == {"accuracy": 0.5} and len(list(path.parent.iterdir())) == 1
    path.write_text("{")
    with pytest.raises(ValueError, match=r"baseline\.json` must be JSON"):
        read_json(path)
