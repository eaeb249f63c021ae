"""The report's data against the ledger, in every state of a run; nothing of others is markup."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_front import trial

from prunesearch.methods.models.build import build_model
from prunesearch.methods.surgery import layer_widths
from prunesearch.search import ConfigError, cli
from prunesearch.search.bench.synthetic import synthetic_run
from prunesearch.search.early_stop import rank_correlations
from prunesearch.search.front import front_hypervolume
from prunesearch.search.locks import locked
from prunesearch.search.records import TrialResult, TrialStatus, is_uniform
from prunesearch.search.report import render, report_data, write_report
from prunesearch.search.report.columns import Tried
from prunesearch.search.report.history import failures_of
from prunesearch.search.report.importance import importance_of
from prunesearch.search.report.page import as_json
from prunesearch.search.runs import Run
from prunesearch.search.store import Store

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(synthetic_run(tmp_path_factory.mktemp("report") / "run", 150))


@pytest.fixture(scope="module")
def data(run: Run) -> dict[str, Any]:
    return report_data(run)


def text(data: dict[str, Any], index: int, name: str) -> str | None:
    found = data["trials"]["text"][name]
    code = found["codes"][index]
    return None if code < 0 else str(found["values"][code])


def test_every_figure_of_every_trial_is_the_ledgers(run: Run, data: dict[str, Any]) -> None:
    rows, trials, network = run.results(), data["trials"], data["network"]
    assert trials["id"] == [row.trial_id for row in rows] and len(rows) == 150
    names = {column["name"] for column in data["columns"]}
    assert names >= {"accuracy", "latency_ms", "macs", "latency_ms@edge", "speedup@edge"}
    layers = [layer["name"] for layer in network["layers"]]
    for index, row in enumerate(rows):
        for name in names - {"trial_s"}:
            found, expected = trials["number"][name][index], row.metric(name)
            assert found == (None if expected is None else pytest.approx(expected, rel=1e-5))
        for name in ("status", "message", "criterion", "host", "device"):
            assert text(data, index, name) == getattr(row, name)
        assert [network["blocks"][n] for n in trials["dropped"][index]] == row.dropped_blocks
        widths = trials["widths"][index] or [None] * len(layers)
        kept = {la: n for la, n in zip(layers, widths, strict=True) if n is not None}
        assert kept == row.widths
        keep = json.loads(row.candidate)["keep"]
        shares = trials["keep"][index] or [None] * len(trials["groups"])
        shown = {g: k for g, k in zip(trials["groups"], shares, strict=True) if k is not None}
        assert shown == pytest.approx(keep, rel=1e-3)
        kind = "uniform" if is_uniform(row) else "search"
        assert text(data, index, "kind") == ("random" if row.criterion == "random" else kind)
    assert {text(data, n, "kind") for n in range(150)} == {"search", "random", "uniform"}
    begun = [row.started_at or 0.0 for row in rows]
    assert trials["number"]["started_s"][-1] == pytest.approx(begun[-1] - begun[0])


def test_front_and_hypervolume_are_the_runs(run: Run, data: dict[str, Any]) -> None:
    members = [data["trials"]["id"][index] for index in data["front"]]
    assert members == [member.trial_id for member in run.front_results()]
    found = data["hypervolume"]
    assert found["value"][-1] == pytest.approx(run.hypervolume())
    assert found["trials"][-1] == 150 and found["value"] == sorted(found["value"])
    middle = len(found["trials"]) // 2
    ended = sorted(run.results(), key=lambda row: row.finished_at or 0.0)
    first = ended[: found["trials"][middle]]
    objectives = run.config.objectives
    expected = front_hypervolume(first, run.baseline, objectives)
    assert found["value"][middle] == pytest.approx(expected)
    seconds = (first[-1].finished_at or 0.0) - min(row.started_at or 0.0 for row in ended)
    assert found["seconds"][middle] == pytest.approx(seconds, rel=1e-5)


def test_rungs_times_dense_and_environment(run: Run, data: dict[str, Any]) -> None:
    expected = [
        dataclasses.asdict(c) | {"warning": c.warning} for c in rank_correlations(run.results())
    ]
    assert data["rungs"] == expected and len(expected) == 3
    seconds = {part["name"]: part["seconds"] for part in data["times"]["trial_parts"]}
    assert seconds["finetune_s"] == pytest.approx(sum(r.finetune_s for r in run.results()), 1e-5)
    assert sum(one["trials"] for one in data["times"]["by_status"]) == 150
    assert data["dense"]["accuracy"] == pytest.approx(run.baseline["accuracy"])
    assert data["dense"]["latency_ms@edge"] == pytest.approx(4 * run.baseline["latency_ms"])
    assert data["dense"]["speedup"] == 1.0
    assert {one["host"] for one in data["environment"]["hosts"]} == {"alpha", "beta"}
    assert data["environment"]["probes"]["edge"]["threads"] == 4
    assert any("edge" in note and "batch size 1" in note for note in data["notes"])
    assert any("validation" in note for note in data["notes"])


def test_the_network_is_the_dense_models(run: Run, data: dict[str, Any], tmp_path: Path) -> None:
    widths = layer_widths(build_model("resnet20", num_classes=10))
    network = data["network"]
    assert {la["name"]: la["dense"] for la in network["layers"]} == widths
    assert [la["name"] for la in network["layers"]] == list(widths) and network["exact"]
    assert network["blocks"] == sorted(network["blocks"]) and len(network["blocks"]) == 6
    groups = {la["name"]: la["group"] for la in network["layers"]}
    assert groups["layer1.1.conv2"] == "layer1.1" and groups["fc"] == ""
    shutil.copytree(run.folder, tmp_path / "old")
    baseline = {k: v for k, v in run.baseline.items() if k != "widths"}
    (tmp_path / "old" / "baseline.json").write_text(json.dumps(baseline))
    (tmp_path / "old" / "blocks.json").unlink()
    old = report_data(Run(tmp_path / "old"), importance=False)  # of a version without them
    assert not old["network"]["exact"] and old["importance"] is None
    assert old["network"]["layers"] == network["layers"]  # a trial was dense
    assert any("widths were not stored" in note for note in old["notes"])


def test_failures_are_counted_by_cause() -> None:
    rows = [
        trial("a", None, None, status=TrialStatus.FAILED, message="no memory for 10 bytes"),
        trial("b", None, None, status=TrialStatus.FAILED, message="no memory for 2e7 bytes"),
        trial("c", 0.1, 1.0, status=TrialStatus.INFEASIBLE, message="violates macs <= 5.0 by 3"),
        trial("d", 0.1, 1.0, status=TrialStatus.INFEASIBLE, message="violates macs <= 5.0 by 4.5"),
        trial("e", 0.1, 1.0, status=TrialStatus.INFEASIBLE, message="violates loss <= 5.0 by 4.5"),
        trial("f", 0.9, 1.0),
    ]
    found = failures_of(rows)
    assert [(one["cause"], one["count"], one["trials"]) for one in found] == [
        ("no memory for 10 bytes", 2, ["a", "b"]),
        ("violates macs <= 5.0", 2, ["c", "d"]),
        ("violates loss <= 5.0", 1, ["e"]),
    ]


def planted(count: int, signal: float) -> tuple[list[TrialResult], list[Tried]]:
    """Accuracy that depends on a criterion and on one of two fractions, and noise."""
    rng = np.random.default_rng(0)
    rows, tried = [], []
    for number in range(count):
        params = {
            "keep": float(rng.random()), "idle": float(rng.random()),
            "criterion": str(rng.choice(["a", "b"])), "constant": 3,
        }  # fmt: skip
        if number % 2:
            params["conditional"] = float(rng.random())
        value = signal * (params["keep"] + 0.4 * (params["criterion"] == "a"))
        value += 0.02 * float(rng.normal())
        rows.append(trial(f"t{number}", value, 1.0, fidelity=2))
        tried.append(Tried(None, "", params))
    return rows, tried


def test_importance_finds_what_was_planted_and_doubts_the_rest() -> None:
    found = importance_of(*planted(200, 1.0), ["accuracy", "latency_ms"])["metrics"]
    accuracy, latency = found
    assert [one["name"] for one in accuracy["parameters"][:2]] == ["keep", "criterion"]
    by_name = {one["name"]: one for one in accuracy["parameters"]}
    assert set(by_name) == {"keep", "criterion", "idle", "conditional"}
    assert abs(by_name["idle"]["mean"]) < 0.05 < by_name["criterion"]["mean"]
    assert accuracy["r2"] > 0.8 and not accuracy["doubt"] and accuracy["num_used"] == 200
    assert "varied" in latency["doubt"] and latency["parameters"] == []
    noise = importance_of(*planted(200, 0.0), ["accuracy"])["metrics"][0]
    assert noise["r2"] < 0.3 and "R²" in noise["doubt"]
    few = importance_of(*planted(10, 1.0), ["accuracy"])["metrics"][0]
    assert "Only 10 trials" in few["doubt"] and few["parameters"] == []


def states(run: Run, folder: Path) -> Iterator[tuple[str, Run]]:
    """The run before anything ended, when all failed, and when it was broken off."""
    for name in ("empty", "begun", "failed", "stopped"):
        place = folder / name
        place.mkdir()
        for file in ("config.yaml", "baseline.json", "environment.json"):
            if name != "begun" or file == "config.yaml":
                shutil.copy(run.folder / file, place)
        rows = [] if name in ("empty", "begun") else run.results()[:12]
        for row in rows:
            if name == "failed":
                row = TrialResult(row.trial_id, TrialStatus.FAILED, "boom", started_at=1.0)
            Store(place).write_trial(row)
        yield "empty" if name == "begun" else name, Run(place)


def test_every_state_of_a_run_has_its_report(run: Run, tmp_path: Path) -> None:
    assert report_data(run, importance=False)["state"]["name"] == "finished"
    for expected, one in states(run, tmp_path):
        data = report_data(one)
        assert data["state"]["name"] == expected
        json.dumps(data, allow_nan=False)
        path = write_report(one)
        assert path == str(one.folder / "report.html")
        assert data["state"]["label"] in Path(path).read_text(encoding="utf-8")
    with locked(one.folder, pytest.fail):
        assert report_data(one)["state"]["name"] == "running"
    assert data["chosen"] in data["front"]


class _Page(HTMLParser):
    """Elements and the text of scripts, by the parser that browsers' rules are written for."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.scripts: list[str] = []
        self.policy = ""
        self._in_script = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        if dict(attrs).get("http-equiv"):
            self.policy = str(dict(attrs)["content"])
        self._in_script = tag == "script"
        if self._in_script:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts[-1] += data


