"""FGP's k for a MACs budget."""

import copy
import math

import pytest
import torch

from prunesearch.methods.groups import plan_pruning
from prunesearch.methods.k_for_macs import k_for_macs
from prunesearch.methods.measure import count_macs
from prunesearch.methods.models.build import build_model
from prunesearch.methods.select import select_cumulative
from prunesearch.methods.surgery import Recipe, apply

SCORES = {
    "even": lambda n: torch.rand(n, generator=torch.Generator().manual_seed(n)),
    "a long tail": lambda n: torch.exp(-0.2 * torch.arange(n)),
    "a cliff": lambda n: torch.where(torch.arange(n) < n // 2, 1.0, 1e-4) + 1e-7 * torch.arange(n),
}


@pytest.fixture(scope="module", params=SCORES)
def posed(request):
    torch.manual_seed(0)
    model = build_model("resnet20", num_classes=10)
    image = torch.zeros(1, 3, 16, 16)
    plan = plan_pruning(model, torch.zeros(2, 3, 16, 16))
    scores = {g.name: SCORES[request.param](g.num_channels) for g in plan.groups}

    def recipe(k: float) -> Recipe:
        kept = {n: tuple(select_cumulative(s, k).tolist()) for n, s in scores.items()}
        return Recipe((), kept)

    return model, plan, image, recipe


@pytest.mark.parametrize("target", [0.2, 0.5, 0.9])
def test_the_budget_is_used_whatever_the_scores_look_like(posed, target):
    model, plan, image, recipe = posed

    def share(k: float) -> float:
        pruned = apply(copy.deepcopy(model), plan, recipe(k))
        return count_macs(pruned, image) / count_macs(model, image)

    k = k_for_macs(model, plan, image, recipe, target)
    assert target - 0.06 < share(k) <= target
    above = k
    while share(above) <= target:  # the very next width is over the budget
        above = math.nextafter(above, 2)
        above += (above - k) * 3
    assert recipe(above) != recipe(k)


def test_all_of_the_model_is_k_one_and_too_little_is_refused(posed):
    assert k_for_macs(*posed, 1.0) == 1.0
    with pytest.raises(ValueError, match=r"`macs_keep` \(=0.0001\) must be reachable"):
        k_for_macs(*posed, 0.0001)
