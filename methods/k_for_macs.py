"""FGP's fraction k for a MACs budget."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import Tensor, nn

from .measure import count_macs
from .surgery import PruningPlan, Recipe, apply

PRECISION = 2.0**-12  # of k


def k_for_macs(
    model: nn.Module,
    plan: PruningPlan,
    example_input: Tensor,
    recipe: Callable[[float], Recipe],
    target: float,
) -> float:
    """The largest k in (0, 1] whose recipe keeps at most a fraction of the model's MACs.

    Found by bisection: a larger k never keeps fewer channels.

    Args:
        model: The dense model; left as it was.
        plan: Its channel groups.
        example_input: One image, [1, C, H, W].
        recipe: k -> what is removed at that k.
        target: Fraction of the dense model's MACs, in (0, 1].

    Returns:
        k, to within `PRECISION`.

    Raises:
        ValueError: If the smallest k still keeps more MACs.
    """
    dense = count_macs(model, example_input)

    def fits(k: float) -> bool:
        pruned = apply(copy.deepcopy(model), plan, recipe(k))
        return count_macs(pruned, example_input) <= target * dense

    if fits(1.0):
        return 1.0
    low, high = PRECISION, 1.0
    if not fits(low):
        raise ValueError(
            f"`macs_keep` (={target:g}) must be reachable: one channel in every group is still "
            "more of the dense model's MACs. Raise it, or drop blocks as well."
        )
    while high - low > PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
