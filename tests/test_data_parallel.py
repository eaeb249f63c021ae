"""Several devices of one process: here the CPU stands for each; the arithmetic is the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunesearch.methods.data import load_data
from prunesearch.methods.data_parallel import Replicas
from prunesearch.methods.finetune import FinetuneOptions, Finetuning
from prunesearch.methods.models.build import build_model
from prunesearch.methods.tasks.classification import ClassificationTask

CPU = torch.device("cpu")


def plain_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))


def batch(size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(size, 3, 8, 8, generator=generator)
    return images, torch.randint(5, (size,), generator=generator)


def loss_of(model: nn.Module, teacher: nn.Module | None, images: Tensor, target: Tensor) -> Tensor:
    loss = F.cross_entropy(model(images), target)
    return loss if teacher is None else loss + F.mse_loss(model(images), teacher(images))


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize(("size", "num_devices"), [(8, 2), (7, 3), (9, 4), (2, 2), (1, 3)])
def test_the_gradients_of_a_batch_are_those_of_one_device(size: int, num_devices: int) -> None:
    """Also where the shares are uneven, and where not every device gets one."""
    images, target = batch(size)
    teacher = plain_net().requires_grad_(False)
    alone, model = plain_net(), plain_net()
    for one in (alone, model):
        with torch.no_grad():
            one[0].weight.mul_(2)  # otherwise the teacher's loss is zero
    expected = loss_of(alone, teacher, images, target)
    expected.backward()
    replicas = Replicas(model, teacher, [CPU] * (num_devices - 1))
    for _ in range(2):  # what a step left must not add to the next
        loss = replicas.backward(loss_of, images, target)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6) and not loss.requires_grad
    for mine, others in zip(gradients(model), gradients(alone), strict=True):
        torch.testing.assert_close(mine, others, rtol=1e-5, atol=1e-7)
    replicas.close()


def test_copies_follow_the_weights() -> None:
    images, target = batch(8)
    model = plain_net()
    replicas = Replicas(model, None, [CPU])
    before = replicas.backward(loss_of, images, target)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(0.1 * parameter.grad)
    after = replicas.backward(loss_of, images, target)
    assert after.item() == pytest.approx(loss_of(model, None, images, target).item(), rel=1e-6)
    assert after < before
    replicas.close()


def test_batch_norms_see_their_share_and_the_first_keeps_its_statistics() -> None:
    images, target = batch(8)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5))
    reference = copy.deepcopy(model)
    expected = [torch.zeros_like(p) for p in reference.parameters()]
    for n, (some, labels) in enumerate(zip(images.chunk(2), target.chunk(2), strict=True)):
        one = copy.deepcopy(reference)
        F.cross_entropy(one(some), labels).backward()
        expected = [a + b / 2 for a, b in zip(expected, gradients(one), strict=True)]
        if n == 0:
            statistics = one[1].running_mean
    replicas = Replicas(model, None, [CPU])
    replicas.backward(loss_of, images, target)
    replicas.close()
    for mine, others in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(mine, others, rtol=1e-5, atol=1e-7)
    assert torch.equal(model[1].running_mean, statistics)


def test_an_error_of_one_device_is_an_error_of_the_step() -> None:
    def broken(model: nn.Module, teacher: object, images: Tensor, target: Tensor) -> Tensor:
        if model is not first:
            raise FloatingPointError("not on this one")
        return loss_of(model, None, images, target)

    first = plain_net()
    replicas = Replicas(first, None, [CPU])
    with pytest.raises(FloatingPointError, match="not on this one"):
        replicas.backward(broken, *batch(8))
    replicas.close()


def test_finetuning_on_two_devices_learns_and_can_be_paused() -> None:
    task = ClassificationTask(
        load_data("digits", image_size=8, limit=240), batch_size=32, calibration_size=32
    )
    options = FinetuneOptions(epochs=2, lr=0.05, distill=0.3)
    teacher = build_model("resnet20", num_classes=10).eval()

    def trained(*stops: int | None) -> tuple[dict[str, Tensor], list[float]]:
        torch.manual_seed(0)
        model, losses = build_model("resnet20", num_classes=10), []
        generator = torch.Generator().manual_seed(3)
        training = Finetuning(
            model, task, options, generator=generator, teacher=teacher, devices=[CPU]
        )
        for stop in stops:
            training.run(stop, on_epoch=lambda _, loss: losses.append(loss))
        return model.state_dict(), losses

    whole, losses = trained(None)
    paused, _ = trained(3, None)
    assert losses[-1] < losses[0]
    assert all(torch.equal(paused[name], whole[name]) for name in whole)
