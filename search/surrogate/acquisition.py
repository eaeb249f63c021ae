"""Expected improvement of the hypervolume, by Monte Carlo.

Emmerich et al. 2006, doi:10.1109/TEVC.2005.859463; by sampling: Daulton et al. 2020,
arXiv:2006.05078.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.stats import norm, qmc

from ..front import hypervolume, non_dominated

Array = npt.NDArray[np.float64]

SAMPLES = 64
FEW = {3: (24, 8), 4: (12, 4)}  # candidates and samples, where a volume costs milliseconds


def normal_samples(num_objectives: int, seed: int, count: int = SAMPLES) -> Array:
    """Quasi-random standard normal vectors, [count, num_objectives]."""
    points = qmc.Sobol(num_objectives, seed=seed).random(count)
    return np.asarray(norm.ppf(np.clip(points, 1e-6, 1 - 1e-6)), dtype=np.float64)


def expected_improvement(samples: Array, front: Array, reference: Array) -> Array:
    """Mean growth of the front's hypervolume, one candidate at a time.

    Args:
        samples: Drawn costs (less is better), [num_samples, num_candidates, num_objectives].
        front: Costs of the front, [num_members, num_objectives].
        reference: The corner that bounds the volume, [num_objectives].

    Returns:
        [num_candidates].
    """
    inside = front[(front < reference).all(axis=1)]
    if len(reference) == 1:
        best = min(inside[:, 0].min(initial=np.inf), reference[0])
        return np.asarray(np.maximum(best - samples[:, :, 0], 0).mean(axis=0))
    if len(reference) == 2:
        return np.asarray(_improvement_2d(samples, inside, reference).mean(axis=0))
    return _improvement_many(samples, inside, reference)


def _improvement_2d(samples: Array, front: Array, reference: Array) -> Array:
    """The part of each sample's box that no member dominates, strip by strip."""
    front = front[non_dominated(front, [False, False])] if len(front) else front
    front = front[np.argsort(front[:, 0])]
    left = np.concatenate([[-np.inf], front[:, 0]])
    right = np.concatenate([front[:, 0], reference[:1]])
    ceiling = np.concatenate([reference[1:], front[:, 1]])
    x, y = samples[..., 0, None], samples[..., 1, None]
    width = np.maximum(right - np.maximum(left, x), 0)
    return np.asarray((width * np.maximum(ceiling - y, 0)).sum(axis=-1))


def _improvement_many(samples: Array, front: Array, reference: Array) -> Array:
    """Exact volumes for the candidates with the largest boxes beyond the front's mean point."""
    mean = samples.mean(axis=0)
    gap = (front[None] - mean[:, None]).max(axis=2).min(axis=1) if len(front) else -mean.sum(1)
    few, few_samples = FEW[len(reference)]
    chosen = np.argsort(-gap, kind="stable")[:few]
    improvement = np.zeros(len(mean))
    minimize = [False] * len(reference)
    for index in chosen:
        total = 0.0
        for cost in samples[:few_samples, index]:
            if (cost < reference).all():
                box = float((reference - cost).prod())
                total += box - hypervolume(np.maximum(front, cost), tuple(reference), minimize)
        improvement[index] = total / min(few_samples, len(samples))
    return improvement
