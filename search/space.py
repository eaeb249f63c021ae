"""The search space: a config and a model's blocks and groups -> Optuna distributions -> Candidate.

Dimensions are conditional: keep fractions exist only under the rule `ratio`, `top_k` only under
`cumulative`, lambda, Q and epochs of sparse training only with the criterion `dsd`, and none of
them when no channel may be removed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import Trial

from ..methods.select import num_kept
from ..methods.surgery import ChannelGroup, PruningPlan
from .config import (
    BlocksConfig,
    ConfigError,
    DsdLambdaConfig,
    KeepConfig,
    MacsConfig,
    SpaceConfig,
    TopKConfig,
)
from .records import Candidate

Params = dict[str, Any]

NUM_BLOCKS = "num_blocks"
CRITERION = "criterion"
SELECT = "select"
TOP_K = "top_k"
GLOBAL_KEEP = "keep:global"
MACS_KEEP = "macs_keep"
DSD = "dsd"
DSD_LAMBDA, DSD_Q, DSD_EPOCHS = "dsd_lambda", "dsd_q", "dsd_epochs"
K_DECIMALS = 3
FRACTION_OF = {"cumulative": TOP_K, "macs": MACS_KEEP, "global": GLOBAL_KEEP}


@dataclass(frozen=True)
class Space:
    """All candidates of one search.

    Attributes:
        config: The `space` section of the config.
        plan: The model's channel groups.
        drops: The blocks to drop if 0, 1, 2, ... are to go: the ranked path. Its last entry holds
            every removable block, the one to remove first in front.
    """

    config: SpaceConfig
    plan: PruningPlan
    drops: tuple[tuple[str, ...], ...]

    @property
    def block_order(self) -> tuple[str, ...]:
        """Every removable block, the one to remove first in front; empty when none may go."""
        return self.drops[-1]

    @cached_property
    def max_blocks(self) -> int:
        """How many blocks a candidate may drop."""
        return max_blocks(self.config.blocks, len(self.block_order))

    @cached_property
    def criteria(self) -> tuple[str, ...]:
        """Names of the criteria; empty when no channel can be removed."""
        return tuple(self.config.criterion_names) if self.plan.groups else ()

    @property
    def size_hint(self) -> str:
        """The dimensions in words, for `check` and the head of a run."""
        parts = []
        if self.max_blocks:
            parts.append(f"up to {self.max_blocks} of {len(self.block_order)} blocks dropped")
        if self.criteria:
            parts.append(f"{len(self.plan.groups)} channel groups by {', '.join(self.criteria)}")
            parts.append(f"keep per {self.config.keep.per}, rules {', '.join(self.config.select)}")
        return "; ".join(parts)

    def suggest(self, trial: Trial) -> Params:
        """Asks `trial` for every parameter that applies and returns them."""
        return self.fill({}, lambda name, distribution: _suggest(trial, name, distribution))

    def fill(
        self, given: Mapping[str, Any], draw: Callable[[str, BaseDistribution], Any]
    ) -> Params:
        """Every parameter that applies: as given where it is admitted, drawn where not."""
        params: Params = {}
        for name, distribution in self._walk(params):
            held = name in given and _holds(distribution, given[name])
            params[name] = given[name] if held else draw(name, distribution)
        return params

    def every(self) -> Iterator[Params]:
        """Parameters of every point of a space whose dimensions are all discrete.

        Raises:
            ConfigError: If a dimension is continuous.
        """
        yield from self._complete({})

    def _complete(self, params: Params) -> Iterator[Params]:
        for name, distribution in self._walk(params):
            if name not in params:
                for value in _values(name, distribution):
                    yield from self._complete(params | {name: value})
                return
        yield params

    def distributions(self, params: Mapping[str, Any]) -> dict[str, BaseDistribution]:
        """The distributions of exactly the parameters that apply given `params`.

        Raises:
            KeyError: If `params` lacks one.
            ValueError: If a value lies outside its distribution.
        """
        found: dict[str, BaseDistribution] = {}
        for name, distribution in self._walk(params):
            if not _holds(distribution, params[name]):
                raise ValueError(f"`{name}` (={params[name]}) must lie in {distribution}.")
            found[name] = distribution
        return found

    def candidate(self, params: Mapping[str, Any]) -> Candidate:
        """The candidate that `params` mean, in canonical form.

        Keep fractions become the fractions that whole channels allow, groups inside dropped
        blocks vanish, and a candidate that removes no channel has no criterion, so that equal
        architectures are equal candidates.
        """
        dropped = self._dropped(params)
        if CRITERION not in params:
            return Candidate(dropped_blocks=dropped)
        criterion = str(params[CRITERION])
        alive = self.alive(dropped)
        if not any(group.internal or criterion != DSD for group in alive):
            return Candidate(dropped_blocks=dropped)  # no channel is left to remove
        if criterion == DSD:
            return self._sparse(dropped, params)
        rule = str(params[SELECT])
        if rule in FRACTION_OF:
            k = max(round(float(params[FRACTION_OF[rule]]), K_DECIMALS), 10.0**-K_DECIMALS)
            if k == 1 and rule != "cumulative":
                return Candidate(dropped_blocks=dropped)
            return Candidate(criterion, dropped, rule, k=k)
        if rule != "ratio":  # a retain mode has no parameter
            return Candidate(criterion, dropped, rule)
        keep = {}
        for group in alive:
            kept = kept_channels(group, float(params[self.keep_name(group)]), self._round_to)
            keep[group.name] = kept / group.num_channels
        if all(fraction == 1 for fraction in keep.values()):
            return Candidate(dropped_blocks=dropped)
        return Candidate(criterion, dropped, rule, keep=tuple(sorted(keep.items())))

    def alive(self, dropped_blocks: tuple[str, ...]) -> tuple[ChannelGroup, ...]:
        """`PruningPlan.alive`, remembered: a sampler asks for thousands of candidates."""
        if dropped_blocks not in self._alive:
            self._alive[dropped_blocks] = self.plan.alive(dropped_blocks)
        return self._alive[dropped_blocks]

    @cached_property
    def _alive(self) -> dict[tuple[str, ...], tuple[ChannelGroup, ...]]:
        return {}

    # --- the dimensions ---------------------------------------------------------------------

    def _walk(self, params: Mapping[str, Any]) -> Iterator[tuple[str, BaseDistribution]]:
        """Yields the dimensions in order; reads `params` only for those already yielded."""
        blocks, keep, top_k = self.config.blocks, self.config.keep, self.config.top_k
        if self.max_blocks and blocks.mode == "ranked":
            yield NUM_BLOCKS, IntDistribution(0, self.max_blocks)
        elif self.max_blocks and blocks.mode == "mask":
            for block in self.block_order:
                yield block_name(block), _choices((False, True))
        if not self.criteria:
            return
        yield CRITERION, _choices(self.criteria)
        if params[CRITERION] == DSD:
            yield from self._sparse_dimensions()
            return
        yield SELECT, _choices(self.config.select)
        match params[SELECT]:
            case "cumulative":
                yield TOP_K, _floats(top_k.low, top_k.high)
            case "macs":
                macs = self.config.macs_keep
                yield MACS_KEEP, _floats(macs.low, macs.high)
            case "global":
                yield GLOBAL_KEEP, _floats(keep.low, keep.high, keep.step)
            case "ratio":
                for name in self.keep_names():
                    yield name, _floats(keep.low, keep.high, keep.step)

    def _sparse_dimensions(self) -> Iterator[tuple[str, BaseDistribution]]:
        strength, q = self.config.dsd_lambda, self.config.dsd_q
        yield DSD_LAMBDA, _floats(strength.low, strength.high, log=strength.log)
        yield DSD_Q, _floats(q.low, q.high, q.step)
        yield DSD_EPOCHS, _choices(self.config.dsd_epochs)

    def _sparse(self, dropped: tuple[str, ...], params: Mapping[str, Any]) -> Candidate:
        """Sparse training, then global pruning of the fraction that it drove to zero."""
        q = round(float(params[DSD_Q]), K_DECIMALS)
        return Candidate(
            DSD,
            dropped,
            "global",
            k=round(1 - q, K_DECIMALS),
            dsd_lambda=snap(self.config.dsd_lambda, float(params[DSD_LAMBDA])),
            dsd_q=q,
            dsd_epochs=float(params[DSD_EPOCHS]),
        )

    @property
    def _round_to(self) -> int:
        return self.config.keep.round_to

    def keep_names(self) -> list[str]:
        """The dimensions of the rule `ratio`, in the order of the plan's groups."""
        return list(dict.fromkeys(self.keep_name(group) for group in self.plan.groups))

    def keep_name(self, group: ChannelGroup) -> str:
        """The dimension that decides how many of a group's channels are kept."""
        match self.config.keep.per:
            case "model":
                return "keep"
            case "stage":
                return f"keep:{group.stage}"
            case _:
                return f"keep:{group.name}"

    def _dropped(self, params: Mapping[str, Any]) -> tuple[str, ...]:
        if not self.max_blocks:
            return ()
        if self.config.blocks.mode == "ranked":
            return tuple(sorted(self.drops[params[NUM_BLOCKS]]))
        chosen = [block for block in self.block_order if params[block_name(block)]]
        return tuple(sorted(chosen[: self.max_blocks]))  # over the limit: the best-ranked ones go

    # --- parameters from a few numbers ------------------------------------------------------

    def block_params(self, num_dropped: int) -> Params:
        """Parameters that drop the first so many blocks of the ranked path."""
        if not self.max_blocks:
            return {}
        if self.config.blocks.mode == "ranked":
            return {NUM_BLOCKS: num_dropped}
        return {block_name(b): b in self.drops[num_dropped] for b in self.block_order}

    def channel_params(self, criterion: str, keep: float) -> Params:
        """Parameters that keep the same fraction everywhere, by the first rule that fits."""
        if criterion == DSD:
            return self._sparse_params(keep)
        keep = self.on_grid(self.first_rule, keep)
        rule = self.first_rule
        params: Params = {CRITERION: criterion, SELECT: rule}
        if rule == "ratio":
            return params | {name: keep for name in self.keep_names()}
        return params | ({FRACTION_OF[rule]: keep} if rule in FRACTION_OF else {})

    def fraction_bounds(self, rule: str) -> KeepConfig | TopKConfig | MacsConfig:
        """The ends of the fraction that a rule of `FRACTION_OF` has."""
        match rule:
            case "cumulative":
                return self.config.top_k
            case "macs":
                return self.config.macs_keep
            case _:
                return self.config.keep

    @property
    def first_rule(self) -> str:
        """The rule of equal fractions where there is one, else the first."""
        return "ratio" if "ratio" in self.config.select else self.config.select[0]

    def on_grid(self, rule: str, value: float) -> float:
        """The fraction nearest to `value` that the rule's dimension has; unbounded ones as is."""
        bounds = self.fraction_bounds(rule)
        step = getattr(bounds, "step", None)
        if step is None:
            return value
        return min(_steps(bounds.low, bounds.high, step), key=lambda point: abs(point - value))

    def admits(self, params: Mapping[str, Any]) -> bool:
        """Whether every parameter lies within its bounds."""
        try:
            self.distributions(params)
        except ValueError:
            return False
        return True

    def means(self, params: Mapping[str, Any], candidate: Candidate) -> bool:
        """Whether the parameters are of this space and stand for that candidate in it."""
        try:
            return self.admits(params) and self.candidate(params) == candidate
        except (KeyError, ValueError, TypeError, IndexError):  # a foreign row too
            return False

    def _sparse_params(self, keep: float) -> Params:
        """Sparse training of medium strength that removes about 1 - `keep`."""
        strength, q, epochs = self.config.dsd_lambda, self.config.dsd_q, self.config.dsd_epochs
        grid = lambda_grid(strength)
        fractions = _steps(q.low, q.high, q.step)
        return {
            CRITERION: DSD,
            DSD_LAMBDA: grid[len(grid) // 2],
            DSD_Q: min(fractions, key=lambda fraction: abs(1 - keep - fraction)),
            DSD_EPOCHS: epochs[-1],
        }


def max_blocks(config: BlocksConfig, num_removable: int) -> int:
    """How many of the removable blocks a candidate may drop."""
    if config.mode == "none":
        return 0
    return math.floor(config.max_drop * num_removable + 1e-9)


def kept_channels(group: ChannelGroup, keep: float, round_to: int) -> int:
    """Channels of `group` that stay at the keep fraction `keep`: whole columns of its parts."""
    return group.parts * num_kept(group.num_channels // group.parts, keep, round_to=round_to)


def lambda_grid(config: DsdLambdaConfig) -> list[float]:
    """The strengths of sparse training that candidates may have, ascending."""
    if config.num == 1:
        return [config.low]
    spaced = np.geomspace if config.log else np.linspace
    inner = [float(value) for value in spaced(config.low, config.high, config.num)[1:-1]]
    return [config.low, *inner, config.high]  # the ends without a rounding error


def snap(config: DsdLambdaConfig, value: float) -> float:
    """The value of the grid that is nearest to `value`, so that trials can share its training."""
    scale = math.log if config.log else float
    return min(lambda_grid(config), key=lambda point: abs(scale(point) - scale(value)))


def effective_widths(groups: Sequence[ChannelGroup], keep: float, round_to: int) -> dict[str, int]:
    """Width of every group at one requested keep fraction."""
    return {group.name: kept_channels(group, keep, round_to) for group in groups}


def _suggest(trial: Trial, name: str, distribution: BaseDistribution) -> Any:
    match distribution:
        case CategoricalDistribution(choices=choices):
            return trial.suggest_categorical(name, choices)
        case IntDistribution(low=low, high=high):
            return trial.suggest_int(name, low, high)
        case FloatDistribution(low=low, high=high, log=log, step=step):
            return trial.suggest_float(name, low, high, log=log, step=step)
    raise AssertionError(distribution)


def _values(name: str, distribution: BaseDistribution) -> list[Any]:
    """Every value of a discrete dimension."""
    match distribution:
        case CategoricalDistribution(choices=choices):
            return list(choices)
        case IntDistribution(low=low, high=high):
            return list(range(low, high + 1))
        case FloatDistribution(low=low, high=high, step=float(step)):
            return _steps(low, high, step)
    raise ConfigError(
        f"`{name}` (={distribution}) must have countably many values. Set space.keep.step."
    )


@cache
def _choices(choices: tuple[Any, ...]) -> CategoricalDistribution:
    return CategoricalDistribution(choices)


@cache
def _floats(
    low: float, high: float, step: float | None = None, log: bool = False
) -> FloatDistribution:
    if step is None:
        return FloatDistribution(low, high, log=log)
    return FloatDistribution(low, _steps(low, high, step)[-1], step=step)


def _steps(low: float, high: float, step: float) -> list[float]:
    count = math.floor((high - low) / step + 1e-9) + 1
    return [round(low + i * step, 9) for i in range(count)]  # no more of the binary remainder


def _holds(distribution: BaseDistribution, value: Any) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    within = bool(distribution.low <= value <= distribution.high)
    if within and isinstance(distribution, FloatDistribution) and distribution.step is not None:
        steps = (value - distribution.low) / distribution.step
        return bool(abs(steps - round(steps)) < 1e-6)
    return within


def block_name(block: str) -> str:
    """The dimension that says whether a block is dropped, where blocks are a mask."""
    return f"drop:{block}"
