"""The latency of a model from its layers measured alone."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from prunesearch.methods.groups import plan_pruning
from prunesearch.methods.layer_costs import LayerCosts
from prunesearch.methods.layer_latency import FRACTIONS, LayerLatencies, measure_layers
from prunesearch.methods.models.build import build_model
from prunesearch.search.store import read_as, write_json


def test_widths_between_the_measured_ones_are_interpolated_and_dead_layers_cost_nothing(tmp_path):
    ratios = ((0.1, 0.2, 0.3), (0.2, 0.4, 0.6), (0.4, 0.6, 1.0))  # inputs down, outputs across
    found = LayerLatencies((0.75, 0.25), (ratios, ratios))

    def fraction(outputs: float, inputs: float, *living: float) -> float:
        return found.fraction(np.full(2, outputs), np.full(2, inputs), np.array(living))

    assert fraction(1, 1, 1, 1) == pytest.approx(1.0)
    assert fraction(1, 1, 0, 1) == pytest.approx(0.25)
    for row, i in enumerate(FRACTIONS):
        for column, o in enumerate(FRACTIONS):
            assert fraction(o, i, 1, 1) == pytest.approx(ratios[row][column])
    assert fraction(0.75, 1, 1, 1) == pytest.approx(0.8)
    assert fraction(0.75, 0.375, 1, 1) == pytest.approx((0.5 + 0.25) / 2)
    assert 0 <= fraction(0.01, 0.01, 1, 1) <= 0.1
    write_json(tmp_path / "layers.json", dataclasses.asdict(found))
    assert read_as(tmp_path / "layers.json", LayerLatencies) == found


class Mixed(nn.Module):
    """A depthwise, a grouped and a dilated convolution, linear layers on two kinds of input."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding="same")
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 16, 3, padding=2, dilation=2, groups=2)
        self.tokens = nn.Linear(16, 12)
        self.last = nn.Linear(12, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.grouped(self.depthwise(self.first(images)).relu())
        tokens: torch.Tensor = self.tokens(features.permute(0, 2, 3, 1))
        return self.last(tokens.mean((1, 2)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("make", [Mixed, lambda: build_model("resnet20", num_classes=10)])
def test_every_kind_of_layer_is_measured_and_the_dense_model_is_the_unit(make):
    model, images = make().eval(), torch.zeros(2, 3, 8, 8)
    costs = LayerCosts(model, plan_pruning(model, images), images)
    found = measure_layers(model, costs.calls, rounds=2)
    assert len(found.shares) == len(found.ratios) == len(costs.calls)
    assert sum(found.shares) == pytest.approx(1) and min(found.shares) > 0
    assert all(np.array(layer).shape == (3, 3) and layer[2][2] == 1 for layer in found.ratios)
    ones = np.ones(len(costs.calls))
    assert found.fraction(ones, ones, ones) == pytest.approx(1)
    assert found.fraction(*costs.layer_fractions({}), costs.living(())) == pytest.approx(1)
