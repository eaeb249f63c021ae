"""One trial from candidate to row, on a real network and real digits; and what precedes it."""

import copy
import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from prunesearch.methods.measure import Latency, count_macs, paired_latency
from prunesearch.methods.surgery import Recipe, apply
from prunesearch.search.config import DEFAULT_PROBE, ConfigError, SearchConfig, parse_config
from prunesearch.search.context import TrialContext, TrialSpec
from prunesearch.search.dense import DENSE_WEIGHTS, dense_key, prepare_dense
from prunesearch.search.keeper import Keeper
from prunesearch.search.records import Candidate, TrialResult, TrialStatus, with_provenance
from prunesearch.search.setup import (
    Problem,
    load_state,
    make_model,
    pack_images,
    pose,
    unpack_images,
)
from prunesearch.search.shelf import address
from prunesearch.search.store import SCHEMA
from prunesearch.search.trial import TrialOutcome, run_trial
from prunesearch.search.work import put_down, restore_work, take_up

BLOCK = "layer2.1"


def config(**sections: Any) -> SearchConfig:
    data: dict[str, Any] = {
        "model": {"name": "resnet20"},
        "data": {"name": "digits", "image_size": 8, "limit": 240, "batch_size": 32,
                 "calibration_size": 64},
        "baseline": {"epochs": 2, "lr": 0.05},
        "space": {"criteria": ["magnitude_l1", {"fgp": {"feature_point": "act"}}],
                  "blocks": {"mode": "none"}},
        "recover": {"epochs": 0.5},
    }  # fmt: skip
    return parse_config(data | sections)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def problem(folder) -> Problem:
    posed = pose(config())
    prepare_dense(posed, folder, lambda message: None)
    return posed


@pytest.fixture
def context(problem) -> TrialContext:
    def measure(recipe: Recipe) -> tuple[dict[str, Latency], float]:
        model = apply(copy.deepcopy(problem.model), problem.plan, recipe)
        example = problem.task.example_input()
        latency = paired_latency(model, problem.model, example, reference_ms=1.0, runs=12)
        return {DEFAULT_PROBE: latency}, 0.0

    accuracy = problem.task.evaluate(problem.model)["accuracy"]
    return TrialContext(
        problem.config, problem.task, problem.model, problem.plan, accuracy, measure
    )


def spec(candidate: Candidate, seed: int = 1) -> TrialSpec:
    return TrialSpec("t00000", candidate, with_provenance(candidate, {"origin": "tpe"}), seed)


def halved(context: TrialContext, criterion: str = "magnitude_l1") -> Candidate:
    keep = tuple(sorted((group.name, 0.5) for group in context.plan.alive([BLOCK])))
    return Candidate(criterion, (BLOCK,), "ratio", keep)


def changed(context: TrialContext, **sections: Any) -> TrialContext:
    return dataclasses.replace(context, config=config(**sections))


# --- the row ---------------------------------------------------------------------------------


def test_a_trial_fills_every_column_and_leaves_the_dense_model(context):
    before = copy.deepcopy(context.dense.state_dict())
    outcome = run_trial(spec(halved(context)), context)
    row = outcome.result
    assert row.status == TrialStatus.COMPLETED and row.message == ""
    empty = {f.name for f in dataclasses.fields(row) if getattr(row, f.name) in (None, "", 0)}
    assert empty <= {"message", "on_front", "recipe", "weights", "wait_s"}
    assert {f.name for f in dataclasses.fields(row)} == set(SCHEMA.names)
    assert row.accuracy_drop == context.baseline_accuracy - row.accuracy
    assert row.widths["conv1"] == 8 and f"{BLOCK}.conv1" not in row.widths
    assert row.dropped_blocks == [BLOCK] and row.epochs == 0.5 and row.fidelity == 2
    assert json.loads(row.candidate)["origin"] == "tpe"
    assert Candidate.from_mapping(json.loads(row.candidate)) == halved(context)
    assert row.started_at < row.finished_at and row.speedup == pytest.approx(1 / row.latency_ms)
    pruned = apply(copy.deepcopy(context.dense), context.plan, outcome.recipe)
    pruned.load_state_dict(outcome.state)
    assert context.task.evaluate(pruned)["accuracy"] == row.accuracy
    assert row.macs == count_macs(pruned, context.task.example_input())
    after = context.dense.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_trial_is_deterministic_by_its_seed(context):
    first, same, other = (run_trial(spec(halved(context), s), context) for s in (1, 1, 2))
    for column in ("accuracy", "loss", "accuracy_before_finetune", "macs", "peak_memory_mib"):
        assert getattr(first.result, column) == getattr(same.result, column)
    assert first.recipe == same.recipe == other.recipe
    assert all(torch.equal(first.state[name], same.state[name]) for name in first.state)
    assert not torch.equal(first.state["fc.weight"], other.state["fc.weight"])


