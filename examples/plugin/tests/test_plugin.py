"""The plug-in is found, and what it offers does what prune-search asks of it."""

from __future__ import annotations

import torch

from prunesearch.methods.blocks import removable_blocks
from prunesearch.methods.criteria import score_channels
from prunesearch.methods.data import load_data
from prunesearch.methods.groups import plan_pruning
from prunesearch.methods.models.build import build_model
from prunesearch.methods.tasks import make_task


def test_everything_together() -> None:
    """By the names that a config would use."""
    data = load_data("squares", channels=1)
    task = make_task("balanced", data, batch_size=64, calibration_size=64)
    model = build_model("tiny_net", num_classes=task.num_classes)
    example = task.example_input(2)
    assert removable_blocks(model, example) == ["blocks.1", "blocks.2"]
    plan = plan_pruning(model, example)
    assert [group.name for group in plan.groups] == [
        "stem",
        *(f"blocks.{index}.conv1" for index in range(3)),
    ]
    scores = score_channels("largest_weight", model, task, plan.layers)
    expected = model.get_submodule("stem").weight.abs().flatten(1).amax(1)
    assert torch.equal(scores["stem"], expected.detach())
    assert 0 <= task.evaluate(model)["accuracy"] <= 1
