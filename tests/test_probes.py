"""Several latency probes: their config, their columns, and a search over them."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from helpers import SMALL, command, write_config
from rich.console import Console

from prunesearch.search import ConfigError, Run, cli, load_config, parse_config
from prunesearch.search.changes import remember, settle_changes
from prunesearch.search.cluster import check_local, probe_resources
from prunesearch.search.config import DEFAULT_PROBE, SearchConfig, dump_config
from prunesearch.search.dense import Baseline, with_references
from prunesearch.search.digests import latency_basis
from prunesearch.search.front import choose, reference_point
from prunesearch.search.metrics import METRICS, dense_value, direction_of, metrics_of
from prunesearch.search.plot import plot_front
from prunesearch.search.records import TrialResult, TrialStatus
from prunesearch.search.sampler import Sampler
from prunesearch.search.setup import make_space, pose
from prunesearch.search.store import SCHEMA, Store, to_table
from prunesearch.search.tables import front_rows, front_table, status_of, status_table

MINIMAL = "model: {name: resnet20}\ndata: {name: digits, image_size: 8, limit: 240}\n"
EDGE = "probes: {edge: {threads: 2}}\n"
BASELINE = Baseline(0.9, 0.3, 1000, 100, 1.0, "trained", 1, 0.0)


def config(text: str = "", **sections: Any) -> SearchConfig:
    data = {"model": {"name": "resnet20"}, "data": {"name": "digits", "image_size": 8}}
    return parse_config(data | sections, [line for line in text.splitlines() if line])


# --- config ----------------------------------------------------------------------------------

WRONG = [
    ("probes: {Edge: {}}", ["3:16: `probes.Edge` (={})", "lower-case", "Rename it"]),
    ("probes: {edge-1: {}}", ["`probes.edge-1` (={})", "metrics are named after it"]),
    ("probes: {edge: {runz: 30}}", ["`probes.edge.runz` (=30)", "`probes.edge` has device",
                                    "Did you mean `runs`?"]),
    ("probes: {edge: {sampler: tpe}}", ["`probes.edge.sampler`", "`search.sampler`"]),
    ("probes: {edge: {runs: 1}}", ["3:23: `probes.edge.runs` (=1) must be at least 10", "pairs"]),
    ("probes: {edge: {device: gpu}}", ["`probes.edge.device` (=gpu)", "cpu or cuda"]),
    ("probes: {edge: 3}", ["`probes.edge` (=3) must be a section", "{edge: {threads: 4}}"]),
    ("probes: 3", ["3:9: `probes` (=3) must be a mapping"]),
    ("probes: {edge: {resource: GPU}}", ["(=GPU) must be a custom resource"]),
    ("probes: {edge: {resource: a-b}}", ["(=a-b)", "Write for example latency_probe_edge"]),
    (EDGE + "objectives: {accuracy: maximize, latency_ms@egde: minimize}",
     ["`objectives.latency_ms@egde` (=minimize) must name one of accuracy",
      "`probes` has no egde", "Did you mean `latency_ms@edge`?"]),
    ("objectives: {latency_ms@edge: minimize}", ["Add it to `probes`."]),
    ("objectives: {accuracy@edge: maximize}", ["`objectives.accuracy@edge`", "no metric"]),
    (EDGE + "objectives: {speedup@edge: minimize}", ["(=minimize) must be maximize"]),
    (EDGE + "objectives: {latency_ms@edge: minimize, speedup@edge: maximize}",
     ["not name both latency_ms@edge and speedup@edge", "Delete speedup@edge."]),
    (EDGE + "constraints: ['latency_ms@egde <= 3']",
     ["`constraints[0]` (=latency_ms@egde <= 3)", "Did you mean `latency_ms@edge`?"]),
    ("constraints: ['latency_ms@ <= 3']", ["`metric <= number`"]),
    ("resources: {wait_for_nodes_s: -1}", ["`resources.wait_for_nodes_s` (=-1)", "at least 0"]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "pieces"), WRONG, ids=[w[0] for w in WRONG])
def test_wrong_input_is_named(tmp_path: Path, text: str, pieces: list[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(MINIMAL + text + "\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    message = str(caught.value)
    assert all(piece in message for piece in pieces), message
    assert message.startswith(f"{path}:") and "\n" not in message


def test_a_probe_has_the_keys_of_latency_and_a_resource() -> None:
    probes = {"edge": {"threads": 2}, "card": {"device": "cuda", "resource": "my_card"}}
    found = config(
        probes=probes,
        objectives={"accuracy": "maximize", "speedup@card": "maximize"},
        constraints=["latency_ms@edge < 3"],
    )
    assert probe_resources(found) == {
        DEFAULT_PROBE: "latency_probe",
        "edge": "latency_probe_edge",
        "card": "my_card",
    }
    assert {n: (p.device, p.threads, p.runs) for n, p in found.all_probes.items()} == {
        DEFAULT_PROBE: ("cpu", 1, 200),
        "edge": ("cpu", 2, 200),
        "card": ("cuda", 1, 200),
    }
    assert parse_config(found.model_dump(mode="json")) == found
    assert "latency_ms@edge < 3.0" in dump_config(found)
    assert config("probes.edge.threads=3").probes["edge"].threads == 3


def test_a_named_probe_shares_the_cache_of_one_with_the_same_settings() -> None:
    plain, named = config(), config(probes={"edge": {"resource": "anything"}})
    device = {"cpu": "a", "host": "b"}
    seen = named.model_copy(update={"latency": named.all_probes["edge"]})
    assert latency_basis(plain, 10, (3, 8, 8), device) == latency_basis(
        seen, 10, (3, 8, 8), device
    )
    assert set(latency_basis(plain, 10, (3, 8, 8), device)["settings"]) == {
        "device", "batch_size", "threads", "runs",
    }  # fmt: skip


@pytest.mark.parametrize("key", ["threads", "device"])
def test_this_machine_must_have_what_a_named_probe_takes(key: str) -> None:
    if key == "device" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    value: object = {"threads": 4096, "device": "cuda"}[key]
    with pytest.raises(ConfigError, match=f"`probes.edge.{key}` .={value}. must be"):
        check_local(config(probes={"edge": {key: value}}))


# --- metrics and columns ---------------------------------------------------------------------


def row(number: int, accuracy: float, a: float, b: float, **changes: Any) -> TrialResult:
    made = TrialResult(
        f"t{number:05d}",
        TrialStatus.COMPLETED,
        accuracy=accuracy,
        accuracy_drop=0.9 - accuracy,
        accuracy_before_finetune=accuracy,
        latency_ms=1.0,
        latency_ms_by_probe={"a": a, "b": b},
        speedup_by_probe={"a": 2 / a, "b": 8 / b},
        fidelity=2,
    )
    return dataclasses.replace(made, **changes)


ROWS = [row(0, 0.9, 2.0, 8.0), row(1, 0.8, 1.0, 7.0), row(2, 0.7, 1.5, 3.0)]
BOTH = {"latency_ms@a": "minimize", "latency_ms@b": "minimize"}


def test_metrics_of_a_probe_have_its_name() -> None:
    assert metrics_of([]) == list(METRICS)
    assert metrics_of(["a"])[len(METRICS) :] == ["latency_ms@a", "speedup@a"]
    assert direction_of("speedup@a") == "maximize" and direction_of("macs") == "minimize"
    assert (ROWS[1].metric("latency_ms@a"), ROWS[1].metric("speedup@a")) == (1.0, 2.0)
    assert ROWS[1].metric("latency_ms@c") is None and ROWS[1].metric("latency_ms") == 1.0
    assert TrialResult.from_json(ROWS[0].to_json()) == ROWS[0]


def test_maps_are_stored_and_older_files_have_none(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write_trial(ROWS[0])
    store.write_trial(row(1, 0.8, math.nan, 7.0))
    old = to_table([row(2, 0.7, 1.5, 3.0)]).drop_columns(
        ["latency_ms_by_probe", "speedup_by_probe"]
    )
    old = old.replace_schema_metadata({b"prune_search.schema_version": b"2"})
    pq.write_table(old, store.trials_dir / "t00002.parquet")
    first, second, third = store.read()
    assert first == ROWS[0]
    assert second.latency_ms_by_probe == {"b": 7.0} and second.metric("latency_ms@a") is None
    assert third.latency_ms_by_probe == third.speedup_by_probe == {}
    frame = store.frame()
    assert list(frame["latency_ms_by_probe"]) == [{"a": 2.0, "b": 8.0}, {"b": 7.0}, {}]
    assert frame["speedup_by_probe"][0] == {"a": 1.0, "b": 1.0}
    store.compact()
    assert pq.read_schema(next(store.trials_dir.glob("compact-*"))).equals(SCHEMA)
    assert len(pd.read_parquet(store.trials_dir)) == 3


def test_one_member_is_chosen_by_a_probe() -> None:
    assert choose(ROWS, minimize="latency_ms@a").trial_id == "t00001"
    assert choose(ROWS, minimize="latency_ms@b", where=["latency_ms@a < 1.2"]).trial_id == "t00001"
    assert choose(ROWS, maximize="speedup@b").trial_id == "t00002"
    for wrong in ({"minimize": "latency_ms@c"}, {"minimize": "macs", "where": ["speedup@c > 1"]}):
        with pytest.raises(ConfigError, match=r"`metric` \(=.*@c\) must be one of.*_ms@a.*mean"):
            choose(ROWS, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="must have been measured by a completed trial: none"):
        choose([], minimize="latency_ms@a")


def test_the_dense_model_is_measured_once_on_each_probe(tmp_path: Path) -> None:
    said: list[str] = []
    probe = {"cpu": "an old one", "torch": "2"}
    measured = {DEFAULT_PROBE: (2.0, probe), "a": (2.5, probe | {"gpu": "a card"})}
    found = with_references(BASELINE, measured, tmp_path, said.append)
    assert said == [
        "dense latency 2.000 ms on an old one",
        "dense latency 2.500 ms on a card (probe a)",
    ]
    assert Baseline.read(tmp_path) == found
    stored = json.loads((tmp_path / "baseline.json").read_text())
    assert stored["latency_by_probe"]["a"]["latency_ms"] == 2.5 and stored["latency_ms"] == 2.0
    assert found.references == {DEFAULT_PROBE: 2.0, "a": 2.5}
    assert dense_value(stored, "latency_ms@a") == 2.5 and dense_value(stored, "speedup@a") == 1
    assert dense_value(stored, "latency_ms@b") is None and dense_value(stored, "macs") == 1000
    assert reference_point(stored, {"latency_ms@a": "", "speedup@a": ""}) == pytest.approx(
        (2.75, 1 / 1.1)
    )
    with pytest.raises(KeyError, match="latency_ms@b"):
        reference_point(stored, BOTH)
    said.clear()
    now = {"a": (9.0, probe | {"gpu": "another"}), "b": (8.0, probe)}
    later = with_references(found, now, tmp_path, said.append)
    assert later.references == {DEFAULT_PROBE: 2.0, "a": 2.5, "b": 8.0}, "the first one counts"
    assert said[0] == "dense latency 8.000 ms on an old one (probe b)"
    assert said[1].startswith("warning: latencies of probe a are now measured on another gpu (an")


def test_a_baseline_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    fields = dataclasses.asdict(BASELINE) | {"latency_ms": 2.0, "split": "val"}
    del fields["latency_by_probe"]
    (tmp_path / "baseline.json").write_text(json.dumps(fields))
    assert Baseline.read(tmp_path) == dataclasses.replace(BASELINE, latency_ms=2.0)


def test_axes_say_which_probe(tmp_path: Path) -> None:
    baseline = {"accuracy": 0.9, "latency_by_probe": {"a": {"latency_ms": 2.0}}}
    path = plot_front(ROWS, baseline, tmp_path / "a.png", x="latency_ms@a")
    assert path.stat().st_size > 10_000
    with pytest.raises(ConfigError, match="Did you mean `latency_ms@[ab]`"):
        plot_front(ROWS, baseline, tmp_path / "c.png", x="latency_ms@c")


# --- one real search -------------------------------------------------------------------------

TWO = (
    SMALL.replace("macs: minimize", "latency_ms@a: minimize, latency_ms@b: minimize")
    + "probes: {a: {runs: 20}, b: {batch_size: 16, runs: 20}}\n"
)
OBJECTIVES = {"accuracy": "maximize", **BOTH}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("run")
    done = command("run", write_config(folder, TWO), "--out", folder / "out", "--json")
    assert done.returncode == 0, done.stderr
    return Run(folder / "out"), json.loads(done.stdout)


def test_every_trial_is_measured_on_every_probe(finished: tuple[Run, dict[str, Any]]) -> None:
    run, _ = finished
    known = run.baseline["latency_by_probe"]
    assert known["a"]["probe"]["batch_size"] == 1 and known["b"]["probe"]["batch_size"] == 16
    assert known["b"]["latency_ms"] != known["a"]["latency_ms"] > 0
    rows = run.results()
    assert len(rows) == 6
    for one in rows:
        assert set(one.latency_ms_by_probe) == set(one.speedup_by_probe) == {"a", "b"}
        for name in "ab":
            latency, speedup = one.metric(f"latency_ms@{name}"), one.metric(f"speedup@{name}")
            assert latency == pytest.approx(known[name]["latency_ms"] / (speedup or 0))
        assert one.latency_ms == pytest.approx(run.baseline["latency_ms"] / (one.speedup or 0))
    pairs = [(one.speedup_by_probe["a"], one.speedup_by_probe["b"]) for one in rows]
    assert any(a != b for a, b in pairs)
    assert any(one.measure_s > 0 for one in rows) and all(one.wait_s >= 0 for one in rows)


def test_the_front_is_non_dominated_in_all_three(finished: tuple[Run, dict[str, Any]]) -> None:
    run, printed = finished
    rows = [r for r in run.results() if r.status is TrialStatus.COMPLETED]
    costs = {
        r.trial_id: (-(r.accuracy or 0), *(r.latency_ms_by_probe[n] for n in "ab")) for r in rows
    }
    front = {member.trial_id for member in run.front_results()}
    assert front

    def dominates(one: str, other: str) -> bool:
        pairs = zip(costs[one], costs[other], strict=True)
        return costs[one] != costs[other] and all(a <= b for a, b in pairs)

    assert not any(dominates(a, b) for a, b in itertools.permutations(front, 2))
    for name in costs.keys() - front:
        assert any(dominates(a, name) or costs[a] == costs[name] for a in front)
    assert [r["trial_id"] for r in printed["front"]] == [r.trial_id for r in run.front_results()]
    assert set(printed["front"][0]["latency_ms_by_probe"]) == {"a", "b"}
    assert (run.hypervolume() or 0) > 0
    assert set(pd.read_parquet(run.folder / "front.parquet")["trial_id"]) == front


def test_tables_show_the_probes(
    finished: tuple[Run, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, _ = finished
    out = io.StringIO()
    for table in (front_table(run), status_table(status_of(run))):
        Console(file=out, width=300).print(table)
    for piece in ("latency ms@a", "speedup@b", "dense latency_ms@b"):
        assert piece in out.getvalue()
    dense = run.baseline["latency_by_probe"]["b"]["latency_ms"]
    assert out.getvalue().count(f"{dense:.3f}") >= 2
    assert status_of(run)["dense_latency_ms"]["latency_ms@b"] == dense
    objectives = {"accuracy": "maximize", "latency_ms@b": "minimize"}
    expected = [r["trial_id"] for r in front_rows(run, objectives)]
    monkeypatch.setattr(
        sys, "argv", ["prune-search", "front", str(run.folder), "--x", "latency_ms@b", "--json"]
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (0, None)
    assert [r["trial_id"] for r in json.loads(capsys.readouterr().out)["front"]] == expected
    chosen = run.choose(minimize="latency_ms@a")
    assert chosen.latency_ms_by_probe["a"] == min(
        r.latency_ms_by_probe["a"] for r in run.front_results()
    )


def test_the_sampler_learns_from_the_probes(finished: tuple[Run, dict[str, Any]]) -> None:
    run, _ = finished
    posed = pose(run.config)
    space = make_space(posed, run.folder, lambda message: None)
    sampler = Sampler(space, run.config, [], run.baseline)
    for number, one in enumerate(ROWS * 3):
        proposal = sampler.ask(number)
        sampler.tell(number, dataclasses.replace(one, trial_id=f"t{number:05d}"))
    assert sampler.ask(len(ROWS) * 3).candidate != proposal.candidate
    told = sampler._learner._observations.values()  # type: ignore[attr-defined]
    assert [o.metrics["latency_ms@b"] for o in told] == [8.0, 7.0, 3.0] * 3


# --- going on --------------------------------------------------------------------------------


def test_a_run_goes_on_with_its_probes_wherever_they_are_now(tmp_path: Path) -> None:
    begun = {"probes": {"a": {"resource": "here"}}, "objectives": {"latency_ms@a": "minimize"}}
    problem = pose(config(**begun))
    remember(tmp_path, problem)

    def go_on(**probe: Any) -> list[str]:
        now = config(**{**begun, "probes": {"a": probe}})
        return settle_changes(
            tmp_path, dataclasses.replace(problem, config=now), allow_space_change=False
        )

    assert go_on(resource="there") == []
    with pytest.raises(ConfigError, match="probes.a.threads: 1 -> 2"):
        go_on(threads=2)