def test_the_dense_candidate_without_recovery_is_the_baseline(context):
    still = changed(context, recover={"epochs": 0, "recalibrate_bn": False})
    row = run_trial(spec(Candidate()), still).result
    assert row.accuracy_drop == 0 and row.accuracy == row.accuracy_before_finetune
    assert row.criterion is None and row.epochs == 0 and row.widths["conv1"] == 16


def test_distillation_uses_the_dense_model(context):
    plain = run_trial(spec(halved(context)), context)
    distilled = run_trial(
        spec(halved(context)), changed(context, recover={"epochs": 0.5, "distill": 0.9})
    )
    assert distilled.result.status == TrialStatus.COMPLETED
    assert not torch.equal(plain.state["fc.weight"], distilled.state["fc.weight"])


def test_a_violated_constraint_makes_the_trial_infeasible_with_all_metrics(context):
    bounds = ["accuracy_drop <= -0.5", "macs <= 1", "num_params <= 1e9"]
    outcome = run_trial(spec(halved(context)), changed(context, constraints=bounds))
    row = outcome.result
    assert row.status == TrialStatus.INFEASIBLE
    assert "violates accuracy_drop <= -0.5 by" in row.message and "macs <= 1.0" in row.message
    assert "num_params" not in row.message
    assert None not in (row.accuracy, row.loss, row.latency_ms, row.macs, row.peak_memory_mib)


# --- the ladder ------------------------------------------------------------------------------


def climb(
    context: TrialContext, candidate: Candidate, kept: str, until: int = 2
) -> list[TrialOutcome]:
    """A trial from rung to rung; between two it is `kept` in memory, as a checkpoint or not."""
    outcomes: list[TrialOutcome] = []
    for fidelity in range(until + 1):
        row = work = None
        if outcomes:
            row, work = TrialResult.from_json(outcomes[-1].result.to_json()), outcomes[-1].work
            assert work is not None and work.fidelity == row.fidelity == fidelity - 1
            recipe, tensors = work.checkpoint()
            if kept == "checkpoint":
                work = restore_work(recipe, tensors, row.fidelity, context)
            elif kept == "nothing":
                work = None
        todo = dataclasses.replace(spec(candidate), fidelity=fidelity, row=row)
        torch.rand(3)  # another trial ran meanwhile
        outcomes.append(run_trial(TrialSpec.from_mapping(todo.to_mapping()), context, work))
    return outcomes


