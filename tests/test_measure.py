"""What a model costs: multiply-adds, parameters, memory by hand, latency against itself."""

import copy
import statistics

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from prunesearch.methods.groups import plan_pruning
from prunesearch.methods.measure import (
    MIB,
    Latency,
    _median_interval,
    count_macs,
    count_params,
    paired_latency,
    peak_memory_mib,
    reference_latency_ms,
)
from prunesearch.methods.models.build import build_model
from prunesearch.methods.shapes import changed_attributes, rebuild
from prunesearch.methods.surgery import Recipe, apply

FLOAT = 4  # bytes


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    return build_model("resnet20", num_classes=10)


# --- multiply-adds and parameters ------------------------------------------------------------


@pytest.mark.parametrize(
    ("shortcut", "macs", "params"), [("A", 40.55e6, 0.2697e6), ("B", 40.81e6, 0.2725e6)]
)
def test_resnet20_costs_what_the_literature_says(shortcut, macs, params):
    model = build_model("resnet20", num_classes=10, kwargs={"shortcut": shortcut})
    assert count_macs(model, torch.zeros(1, 3, 32, 32)) == pytest.approx(macs, abs=5e3)
    assert count_params(model) == pytest.approx(params, abs=5e1)


def test_macs_by_hand_and_of_one_image_whatever_the_batch():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=True),  # 4 x 4 pixels
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Flatten(),
        nn.Linear(128, 5),
    )
    by_hand = 16 * 8 * 27 + 16 * 8 * 9 + 128 * 5
    assert count_macs(model, torch.zeros(1, 3, 8, 8)) == by_hand
    assert count_macs(model, torch.zeros(7, 3, 8, 8)) == by_hand
    assert count_params(model) == (8 * 27 + 8) + 16 + (8 * 9 + 8) + (128 * 5 + 5)


@pytest.mark.parametrize(
    ("name", "pixels"),
    [
        ("resnet20", 16),
        ("torchvision:mobilenet_v3_small", 32),
        ("torchvision:densenet121", 32),
        ("torchvision:vit_b_16", 224),
    ],
)
def test_macs_are_half_of_what_torch_counts(name, pixels):
    model = build_model(name, num_classes=10).eval()
    image = torch.zeros(1, 3, pixels, pixels)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(image)
    assert count_macs(model, image) == counter.get_total_flops() // 2 > 0


# --- memory ----------------------------------------------------------------------------------


def test_peak_memory_of_a_sequence_by_hand():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),  # 512 floats out
        nn.ReLU(),  # input and output are alive at once
        nn.Conv2d(4, 2, 3, padding=1),  # 256 out, beside 512
    )
    weights = 4 * 9 + 4 + 2 * 36 + 2
    images, peak = 2 * 64, 512 + 512
    found = peak_memory_mib(model, torch.zeros(2, 1, 8, 8))
    assert found * MIB == FLOAT * (weights + images + peak)


def test_work_in_place_and_views_need_no_memory():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(256, 3)
    )
    weights = 4 * 9 + 4 + 256 * 3 + 3
    assert peak_memory_mib(model, torch.zeros(1, 1, 8, 8)) * MIB == FLOAT * (weights + 64 + 259)


def test_a_shortcut_keeps_its_input_alive():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.one, self.two = (nn.Conv2d(4, 4, 1, bias=False) for _ in range(3))

        def forward(self, x):
            x = self.stem(x)
            y = self.one(x)
            y = self.two(y)  # x, the old y and the new one
            return x + y

    found = peak_memory_mib(Residual(), torch.zeros(1, 4, 8, 8))
    assert found * MIB == FLOAT * (3 * 16 + 256 + 3 * 256)


