"""Damaged and foreign files in a run folder: sound results beside them are still read."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faults.commands import invoke
from faults.payload import run_code
from helpers import SMALL

from prunesearch.search.changes import settle_changes
from prunesearch.search.config import ConfigError, dump_config, parse_config
from prunesearch.search.costs import LAYERS, costs_of
from prunesearch.search.dense import BASELINE, DENSE_WEIGHTS, Baseline, prepare_dense
from prunesearch.search.locks import LOCK, locked
from prunesearch.search.records import TrialResult, TrialStatus
from prunesearch.search.rows import proposal_of
from prunesearch.search.runs import Run
from prunesearch.search.sensitivity import SENSITIVITY, measure_sensitivity
from prunesearch.search.setup import Problem, make_space, pose
from prunesearch.search.space import Space
from prunesearch.search.store import BLOCKS, FIXED, SCHEMA, Store, to_table
from prunesearch.search.yaml_source import read_source

DENSE = {"accuracy": 0.9, "loss": 0.4, "macs": 1000, "num_params": 100, "peak_memory_mib": 1.0,
         "latency_ms": 1.0, "source": "trained", "epochs": 3, "train_s": 1.0}  # fmt: skip
SHOWS = (["status"], ["front"], ["front", "--json"], ["list"], ["sparse"])


def row(number: int, **changes: Any) -> TrialResult:
    candidate = {"criterion": None, "dropped_blocks": [], "select": None, "keep": {}, "k": None}
    made = TrialResult(
        f"t{number:05d}",
        TrialStatus.COMPLETED,
        candidate=json.dumps(candidate),
        accuracy=0.5 + number / 100,
        macs=900 - number,
        finished_at=1.7e9,
    )
    return dataclasses.replace(made, **changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder with three trials."""
    run = tmp_path / "runs" / "small"
    for number in range(3):
        Store(run).write_trial(row(number))
    config = parse_config(read_source_text(tmp_path, SMALL))
    (run / "config.yaml").write_text(dump_config(config))
    (run / BASELINE).write_text(json.dumps(DENSE))
    (run / "times.json").write_text('{"load_s": 1.0}')
    (run / "environment.json").write_text('{"python": "3"}')
    Store(run).write_front([row(2)])
    return run


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read_source_text(folder: Path, text: str) -> dict[str, Any]:
    (folder / "small.yaml").write_text(text)
    return read_source(folder / "small.yaml").data


# --- the ledger ------------------------------------------------------------------------------


def cut(size: int) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes()[:size])


