"""What a search starts from: data, model, what can be removed of it, block ranking, space.

Nothing here needs Ray. Wrong input ends here, before any long work, with one `ConfigError`.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..methods.block_removal import MAX_EXHAUSTIVE, rank_blocks
from ..methods.blocks import removable_blocks
from ..methods.data import Data, ImageSize, load_data
from ..methods.groups import plan_pruning
from ..methods.layout import prefer_channels_last
from ..methods.models.build import build_model, default_image_size, input_channels
from ..methods.outputs import tensors_of
from ..methods.shapes import load_state as load_weights
from ..methods.sparse_training import SPARSE_TRAINING
from ..methods.surgery import PruningPlan, group_norms
from ..methods.tasks import Task, task_of
from ..methods.tasks import make_task as build_task
from .cache import Made, Say, open_cache, sharing_here
from .config import ConfigError, SearchConfig
from .digests import common_key, data_digest, weights_digest
from .space import Space, max_blocks
from .store import BLOCKS, read_as, write_json


@dataclass(frozen=True)
class Problem:
    """A checked config with its data and its untrained (or loaded) model.

    Attributes:
        config: The config.
        task: The data on the device that trains.
        model: The dense model, on the same device.
        plan: Its channel groups (none when the space names no criterion).
        blocks: Names of the blocks that may be dropped, in forward order.
    """

    config: SearchConfig
    task: Task
    model: nn.Module
    plan: PruningPlan
    blocks: tuple[str, ...]

    @cached_property
    def data_digest(self) -> str:
        """Content address of the data."""
        return data_digest(self.task.data)

    def key(self, kind: str) -> dict[str, Any]:
        """What every result of this kind depends on that is made of the model as it is now."""
        return common_key(
            kind,
            self.config,
            weights=weights_digest(self.model),
            data=self.data_digest,
            device=self.task.device,
        )


def pose(config: SearchConfig, *, prunable: bool = True) -> Problem:
    """Loads data and model and finds what can be removed.

    Args:
        config: Names them.
        prunable: Whether a model without a removable block or channel is refused.

    Raises:
        ConfigError: If any of it is wrong, or nothing can be removed.
    """
    device = driver_device(config)
    try:
        data = load_images(config)
        task = make_task(config, data, device)
        _check_supported(config, task)
        model = make_model(config, task.num_classes).to(device)
        example = task.example_input(2)
        _try_forward(model, example, task, config)
        prefer_channels_last(model, example)
        plan = find_groups(config, model, example)
        blocks = find_removable(config, model, example)
        _check_sparse_training(config, model, plan)
        _check_order(config, blocks)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if prunable and not plan.groups and not blocks:
        raise ConfigError(
            f"`model.name` (={config.model.name}) must have something to prune: no block and no "
            "channel group of it is removable under `space`. Run `prune-search check` for the "
            "reasons, or widen space.blocks and space.criteria."
        )
    return Problem(config, task, model, plan, blocks)


def trial_device(config: SearchConfig) -> torch.device:
    """Where trials train: a GPU when `resources.gpu` asks for one."""
    if config.resources.gpu > 0:
        if not torch.cuda.is_available():
            raise ConfigError(
                f"`resources.gpu` (={config.resources.gpu}) must be 0 here: torch sees no GPU on "
                "this machine, which trains. Set resources.gpu: 0."
            )
        return torch.device("cuda")
    return torch.device("cpu")


def further_devices(config: SearchConfig) -> tuple[torch.device, ...]:
    """The GPUs that a trial has beside its first one; they share its fine-tuning."""
    return tuple(torch.device("cuda", n) for n in range(1, math.ceil(config.resources.gpu)))


def driver_device(config: SearchConfig) -> torch.device:
    """Where the dense model trains: as trials do, and on the CPU of a head node without a GPU."""
    return trial_device(config) if torch.cuda.is_available() else torch.device("cpu")


def load_images(config: SearchConfig) -> Data:
    """The config's data, as the model needs it."""
    return load_data(
        config.data.name,
        root=config.data.root,
        image_size=_image_size(config),
        channels=_channels(config),
        split=config.data.split,
        seed=config.data.seed,
        limit=config.data.limit,
        memory_bytes=int(config.data.memory_gib * 2**30),
        workers=config.data.workers,
    )


def make_task(config: SearchConfig, data: Data, device: torch.device | str) -> Task:
    """The task over `data` with the config's batch and calibration sizes."""
    return build_task(
        None if config.task is None else config.task.name,
        data,
        batch_size=config.data.batch_size,
        calibration_size=config.data.calibration_size,
        seed=config.data.seed,
        device=device,
        options=None if config.task is None else config.task.options,
    )