def test_peak_memory_is_deterministic_and_shrinks_with_the_model(resnet):
    images = torch.randn(2, 3, 16, 16)
    first = peak_memory_mib(resnet, images)
    ballast = [torch.zeros(1 << 18) for _ in range(3)]
    assert {peak_memory_mib(resnet, images) for _ in range(4)} == {first}
    del ballast
    plan = plan_pruning(resnet, images)
    half = {g.name: tuple(range(g.num_channels // 2)) for g in plan.groups}
    small = apply(copy.deepcopy(resnet), plan, Recipe(kept=half))
    assert peak_memory_mib(small, images) < first


# --- latency ---------------------------------------------------------------------------------


def test_a_model_is_as_fast_as_itself(resnet):
    images = torch.randn(1, 3, 8, 8)
    found = paired_latency(resnet, copy.deepcopy(resnet), images, reference_ms=2.0, runs=120)
    assert 0.8 < found.speedup < 1.25
    assert found.latency_ms_p10 <= found.latency_ms <= found.latency_ms_p90
    assert found.speedup_low <= found.speedup <= found.speedup_high
    assert found.latency_ms == pytest.approx(2.0 / found.speedup)


def test_a_smaller_model_is_faster_and_the_order_of_the_arguments_is_right():
    def convolutions(count):
        return nn.Sequential(*(nn.Conv2d(32, 32, 3, padding=1) for _ in range(count)))

    images = torch.randn(1, 32, 16, 16)
    found = paired_latency(convolutions(1), convolutions(6), images, reference_ms=1.0, runs=40)
    assert found.speedup > 2 and found.latency_ms < 0.5


@pytest.mark.parametrize("threads", [1, 2])
def test_timing_restores_threads_and_modes(threads):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()).train()
    model[1].eval()
    modes, before = [m.training for m in model.modules()], torch.get_num_threads()
    images = torch.randn(2, 3, 4, 4)
    seen = []

    def look(module, args):
        inference = torch.is_inference_mode_enabled()
        seen.append((torch.get_num_threads(), inference, module.training, module[2].training))

    handle = model.register_forward_pre_hook(look)
    reference = reference_latency_ms(model, images, threads=threads, runs=4)
    paired_latency(model, model, images, reference_ms=1.0, threads=threads, runs=4)
    handle.remove()
    assert reference > 0 and set(seen) == {(threads, True, False, False)}
    assert torch.get_num_threads() == before
    assert [m.training for m in model.modules()] == modes
    assert not torch.is_inference_mode_enabled()


def test_a_model_that_raises_leaves_nothing_behind(resnet):
    threads = torch.get_num_threads()
    model = copy.deepcopy(resnet).train()
    for measure in (count_macs, peak_memory_mib):
        with pytest.raises(RuntimeError):
            measure(model, torch.zeros(1, 5, 8, 8))
    with pytest.raises(RuntimeError):
        reference_latency_ms(model, torch.zeros(1, 5, 8, 8), threads=2, runs=4)
    assert model.training and torch.get_num_threads() == threads
    assert not torch.is_inference_mode_enabled()


def test_the_interval_holds_the_median_and_is_by_ranks():
    for n in (1, 2, 3, 50, 101):
        values = [float(v) for v in range(n)][::-1]
        low, high = _median_interval(values)
        assert low <= statistics.median(values) <= high
    assert _median_interval([float(v) for v in range(100)]) == (40.0, 59.0)
    assert set(Latency.__annotations__) >= {"speedup", "latency_ms_p10", "latency_ms_p90"}


# --- rebuilding from shapes ------------------------------------------------------------------


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_a_pruned_model_is_rebuilt_from_shapes_and_weights_alone(shortcut):
    dense = build_model("resnet20", num_classes=10, kwargs={"shortcut": shortcut})
    images = torch.randn(2, 3, 16, 16)
    plan = plan_pruning(dense, images)
    kept = {g.name: tuple(range(0, g.num_channels, 3)) for g in plan.alive(["layer1.1"])}
    pruned = apply(copy.deepcopy(dense), plan, Recipe(("layer1.1",), kept)).eval()
    attributes = changed_attributes(dense, pruned)
    assert attributes["conv1"] == {"out_channels": 6}
    fresh = build_model("resnet20", num_classes=10, kwargs={"shortcut": shortcut})
    rebuilt = rebuild(fresh, ["layer1.1"], attributes, pruned.state_dict())
    with torch.inference_mode():
        assert torch.equal(rebuilt(images), pruned(images))
    assert changed_attributes(pruned, rebuilt) == {} and not rebuilt.training


def test_rebuilding_a_different_model_is_refused(resnet):
    dense = copy.deepcopy(resnet)
    assert changed_attributes(dense, dense) == {}
    with pytest.raises(ValueError, match="does not have: layer9.0. Use the constructor"):
        rebuild(dense, ["layer9.0"], {}, dense.state_dict())
    state = dense.state_dict()
    del state["fc.weight"]
    with pytest.raises(ValueError, match="(?s)must fit the recipe.*fc.weight.*Export"):
        rebuild(dense, [], {}, state)