@pytest.mark.parametrize("kept", ["memory", "checkpoint", "nothing"])
def test_a_trial_that_pauses_ends_as_one_that_does_not(context, kept):
    context = changed(context, recover={"epochs": 1.5, "lr": 0.05, "distill": 0.5})
    once = run_trial(spec(halved(context)), context)
    first, second, last = climb(context, halved(context), kept)
    for column in ("status", "accuracy", "loss", "accuracy_before_finetune", "epochs", "fidelity",
                   "widths", "macs", "peak_memory_mib"):  # fmt: skip
        assert getattr(last.result, column) == getattr(once.result, column), column
    assert last.recipe == once.recipe
    assert all(torch.equal(last.state[name], once.state[name]) for name in once.state)
    rows = [outcome.result for outcome in (first, second, last)]
    assert [str(r.status) for r in rows] == ["early_stopped", "early_stopped", "completed"]
    assert [r.fidelity for r in rows] == [0, 1, 2] and first.state is second.state is None
    assert rows[0].epochs == 0 < rows[1].epochs < rows[2].epochs == 1.5
    assert rows[2].accuracy_by_fidelity == [r.accuracy for r in rows]
    assert once.result.accuracy_by_fidelity == [rows[0].accuracy, None, rows[2].accuracy]
    assert rows[0].finetune_s < rows[1].finetune_s < rows[2].finetune_s
    assert {r.latency_ms for r in rows} == {rows[0].latency_ms}  # measured once
    assert {r.started_at for r in rows} == {rows[0].started_at}


@pytest.mark.parametrize("damaged", ["cut off", "another model's", "recipe"])
def test_a_damaged_checkpoint_is_a_lost_one(context, tmp_path, damaged):
    keeper, name = Keeper(str(tmp_path)), "t00000"
    _, second, last = climb(context, halved(context), "memory")
    put_down(second.work, lambda *parts: keeper.pause(name, *parts), name)
    assert take_up(lambda: keeper.paused(name), name, 1, context).training.step > 0
    recipe, tensors = keeper._paused_paths(name)
    if damaged == "cut off":
        tensors.write_bytes(tensors.read_bytes()[:-100])
    elif damaged == "recipe":
        recipe.write_bytes(b"\xff{")
    else:
        recipe.write_text(run_trial(spec(Candidate()), context).recipe.to_json())
    with pytest.warns(UserWarning, match="t00000 starts afresh, its checkpoint is not readable"):
        work = take_up(lambda: keeper.paused(name), name, 1, context)
    todo = dataclasses.replace(spec(halved(context)), row=second.result)
    again = run_trial(todo, context, work)
    assert work is None and again.result.accuracy == last.result.accuracy
    assert all(torch.equal(last.state[key], again.state[key]) for key in last.state)


def test_a_checkpoint_that_cannot_be_written_is_a_warning(context, tmp_path):
    keeper = Keeper(str(tmp_path))
    (tmp_path / "rungs").write_text("in the way")
    *_, second = climb(context, halved(context), "memory", until=1)
    with pytest.warns(UserWarning, match="t00000 has no checkpoint and may start afresh"):
        put_down(second.work, lambda *parts: keeper.pause("t00000", *parts), "t00000")


def test_only_costs_make_a_trial_infeasible_at_a_low_fidelity(context):
    strict = changed(context, constraints=["accuracy_drop <= -0.5", "loss <= 1e-6"])
    assert [str(o.result.status) for o in climb(strict, halved(context), "memory")] == [
        "early_stopped", "early_stopped", "infeasible"
    ]  # fmt: skip
    costly = changed(context, constraints=["macs <= 1"])
    (only,) = climb(costly, halved(context), "memory", until=0)
    assert only.result.status is TrialStatus.INFEASIBLE and only.work is only.state is None


def test_a_failure_on_the_way_up_keeps_what_is_known(context):
    (first,) = climb(context, halved(context), "memory", until=0)
    hot = changed(context, recover={"epochs": 0.5, "lr": 1e30})
    todo = dataclasses.replace(spec(halved(context)), fidelity=1, row=first.result)
    failed = run_trial(todo, hot)
    assert failed.result.status is TrialStatus.FAILED and failed.work is None
    assert failed.result.accuracy_by_fidelity == [first.result.accuracy]
    assert failed.result.fidelity == 0 and failed.result.macs == first.result.macs


