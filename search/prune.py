"""From a candidate to its recipe and its model: sparse training, channel scores, selection."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..methods.block_widths import inner_groups
from ..methods.blockwise import prune_blockwise
from ..methods.criteria import DRAWN, is_comparable, needs, score_channels
from ..methods.k_for_macs import k_for_macs
from ..methods.restrict import compose, restrict
from ..methods.seeding import seeded
from ..methods.select import SELECTION_RULES, select_cumulative, select_global, select_retain
from ..methods.shapes import copy_state, load_state
from ..methods.sparse_training import SPARSE_TRAINING
from ..methods.surgery import (
    ChannelGroup,
    PruningPlan,
    Recipe,
    group_norms,
    group_scores,
    prune,
    whole_columns,
)
from ..methods.tasks.no_data import NoData
from .cache import Made
from .context import TrialContext
from .records import Candidate

TAU = "slimming"  # what sparse training is scored by: the absolute batch-norm scales


@dataclasses.dataclass(frozen=True)
class Start:
    """The model that channels are removed from.

    Attributes:
        model: The dense model, or a sparse-trained copy of it.
        waited_s: Seconds spent waiting for another trial's sparse training.
    """

    model: nn.Module
    waited_s: float = 0.0


def start_of(candidate: Candidate, context: TrialContext) -> Start:
    """The dense model, or its sparse-trained copy, which all trials that ask for it share."""
    if candidate.dsd_lambda is None:
        return Start(context.dense)
    key = _sparse_key(candidate, context)
    made, waited = context.shared(key, lambda: _sparse_train(candidate, context))
    model = copy.deepcopy(context.dense)
    load_state(model, made.tensors)
    return Start(model, waited)


def make_recipe(
    candidate: Candidate, context: TrialContext, seed: int, start: Start | None = None
) -> tuple[Recipe, float]:
    """The exact channels that a candidate keeps: its criterion's scores under its rule.

    Args:
        candidate: Blocks to drop and channels to keep.
        context: The dense model and its groups.
        seed: Seed of the criteria and rules that draw; the others use the run's.
        start: From `start_of`; the dense model when left out.

    Returns:
        The recipe, and the seconds spent waiting for another trial's scores.
    """
    if candidate.criterion is None:
        return Recipe(candidate.dropped_blocks), 0.0
    groups = context.plan.alive(candidate.dropped_blocks)
    if candidate.dsd_lambda is not None:
        assert start is not None
        groups = tuple(g for g in groups if g.name in group_norms(context.dense, context.plan))
        scores, waited = _score(TAU, start.model, context, groups, {}, seed), 0.0
    else:
        scores, waited = _shared_scores(candidate.criterion, context, seed)
    # The parts of a group keep the same columns: one part is ranked, and stands for all.
    parts = {
        group.name: group_scores(group, scores, candidate.dropped_blocks)[: _columns(group)]
        for group in groups
    }
    columns = _select(candidate, context, groups, parts, seed)
    kept = {group.name: whole_columns(group, columns[group.name]) for group in groups}
    return Recipe(candidate.dropped_blocks, kept), waited


def prune_by_blocks(
    candidate: Candidate, start: Start, recipe: Recipe, context: TrialContext, seed: int
) -> tuple[nn.Module, Recipe]:
    """Removes what `recipe` names; inside blocks iteratively, with reconstruction on noise.

    Blocks, and channels that leave their block, go at once. The widths of the other groups are
    the recipe's; which of their channels stay is decided anew, block by block.

    Returns:
        The pruned model, and the recipe of what was removed.
    """
    assert candidate.criterion is not None
    settings, task = context.config.recover.reconstruct, context.task
    groups = [context.plan[name] for name in recipe.kept]
    blocks = inner_groups(context.dense, groups, task.example_input(1))
    inner = {group.name for inside in blocks.values() for group in inside}
    outer = Recipe(
        recipe.dropped_blocks, {n: kept for n, kept in recipe.kept.items() if n not in inner}
    )
    model = prune(start.model, context.plan, outer)
    sparse = candidate.dsd_lambda is not None
    criterion = TAU if sparse else candidate.criterion
    model, removed = prune_blockwise(
        model,
        restrict(model, context.plan, outer),
        task if settings.labels else _needed(criterion, context),
        {name: len(recipe.kept[name]) for name in sorted(inner)},
        generator=torch.Generator().manual_seed(seed),
        steps=settings.steps,
        epochs=settings.epochs,
        lr=settings.lr,
        num_vectors=settings.num_vectors,
        finetune_with_labels=settings.labels,
        augment=context.config.data.augment,
        ratio_target=settings.ratio_target,
        criterion=criterion,
        options={} if sparse else criterion_options(candidate.criterion, context),
    )
    return model, compose(context.plan, outer, removed)


# --- selection -------------------------------------------------------------------------------


def _select(
    candidate: Candidate,
    context: TrialContext,
    groups: Sequence[ChannelGroup],
    scores: Mapping[str, Tensor],
    seed: int,
) -> Mapping[str, Tensor]:
    """Kept columns of each group."""
    rule, k = candidate.select, candidate.k
    round_to = context.config.space.keep.round_to
    if rule == "ratio":
        keep = dict(candidate.keep)
        return {
            name: SELECTION_RULES[rule](values, keep[name], round_to=round_to)
            for name, values in scores.items()
        }
    if k is None:  # a retain mode
        generator = torch.Generator().manual_seed(seed)
        return {
            name: select_retain(values, rule, generator, round_to=round_to)  # type: ignore[arg-type]
            for name, values in scores.items()
        }
    if rule == "global":
        normalize = not is_comparable(candidate.criterion)
        return select_global(scores, k, round_to=round_to, normalize=normalize)

    def cumulative(share: float) -> dict[str, Tensor]:
        return {
            name: select_cumulative(values, share, round_to=round_to)
            for name, values in scores.items()
        }

    if rule == "cumulative":
        return cumulative(k)
    assert rule == "macs", rule
    by_name = {group.name: group for group in groups}

    def recipe(share: float) -> Recipe:
        kept = {name: whole_columns(by_name[name], c) for name, c in cumulative(share).items()}
        return Recipe(candidate.dropped_blocks, kept)

    image = context.task.example_input()
    return cumulative(k_for_macs(context.dense, context.plan, image, recipe, k))


def _columns(group: ChannelGroup) -> int:
    return group.num_channels // group.parts


# --- scores ----------------------------------------------------------------------------------


def _shared_scores(
    criterion: str, context: TrialContext, seed: int
) -> tuple[Mapping[str, Tensor], float]:
    options = criterion_options(criterion, context)
    if criterion in DRAWN:
        scores = _score(criterion, context.dense, context, context.plan.groups, options, seed)
        return scores, 0.0
    waited = 0.0
    if criterion not in context.scores:
        run_seed = context.config.search.seed
        groups = context.plan.groups

        def make() -> Made:
            return Made(_score(criterion, context.dense, context, groups, options, run_seed))

        key = context.key("scores") | {
            "criterion": criterion,
            "options": dict(options),
            "layers": list(context.plan.layers),
        }
        made, waited = context.shared(key, make)
        context.scores[criterion] = made.tensors
    return context.scores[criterion], waited


def _score(
    criterion: str,
    model: nn.Module,
    context: TrialContext,
    groups: Sequence[ChannelGroup],
    options: Mapping[str, Any],
    seed: int,
) -> Mapping[str, Tensor]:
    layers = PruningPlan(tuple(groups), {}).layers
    task = _needed(criterion, context)
    return score_channels(criterion, model, task, layers, seed=seed, options=options)


def _needed(criterion: str, context: TrialContext) -> Any:
    """What a criterion gets to see: a data-free one gets no data."""
    task = context.task
    if needs(criterion) != "nothing":
        return task
    return NoData(task.example_input(1).shape[1:], task.num_classes, task.device)


def criterion_options(criterion: str, context: TrialContext) -> Mapping[str, Any]:
    """The criterion's options in the config."""
    return next(c.options for c in context.config.space.criteria if c.name == criterion)