def flip(at: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[at] ^= 0xFF
        path.write_bytes(data)

    return damage


def holds(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data)


def tells(**changes: Any) -> Callable[[Path], None]:
    """A part that somebody wrote who does not keep to the rules."""
    return lambda path: pq.write_table(to_table([row(1, **changes)]), path)


def column(name: str, values: pa.Array) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        table = to_table([row(1)])
        pq.write_table(table.set_column(table.column_names.index(name), name, values), path)

    return damage


def replaced(make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


def footer_of(length: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes()[:-8] + length + b"PAR1")


PARTS: dict[str, Callable[[Path], None]] = {
    "empty": holds(b""),
    "one byte": holds(b"P"),
    "only the magic": holds(b"PAR1"),
    "two magics": holds(b"PAR1PAR1"),
    "no footer": holds(b"PAR1\0\0\0\0PAR1"),
    "text": holds(b'{"trial_id": "t00001"}'),
    "a pickle": holds(b"cos\nsystem\n(S'touch canary'\ntR."),
    "without its first byte": lambda path: path.write_bytes(path.read_bytes()[1:]),
    "without its last byte": cut(-1),
    "without its magic": cut(-4),
    "without its footer's length": cut(-8),
    "half": lambda path: cut(path.stat().st_size // 2)(path),
    "cut in the first page": cut(40),
    "a changed page header": flip(5),
    "a changed page": flip(40),
    "a changed footer": flip(-100),
    "a changed footer's end": flip(-9),
    "a footer of 4 GiB": footer_of(b"\xff\xff\xff\xff"),
    "a footer of no bytes": footer_of(b"\0\0\0\0"),
    "a folder": replaced(Path.mkdir),
    "a loop of links": replaced(lambda path: path.symlink_to(path.name)),
    "a link to nothing": replaced(lambda path: path.symlink_to("nothing")),
    "a pipe": replaced(os.mkfifo),
    "a foreign table": lambda path: pq.write_table(pa.table({"a": [1]}), path),
    "no name": column("trial_id", pa.nulls(1, pa.string())),
    "a name that is a path": tells(trial_id="../../victim"),
    "a name from the root": tells(trial_id="/victim"),
    "a name without an end": tells(trial_id="t" * 300),
    "a recipe elsewhere": tells(recipe="../victim"),
    "a recipe behind dots": tells(recipe="recipes/../../victim"),
    "weights from the root": tells(weights="/etc/passwd"),
    "weights of the recipe": tells(weights="recipes/t00001.json"),
    "a candidate that is no JSON": tells(candidate="os.system('touch canary')"),
    "a candidate that is a list": tells(candidate="[]"),
    "a deep candidate": tells(candidate="[" * 100_000),
    "a high fidelity": tells(fidelity=99),
    "a negative fidelity": tells(fidelity=-1),
    "too many rungs": tells(accuracy_by_fidelity=[0.5] * 50),
    "an unknown status": column("status", pa.array(["perfect"])),
    "a status of another type": column("status", pa.array([[1]])),
    "an accuracy in words": column("accuracy", pa.array(["good"])),
    "an end in words": column("finished_at", pa.array(["yesterday"])),
    "a count that is none": column("macs", pa.array([1.5])),
    "widths in a list": column("widths", pa.array([["conv1"]])),
}


@pytest.mark.parametrize("name", PARTS)
def test_sound_trials_beside_a_broken_one_are_read(name: str, folder: Path) -> None:
    victim = folder.parent / "victim"
    victim.write_text("not a trial's")
    PARTS[name](folder / "trials" / "t00001.parquet")
    with pytest.warns(UserWarning, match=r"trials/t00001\.parquet"):
        rows = Store(folder).read()
    assert rows == [row(0), row(2)]
    for command in SHOWS[:4]:
        ended = invoke(*command, folder.parent if command == ["list"] else folder)
        assert ended.code == 0, ended
    assert json.loads(invoke("status", folder, "--json").out)["finished"] == 2
    assert victim.exists() and not run_code()


def test_a_broken_row_costs_no_other_row_of_its_file(folder: Path) -> None:
    bad = row(3, recipe="../victim")
    pq.write_table(to_table([row(3), bad, row(4)]), folder / "trials" / "compact-1.parquet")
    with pytest.warns(UserWarning, match=r"1 of 3 rows .* _corrupt-compact-1\.rows"):
        assert [r.trial_id for r in Store(folder).read()] == [f"t{n:05d}" for n in range(5)]
    with pytest.warns(UserWarning, match="1 of 3 rows"):
        Store(folder).compact()
    assert len(Store(folder).read()) == 5
    kept = pq.read_table(
        pa.BufferReader((folder / "trials" / "_corrupt-compact-1.rows").read_bytes())
    )
    assert kept["recipe"].to_pylist() == [None, "../victim", None]


def test_values_that_are_no_numbers_are_unknown(folder: Path) -> None:
    table = to_table([row(1)])
    nan = pa.array([float("nan")])
    table = table.set_column(table.column_names.index("accuracy"), "accuracy", nan)
    pq.write_table(table, folder / "trials" / "t00001.parquet")
    assert Store(folder).read()[1] == row(1, accuracy=None)


def test_a_newer_file_is_left_alone(folder: Path) -> None:
    newer = SCHEMA.with_metadata({b"prune_search.schema_version": b"99"})
    path = folder / "trials" / "t00001.parquet"
    pq.write_table(to_table([row(1)]).cast(newer), path)
    for command in ("status", "front"):
        ended = invoke(command, folder)
        assert ended.code == 2 and "Upgrade prune-search" in ended.err
    assert path.exists()


def test_what_others_write_is_printed_and_not_obeyed(folder: Path) -> None:
    failed = row(3, status=TrialStatus.FAILED, message="[/b] \x1b]0;owned\x07 :smile:")
    Store(folder).write_trial(failed)
    ended = invoke("status", folder)
    assert ended.code == 0 and r"[/b] \x1b]0;owned\x07 :smile:" in ended.out


def test_a_row_that_no_search_wrote_is_named(folder: Path) -> None:
    for changes in ({}, {"candidate": "{}"}, {"trial_id": "nobody"}):
        with pytest.raises(ConfigError, match=r"`candidate` of trial .* must say what was tried"):
            proposal_of(row(1, **changes))
    Store(folder).write_trial(row(2, candidate='{"keep": 3}'))
    ended = invoke("front", folder)
    assert ended.code == 0 and "not known" in ended.out
    for params in (None, 3, ["a"], {"a": [1]}):
        Store(folder).write_trial(row(2, candidate=json.dumps({"params": params})))
        ended = invoke("journal", folder)
        assert ended.code == 2 and "must have `params`" in ended.err, ended


@pytest.mark.parametrize("data", [b"", b"PAR1", b"garbage"])
def test_a_damaged_front_file_is_not_needed(data: bytes, folder: Path) -> None:
    (folder / "front.parquet").write_bytes(data)
    assert invoke("front", folder).code == 0


# --- JSON ------------------------------------------------------------------------------------

JSON = {
    "empty": b"",
    "cut": b'{"accuracy": 0.9',
    "a list": b"[]",
    "a number": b"3",
    "a text": b'"accuracy"',
    "null": b"null",
    "not UTF-8": b'{"accuracy": "\xff"}',
    "not a number": b'{"accuracy": NaN}',
    "infinity": b'{"accuracy": -Infinity}',
    "a deep list": b"[" * 100_000,
    "a long number": b'{"accuracy": ' + b"9" * 5000 + b"}",
    "words for numbers": b'{"accuracy": "good", "drops": "all", "entries": "many", "shares": {}}',
    "a probe in words": b'{"latency_by_probe": {"edge": "fast"}, "load_s": "long"}',
    "a number in a text": b'{"accuracy": "0.9", "load_s": [1]}',
    "a pickle": b"cos\nsystem\n(S'touch canary'\ntR.",
    "a folder": None,
}


def write(path: Path, content: bytes | None) -> None:
    path.unlink(missing_ok=True)
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)


@pytest.mark.parametrize("content", JSON)
@pytest.mark.parametrize("name", [BASELINE, "times.json"])
def test_damaged_facts_of_a_run_are_named(name: str, content: str, folder: Path) -> None:
    write(folder / name, JSON[content])
    ended = invoke("status", folder)
    assert ended.code == 2 and name in ended.err, ended
    other = folder.parent / "sound"
    other.mkdir()
    (other / "config.yaml").write_text((folder / "config.yaml").read_text())
    ended = invoke("list", folder.parent, "--json")
    assert ended.code == 0 and name in ended.err, ended
    assert [found["run"] for found in json.loads(ended.out)] == [str(other)]


@pytest.mark.parametrize("missing", ["accuracy", "macs"])
def test_a_baseline_without_an_objective(missing: str, folder: Path) -> None:
    (folder / BASELINE).write_text(json.dumps({k: v for k, v in DENSE.items() if k != missing}))
    for command in SHOWS[:3]:
        ended = invoke(*command, folder)
        assert ended.code in (0, 2) and (ended.code == 0 or missing in ended.err), ended


@pytest.mark.parametrize("content", ["", "model: 3\n", "- x\n", "name: ../../x\n", "model: [\n"])
@pytest.mark.parametrize("command", ["status", "front", "resume", "extend", "export", "sparse"])
def test_a_damaged_config_of_a_run_is_named(command: str, content: str, folder: Path) -> None:
    (folder / "config.yaml").write_text(content)
    more = {"extend": ["--trials", "1"], "export": ["--out", "out", "--min", "macs"]}
    ended = invoke(command, folder, *more.get(command, []))
    assert ended.code == 2, ended
    assert "config.yaml" in ended.err or command == "sparse"


@pytest.mark.parametrize("content", JSON)
def test_a_damaged_sparse_training_is_named(content: str, folder: Path) -> None:
    entry = folder / "shared" / "sparse-0" / "entry.json"
    entry.parent.mkdir(parents=True)
    write(entry, JSON[content])
    ended = invoke("sparse", folder)
    assert ended.code == 2 and "entry.json" in ended.err, ended


# --- what only a driver reads -----------------------------------------------------------------


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Problem:
    return pose(parse_config(read_source_text(tmp_path_factory.mktemp("problem"), SMALL)))


def _read_sensitivity(problem: Problem, folder: Path) -> Any:
    return measure_sensitivity(problem, _space(problem), 0.9, folder, print)


def _read_layers(problem: Problem, folder: Path) -> Any:
    return costs_of(problem, _space(problem), None, folder, _never)


READERS: dict[str, Callable[[Problem, Path], Any]] = {
    BLOCKS: lambda problem, folder: make_space(problem, folder, print),
    SENSITIVITY: _read_sensitivity,
    LAYERS: _read_layers,
    FIXED: lambda problem, folder: settle_changes(folder, problem, allow_space_change=False),
    BASELINE: lambda problem, folder: Baseline.read(folder),
}

OTHERS = {
    BLOCKS: ({}, {"drops": []}, {"drops": [["nobody"]]}, {"drops": [[], ["layer1.1", "layer1.2"]]},
             {"drops": [[], ["__class__"]]}),
    SENSITIVITY: ({}, {"entries": [{"dimension": 1}]}),
    LAYERS: ({}, {"shares": [], "ratios": []}, {"shares": [1.0], "ratios": [[[1.0]]]}),
    FIXED: ({}, {"meaning": {}, "space": {}}, {"meaning": [], "space": []}),
    BASELINE: ({}, DENSE | {"macs": "many"}, DENSE | {"accuracy": None}),
}  # fmt: skip


def _space(problem: Problem) -> Any:
    path = [tuple(problem.blocks[:count]) for count in range(len(problem.blocks) + 1)]
    return Space(problem.config.space, problem.plan, tuple(path))


def _never() -> Any:
    raise AssertionError("measured anew")


@pytest.mark.parametrize("name", READERS)
def test_damaged_parts_of_a_driver_are_named(name: str, problem: Problem, tmp_path: Path) -> None:
    wrong = [*JSON.values(), *(json.dumps(data).encode() for data in OTHERS[name])]
    for content in wrong:
        path = tmp_path / name
        if path.is_dir():
            path.rmdir()
        write(path, content)
        with pytest.raises(ConfigError, match=name):
            READERS[name](problem, tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, (2**63).to_bytes(8, "little"), None])
def test_damaged_dense_weights_are_named(
    content: bytes | None, problem: Problem, folder: Path
) -> None:
    (folder / "weights").mkdir()
    write(folder / DENSE_WEIGHTS, content)
    with pytest.raises(ConfigError, match="dense.safetensors` must hold the dense weights"):
        prepare_dense(problem, folder, print)


def test_a_lock_that_leads_elsewhere_empties_nothing(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("of the user")
    (tmp_path / LOCK).symlink_to("precious")
    with (
        pytest.raises(ConfigError, match="must be a file of this folder"),
        locked(tmp_path, print),
    ):
        pass
    assert (tmp_path / "precious").read_text() == "of the user"


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").symlink_to("config.yaml")
    for command in ("status", "front", "resume"):
        assert invoke(command, tmp_path).code == 2
    with pytest.raises(ConfigError, match="RUN_DIR"):
        Run(tmp_path)
