"""BlockWIPG: gradients inside each block under image and weight perturbations, without data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import channel_rows, get_layer, num_channels
from ..options import Bounds
from .block_gradients import BlockGradients, Gradients
from .scoring import CalibrationTask, scoring


def blockwipg(
    model: nn.Module,
    task: CalibrationTask,
    layers: Sequence[str],
    *,
    generator: torch.Generator,
    terms: Literal["I_m", "I_n", "I_p"] = "I_m",
    norm: Literal["sum", "max", "none"] = "sum",
    fisher: Literal["squared_mean", "mean_squared"] = "squared_mean",
    variance_level: Literal["weight", "channel"] = "weight",
    stopgrad: bool = False,
    n_perturbations: Annotated[int, Bounds(2)] = 10,
    sigma: Annotated[float, Bounds(1e-6)] = 0.1,
    num_images: Annotated[int, Bounds(1)] = 32,
) -> dict[str, Tensor]:
    """Spread and size of a channel's gradients inside its block, on random images (BlockWIPG).

    With x_z ~ N(0, 1) an image of noise, x_zd = x_z + N(0, sigma^2), h the features that enter
    block B (constants: no gradient passes from block to block) and W a layer's weight in B:
    G_zd = |d/dW sum |B(h(x_z)) - B(h(x_zd))||            (eqs. 6 and 7)
    I_n(c) = sum over w in c of the mean over z of the variance over d of G_zd      (eq. 8)
    s(x) = the largest log-softmax of B(h(x)), averaged over the pixels first
    I_p(c) = sum over w in c of (mean over z of ds(x_z)/dw)^2                       (eqs. 4 and 5)
    score = norm(I_n) + norm(I_p)                                                   (eq. 9)

    A block is the residual block that a layer lies in, also where the shape changes. A layer
    outside such blocks (stem, plain networks, classifier) is one with the batch norms and
    activations that follow it; one that is called several times has a block a call, which add up.

    Args:
        model: Scored in evaluation mode and left as it was.
        task: Only the shape and the device of its `example_input` are used.
        layers: Names of the layers to score.
        generator: Draws the images.
        terms: I_m is the sum of I_n and I_p; the other two are used alone (Table 3).
        norm: Divide each term by its sum or its maximum over the layer's channels. `none` is
            eq. 9 to the letter; the terms then differ by orders of magnitude.
        fisher: Square after or before the mean over the images in I_p.
        variance_level: Variance of each weight's G, or of their sum over the channel.
        stopgrad: B(h(x_z)) is a constant in G.
        n_perturbations: d, the number of perturbed copies of an image.
        sigma: Standard deviation of a perturbation.
        num_images: z, the number of images.

    Returns:
        Layer name to scores, [out]; zero where a layer is not called in its block.

    Raises:
        ValueError: If a layer mixes the images of a batch.
    """
    with scoring(model):
        example = task.example_input(1)
        images = _draw((num_images, *example.shape[1:]), generator, example)
        scores = {name: torch.zeros(num_channels(get_layer(model, name))) for name in layers}
        blocks = BlockGradients(model, layers, images[:1])
        if terms != "I_p":
            term = {name: torch.zeros_like(values) for name, values in scores.items()}
            for image in images:
                noise = _draw((n_perturbations, *image.shape), generator, example) * sigma
                pairs = torch.stack([image.expand_as(noise), image + noise], dim=1)
                _add_variances(term, model, blocks, pairs, variance_level, stopgrad)
            _add(scores, term, norm, 1 / num_images)
        if terms != "I_n":
            term = {name: torch.zeros_like(values) for name, values in scores.items()}
            size = num_images if fisher == "squared_mean" else 1
            _add_squares(term, model, blocks, images, size)
            _add(scores, term, norm, 1 / (num_images * size))
    return scores


def _draw(shape: Sequence[int], generator: torch.Generator, like: Tensor) -> Tensor:
    """Normal numbers; a generator on the CPU gives the same whatever the device."""
    return torch.randn(*shape, generator=generator, device=generator.device).to(like)


def _add_variances(
    term: dict[str, Tensor],
    model: nn.Module,
    blocks: BlockGradients,
    pairs: Tensor,
    level: str,
    stopgrad: bool,
) -> None:
    """Adds the variances over the pairs (image, perturbed image), [D, 2, C, H, W]."""

    def distance(output: Tensor) -> Tensor:
        clean, noisy = output[::2], output[1::2]
        return ((clean.detach() if stopgrad else clean) - noisy).abs().sum()

    def receive(gradients: Iterator[Gradients]) -> None:
        spreads: dict[str, _Variance] = {}
        for each in gradients:
            for name, gradient in each.items():
                rows = channel_rows(get_layer(model, name), gradient.abs())
                value = rows.sum(1, keepdim=True) if level == "channel" else rows
                spreads.setdefault(name, _Variance(value)).add(value)
        for name, spread in spreads.items():
            term[name] += spread.value().sum(1).float().cpu()

    blocks.run(pairs.flatten(0, 1), distance, receive, size=2)


def _add_squares(
    term: dict[str, Tensor], model: nn.Module, blocks: BlockGradients, images: Tensor, size: int
) -> None:
    """Adds the squared gradients, summed over each `size` images before they are squared."""

    def certainty(output: Tensor) -> Tensor:
        means = output.flatten(2).mean(2) if output.ndim > 2 else output
        return F.log_softmax(means, 1).amax(1).sum()

    def receive(gradients: Iterator[Gradients]) -> None:
        for each in gradients:
            for name, gradient in each.items():
                rows = channel_rows(get_layer(model, name), gradient)
                term[name] += rows.square().sum(1).float().cpu()

    blocks.run(images, certainty, receive, size=size)


class _Variance:
    """Running variance (Welford 1962): no gradient is kept, and nothing cancels."""

    def __init__(self, like: Tensor) -> None:
        self._mean = torch.zeros_like(like)
        self._squares = torch.zeros_like(like)
        self._count = 0

    def add(self, value: Tensor) -> None:
        self._count += 1
        delta = value - self._mean
        self._mean += delta / self._count
        self._squares += delta * (value - self._mean)

    def value(self) -> Tensor:
        return self._squares / self._count


def _add(scores: dict[str, Tensor], term: dict[str, Tensor], norm: str, factor: float) -> None:
    """Adds a term times `factor`, normalised over the channels of each layer."""
    for name, values in term.items():
        values = values * factor
        scale = {"sum": values.sum(), "max": values.max(), "none": torch.tensor(1.0)}[norm]
        scores[name] += values / scale if scale > 0 else values
