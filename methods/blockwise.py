"""Iterative pruning, block by block, with reconstruction on noise: BlockWIPG without data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .block_widths import RatioTarget, check_inner, inner_groups, step_widths
from .criteria import score_channels, validate_options
from .names import unknown_name
from .restrict import compose, restrict
from .select import select_ratio
from .surgery import ChannelGroup, PruningPlan, Recipe, apply, group_scores


def prune_blockwise(
    model: nn.Module,
    plan: PruningPlan,
    task: Any,
    widths: Mapping[str, int],
    *,
    generator: torch.Generator,
    steps: int = 1,
    epochs: int = 10,
    lr: float = 0.003,
    batch_size: int = 32,
    num_vectors: int = 256,
    student_input: Literal["student", "teacher"] = "student",
    finetune_with_labels: bool = False,
    augment: bool = True,
    ratio_target: RatioTarget = "channels",
    on_block: Callable[[int, str], None] | None = None,
    criterion: str = "blockwipg",
    options: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, Recipe]:
    """Prunes each block in turn and teaches it to answer as the dense one does (BlockWIPG).

    In each step, for each block in forward order: score its groups on the model as it is by then,
    remove the lowest channels, and train the block alone, with Adam, on
    L_KD = MSE(dense block's output, block's output). Blocks run in evaluation mode: statistics of
    noise would spoil the batch norms, whose scale and shift are trained.

    Args:
        model: The dense model; left as it was.
        plan: Its channel groups.
        task: Gives the images' shape; the training batches too if `finetune_with_labels`, and
            the calibration batches if the criterion needs them.
        widths: Channels that each group keeps at the end; others keep all. Only groups inside a
            block: its output must keep its shape.
        generator: Draws the noise and the order of the batches.
        steps: In how many steps the widths are reached.
        epochs: Passes over the noise images, for each block and step.
        lr: Adam's learning rate.
        batch_size: Images in a batch of noise.
        num_vectors: Noise images N(0, 1), drawn anew for each block and step.
        student_input: The block learns on the features of the pruned model, which makes good what
            the blocks before it changed, or on those of the dense model.
        finetune_with_labels: Train each block for `epochs` more, on L_CL + L_KD: the label loss
            of the whole model plus the above, over `num_vectors` training images an epoch.
        augment: Whether those training images are augmented as suits the data set.
        ratio_target: Each step removes an equal share of a block's channels, weights or
            multiply-adds.
        on_block: Called with step (from 1) and block after each reconstruction.
        criterion: What scores the channels: BlockWIPG, or any other for comparison.
        options: The criterion's options.

    Returns:
        The pruned model in evaluation mode, and what was removed, in the dense model's numbering.

    Raises:
        ValueError: If a group is unknown or not inside a block, or a number is out of range.
    """
    validate_options(criterion, options or {})
    _check_numbers(steps=steps, epochs=epochs, batch_size=batch_size, num_vectors=num_vectors)
    _check_widths(plan, widths)
    example = task.example_input(1)
    groups_named = [plan[name] for name in widths]
    blocks = inner_groups(model, groups_named, example)
    check_inner(groups_named, blocks)
    schedule = step_widths(model, blocks, widths, example, steps, ratio_target)
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    student, recipe = copy.deepcopy(teacher), Recipe()
    study = _Study(teacher, task, example, generator, epochs, lr, batch_size, num_vectors)
    for step, targets in enumerate(schedule, start=1):
        for block, groups in blocks.items():
            own = restrict(student, plan, recipe)
            removal = _choose(student, own, groups, targets, study, criterion, options or {})
            if not removal.kept:
                continue
            apply(student, own, removal).requires_grad_(False)
            recipe = compose(plan, recipe, removal)
            study.reconstruct(student, block, student_input)
            if finetune_with_labels:
                study.finetune(student, block, augment)
            if on_block is not None:
                on_block(step, block)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(flags[name])
    return student, recipe


def _choose(
    student: nn.Module,
    plan: PruningPlan,
    groups: tuple[ChannelGroup, ...],
    targets: Mapping[str, int],
    study: _Study,
    criterion: str,
    options: Mapping[str, Any],
) -> Recipe:
    """The channels of highest score of a block's groups, in the student's numbering."""
    present = [plan[group.name] for group in groups]
    shrinking = [group for group in present if targets[group.name] < group.num_channels]
    layers = list(dict.fromkeys(layer for group in shrinking for layer in group.layers))
    if not layers:
        return Recipe()
    generator = study.generator
    seed = int(torch.randint(2**31, (1,), generator=generator, device=generator.device))
    scores = score_channels(criterion, student, study.task, layers, seed=seed, options=options)
    kept = {}
    for group in shrinking:
        size = group.num_channels // group.parts
        keep = targets[group.name] / group.num_channels
        columns = select_ratio(group_scores(group, scores)[:size], keep)
        kept[group.name] = tuple(
            part * size + column for part in range(group.parts) for column in columns.tolist()
        )
    return Recipe((), kept)


@dataclass
class _Study:
    """What reconstruction needs besides the student."""

    teacher: nn.Module
    task: Any
    example: Tensor
    generator: torch.Generator
    epochs: int
    lr: float
    batch_size: int
    num_vectors: int

    def reconstruct(self, student: nn.Module, block: str, student_input: str) -> None:
        """Trains one block of the student on noise."""
        inputs, outputs = [], []
        for images in torch.split(self._noise(), self.batch_size):
            given, expected = block_features(self.teacher, block, images)
            if student_input == "student":
                given, _ = block_features(student, block, images)
            inputs.append(given)
            outputs.append(expected)
        features, answers = torch.cat(inputs), torch.cat(outputs)
        module = student.get_submodule(block)
        with self._training(module) as step:
            for _ in range(self.epochs):
                order = torch.randperm(
                    len(features), generator=self.generator, device=self.generator.device
                )
                for rows in torch.split(order.to(features.device), self.batch_size):
                    step(F.mse_loss(module(features[rows]), answers[rows]))

    def finetune(self, student: nn.Module, block: str, augment: bool) -> None:
        """Trains one block of the student on labelled images."""
        module = student.get_submodule(block)
        outputs: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            outputs.append(output.clone())  # the model may work on it in place

        handle = module.register_forward_hook(keep)
        try:
            with self._training(module) as step:
                for _ in range(self.epochs):
                    for images, target in self.task.train_batches(
                        self.generator, max_images=self.num_vectors, augment=augment
                    ):
                        outputs.clear()
                        loss = self.task.training_loss(student, images, target)
                        _, expected = block_features(self.teacher, block, images)
                        step(loss + F.mse_loss(outputs[0], expected))
        finally:
            handle.remove()

    def _noise(self) -> Tensor:
        shape = (self.num_vectors, *self.example.shape[1:])
        noise = torch.randn(shape, generator=self.generator, device=self.generator.device)
        return noise.to(self.example)

    @contextmanager
    def _training(self, module: nn.Module) -> Iterator[Callable[[Tensor], None]]:
        """Gives a function that makes one optimiser step on a loss; only `module` trains."""
        module.requires_grad_(True)
        optimizer = torch.optim.Adam(module.parameters(), lr=self.lr)

        def step(loss: Tensor) -> None:
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

        with torch.inference_mode(False), torch.enable_grad():
            yield step
        optimizer.zero_grad(set_to_none=True)
        module.requires_grad_(False)


class _Reached(Exception):  # noqa: N818  # not an error: the block has returned
    pass


def block_features(model: nn.Module, block: str, images: Tensor) -> tuple[Tensor, Tensor]:
    """Runs the model up to the end of a block; the block's input and output.

    Args:
        model: In evaluation mode.
        block: A module that is called once, with one tensor, and returns one.
        images: [B, C, H, W].
    """
    found: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0].clone())  # the block may overwrite its input

    def after(module: nn.Module, args: Any, output: Tensor) -> None:
        found.append(output)
        raise _Reached

    module = model.get_submodule(block)
    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        with torch.inference_mode(False), torch.no_grad():
            model(images.clone())
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found[0], found[1]


def _check_numbers(**numbers: int) -> None:
    for name, value in numbers.items():
        least = 0 if name == "epochs" else 1
        if value < least:
            raise ValueError(
                f"`{name}` (={value}) must be at least {least}: fewer do nothing. "
                "Leave it out for the default."
            )


def _check_widths(plan: PruningPlan, widths: Mapping[str, int]) -> None:
    known = {group.name: group for group in plan.groups}
    for name, width in widths.items():
        if name not in known:
            reason = f" It {plan.excluded[name]}." if name in plan.excluded else ""
            raise ValueError(unknown_name("widths", name, known) + reason)
        group = known[name]
        if not 1 <= width <= group.num_channels or width % group.parts:
            raise ValueError(
                f"`widths.{name}` (={width}) must be from {group.parts} to {group.num_channels} "
                f"in steps of {group.parts}: that many channels there are. Change it."
            )
