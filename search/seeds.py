"""Where a search starts: known good candidates, tried before the sampler proposes any."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest

from .config import SearchConfig
from .records import Candidate
from .sensitivity import SensitivityTable
from .space import DSD, FRACTION_OF, Params, Space

SEED_SHARE = 0.4  # at most this share of the trials are seed candidates
UNIFORM_KEEPS = (0.9, 0.75, 0.6, 0.45, 0.3)


@dataclass(frozen=True)
class Seed:
    """Parameters to try first, and where they come from."""

    origin: str
    params: Params


def default_seeds(
    space: Space, config: SearchConfig, table: SensitivityTable | None = None
) -> list[Seed]:
    """The seeds of a search: none where they are switched off, else a share of its trials."""
    limit = int(SEED_SHARE * config.search.trials) if config.search.seeds else 0
    return make_seeds(space, limit)


def make_seeds(space: Space, limit: int) -> list[Seed]:
    """Known good starts: dense, each criterion's uniform ladder, the ranked block path.

    Each ladder gives every second rung first, so that few seeds already span it. Seeds that the
    space's bounds do not admit are left out, and so are repeated ones.
    """
    ladders = [_uniform(space, criterion) for criterion in space.criteria]
    ladders.append(
        [Seed("seed: ranked blocks", _ranked(space, n)) for n in range(1, space.max_blocks + 1)]
    )
    return _admitted(space, [_least_pruned(space), *_in_turn(map(_spread, ladders))])[:limit]


def _uniform(space: Space, criterion: str) -> list[Seed]:
    origin = f"seed: {_ladder(space, criterion)}"
    return [
        Seed(origin, space.block_params(0) | space.channel_params(criterion, keep))
        for keep in UNIFORM_KEEPS
    ]


def _ladder(space: Space, criterion: str) -> str:
    """Only equal fractions in all groups are the control that is called uniform pruning."""
    if criterion != DSD and "ratio" in space.config.select:
        return f"uniform {criterion}"
    return f"{criterion} ladder"


def _least_pruned(space: Space) -> Seed:
    params = _ranked(space, 0)
    dense = space.admits(params) and space.candidate(params) == Candidate()
    return Seed("seed: dense" if dense else "seed: least pruned", params)


def _ranked(space: Space, num_dropped: int) -> Params:
    """The first blocks of the ranked path gone, and as many channels kept as may be."""
    if not space.criteria:
        return space.block_params(num_dropped)
    plain = [criterion for criterion in space.criteria if criterion != DSD]
    most = 1.0 if "ratio" in space.config.select else _most_kept(space)
    return space.block_params(num_dropped) | space.channel_params((plain or [DSD])[0], most)


def _most_kept(space: Space) -> float:
    """The largest fraction under the first rule of the space."""
    rule = space.config.select[0]
    return space.fraction_bounds(rule).high if rule in FRACTION_OF else 1.0


def _spread(ladder: list[Seed]) -> list[Seed]:
    """Every second rung first, so that few of them already span the ladder."""
    return ladder[1::2] + ladder[::2]


def _in_turn(ladders: Iterable[list[Seed]]) -> Iterator[Seed]:
    for row in zip_longest(*ladders):
        yield from (seed for seed in row if seed is not None)


def _admitted(space: Space, seeds: Iterable[Seed]) -> list[Seed]:
    """Those within the space's bounds, each candidate once."""
    admitted: list[Seed] = []
    known: set[Candidate] = set()
    for seed in seeds:
        if space.admits(seed.params) and (c := space.candidate(seed.params)) not in known:
            known.add(c)
            admitted.append(seed)
    return admitted