def make_model(config: SearchConfig, num_classes: int, *, trained: bool = True) -> nn.Module:
    """The config's dense model on the CPU; seeded, so that a fresh one is the same everywhere.

    Args:
        config: Names the model.
        num_classes: Outputs of the classifier.
        trained: Whether a checkpoint of the config is loaded.
    """
    torch.manual_seed(config.search.seed)
    return build_model(
        config.model.name,
        num_classes=num_classes,
        kwargs=config.model.kwargs,
        checkpoint=config.model.checkpoint if trained else None,
    )


def draw_model(config: SearchConfig, num_classes: int) -> nn.Module:
    """The config's model with weights from torch's global generator, as it stands."""
    return build_model(config.model.name, num_classes=num_classes, kwargs=config.model.kwargs)


def find_groups(config: SearchConfig, model: nn.Module, example: torch.Tensor) -> PruningPlan:
    """The model's channel groups, if the space removes channels at all."""
    if not config.space.criteria:
        return PruningPlan((), {})
    return plan_pruning(model, example, scope=config.space.keep.scope)


def find_removable(
    config: SearchConfig, model: nn.Module, example: torch.Tensor
) -> tuple[str, ...]:
    """Names of the blocks that may be dropped, if the space drops blocks at all."""
    if config.space.blocks.mode == "none":
        return ()
    return tuple(removable_blocks(model, example, valid=config.space.blocks.valid))


def make_space(problem: Problem, run_dir: Path, say: Say) -> Space:
    """Ranks the blocks (once; stored in the run folder) and lays out the search space."""
    config, path = problem.config, run_dir / BLOCKS
    drops: tuple[tuple[str, ...], ...] = ((),)
    if path.exists():
        drops = _read_drops(path, problem.blocks)
    elif problem.blocks:
        cache = open_cache(config.cache, run_dir, say)
        made, waited = sharing_here(cache)(_ranking_key(problem), lambda: _rank(problem, say))
        drops = tuple(map(tuple, made.info["drops"]))
        write_json(path, made.info)
        if waited:
            say(f"blocks were ranked by another run, {waited:.1f} s waited")
        say(f"blocks by {config.space.blocks.order}, first to go: {', '.join(drops[-1][:3])}")
    return Space(config.space, problem.plan, drops)


@dataclass(frozen=True)
class _Ranked:
    """What a space needs of a stored ranking."""

    drops: tuple[tuple[str, ...], ...]


