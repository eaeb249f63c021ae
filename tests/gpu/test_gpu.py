"""What the CPU tests prove, on a GPU: scoring, surgery, recovery, measuring, one whole search."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from helpers import SMALL, command, write_config

from prunesearch.methods.blockwise import prune_blockwise
from prunesearch.methods.data import load_data
from prunesearch.methods.finetune import finetune, recalibrate_batch_norm
from prunesearch.methods.groups import plan_pruning
from prunesearch.methods.measure import paired_latency, reference_latency_ms
from prunesearch.methods.models.build import build_model
from prunesearch.methods.sparse_training import sparse_train
from prunesearch.methods.surgery import Recipe, apply
from prunesearch.methods.tasks.classification import ClassificationTask
from prunesearch.methods.tasks.no_data import NoData
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


def test_sparse_training_freezes_exactly(task: ClassificationTask, model: torch.nn.Module) -> None:
    norms = [f"layer{stage}.{block}.bn1" for stage in (1, 2, 3) for block in (0, 1, 2)]
    history = sparse_train(
        model, task, norms, lam=0.1, q=0.4, epochs=3, lr=0.05,
        generator=torch.Generator().manual_seed(0), threshold="layer", freeze_scope="filter",
    )  # fmt: skip
    assert [record.phase for record in history.epochs] == ["decoupling"] * 2 + ["finetuning"]
    assert history.epochs[1].redundant == history.epochs[2].redundant  # bit by bit, so bin by bin


def test_blocks_are_reconstructed_on_noise(
    task: ClassificationTask, model: torch.nn.Module
) -> None:
    plan = plan_pruning(model, task.example_input(2))
    pruned, recipe = prune_blockwise(
        model, plan, NoData((3, 16, 16), device="cuda"), {"layer1.1.conv1": 6}, epochs=2,
        generator=torch.Generator().manual_seed(0), options={"num_images": 4},
    )  # fmt: skip
    assert len(recipe.kept["layer1.1.conv1"]) == 6
    assert pruned(task.example_input(2)).shape == (2, 10)


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


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="this machine has fewer than two GPUs")
def test_two_gpus_share_a_batch() -> None:
    """The gradients of one GPU, to float32's rounding."""
    from prunesearch.methods.data_parallel import Replicas

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 5)).to("cuda:0")
    images = torch.randn(16, 3, 8, 8, device="cuda:0")
    target = torch.randint(5, (16,), device="cuda:0")

    def loss_of(net: torch.nn.Module, _: object, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(net(x), y)

    loss_of(model, None, images, target).backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    replicas = Replicas(model, None, [torch.device("cuda:1")])
    replicas.backward(loss_of, images, target)
    replicas.close()
    for mine, alone in zip((p.grad for p in model.parameters()), expected, strict=True):
        torch.testing.assert_close(mine, alone, rtol=1e-4, atol=1e-6)
