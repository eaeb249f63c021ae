"""What is known of a candidate before it is tried: its costs, and the expected damage."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..costs import Costs
from ..records import Candidate
from ..sensitivity import SensitivityTable
from ..space import Params
from .features import Hints

DECADES = 2.0  # a cost of a hundredth of the dense one is 0
WORST = 2.5  # a damage (logarithm of the loss) that leaves little more than guessing


def hints_of(costs: Costs, table: SensitivityTable | None = None) -> Hints:
    """Hints for the surrogate.

    Args:
        costs: MACs and parameters of any candidate.
        table: The damage of each level alone; None where it was not measured.

    Returns:
        Candidate -> MACs and parameters on a logarithmic scale, relative to the dense model's,
        and with a table what the added damages leave. All about 0..1.
    """
    dense_macs, dense_params = costs.layers.macs({}), costs.layers.num_params({})

    def hints(params: Params, candidate: Candidate) -> Sequence[float]:
        known = [
            _log_share(costs.macs(params, candidate), dense_macs),
            _log_share(costs.num_params(params, candidate), dense_params),
        ]
        if table is not None:
            known.append(1 - table.damage(params) / WORST)
        return known

    return hints


def _log_share(cost: float, dense: float) -> float:
    return 1 + math.log10(max(cost / dense, 1e-6)) / DECADES
