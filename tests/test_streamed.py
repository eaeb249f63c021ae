"""Data sets that are larger than memory: image folders that stay on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from prunesearch.methods.data import ImageData, load_data, streamed
from prunesearch.methods.data.streamed import Paths, StreamedData
from prunesearch.methods.finetune import FinetuneOptions, Finetuning
from prunesearch.methods.tasks import Task, make_task, quick_split
from prunesearch.methods.tasks.streamed import StreamedTask
from prunesearch.search.config import parse_config
from prunesearch.search.context import TrialContext, TrialSpec
from prunesearch.search.digests import data_digest
from prunesearch.search.records import Candidate
from prunesearch.search.setup import pack_images, pose, unpack_images
from prunesearch.search.trial import run_trial

SIZE = 32


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty images of three classes, told apart by their colour."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for label, name in enumerate(("blau", "grün", "rot")):
        (folder / name).mkdir()
        for index in range(20):
            pixels = rng.integers(0, 120, (40 + index, 60, 3), dtype=np.uint8)
            pixels[..., 2 - label] += 100
            Image.fromarray(pixels).save(folder / name / f"{index}.jpg")
    return folder


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def load(root: Path, *, memory_bytes: int = 1, workers: int = 0) -> Any:
    return load_data(
        "image_folder", root=root, image_size=SIZE, memory_bytes=memory_bytes, workers=workers
    )


def tasks(root: Path) -> tuple[Task, Task]:
    sizes = {"batch_size": 8, "calibration_size": 12}
    in_memory = load(root, memory_bytes=2**30)
    on_disk = load(root)
    assert isinstance(in_memory, ImageData) and isinstance(on_disk, StreamedData)
    return make_task(None, in_memory, **sizes), make_task(None, on_disk, **sizes)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_net() -> nn.Module:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    return nn.Sequential(conv, norm, nn.ReLU(), *head)


def equal(ones: Any, others: Any) -> bool:
    ones, others = list(ones), list(others)
    return len(ones) == len(others) and all(
        torch.equal(a, c) and torch.equal(b, d)
        for (a, b), (c, d) in zip(ones, others, strict=True)
    )


def test_evaluation_is_that_of_data_in_memory(root: Path) -> None:
    memory, disk = tasks(root)
    assert isinstance(disk, StreamedTask) and quick_split(disk) == "quick"
    assert quick_split(memory) == "val"
    for split in ("train", "val", "test", "calibration"):
        assert equal(memory.batches(split), disk.batches(split))
    assert equal(memory.calibration_batches(), disk.calibration_batches())
    assert torch.equal(memory.example_input(15), disk.example_input(15))
    model = small_net()
    assert memory.evaluate(model) == disk.evaluate(model) == disk.evaluate(model, "quick")
    without = {"augment": False, "max_images": 20}
    assert equal(
        memory.train_batches(generator(), **without), disk.train_batches(generator(), **without)
    )


def test_augmentation_depends_on_the_generator_alone(root: Path) -> None:
    sizes = {"batch_size": 8, "calibration_size": 12}
    one, other = (make_task(None, load(root, workers=n), **sizes) for n in (0, 2))
    state = torch.get_rng_state()
    first = list(one.train_batches(generator()))
    assert torch.equal(torch.get_rng_state(), state)
    assert equal(first, other.train_batches(generator()))  # however many processes decode
    assert not equal(first, one.train_batches(generator(1)))
    plain = list(one.train_batches(generator(), augment=False))
    assert equal(
        [(y, y) for _, y in first], [(y, y) for _, y in plain]
    )  # the same order, other crops
    assert not any(torch.equal(a, b) for (a, _), (b, _) in zip(first, plain, strict=True))


def test_no_more_than_a_batch_is_decoded_ahead(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, task = tasks(root)
    decoded: list[Path] = []

    def decode(path: Path, size: int) -> Any:
        decoded.append(path)
        return real(path, size)

    real = streamed.decode
    monkeypatch.setattr(streamed, "decode", decode)
    batches = iter(task.batches("train"))
    for count in (8, 16):
        next(batches)
        assert len(decoded) == count
    assert len(set(decoded)) == 16


def test_training_goes_on_where_it_stopped(root: Path) -> None:
    _, task = tasks(root)
    options = FinetuneOptions(epochs=2, lr=0.05)
    whole, parts = small_net(), small_net()
    Finetuning(whole, task, options, generator=generator()).run()
    first = Finetuning(parts, task, options, generator=generator())
    first.run(4)
    second = Finetuning(parts, task, options, generator=generator(9))
    second.load_state(first.state())
    second.run()
    for a, b in zip(whole.state_dict().values(), parts.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_workers_get_it_without_the_images(root: Path, tmp_path: Path) -> None:
    data = load(root)
    back = unpack_images(pack_images(data))
    assert data_digest(back) == data_digest(data)
    assert [back.train.paths[i] for i in range(3)] == [data.train.paths[i] for i in range(3)]
    for label in ("blau", "grün", "rot"):
        (tmp_path / label).mkdir()
        for file in (root / label).iterdir():
            (tmp_path / label / file.name).write_bytes(file.read_bytes())
    assert data_digest(load(tmp_path)) == data_digest(data)  # wherever it lies
    path = load(tmp_path).val.paths[0]
    path.write_bytes(path.read_bytes() + b"\0")
    assert data_digest(load(tmp_path)) != data_digest(data)


def test_paths_are_packed() -> None:
    paths = [Path("a/b"), Path("grün/ü.jpg"), Path("c")]
    packed = Paths.of(paths)
    assert [packed[i] for i in range(3)] == paths and len(packed) == 3
    assert packed.take(torch.tensor([2, 0]))[0] == Path("c")


def test_a_trial_reads_from_disk(root: Path) -> None:
    config = parse_config(
        {
            "model": {"name": "resnet20"},
            "data": {"name": "image_folder", "root": str(root), "image_size": SIZE,
                     "batch_size": 8, "calibration_size": 8, "memory_gib": 1e-6, "workers": 1},
            "space": {"criteria": ["taylor"], "blocks": {"mode": "none"}},
            "recover": {"epochs": 0.5, "recalibration_images": 8},
            "objectives": {"accuracy": "maximize", "macs": "minimize"},
        }
    )  # fmt: skip
    problem = pose(config)
    assert isinstance(problem.task, StreamedTask)
    context = TrialContext(config, problem.task, problem.model, problem.plan, 0.5, None)
    keep = tuple((group.name, 0.5) for group in problem.plan.groups)
    candidate = Candidate("taylor", (), "ratio", tuple(sorted(keep)))
    outcome = run_trial(TrialSpec("t1", candidate, candidate.to_json(), 0), context)
    assert str(outcome.result.status) == "completed", outcome.result.message
    assert outcome.result.accuracy is not None
