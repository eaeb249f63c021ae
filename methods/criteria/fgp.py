"""Feature-gradient pruning (FGP). Lv et al. 2024, "FGP: Feature-Gradient-Prune"."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..layers import Layer, get_layer, num_channels
from ..outputs import unwrapped
from .features import find_activations, observed
from .scoring import CalibrationTask, check_batch, scoring


def fgp(
    model: nn.Module,
    task: CalibrationTask,
    layers: Sequence[str],
    *,
    generator: torch.Generator,
    feature_point: Literal["conv", "act"] = "conv",
    class_agg: Literal["sum", "min", "mean"] = "sum",
    presence: Literal["predicted", "label"] = "predicted",
    map_norm: Literal["none", "layer_max"] = "none",
    criterion: Literal["both", "feature_only", "gradient_only"] = "both",
    classes: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """Feature x gradient heat of each channel, added up over the classes (FGP).

    With F the feature and p_d the logit of class d for an image of that class:
    G_c = mean over pixels of dp_d / dF_c;  I_cd = mean over the images with d of the sum over
    pixels of ReLU(G_c F_c);  score_c = sum over d of I_cd. Eqs. 6-9 of the paper, without the sum
    over channels in eq. 6, which would make all channels equal. Where the model gives a map of
    logits, p_d is the sum of those of d over the pixels of class d, and an image has many classes.

    All layers together cost one forward and one backward pass a calibration batch: in evaluation
    mode images do not mix, so the gradient of sum_b z[b, d_b] holds every image's own gradient.
    Segmentation takes one backward pass for each class that is present in the batch.

    Args:
        model: A model that gives logits [B, classes] or [B, classes, H, W]; scored in evaluation
            mode and left as it was.
        task: Gives the calibration batches.
        layers: Names of the layers to score.
        generator: Not used.
        feature_point: F is the layer's output, or the output of the batch norm and activation
            that follow it (up to the next sum, product, pooling or layer).
        class_agg: How I_cd becomes the score; only classes that have an image take part.
        presence: The class of an image (or pixel) is the predicted one or its label; a label
            that is no class, as of pixels to be ignored, counts for none.
        map_norm: `layer_max` divides the maps of an image by their largest value in the layer.
        criterion: `feature_only` uses |F| in place of ReLU(G F); `gradient_only` is |G_c|.
        classes: Use only the images of these classes; None for all.

    Returns:
        Layer name to scores, [out]; zero where a layer is not called or no logit depends on it.

    Raises:
        ValueError: If the model's output or the labels have another shape, if `classes` are not
            classes of the task, if no image has one of them, or if a layer mixes the images.
    """
    wanted = _class_mask(classes, task.num_classes)
    batches = task.calibration_batches()
    modules = {name: get_layer(model, name) for name in layers}
    with scoring(model):
        sums = {n: torch.zeros(task.num_classes, num_channels(m)) for n, m in modules.items()}
        counts = torch.zeros(task.num_classes)
        activations = {}
        if feature_point == "act":
            activations = find_activations(model, layers, batches[0][0][:1].clone())
        for images, labels in batches:
            features: list[tuple[str, _Feature]] = []

            def observe(name: str, tensor: Tensor, to: list[Any] = features) -> None:
                check_batch(name, tensor, len(images))  # noqa: B023  # called in this pass
                to.append((name, _Feature.read(modules[name], tensor)))

            source = images.clone().requires_grad_(criterion != "feature_only")
            with observed(model, layers, observe, activations):
                logits = unwrapped(model(source.clone()))  # which the model may overwrite
            _check_logits(logits, task.num_classes, differentiable=source.requires_grad)
            classes_of = logits.argmax(1) if presence == "predicted" else labels
            _check_labels(classes_of, logits)
            for total, rows, present in _targets(logits, classes_of):
                if source.requires_grad:
                    torch.autograd.grad(total, source, retain_graph=logits.ndim == 4)
                counts += torch.bincount(present, minlength=task.num_classes)
                for name, feature in features:
                    heat = feature.heat(criterion, map_norm)[rows].cpu()
                    sums[name].index_add_(0, present, heat)
    used = wanted & (counts > 0)
    if not used.any():
        raise ValueError(
            f"`fgp.classes` (={classes!r}) must hold a class of some calibration image: no image "
            f"has one of them (presence={presence!r}). Add classes or enlarge the calibration set."
        )
    means = {name: total[used] / counts[used, None] for name, total in sums.items()}
    return {name: _AGGREGATE[class_agg](mean) for name, mean in means.items()}


def _targets(logits: Tensor, classes: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """What is differentiated: once a batch, or in segmentation once for each class present.

    Args:
        logits: [B, classes] or [B, classes, H, W].
        classes: Class of each image or pixel; one that does not exist counts for none.

    Yields:
        Sum of the images' p_d; the images [n] that have one; the class d of each, [n], on the CPU.
    """
    if logits.ndim == 2:
        rows = ((classes >= 0) & (classes < logits.shape[1])).nonzero()[:, 0]
        yield logits[rows, classes[rows]].sum(), rows, classes[rows].cpu()
        return
    for d in range(logits.shape[1]):
        inside = classes == d
        rows = inside.flatten(1).any(1).nonzero()[:, 0]
        if len(rows):
            yield (logits[:, d] * inside).sum(), rows, torch.full((len(rows),), d)


_AGGREGATE: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda means: means.sum(0),
    "min": lambda means: means.amin(0),
    "mean": lambda means: means.mean(0),
}


@dataclass
class _Feature:
    """What the scores need of one feature [B, C, ...]: far smaller than the feature itself.

    G_c is one number a map, so sum ReLU(G F) = ReLU(G) sum ReLU(F) + ReLU(-G) sum ReLU(-F), and
    the same holds for the largest value; neither needs F once G arrives.
    """

    layer: Layer
    sums: tuple[Tensor, Tensor]  # of ReLU(F) and of ReLU(-F) over the pixels, [B, C]
    peaks: tuple[Tensor, Tensor]  # the largest ReLU(F) and ReLU(-F) over the pixels, [B, C]
    gradient: Tensor | None = None  # G, [B, C]; None where the logits do not depend on F

    @classmethod
    def read(cls, layer: Layer, tensor: Tensor) -> _Feature:
        """Summarises a feature; the backward pass fills in the gradient."""
        maps = _as_maps(layer, tensor.detach())
        sides = (maps.clamp(min=0), (-maps).clamp_(min=0))
        feature = cls(
            layer,
            sums=(sides[0].sum(2), sides[1].sum(2)),
            peaks=(sides[0].amax(2), sides[1].amax(2)),
        )
        if tensor.requires_grad:
            tensor.register_hook(feature._receive)  # type: ignore[no-untyped-call]
        return feature

    def _receive(self, gradient: Tensor) -> None:
        self.gradient = _as_maps(self.layer, gradient).mean(2)

    def heat(self, criterion: str, map_norm: str) -> Tensor:
        """Sum over the pixels of each image's map of each channel, [B, C]."""
        gradient = torch.zeros_like(self.sums[0]) if self.gradient is None else self.gradient
        if criterion == "gradient_only":
            heat = peak = gradient.abs()
        else:
            up, down = gradient.clamp(min=0), (-gradient).clamp(min=0)
            if criterion == "feature_only":
                up = down = torch.ones_like(gradient)
            heat = up * self.sums[0] + down * self.sums[1]
            peak = torch.maximum(up * self.peaks[0], down * self.peaks[1])
        if map_norm == "layer_max":
            largest = peak.amax(1, keepdim=True)
            heat = heat / torch.where(largest > 0, largest, 1)
        return heat