def _read_drops(path: Path, blocks: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    drops = read_as(path, _Ranked).drops
    strangers = sorted({name for some in drops for name in some} - set(blocks))
    if strangers or list(map(len, drops)) != list(range(len(drops))) or not drops:
        raise ConfigError(
            f"`drops` of {path} must be growing sets of removable blocks of this model"
            f"{': not ' if strangers else ''}{', '.join(strangers[:3])}. Delete the file: the "
            "blocks are ranked again."
        )
    return drops


def _rank(problem: Problem, say: Say) -> Made:
    config = problem.config
    try:
        ranking = rank_blocks(
            problem.model,
            problem.task,
            problem.blocks,
            order=config.space.blocks.order,
            score=config.space.blocks.score,
            score_recalibrate_bn=config.space.blocks.score_recalibrate_bn,
            recalibration_images=config.recover.recalibration_images,
            score_finetune_epochs=config.space.blocks.score_finetune_epochs,
            finetune_lr=config.space.blocks.score_finetune_lr,
            finetune_from=config.space.blocks.finetune_from,
            augment=config.data.augment,
            seed=config.search.seed,
            max_drop=max_blocks(config.space.blocks, len(problem.blocks)),
            fresh=lambda: draw_model(config, problem.task.num_classes),
        )
    except (ValueError, FloatingPointError) as error:
        raise ConfigError(
            f"`space.blocks` must rank the blocks of this model: {error}. Use another order."
        ) from error
    say(f"blocks ranked: {ranking.evaluations} evaluations, {ranking.seconds:.1f} s")
    return Made(info=dataclasses.asdict(ranking) | {"drops": ranking.drops})


def _ranking_key(problem: Problem) -> dict[str, Any]:
    config = problem.config
    return problem.key("ranking") | {
        "blocks": problem.blocks,
        "max_drop": max_blocks(config.space.blocks, len(problem.blocks)),
        "settings": config.space.blocks.model_dump(mode="json", exclude={"mode", "max_drop"}),
        "recalibration_images": config.recover.recalibration_images,
    }


@dataclass(frozen=True)
class PackedData:
    """A dataclass whose tensors are numpy arrays, which Ray shares without copying."""

    kind: type[Any]
    fields: Mapping[str, Any]


def pack_images(data: Data) -> PackedData:
    """The data for `ray.put`; tensors are packed, all else in it is pickled."""
    return _packed(data.to("cpu"))


def _packed(data: Any) -> PackedData:
    def one(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.numpy()
        return _packed(value) if dataclasses.is_dataclass(value) else value

    return PackedData(
        type(data), {f.name: one(getattr(data, f.name)) for f in dataclasses.fields(data)}
    )


def unpack_images(packed: PackedData) -> Any:
    """Inverse of `pack_images`, a `Data`; the tensors share the arrays' memory."""

    def one(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return _shared(value)
        return unpack_images(value) if isinstance(value, PackedData) else value

    return packed.kind(**{name: one(value) for name, value in packed.fields.items()})


def load_state(model: nn.Module, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Copies weights from shared arrays into `model`."""
    load_weights(model, {name: _shared(array) for name, array in arrays.items()})


# --- checks ----------------------------------------------------------------------------------


def _channels(config: SearchConfig) -> int:
    """Image channels that the model takes; the model is built once to look."""
    return input_channels(make_model(config, 2, trained=False))


def _image_size(config: SearchConfig) -> ImageSize | None:
    """What the config says, else what a classifier was designed for; None for the data's own."""
    if config.data.image_size is not None:
        return config.data.image_size
    classifies = task_of(config.data.name) == "classification"
    return default_image_size(config.model.name) if classifies else None


def _try_forward(
    model: nn.Module, example: torch.Tensor, task: Task, config: SearchConfig
) -> None:
    shape = "x".join(str(n) for n in example.shape[1:])
    try:
        with torch.inference_mode():
            output = model.eval()(example)
    except Exception as error:  # whatever a foreign model raises means that it does not fit
        raise ConfigError(
            f"`model.name` (={config.model.name}) must accept images of {shape}: it stopped with "
            f"{type(error).__name__}: {error}. Set data.image_size or model.kwargs."
        ) from error
    wanted = task.misfit(output, example)
    if wanted is not None:
        raise ConfigError(
            f"`model.name` (={config.model.name}) must return {wanted} for `data.name` "
            f"(={config.data.name}): it returned {_in_words(output)}. Set model.kwargs."
        )
    if not all(math.isfinite(float(one.abs().sum())) for one in tensors_of(output)):
        raise ConfigError(
            f"`model.checkpoint` (={config.model.checkpoint}) must give finite outputs: it gives "
            "NaN or infinity. Use another checkpoint."
        )


def _in_words(output: Any) -> str:
    return str(list(output.shape)) if isinstance(output, torch.Tensor) else type(output).__name__


def _check_supported(config: SearchConfig, task: Task) -> None:
    """Refuses what makes no sense on the task, with its reason.

    Raises:
        ConfigError: Naming the key that asks for it.
    """
    space, recover = config.space, config.recover
    asked = [("space.criteria", name, name) for name in space.criterion_names]
    if space.blocks.mode != "none":
        asked.append(("space.blocks.order", space.blocks.order, space.blocks.order))
    if recover.distill > 0:
        asked.append(("recover.distill", str(recover.distill), "distill"))
    if recover.reconstruct.steps > 0:
        steps = str(recover.reconstruct.steps)
        asked.append(("recover.reconstruct.steps", steps, "reconstruct"))
    for key, value, method in asked:
        reason = task.supports(method)
        if reason is not None:
            raise ConfigError(
                f"`{key}` (={value}) must make sense for {task.name}: {reason}. Choose another "
                "one, or leave it out."
            )


def _check_order(config: SearchConfig, blocks: Sequence[str]) -> None:
    if config.space.blocks.order == "exhaustive" and len(blocks) > MAX_EXHAUSTIVE:
        raise ConfigError(
            f"`space.blocks.order` (=exhaustive) must measure at most {MAX_EXHAUSTIVE} blocks: "
            f"`model.name` (={config.model.name}) has {len(blocks)}, and each doubles the number "
            "of subsets. Use greedy."
        )


def _check_sparse_training(config: SearchConfig, model: nn.Module, plan: PruningPlan) -> None:
    for name in config.space.criterion_names:
        if name in SPARSE_TRAINING and plan.groups and not group_norms(model, plan):
            raise ConfigError(
                f"`space.criteria` (={name}) must have batch norms to thin: no group of channels "
                f"inside a block of `model.name` (={config.model.name}) has one. Use another one."
            )


def _shared(array: np.ndarray[Any, Any]) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # read-only memory: nothing here writes to it
        return torch.from_numpy(array)
