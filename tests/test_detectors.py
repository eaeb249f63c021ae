"""Every detector of the zoo: outputs, losses, and what is pruned of it."""

from __future__ import annotations

import copy

import pytest
import torch
from test_detection import make_data
from torch import nn

from prunesearch.methods.block_removal import rank_blocks
from prunesearch.methods.blocks import removable_blocks, remove_blocks
from prunesearch.methods.criteria import score_channels
from prunesearch.methods.groups import plan_pruning
from prunesearch.methods.layer_attribution import score_layers
from prunesearch.methods.measure import count_macs, count_params
from prunesearch.methods.models import MODELS
from prunesearch.methods.models.build import build_model, input_channels
from prunesearch.methods.sparse_training import SPARSE_TRAINING
from prunesearch.methods.surgery import Recipe, prune
from prunesearch.methods.tasks.detection import DetectionTask

SMALL = (
    "fasterrcnn_resnet18_fpn", "retinanet_resnet18_fpn", "ssdlite_mobilenet_v3", "yolov5n",
    "yolov8n",
)  # fmt: skip
LARGE = {
    "fasterrcnn_resnet50_fpn": {"proposals": 20},
    "fasterrcnn_convnext_tiny_fpn": {"proposals": 20},
    "retinanet_resnet50_fpn": {},
}
TARGETS = [
    {"boxes": torch.tensor([[4.0, 4.0, 40.0, 50.0], [30.0, 20.0, 60.0, 44.0]]),
     "labels": torch.tensor([1, 2])},
    {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
]  # fmt: skip


def build(name, **kwargs):
    torch.manual_seed(0)
    return build_model(name, num_classes=2, kwargs=kwargs)


@pytest.fixture(scope="module")
def task():
    return DetectionTask(make_data(num_train=8), batch_size=4, calibration_size=4)


@pytest.mark.parametrize(("name", "kwargs"), [*((n, {}) for n in SMALL), *LARGE.items()])
def test_contract(name, kwargs):
    model = build(name, **kwargs)
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        detections = model(images)
        again = model(images)
    assert len(detections) == 2
    for one, other in zip(detections, again, strict=True):
        assert {"boxes", "scores", "labels"} <= set(one)
        assert all(torch.equal(one[key], other[key]) for key in one)
        assert (one["boxes"] >= 0).all()
        assert (one["boxes"] <= 64).all()
        assert set(one["labels"].tolist()) <= {1, 2}
        assert (one["scores"].diff() <= 0).all()
    assert input_channels(model) == 3
    losses = model.train()(images, TARGETS)
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    assert total.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert MODELS[name].__doc__


@pytest.mark.parametrize("name", SMALL)
def test_no_object_in_the_whole_batch(name):
    model = build(name).train()
    losses = model(torch.randn(2, 3, 64, 64), [TARGETS[1], TARGETS[1]])
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    assert total.isfinite()


@pytest.mark.parametrize("name", SMALL)
def test_what_is_pruned(name):
    """Blocks go, channels go, and what is left does what the dense model does without them."""
    model = build(name)
    images = torch.randn(2, 3, 64, 64)
    blocks = removable_blocks(model, images)
    assert len(blocks) >= (3 if name != "yolov8n" else 2)
    plan = plan_pruning(model, images)
    kept_whole = getattr(model, "keep_whole", ())
    for group in plan.groups:
        for layer in group.layers:
            assert not any(layer == whole or layer.startswith(f"{whole}.") for whole in kept_whole)
    kept = {g.name: tuple(i for i in range(g.num_channels) if i % 4) for g in plan.groups
            if g.parts == 1}  # fmt: skip
    assert len(kept) >= 10
    small = prune(model, plan, Recipe(tuple(blocks[:1]), kept))
    assert count_params(small) < 0.8 * count_params(model)
    assert count_macs(small, images) < 0.9 * count_macs(model, images)
    with torch.no_grad():
        assert len(small(images)) == 2
        for one, other in zip(
            small.prunable_forward(images), model.prunable_forward(images), strict=True
        ):
            assert one.shape == other.shape
    total = torch.stack(list(small.train()(images, TARGETS).values())).sum()
    total.backward()
    assert total.isfinite()


def test_counts_of_the_reference_models():
    """METHODS: Faster R-CNN has 41.309 M parameters with frozen norms and three classes."""
    with torch.device("meta"):
        model = build_model_on_meta("fasterrcnn_resnet50_fpn", 3)
    norms = sum(p.numel() for m in model.modules() if isinstance(m, nn.BatchNorm2d)
                for p in m.parameters())  # fmt: skip
    assert (count_params(model) - norms) / 1e6 == pytest.approx(41.309, abs=0.001)


def build_model_on_meta(name: str, num_classes: int) -> nn.Module:
    return MODELS[name](num_classes)


def test_as_many_proposals_whatever_the_weights():
    model = build("fasterrcnn_resnet18_fpn", proposals=30)
    seen = []
    model.model.roi_heads.box_head.register_forward_pre_hook(
        lambda module, args: seen.append(len(args[0]))
    )
    images = torch.randn(1, 3, 64, 64)
    macs = count_macs(model, images)
    nn.init.constant_(model.model.rpn.head.bbox_pred.bias, -50.0)  # every box becomes empty
    assert count_macs(model, images) == macs
    assert seen == [30, 30]


def test_repeated_proposals_add_no_detection():
    """One detector, once with as many proposals as there are anchors left, once with more."""
    few, many = (build("fasterrcnn_resnet18_fpn", proposals=n) for n in (64, 400))
    many.load_state_dict(few.state_dict())
    for model in (few, many):
        model.model.rpn._pre_nms_top_n = {"training": 64, "testing": 64}
        model.model.rpn.nms_thresh = 0.05  # leaves few
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        one, other = few(images)[0], many(images)[0]
    assert len(one["boxes"]) > 0
    assert torch.equal(one["boxes"], other["boxes"])


def test_methods_on_a_detector(task):
    """Criteria, attribution, sparse training and block orders run on torchvision's detector."""
    model = build("fasterrcnn_resnet18_fpn")
    before = copy.deepcopy(model.state_dict())
    example = task.example_input(2)
    plan = plan_pruning(model, example, scope="internal")
    layers = [group.name for group in plan.groups][:4]
    for criterion in ("taylor", "blockwipg", "hrank", "magnitude_l1", "fpgm"):
        options = {"num_images": 2, "n_perturbations": 2} if criterion == "blockwipg" else {}
        scores = score_channels(criterion, model, task, layers, seed=0, options=options)
        assert all(values.isfinite().all() and values.sum() > 0 for values in scores.values())
    blocks = removable_blocks(model, example)
    scores = score_layers(model, task, blocks, generator=torch.Generator().manual_seed(0))
    assert set(scores) == set(blocks) and min(scores.values()) > 0
    again = score_layers(model, task, blocks, generator=torch.Generator().manual_seed(0))
    assert again == scores
    for order in ("oneshot", "attribution", "sr_init"):
        ranking = rank_blocks(model, task, blocks, order=order, score="loss", max_drop=1)
        assert sorted(ranking.order) == sorted(blocks)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert "dsd" in SPARSE_TRAINING
    with torch.no_grad():
        assert len(remove_blocks(model, blocks[:2])(example)) == 2