# --- sparse training -------------------------------------------------------------------------


def sparse_norms(model: nn.Module, plan: PruningPlan) -> list[str]:
    """The batch norms that sparse training may thin: those of channels inside blocks."""
    return [name for names in group_norms(model, plan).values() for name in names]


def _sparse_train(candidate: Candidate, context: TrialContext) -> Made:
    assert candidate.criterion is not None
    model = copy.deepcopy(context.dense)
    settings = context.config.sparse_training
    seed = context.config.search.seed
    with seeded(seed):  # dropout draws from the global generator
        history = SPARSE_TRAINING[candidate.criterion](
            model,
            context.task,
            sparse_norms(model, context.plan),
            lam=candidate.dsd_lambda,
            q=candidate.dsd_q,
            epochs=candidate.dsd_epochs,
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            generator=torch.Generator().manual_seed(seed),
            augment=context.config.data.augment,
            **criterion_options(candidate.criterion, context),
        )
    info = {
        "criterion": candidate.criterion,
        **{name: getattr(candidate, name) for name in ("dsd_lambda", "dsd_q", "dsd_epochs")},
        "accuracy": context.task.evaluate(model, "val")["accuracy"],
        "history": dataclasses.asdict(history),
    }
    return Made({k: v.cpu() for k, v in copy_state(model).items()}, info)


def _sparse_key(candidate: Candidate, context: TrialContext) -> dict[str, Any]:
    assert candidate.criterion is not None
    options = dict(criterion_options(candidate.criterion, context))
    return context.key("sparse") | {
        "criterion": candidate.criterion,
        "options": options,
        "lambda": candidate.dsd_lambda,
        "q": None if options.get("strategy") == "slimming" else candidate.dsd_q,  # trains alike
        "epochs": candidate.dsd_epochs,
        "training": context.config.sparse_training.model_dump(mode="json"),
        "norms": sparse_norms(context.dense, context.plan),
    }
