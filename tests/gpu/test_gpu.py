"""What the CPU tests prove, on a GPU: scoring, surgery, recovery, measuring, one whole search."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from helpers import SMALL, command, write_config

from prunesearch.methods.criteria import CRITERIA, score_channels
from prunesearch.methods.data import load_data
from prunesearch.methods.finetune import finetune, recalibrate_batch_norm
from prunesearch.methods.groups import plan_pruning
from prunesearch.methods.measure import paired_latency, reference_latency_ms
from prunesearch.methods.models.build import build_model
from prunesearch.methods.surgery import Recipe, apply
from prunesearch.methods.tasks.classification import ClassificationTask
from prunesearch.search import Run, load_pruned

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")


@pytest.fixture(scope="module")
def task() -> ClassificationTask:
    data = load_data("digits", image_size=16, limit=600)
    return ClassificationTask(data, batch_size=64, calibration_size=64, device="cuda")


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model("resnet20", num_classes=10).cuda()


@pytest.mark.parametrize("criterion", CRITERIA)
def test_scores_agree_with_the_cpu(
    criterion: str, task: ClassificationTask, model: torch.nn.Module
) -> None:
    layers = plan_pruning(model, task.example_input(2)).layers
    on_gpu = score_channels(criterion, model, task, layers, seed=0)
    cpu_task = ClassificationTask(task.data.to("cpu"), batch_size=64, calibration_size=64)
    on_cpu = score_channels(criterion, copy.deepcopy(model).cpu(), cpu_task, layers, seed=0)
    for layer in layers:
        assert on_gpu[layer].device.type == "cpu"
        torch.testing.assert_close(on_gpu[layer], on_cpu[layer], rtol=2e-2, atol=1e-5)


def test_prune_recover_and_measure(task: ClassificationTask, model: torch.nn.Module) -> None:
    plan = plan_pruning(model, task.example_input(2))
    kept = {group.name: tuple(range(group.num_channels // 2)) for group in plan.groups}
    pruned = apply(copy.deepcopy(model), plan, Recipe(("layer1.1",), kept))
    generator = torch.Generator().manual_seed(0)
    recalibrate_batch_norm(pruned, task, generator=generator)
    finetune(pruned, task, epochs=1, lr=0.05, generator=generator)
    assert task.evaluate(pruned, "val")["accuracy"] > 0.15
    example = task.example_input(1)
    reference = reference_latency_ms(model, example, runs=20)
    latency = paired_latency(pruned, model, example, reference_ms=reference, runs=20)
    assert 0 < latency.latency_ms_p10 <= latency.latency_ms <= latency.latency_ms_p90


def test_a_whole_search_on_one_gpu(tmp_path: Path) -> None:
    text = SMALL.replace("max_concurrent: 1", "gpu: 0.5").replace("runs: 20", "device: cuda")
    done = command("run", write_config(tmp_path, text), "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    run = Run(tmp_path / "out")
    assert {result.device for result in run.results()} == {"cuda"}
    assert run.baseline["probe"]["gpu"]
    folder = run.export(tmp_path / "exported", minimize="macs")
    assert load_pruned(folder)(torch.zeros(1, 3, 8, 8)).shape == (1, 10)
