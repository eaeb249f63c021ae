"""FGP's k for a MACs budget."""

import copy

import pytest
import torch

from prunesearch.methods.groups import plan_pruning
from prunesearch.methods.k_for_macs import PRECISION, k_for_macs
from prunesearch.methods.measure import count_macs
from prunesearch.methods.models.build import build_model
from prunesearch.methods.select import select_cumulative
from prunesearch.methods.surgery import Recipe, apply


@pytest.fixture(scope="module")
def posed():
    torch.manual_seed(0)
    model = build_model("resnet20", num_classes=10)
    image = torch.zeros(1, 3, 16, 16)
    plan = plan_pruning(model, torch.zeros(2, 3, 16, 16))
    generator = torch.Generator().manual_seed(0)
    scores = {g.name: torch.rand(g.num_channels, generator=generator) for g in plan.groups}

    def recipe(k: float) -> Recipe:
        kept = {n: tuple(select_cumulative(s, k).tolist()) for n, s in scores.items()}
        return Recipe((), kept)

    return model, plan, image, recipe


@pytest.mark.parametrize("target", [0.2, 0.5, 0.9])
def test_it_is_the_largest_k_within_the_budget(posed, target):
    model, plan, image, recipe = posed

    def share(k: float) -> float:
        pruned = apply(copy.deepcopy(model), plan, recipe(k))
        return count_macs(pruned, image) / count_macs(model, image)

    k = k_for_macs(model, plan, image, recipe, target)
    assert share(k) <= target < share(min(1.0, k + 2 * PRECISION))
    assert share(k) > target - 0.05


def test_all_of_the_model_is_k_one_and_too_little_is_refused(posed):
    assert k_for_macs(*posed, 1.0) == 1.0
    with pytest.raises(ValueError, match=r"`macs_keep` \(=0.0001\) must be reachable"):
        k_for_macs(*posed, 0.0001)
