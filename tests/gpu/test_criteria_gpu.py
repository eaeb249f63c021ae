"""The contract of every criterion on a GPU, and the CPU's numbers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from criterion_nets import LAYERS, Task, make_model, make_task

from prunesearch.methods.criteria import CRITERIA, NEEDS, score_channels
from prunesearch.methods.tasks.no_data import NoData

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")

OPTIONS: dict[str, dict[str, Any]] = {"blockwipg": {"num_images": 4, "n_perturbations": 3}}


class GpuTask(Task):
    """The task of the CPU tests, on the GPU."""

    def example_input(self, batch_size: int = 1) -> torch.Tensor:
        return torch.zeros(batch_size, 3, 6, 6, device="cuda")


@pytest.fixture(scope="module", autouse=True)
def _plain_float32() -> Any:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def task() -> Task:
    batches = [(images.cuda(), labels.cuda()) for images, labels in make_task().batches]
    return GpuTask(batches)


@pytest.mark.parametrize("name", CRITERIA)
def test_the_contract_holds_and_the_scores_are_those_of_the_cpu(name: str, task: Task) -> None:
    model = make_model().cuda().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state, gpu_state = torch.get_rng_state(), torch.cuda.get_rng_state()
    options = OPTIONS.get(name, {})
    scores = score_channels(name, model, task, LAYERS, seed=3, options=options)
    again = score_channels(name, model, task, LAYERS, seed=3, options=options)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(torch.cuda.get_rng_state(), gpu_state)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    on_cpu = score_channels(
        name, copy.deepcopy(model).cpu(), make_task(), LAYERS, seed=3, options=options
    )
    for layer in LAYERS:
        assert scores[layer].device.type == "cpu" and scores[layer].dtype == torch.float32
        assert scores[layer].isfinite().all() and (scores[layer] >= 0).all()
        torch.testing.assert_close(again[layer], scores[layer], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(on_cpu[layer], scores[layer], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, needs in NEEDS.items() if needs == "nothing"])
def test_what_needs_no_data_runs_without_on_a_gpu(name: str) -> None:
    no_data = NoData((3, 6, 6), num_classes=3, device="cuda")
    options = OPTIONS.get(name, {})
    scores = score_channels(name, make_model().cuda(), no_data, LAYERS, options=options)
    assert list(scores) == LAYERS