def test_text_of_others_is_never_markup(data: dict[str, Any]) -> None:
    changed = json.loads(json.dumps(data))
    changed["run"] |= {"name": HOSTILE, "model": HOSTILE, "data": HOSTILE, "place": HOSTILE}
    changed |= {"notes": [HOSTILE], "config": HOSTILE, "version": HOSTILE, "made_at": HOSTILE}
    changed["state"] |= {"label": HOSTILE}
    for found in changed["trials"]["text"].values():
        found["values"] = [HOSTILE for _ in found["values"]]
    plain, hostile = _Page(), _Page()
    plain.feed(render(data))
    hostile.feed(render(changed))
    assert hostile.tags.count("script") == plain.tags.count("script") == 3
    assert "img" not in hostile.tags
    assert not {name for name in hostile.attributes if name.startswith("on") or name == "style"}
    assert json.loads(hostile.scripts[0]) == changed
    assert not set("<>&") & set(as_json(changed))


def test_the_policy_admits_exactly_the_files_own_scripts(data: dict[str, Any]) -> None:
    page = _Page()
    page.feed(render(data))
    assert "default-src 'none'" in page.policy
    assert "unsafe" not in page.policy and "http" not in page.policy
    for script in page.scripts[1:]:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in page.policy


def command(monkeypatch: pytest.MonkeyPatch, *args: str | Path) -> object:
    monkeypatch.setattr(sys, "argv", ["prune-search", "report", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code or 0


def test_the_command(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = run.front_results()[-1].trial_id
    out = tmp_path / "deep" / "page.html"
    assert command(monkeypatch, run.folder, "--out", out, "--trial", name) == 0
    assert capsys.readouterr().out.strip() == str(out)
    page = _Page()
    page.feed(out.read_text(encoding="utf-8"))
    shown = json.loads(page.scripts[0])
    assert shown["trials"]["id"][shown["chosen"]] == name
    assert command(monkeypatch, run.folder, "--trial", "t99999") == 2
    assert "`--trial` (=t99999) must be a trial" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert command(monkeypatch, run.folder, "--out", tmp_path / "file" / "x.html") == 2
    assert "--out" in capsys.readouterr().err
    assert command(monkeypatch, tmp_path) == 2


def test_on_an_object_store_it_lies_beside_the_run(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.folder, tmp_path / "store" / "run")
    uri = f"file://{tmp_path}/store/run"
    assert write_report(Run(uri)) == f"{uri}/report.html"
    text = (tmp_path / "store" / "run" / "report.html").read_text(encoding="utf-8")
    assert uri in text and "Finished" in text


def test_a_damaged_baseline_is_named(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.folder, tmp_path / "run")
    path = tmp_path / "run" / "baseline.json"
    path.write_text(json.dumps(run.baseline | {"widths": ["many"]}))
    with pytest.raises(ConfigError, match="widths"):
        report_data(Run(tmp_path / "run"))
