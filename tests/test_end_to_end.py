"""One real small search on a real local Ray: its ledger, export, repetition, kill and resume."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import pandas as pd
import pytest
import torch
from helpers import PRUNE_SEARCH, SMALL, command, write_config

from prunesearch.search import Run, load_pruned

METRICS = ("accuracy", "accuracy_before_finetune", "loss", "macs", "num_params", "widths")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, str]:
    folder = tmp_path_factory.mktemp("run")
    done = command("run", write_config(folder), "--out", folder / "out")
    assert done.returncode == 0, done.stderr
    return Run(folder / "out"), done.stdout


def test_run_prints_the_front_with_the_dense_model(finished: tuple[Run, str]) -> None:
    run, printed = finished
    assert "Pareto front of small (validation split)" in printed
    assert "dense" in printed and "Where the time went" in printed
    for member in run.front_results():
        assert member.trial_id in printed


def test_run_folder_holds_the_contract(finished: tuple[Run, str]) -> None:
    run, _ = finished
    names = {path.name for path in run.folder.iterdir()}
    assert {
        "config.yaml", "environment.json", "baseline.json", "trials", "front.parquet", "recipes",
        "weights",
    } <= names  # fmt: skip
    frame = run.trials()
    assert len(frame) == 6
    assert list(frame["trial_id"]) == [f"t{n:05d}" for n in range(6)]
    assert set(frame["status"]) <= {"completed", "duplicate", "early_stopped"}
    for column in (
        "accuracy", "accuracy_before_finetune", "accuracy_drop", "loss", "latency_ms",
        "latency_ms_p10", "latency_ms_p90", "speedup", "macs", "num_params", "peak_memory_mib",
    ):  # fmt: skip
        assert frame[column].notna().all(), column
    assert (frame["latency_ms_p10"] <= frame["latency_ms_p90"]).all()
    baseline = run.baseline
    assert frame["accuracy_drop"].to_numpy() == pytest.approx(
        baseline["accuracy"] - frame["accuracy"].to_numpy()
    )
    dense = frame.iloc[0]
    assert (dense["macs"], dense["num_params"]) == (baseline["macs"], baseline["num_params"])
    environment = json.loads((run.folder / "environment.json").read_text())
    assert torch.__version__.startswith(environment["libraries"]["torch"])


def test_no_secret_is_in_the_run_folder(finished: tuple[Run, str]) -> None:
    run, printed = finished
    token = (Path.home() / ".ray" / "auth_token").read_bytes()
    files = [path for path in run.folder.rglob("*") if path.is_file()]
    assert len(token) >= 32 and len(files) > 10
    assert not [path for path in files if token in path.read_bytes()]
    assert token.decode() not in printed
    environment = run.environment
    assert set(environment) <= {
        "python", "system", "libraries", "host", "cpu", "cores", "torch", "device", "gpu",
        "driver", "cuda", "cudnn",
    }  # fmt: skip


def test_pandas_and_duckdb_read_the_ledger(finished: tuple[Run, str]) -> None:
    run, _ = finished
    frame = pd.read_parquet(run.folder / "trials")
    pattern = str(run.folder / "trials" / "*.parquet")
    rows = duckdb.sql(f"SELECT trial_id, on_front FROM read_parquet('{pattern}')").fetchall()
    assert sorted(rows) == sorted(zip(frame["trial_id"], frame["on_front"], strict=True))
    front = pd.read_parquet(run.folder / "front.parquet")
    assert set(front["trial_id"]) == {name for name, on_front in rows if on_front}
    assert set(front.columns) == set(frame.columns)


def test_only_front_members_keep_their_files(finished: tuple[Run, str]) -> None:
    run, _ = finished
    members = {member.trial_id for member in run.front_results()}
    assert {p.stem for p in (run.folder / "recipes").iterdir()} == members
    assert {p.stem for p in (run.folder / "weights").iterdir()} == members | {"dense"}
    for member in run.front_results():
        assert member.recipe is not None and (run.folder / member.recipe).is_file()


def test_export_reloads_alone_with_equal_outputs(
    finished: tuple[Run, str], tmp_path: Path
) -> None:
    run, _ = finished
    out = tmp_path / "exported"
    done = command(
        "export", run.folder, "--min", "macs", "--where", "accuracy_drop<=1", "--out", out
    )
    assert done.returncode == 0, done.stderr
    recipe = json.loads((out / "recipe.json").read_text())
    images = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.save(images, tmp_path / "images.pt")
    script = (
        "import sys, torch\n"
        "from prunesearch.search import load_pruned\n"
        f"model = load_pruned({str(out)!r})\n"
        f"images = torch.load({str(tmp_path / 'images.pt')!r}, weights_only=True)\n"
        "with torch.inference_mode():\n"
        f"    torch.save(model(images), {str(tmp_path / 'outputs.pt')!r})\n"
        "heavy = {'ray', 'optuna', 'torch_pruning', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
    expected = _pruned_by_hand(run, recipe["trial"]["trial_id"])
    with torch.inference_mode():
        outputs = torch.load(tmp_path / "outputs.pt", weights_only=True)
        assert float((outputs - expected(images)).abs().max()) <= 1e-5
    assert recipe["parity"] <= 1e-5
    assert recipe["test"]["accuracy"] == _test_accuracy(run, load_pruned(out))
    cheapest = min(run.front_results(), key=lambda member: member.macs or 0)
    assert recipe["trial"]["trial_id"] == cheapest.trial_id


def test_front_as_json_and_picture(finished: tuple[Run, str], tmp_path: Path) -> None:
    run, _ = finished
    picture = tmp_path / "front.png"
    done = command("front", run.folder, "--json", "--plot", picture, "--x", "macs")
    assert done.returncode == 0, done.stderr
    members = json.loads(done.stdout)["front"]
    assert [m["trial_id"] for m in members] == [m.trial_id for m in run.front_results()]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_status_and_list(finished: tuple[Run, str]) -> None:
    run, _ = finished
    status = json.loads(command("status", run.folder, "--json").stdout)
    assert (status["finished"], status["trials"]) == (6, 6)
    listed = json.loads(command("list", run.folder.parent, "--json").stdout)
    assert [row["name"] for row in listed] == ["small"]


def test_most_trials_stop_early_and_the_front_holds_completed_ones(tmp_path: Path) -> None:
    done = command(
        "run", write_config(tmp_path), "--out", tmp_path / "out", "--trials", "10",
        "--set", "search.sampler=random", "--set", "search.seeds=false",
        "--set", "resources.max_concurrent=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "afresh" not in done.stderr, "a trial goes on from what another worker evaluated"
    run = Run(tmp_path / "out")
    assert run.finished and not list((run.folder / "rungs").iterdir())
    rows = run.results()
    assert {str(r.status) for r in rows} == {"completed", "early_stopped"}
    assert [len(r.accuracy_by_fidelity) for r in rows] == [r.fidelity + 1 for r in rows]
    assert all(r.accuracy == r.accuracy_by_fidelity[-1] for r in rows)
    stopped = [r for r in rows if r.status == "early_stopped"]
    assert len(stopped) >= 3 and {r.fidelity for r in stopped} <= {0, 1}
    assert all(r.latency_ms and r.macs and r.recipe is None for r in stopped)
    assert {str(r.status) for r in run.front_results()} == {"completed"}
    assert "rank correlation 0-1" in done.stdout
    found = json.loads(command("status", run.folder, "--json").stdout)["rank_correlations"]
    count = sum(r.fidelity >= 1 for r in rows)
    assert [(c["low"], c["high"], c["num_trials"]) for c in found][0] == (0, 1, count)


def test_two_interrupts_leave_a_resumable_folder(tmp_path: Path) -> None:
    """Once, what runs ends first: tests/test_jobs.py. Twice, at once."""
    out = tmp_path / "out"
    process = _start(write_config(tmp_path), out, trials=1)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert f"prune-search resume {out}" in err
    assert "Traceback" not in err
    assert 1 <= len(Run(out).results()) < 6


def test_failures_are_rows_and_the_run_fails(tmp_path: Path) -> None:
    """A learning rate that explodes every trial: rows with a message, exit code 1."""
    text = SMALL.replace("lr: 0.02", "lr: 1.0e30").replace("trials: 6", "trials: 3")
    config = write_config(tmp_path, text)
    done = command("run", config, "--out", tmp_path / "out", "--set", "search.early_stop=false")
    assert done.returncode == 1, done.stderr
    results = Run(tmp_path / "out").results()
    assert [str(r.status) for r in results] == ["failed"] * 3
    assert all("loss" in r.message for r in results)
    assert "Traceback" not in done.stderr


def test_another_space_is_refused_or_accepted(finished: tuple[Run, str], tmp_path: Path) -> None:
    folder = shutil.copytree(finished[0].folder, tmp_path / "run")
    change = ("--set", "space.keep.low=0.6")
    refused = command("resume", folder, *change)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "  keep.low: 0.3 -> 0.6" in refused.stderr
    assert Run(folder).config.space.keep.low == 0.3 and Run(folder).finished
    done = command("extend", folder, "--trials", "3", *change, "--allow-space-change")
    assert done.returncode == 0, done.stderr
    assert "search space changed: keep.low: 0.3 -> 0.6" in done.stderr
    rows = Run(folder).results()
    assert len(rows) == 9
    kept = [
        fraction for row in rows[6:] for fraction in json.loads(row.candidate)["keep"].values()
    ]
    assert min(kept, default=1.0) >= 0.5  # whole channels: 0.6 of 16 are 10, of 8 are 5


def _start(config: Path, out: Path, *, trials: int) -> subprocess.Popen[str]:
    """Starts a run in a session of its own; returns when it has stored so many trials."""
    process = subprocess.Popen(
        [*PRUNE_SEARCH, "run", str(config), "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 240
    while len(list(out.glob("trials/t*.parquet"))) < trials:
        assert process.poll() is None, "the run ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def _pruned_by_hand(run: Run, trial: str) -> torch.nn.Module:
    """The member from its recipe by surgery on the dense constructor, not by the export."""
    from safetensors.torch import load_file

    from prunesearch.methods.groups import plan_pruning
    from prunesearch.methods.models.build import build_model
    from prunesearch.methods.surgery import Recipe, apply

    member = next(r for r in run.results() if r.trial_id == trial)
    assert member.recipe is not None and member.weights is not None
    model = build_model("resnet20", num_classes=10)
    plan = plan_pruning(model, torch.randn(2, 3, 8, 8))
    recipe = Recipe.from_json((run.folder / member.recipe).read_text())
    apply(model, plan, recipe).load_state_dict(load_file(run.folder / member.weights))
    return model.eval()


def _test_accuracy(run: Run, model: torch.nn.Module) -> float:
    from prunesearch.search.setup import load_images, make_task

    config = run.config
    task = make_task(config, load_images(config), "cpu")
    return task.evaluate(model, "test")["accuracy"]