def _as_maps(layer: Layer, tensor: Tensor) -> Tensor:
    """[B, C, pixels] in float32; the channels of a linear layer's output come last."""
    if isinstance(layer, nn.Linear):
        tensor = tensor.movedim(-1, 1)
    return tensor.reshape(*tensor.shape[:2], -1).float()


def _class_mask(classes: Sequence[int] | None, num_classes: int) -> Tensor:
    if classes is None:
        return torch.ones(num_classes, dtype=torch.bool)
    if unknown := [index for index in classes if not 0 <= index < num_classes]:
        raise ValueError(
            f"`fgp.classes` (={list(classes)!r}) must be class indices from 0 to "
            f"{num_classes - 1}: {unknown[0]} is not one. Leave it out or change it."
        )
    mask = torch.zeros(num_classes, dtype=torch.bool)
    mask[list(classes)] = True
    return mask


def _check_logits(logits: Any, num_classes: int, *, differentiable: bool) -> None:
    shape = list(logits.shape) if isinstance(logits, Tensor) else []
    if len(shape) not in (2, 4) or shape[1] != num_classes:
        raise ValueError(
            f"`criterion` (='fgp') must score a classifier or a segmentation model: it needs "
            f"logits [batch, {num_classes}] or [batch, {num_classes}, height, width], and the "
            f"model gives {shape or type(logits).__name__}. Use another criterion or head."
        )
    if differentiable and not logits.requires_grad:
        raise ValueError(
            "`criterion` (='fgp') must score a differentiable model: these logits have no "
            "gradient with respect to the images. Remove no_grad or detach from its forward."
        )


def _check_labels(labels: Tensor, logits: Tensor) -> None:
    expected = [len(logits), *logits.shape[2:]]
    if list(labels.shape) != expected:
        raise ValueError(
            f"`fgp.presence` (=label) must find a label for each output: the labels are "
            f"{list(labels.shape)}, the model's outputs {expected}. Use `predicted`, or resize "
            "the label maps."
        )
