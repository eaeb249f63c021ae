"""The classification task: batches, augmentation, loss and accuracy."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from prunesearch.methods.data import ImageData, Split
from prunesearch.methods.data.image_data import channel_statistics
from prunesearch.methods.tasks import ClassificationTask
from prunesearch.methods.tasks.classification import crop_and_flip


def make_data(num_train: int = 65) -> ImageData:
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> Split:
        images = torch.randint(0, 256, (count, 3, 6, 6), generator=generator, dtype=torch.uint8)
        return Split(images, torch.arange(count) % 4)

    train = split(num_train)
    mean, std = channel_statistics(train.images)
    return ImageData(
        name="made",
        classes=("a", "b", "c", "d"),
        train=train,
        val=split(21),
        test=split(22),
        mean=mean,
        std=std,
        crop_padding=2,
        horizontal_flip=True,
        official_test=False,
    )


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_batches_are_normalised_and_in_order():
    data = make_data()
    task = ClassificationTask(data, batch_size=8)
    images = torch.cat([images for images, _ in task.batches("train")])
    labels = torch.cat([labels for _, labels in task.batches("train")])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.mean, data.std))
    torch.testing.assert_close(images, (data.train.images / 255 - mean) / std)
    assert torch.equal(labels, data.train.labels)
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3), correction=0), torch.ones(3))
    assert (task.num_classes, task.num_train, task.metric) == (4, 65, "top-1")


def test_an_epoch_has_every_image_once_but_a_last_batch_of_one():
    data = make_data(num_train=65)
    task = ClassificationTask(data, batch_size=8)
    order = list(task.batches("train", batch_size=65))[0][0]
    batches = list(task.train_batches(seeded(), augment=False))
    assert [len(labels) for _, labels in batches] == [8] * 8
    seen = torch.cat([images for images, _ in batches])
    found = (seen[:, None] == order[None]).flatten(2).all(2)
    assert found.sum(1).tolist() == [1] * 64
    assert found.sum(0).sum() == 64
    labels = torch.cat([labels for _, labels in batches])
    assert torch.equal(labels, data.train.labels[found.long().argmax(1)])
    assert not torch.equal(labels, data.train.labels[:64])
    assert sum(len(y) for _, y in task.train_batches(seeded(), max_images=20)) == 20


def test_the_generator_gives_the_epoch():
    task = ClassificationTask(make_data(), batch_size=16)
    first, second = seeded(5), seeded(5)
    for a, b in zip(task.train_batches(first), task.train_batches(second), strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    following = next(iter(task.train_batches(first)))
    assert not torch.equal(following[0], next(iter(task.train_batches(seeded(5))))[0])


def test_crop_and_flip_is_a_window_of_the_padded_image():
    images = torch.randint(1, 256, (40, 3, 5, 7), dtype=torch.uint8, generator=seeded(1))
    result = crop_and_flip(images, seeded(), padding=2, flip=True)
    padded = F.pad(images, [2] * 4)
    seen = set()
    for image, wide in zip(result, padded, strict=True):
        windows = {
            (top, left, flip): window.flip(2) if flip else window
            for top in range(5)
            for left in range(5)
            for window in [wide[:, top : top + 5, left : left + 7]]
            for flip in (False, True)
        }
        matches = [key for key, window in windows.items() if torch.equal(window, image)]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) > 20
    assert {flip for _, _, flip in seen} == {False, True}
    assert torch.equal(crop_and_flip(images, seeded(), padding=0, flip=False), images)


def test_calibration_is_a_fixed_stratified_part_of_train():
    data = make_data()
    task = ClassificationTask(data, batch_size=8, calibration_size=20, seed=3)
    images = torch.cat([images for images, _ in task.calibration_batches()])
    labels = torch.cat([labels for _, labels in task.calibration_batches()])
    assert torch.bincount(labels).tolist() == [5, 5, 5, 5]
    train = list(task.batches("train", batch_size=65))[0][0]
    assert (images[:, None] == train[None]).flatten(2).all(2).sum(1).tolist() == [1] * 20
    again = ClassificationTask(data, batch_size=8, calibration_size=20, seed=3)
    other = ClassificationTask(data, batch_size=8, calibration_size=20, seed=4)
    assert torch.equal(again.calibration_batches()[0][0], task.calibration_batches()[0][0])
    assert not torch.equal(other.calibration_batches()[0][0], task.calibration_batches()[0][0])
    assert torch.equal(task.example_input(3), images[:3])
    assert task.example_input(25).shape == (25, 3, 6, 6)


def test_evaluate_against_the_formula_at_any_batch_size():
    torch.manual_seed(0)
    task = ClassificationTask(make_data(), batch_size=8)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(108, 4))
    model.train()
    model[1].eval()
    (images, labels) = next(iter(task.batches("val", batch_size=21)))
    logits = model[2](images.flatten(1)).detach()
    logp = logits - logits.exp().sum(1, keepdim=True).log()
    expected = -logp[torch.arange(21), labels].mean().item()
    for batch_size in (None, 1, 21, 500):
        metrics = task.evaluate(model, batch_size=batch_size)
        assert metrics["accuracy"] == (logits.argmax(1) == labels).double().mean().item()
        assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert task.loss(logits, labels).item() == pytest.approx(expected, rel=1e-5)
    assert task.evaluate(model, "test") != task.evaluate(model, "calibration")


def test_modes_are_restored_when_the_model_fails():
    task = ClassificationTask(make_data())
    model = nn.Linear(2, 2).train()
    with pytest.raises(RuntimeError):
        task.evaluate(model)
    assert model.training


def test_wrong_arguments():
    data = make_data()
    with pytest.raises(ValueError, match=r"`data.batch_size` \(=1\) must be at least 2"):
        ClassificationTask(data, batch_size=1)
    with pytest.raises(ValueError, match=r"`calibration_size` \(=0\) must be at least 1"):
        ClassificationTask(data, calibration_size=0)
    with pytest.raises(ValueError, match=r"`max_images` \(=1\) must be at least 2"):
        next(ClassificationTask(data).train_batches(seeded(), max_images=1))