def test_a_reconstructed_trial_pauses_too(context):
    blockwise = changed(
        context,
        recover={"epochs": 0.5, "reconstruct": {"steps": 1, "epochs": 1, "num_vectors": 4}},
    )
    once = run_trial(spec(halved(context)), blockwise)
    *_, last = climb(blockwise, halved(context), "checkpoint")
    assert last.result.accuracy == once.result.accuracy and last.result.loss == once.result.loss
    assert all(torch.equal(last.state[name], once.state[name]) for name in once.state)


# --- failures --------------------------------------------------------------------------------


def test_a_model_that_raises_is_a_failed_row_that_says_where(context):
    context = dataclasses.replace(context, dense=copy.deepcopy(context.dense))
    context.dense.layer3[0].conv1 = nn.Linear(1, 1)
    outcome = run_trial(spec(Candidate(dropped_blocks=(BLOCK,))), context)
    row = outcome.result
    assert row.status == TrialStatus.FAILED and outcome.recipe is outcome.state is None
    assert re.fullmatch(r"RuntimeError: .*shapes.* \(forward, line \d+\)", row.message)
    assert row.accuracy is None and row.finished_at and row.dropped_blocks == [BLOCK]


@pytest.mark.parametrize("epochs", [0, 0.5])
def test_nan_weights_are_a_failed_row(context, epochs):
    context = changed(context, recover={"epochs": epochs})
    context.dense = copy.deepcopy(context.dense)
    with torch.no_grad():
        context.dense.fc.weight.fill_(math.nan)
    row = run_trial(spec(Candidate()), context).result
    assert row.status == TrialStatus.FAILED and "FloatingPointError" in row.message
    assert row.accuracy is None and row.loss is None
    scored = run_trial(spec(halved(context, "fgp")), context).result
    assert scored.status == TrialStatus.FAILED and "finite" in scored.message


def test_memory_and_foreign_names_fail_with_a_fix(context):
    def explode(recipe):
        raise torch.OutOfMemoryError("8 GiB")

    row = run_trial(
        spec(Candidate()), dataclasses.replace(context, measure_latency=explode)
    ).result
    assert row.message == "out of memory: 8 GiB. Lower data.batch_size."
    assert row.status == TrialStatus.FAILED and row.latency_ms is None


# --- setup -----------------------------------------------------------------------------------


def test_the_dense_model_is_stored_resumed_and_cached(problem, folder, tmp_path):
    said: list[str] = []
    again = pose(config())
    assert not torch.equal(again.model.fc.weight, problem.model.fc.weight)
    resumed = prepare_dense(again, folder, said.append)
    assert (folder / DENSE_WEIGHTS).exists() and resumed.source == "trained" and not said
    other = pose(config())
    cached = prepare_dense(other, tmp_path, said.append)
    assert cached.source == "cache" and cached.accuracy == resumed.accuracy
    for model in (again.model, other.model):
        assert torch.equal(model.fc.weight, problem.model.fc.weight) and not model.training
    fresh = pose(config())
    keys = {address(dense_key(pose(c))) for c in (config(), config(baseline={"epochs": 3}))}
    assert len(keys) == 2 and address(dense_key(pose(config(recover={"epochs": 9})))) in keys
    with torch.no_grad():
        fresh.model.fc.bias.add_(1)
    assert address(dense_key(fresh)) not in keys  # another constructor's weights


def test_what_ray_shares_comes_back_equal(problem):
    back = unpack_images(pack_images(problem.task.data))
    assert torch.equal(back.val.images, problem.task.data.val.images)
    assert back.classes == problem.task.data.classes and back.std == problem.task.data.std
    model = make_model(problem.config, 10, trained=False)
    arrays = {k: v.numpy() for k, v in problem.model.state_dict().items()}
    load_state(model, arrays)
    with torch.no_grad():
        model.fc.weight.zero_()
    assert arrays["fc.weight"].any()  # a copy


def test_wrong_input_is_one_config_error():
    with pytest.raises(ConfigError, match=r"must return logits \[batch, 10\].*returned \[2, 7\]"):
        pose(config(model={"name": "resnet20", "kwargs": {"num_classes": 7}}))
