"""FGP's fraction k for a MACs budget."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from .measure import count_macs
from .surgery import PruningPlan, Recipe, prune

SMALLEST = 1e-9


def k_for_macs(
    model: nn.Module,
    plan: PruningPlan,
    example_input: Tensor,
    recipe: Callable[[float], Recipe],
    target: float,
) -> float:
    """The largest k in (0, 1] whose recipe keeps at most a fraction of the model's MACs.

    Found by bisection, down to the last channel: a larger k never keeps fewer, and where few
    channels hold nearly all of the score, widths differ in the last digits of k only.

    Args:
        model: The dense model; left as it was.
        plan: Its channel groups.
        example_input: One image, [1, C, H, W].
        recipe: k -> what is removed at that k.
        target: Fraction of the dense model's MACs, in (0, 1].

    Returns:
        k.

    Raises:
        ValueError: If the smallest k still keeps more MACs.
    """
    budget = target * count_macs(model, example_input)

    def fits(removal: Recipe) -> bool:
        pruned = prune(model, plan, removal)
        return count_macs(pruned, example_input) <= budget

    low, high = SMALLEST, 1.0
    below, above = recipe(low), recipe(high)
    if fits(above):
        return high
    if not fits(below):
        raise ValueError(
            f"`macs_keep` (={target:g}) must be reachable: the narrowest widths still keep more "
            "of the dense model's MACs. Raise it, or drop blocks as well."
        )
    while low < (middle := (low + high) / 2) < high:
        between = recipe(middle)
        if between == below or (between != above and fits(between)):
            low, below = middle, between
        else:
            high, above = middle, between
        if below == above:
            break
    return low
