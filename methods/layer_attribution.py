"""Scores whole layers or blocks. Shukla and Tapas 2026, arXiv:2602.14040.

A layer matters as much as its activations matter to the loss: S_l = mean over the calibration
batches of sum_i |dL/dA_i * A_i|, with A the layer's output and L the mean loss of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from .criteria.scoring import scoring
from .layer_gradients import BatchLoss, Draw, grad_x_act, gradient_shap
from .names import unknown_name
from .options import Bounds, check_options
from .seeding import seeded

LayerScore = Literal["grad_x_act", "gradient_shap", "layer_l1", "random"]
Reduce = Literal["sum", "mean"]
Baselines = Literal["zeros", "images"]


class LossTask(Protocol):
    """What layer attribution needs of a task."""

    def calibration_batches(self) -> Sequence[tuple[Any, Any]]:
        """Fixed batches of images and targets, on the model's device."""

    def training_loss(self, model: Any, images: Any, target: Any, /) -> Any:
        """Mean loss of a batch, a scalar, or several by name, which are added up."""


def score_layers(
    model: nn.Module,
    task: LossTask,
    layers: Sequence[str],
    *,
    score: LayerScore = "grad_x_act",
    reduce: Reduce = "sum",
    generator: torch.Generator,
    n_samples: Annotated[int, Bounds(1)] = 5,
    baselines: Baselines = "zeros",
    stdev: Annotated[float, Bounds(0)] = 0.0,
    batch_loss: BatchLoss | None = None,
) -> dict[str, float]:
    """How much each layer matters; more means keep.

    grad_x_act: |dL/dA * A|, all layers in one forward and one backward pass a batch.
    gradient_shap: |mean over samples of dL/dA(mix) * (A(image) - A(baseline))|, with mix a random
    point between image and baseline; three passes forward and one backward a sample.
    layer_l1: sum of |w| over the layer's kernels, the rival that reads no data; biases and norms
    do not count. random: uniform in [0, 1).

    Args:
        model: Scored in eval mode and left as it was.
        task: Gives the calibration batches and the loss.
        layers: Names of modules that return one tensor: layers or whole blocks. Over several
            calls of one layer the values are added.
        score: What is measured.
        reduce: Over the values of a layer and batch (over the weights for layer_l1). `sum` as in
            the paper favours layers with many values; `mean` does not.
        generator: CPU generator; decides everything random.
        n_samples: Samples an image, for gradient_shap.
        baselines: `zeros` (the mean colour, where images are normalised) or random `images` of
            the same batch, for gradient_shap.
        stdev: Of the noise added to the images, for gradient_shap.
        batch_loss: (model, images, target) -> loss, or losses by name, which are added up;
            `task.training_loss` by default. `detector_losses` suits torchvision's
            detectors.

    Returns:
        Layer name to score, >= 0; 0 where a layer is not called or the loss ignores it.

    Raises:
        ValueError: If a name is unknown, a layer returns no tensor, or a score is not finite.
    """
    check_options(
        "layers",
        score_layers,
        {
            "score": score,
            "reduce": reduce,
            "n_samples": n_samples,
            "baselines": baselines,
            "stdev": stdev,
        },
        without=("generator", "batch_loss"),
    )
    modules = _modules(model, layers)
    if score == "random":
        return {name: torch.rand((), generator=generator).item() for name in modules}
    if score == "layer_l1":
        return _finite({name: _reduced(_kernels(m), reduce) for name, m in modules.items()})
    loss = batch_loss or task.training_loss
    seed = int(torch.randint(2**31, (), generator=generator))
    totals = dict.fromkeys(modules, 0.0)
    batches = task.calibration_batches() if modules else []
    with scoring(model), seeded(seed):
        for images, target in batches:
            if score == "grad_x_act":
                found = grad_x_act(model, loss, modules, images, target)
            else:
                draws = _draws(images, generator, n_samples, baselines, stdev)
                found = gradient_shap(model, loss, modules, target, draws)
            for name, tensors in found.items():
                totals[name] += _reduced(tensors, reduce) / len(batches)
    return _finite(totals)


def detector_losses(model: nn.Module, images: Any, targets: Any) -> Mapping[str, Tensor]:
    """The loss dict of a torchvision detector, which gives it in train mode only.

    Batch norms and dropout stay in eval mode. Leaves the other modules in train mode.
    """
    for module in model.modules():
        module.training = not isinstance(module, (_BatchNorm, _DropoutNd))
    losses: Mapping[str, Tensor] = model(images, targets)
    return losses


def _draws(
    images: Any, generator: torch.Generator, n_samples: int, baselines: Baselines, stdev: float
) -> list[Draw]:
    """For each sample: noisy images, baselines, and how much of the image is in the mix."""
    if not isinstance(images, Tensor):
        raise ValueError(
            "`score` (=gradient_shap) must get the images of a batch in one tensor: it mixes them "
            "with baselines. Use grad_x_act."
        )

    def sample() -> Draw:
        noise = torch.randn(images.shape, generator=generator) if stdev else torch.zeros(())
        chosen = torch.randint(len(images), (len(images),), generator=generator)
        starts = images[chosen.to(images.device)] if baselines == "images" else images * 0
        share = torch.rand(len(images), generator=generator)
        return images + stdev * noise.to(images), starts, share.to(images)

    return [sample() for _ in range(n_samples)]


def _modules(model: nn.Module, layers: Sequence[str]) -> dict[str, nn.Module]:
    known = dict(model.named_modules(remove_duplicate=False))
    for name in layers:
        if not name or name not in known:
            raise ValueError(unknown_name("layers", name, [key for key in known if key]))
    return {name: known[name] for name in layers}


def _kernels(module: nn.Module) -> list[Tensor]:
    return [p.detach() for p in module.parameters() if p.ndim > 1]


def _reduced(tensors: Sequence[Tensor], reduce: Reduce) -> float:
    """Sum or mean of the absolute values of all tensors together."""
    total = sum(tensor.abs().sum(dtype=torch.float64).item() for tensor in tensors)
    count = sum(tensor.numel() for tensor in tensors)
    return total / max(1, count) if reduce == "mean" else float(total)


def _finite(scores: dict[str, float]) -> dict[str, float]:
    for name, value in scores.items():
        if not math.isfinite(value):
            raise ValueError(
                f"`layers` (={name}) must have a finite score, and it is {value}: a weight, an "
                "output or a gradient is infinite or NaN. Check the checkpoint and the data."
            )
    return scores
