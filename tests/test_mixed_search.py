"""A real search over blocks, channels and sparse training on a real Ray, and what it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import SMALL, command, write_config

from prunesearch.search import Run, load_pruned
from prunesearch.search.shelf import ENTRY

MIXED = SMALL.replace(
    "criteria: [magnitude_l1, random]",
    """criteria: [dsd, {blockwipg: {num_images: 2, n_perturbations: 2}}, lamp]
  select: [ratio, global, macs]
  dsd_lambda: {low: 0.5, high: 2.0, num: 2}
  dsd_q: {low: 0.4, high: 0.4}
  dsd_epochs: [1]""",
).replace("trials: 6, early_stop: true", "trials: 16, early_stop: false")
RECONSTRUCT = "recover.reconstruct={steps: 1, epochs: 1, num_vectors: 32}"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("mixed")
    done = command("run", write_config(folder, MIXED), "--out", folder / "out")
    assert done.returncode == 0, done.stderr
    return Run(folder / "out")


def test_every_kind_of_candidate_ends_well(run: Run) -> None:
    results = run.results()
    assert {str(r.status) for r in results} <= {"completed", "duplicate"}, [
        r.message for r in results
    ]
    candidates = [json.loads(r.candidate) for r in results]
    assert {"dsd", "lamp", "blockwipg"} <= {c["criterion"] for c in candidates}
    assert any(c["criterion"] == "dsd" and c["dropped_blocks"] for c in candidates)
    for candidate in candidates:
        sparse = candidate["criterion"] == "dsd"
        assert (candidate["dsd_lambda"] is not None) == sparse
        if sparse:
            assert (candidate["select"], candidate["k"], candidate["dsd_q"]) == (
                "global",
                0.6,
                0.4,
            )


def test_one_sparse_training_serves_all_trials_that_ask_for_it(run: Run) -> None:
    shared = run.folder / "shared"
    trainings = [json.loads(p.read_text())["info"] for p in shared.glob(f"sparse-*/{ENTRY}")]
    asked = {json.loads(r.candidate)["dsd_lambda"] for r in run.results()} - {None}
    assert sorted(made["dsd_lambda"] for made in trainings) == sorted(asked)
    trials = [r for r in run.results() if r.criterion == "dsd" and r.status == "completed"]
    assert len(trials) > len(trainings)
    assert len(list(shared.glob(f"scores-*/{ENTRY}"))) == 2  # one each of the two criteria


def test_sparse_shows_and_draws_the_trainings(run: Run, tmp_path: Path) -> None:
    done = command("sparse", run.folder, "--plot", tmp_path / "tau.png")
    assert done.returncode == 0, done.stderr
    assert "Sparse trainings" in done.stdout
    assert (tmp_path / "tau.png").read_bytes().startswith(b"\x89PNG")
    listed = json.loads(command("sparse", run.folder, "--json").stdout)
    assert all(sum(e["important"]) + sum(e["redundant"]) == made["history"]["num_channels"]
               for made in listed for e in made["history"]["epochs"])  # fmt: skip


def test_a_sparse_trained_member_exports_and_reloads(run: Run, tmp_path: Path) -> None:
    members = [r for r in run.front_results() if r.criterion == "dsd"]
    trial = (members or run.front_results())[0].trial_id
    folder = run.export(tmp_path / "exported", trial=trial)
    assert load_pruned(folder)(torch.zeros(1, 3, 8, 8)).shape == (1, 10)


def test_block_by_block_reconstruction_in_a_search(tmp_path: Path) -> None:
    config = write_config(tmp_path, MIXED.replace("trials: 16", "trials: 4"))
    done = command(
        "run", config, "--out", tmp_path / "out", "--set", RECONSTRUCT,
        "--set", "space.criteria=[{blockwipg: {num_images: 2, n_perturbations: 2}}]",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = Run(tmp_path / "out")
    assert {str(r.status) for r in run.results()} <= {"completed", "duplicate"}
    trial = run.front_results()[0].trial_id
    folder = run.export(tmp_path / "exported", trial=trial)
    assert load_pruned(folder)(torch.zeros(1, 3, 8, 8)).shape == (1, 10)
