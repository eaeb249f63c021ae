"""Every task: batches, loss, meter, options, and how the search finds it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from torch import Tensor, nn

from prunesearch.methods.data import DATASETS, Data, ImageData, Split
from prunesearch.methods.finetune import finetune
from prunesearch.methods.tasks import (
    TASKS,
    ClassificationTask,
    SegmentationTask,
    Task,
    find_task,
    make_task,
    task_of,
)
from prunesearch.search.config import ConfigError, check_names, dump_config, parse_config
from prunesearch.search.digests import data_digest
from prunesearch.search.setup import pack_images, pose, unpack_images

NUM_CLASSES, NUM_TRAIN = 3, 13


@dataclass
class Case:
    """A task, the data it is for, and a model that fits."""

    build: Callable[..., Task]
    data: Data
    model: nn.Module


def images(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 12, 16), generator=generator, dtype=torch.uint8)


def image_data(name: str, labels_of: Callable[[int, torch.Generator], Tensor]) -> ImageData:
    generator = torch.Generator().manual_seed(0)
    splits = [Split(images(n, n), labels_of(n, generator)) for n in (NUM_TRAIN, 7, 5)]
    return ImageData(
        name=name,
        classes=("a", "b", "c"),
        train=splits[0],
        val=splits[1],
        test=splits[2],
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.3, 0.2),
        crop_padding=1,
        horizontal_flip=True,
        official_test=True,
    )


def classification() -> Case:
    data = image_data("digits", lambda n, _: torch.arange(n) % NUM_CLASSES)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, NUM_CLASSES),
    )  # fmt: skip
    return Case(ClassificationTask, data, model)


def segmentation() -> Case:
    def masks(count: int, generator: torch.Generator) -> Tensor:
        drawn = torch.randint(0, 4, (count, 12, 16), generator=generator, dtype=torch.uint8)
        return torch.where(drawn == 3, 255, drawn).to(torch.uint8)

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, NUM_CLASSES, 1)
    )
    return Case(SegmentationTask, image_data("camvid", masks), model)


CASES = {"classification": classification, "segmentation": segmentation}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


def built(case: Case, **options: Any) -> Task:
    return case.build(case.data, **{"batch_size": 4, "calibration_size": 6, **options})


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same(ones: list[tuple[Tensor, Any]], others: list[tuple[Tensor, Any]]) -> bool:
    return len(ones) == len(others) and all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
        for a, b in zip(ones, others, strict=True)
    )


def test_sizes_and_names(case: Case) -> None:
    task = built(case)
    assert TASKS[task.name] is case.build and find_task(task.name) is case.build
    assert (task.batch_size, task.num_classes, task.num_train) == (4, NUM_CLASSES, NUM_TRAIN)
    assert task.metric and task.device == torch.device("cpu")


def test_train_batches(case: Case) -> None:
    task = built(case)
    epoch = list(task.train_batches(generator()))
    assert [len(x) for x, _ in epoch] == [4, 4, 4]  # the last image alone is dropped
    assert all(x.dtype == torch.float32 and x.shape[1:] == (3, 12, 16) for x, _ in epoch)
    assert same(epoch, list(task.train_batches(generator())))
    assert not same(epoch, list(task.train_batches(generator(1))))
    assert not same(epoch, list(task.train_batches(generator(), augment=False)))
    assert [len(x) for x, _ in task.train_batches(generator(), max_images=6)] == [4, 2]
    with pytest.raises(ValueError, match=r"`max_images` \(=1\) must be at least 2"):
        next(task.train_batches(generator(), max_images=1))


def test_calibration_is_a_fixed_part_of_train(case: Case) -> None:
    task, other = built(case), built(case, seed=1)
    chosen = task.calibration_batches()
    assert sum(len(x) for x, _ in chosen) == 6
    assert same(chosen, task.calibration_batches()) and not same(
        chosen, other.calibration_batches()
    )
    known = {x.numpy().tobytes() for batch, _ in task.batches("train") for x in batch}
    assert all(x.numpy().tobytes() in known for batch, _ in chosen for x in batch)
    assert task.example_input(8).shape == (8, 3, 12, 16)
    assert torch.equal(task.example_input(8)[:4], chosen[0][0])


def test_evaluate_is_the_meter_over_the_split(case: Case) -> None:
    task, model = built(case), case.model.train()
    found = task.evaluate(model, "val")
    assert model.training and all(module.training for module in model.modules())
    meter = task.meter()
    with torch.no_grad():
        for x, y in task.batches("val", batch_size=3):
            meter.update(case.model.eval()(x), y)
    assert meter.compute() == pytest.approx(found)
    assert 0 <= found["accuracy"] <= 1 and found["loss"] > 0
    assert task.evaluate(model, "test") != found


def test_training_loss_has_gradients_and_leaves_the_mode(case: Case) -> None:
    task = built(case)
    (x, y), *_ = task.train_batches(generator())
    for mode in (True, False):
        case.model.train(mode)
        loss = task.training_loss(case.model, x, y)
        assert loss.ndim == 0 and case.model.training is mode
        gradients = torch.autograd.grad(loss, list(case.model.parameters()))
        assert all(g.isfinite().all() for g in gradients) and any(g.any() for g in gradients)
    torch.testing.assert_close(task.loss(case.model(x), y), loss)


def test_training_lowers_the_loss(case: Case) -> None:
    task = built(case)
    before = task.evaluate(case.model, "train")["loss"]
    finetune(case.model, task, epochs=6, lr=0.1, generator=generator(), augment=False)
    assert task.evaluate(case.model, "train")["loss"] < before


def test_distillation_towards_itself_has_no_gradient(case: Case) -> None:
    task, model = built(case), case.model.eval()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    model.requires_grad_(True)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    finetune(
        model, task, epochs=1, lr=1e-3, weight_decay=0.0, momentum=0.0, generator=generator(),
        teacher=model, distill=1.0,
    )  # fmt: skip
    for name, value in model.named_parameters():
        torch.testing.assert_close(value, before[name], atol=1e-6, rtol=0)


def test_misfit_says_what_is_wanted(case: Case) -> None:
    task = built(case)
    x = task.example_input(2)
    assert task.misfit(case.model(x), x) is None
    assert "logits" in str(task.misfit(case.model(x)[:, :2], x))
    assert "logits" in str(task.misfit([1], x))


def test_packing_keeps_everything(case: Case) -> None:
    back = unpack_images(pack_images(case.data))
    assert type(back) is type(case.data) and data_digest(back) == data_digest(case.data)
    assert same(
        list(case.build(back).batches("test")), list(case.build(case.data).batches("test"))
    )


def test_the_digest_sees_each_pixel_and_label(case: Case) -> None:
    def changed(part: str, field: str) -> str:
        other = unpack_images(pack_images(case.data))
        split = getattr(other, part)
        tensors = {"images": split.images.clone(), "labels": split.labels.clone()}
        tensors[field].view(-1)[-1] += 1
        object.__setattr__(other, part, Split(**tensors))
        return data_digest(other)

    found = [changed(part, field) for part in ("train", "val") for field in ("images", "labels")]
    assert len({data_digest(case.data), *found}) == 5
    assert changed("test", "images") == data_digest(case.data)  # no result depends on it


@pytest.mark.parametrize("name", DATASETS)
def test_every_data_set_has_a_task(name: str) -> None:
    assert task_of(name) in TASKS


def test_options_are_checked() -> None:
    data = segmentation().data
    with pytest.raises(ValueError, match=r"`segmentation.class_weights`.*balanced"):
        make_task("segmentation", data, options={"class_weights": "balance"})
    with pytest.raises(ValueError, match=r"`classification.seed`"):
        make_task("classification", classification().data, options={"seed": 1})
    with pytest.raises(ValueError, match=r"`task` \(=classification\) must suit .*segmentation"):
        make_task("classification", data)
    with pytest.raises(ValueError, match=r"`task` \(=clasification\).*Did you mean"):
        find_task("clasification")


DIGITS = {
    "model": {"name": "resnet20"},
    "data": {"name": "digits", "image_size": 8, "limit": 240, "batch_size": 32},
}


def test_config_names_the_task() -> None:
    for task in (None, "segmentation", {"segmentation": {"class_weights": "balanced"}}):
        config = parse_config({**DIGITS, "task": task})
        assert config.model_dump(mode="json")["task"] == task

        assert parse_config(YAML(typ="safe").load(dump_config(config))) == config
    for wrong in (5, ["segmentation"], {"a": 1}, {"a": {}, "b": {}}, "a b"):
        with pytest.raises(
            ConfigError, match="`task`.* must be a name or package.module:callable"
        ):
            parse_config({**DIGITS, "task": wrong})
    with pytest.raises(ConfigError, match="`task` .*must be one of .*segmentation"):
        check_names(parse_config({**DIGITS, "task": "segmentations"}))
    with pytest.raises(ConfigError, match="`task` .*must suit `data.name`"):
        pose(parse_config({**DIGITS, "task": "segmentation"}))


def test_image_size_may_be_a_rectangle() -> None:
    def sized(size: object) -> object:
        data = {**DIGITS["data"], "image_size": size}
        return parse_config({**DIGITS, "data": data}).data.image_size

    assert (sized(8), sized([16, 24]), sized(None)) == (8, (16, 24), None)
    config = parse_config({**DIGITS, "data": {**DIGITS["data"], "image_size": [16, 24]}})
    assert parse_config(YAML(typ="safe").load(dump_config(config))) == config
    for wrong, rule in (
        (7, "at least 8"),
        ([8, 20000], "at most 16384"),
        ([8, 8, 8], r"a whole number or \[height, width\]"),
        ("8", r"a whole number or \[height, width\]"),
        (True, r"a whole number or \[height, width\]"),
        ([], r"a whole number or \[height, width\]"),
    ):
        with pytest.raises(ConfigError, match=f"`data.image_size`.* must be {rule}"):
            sized(wrong)
    with pytest.raises(ConfigError, match=r"\(=\[8, 16\]\) must be one number for digits"):
        pose(parse_config({**DIGITS, "data": {**DIGITS["data"], "image_size": [8, 16]}}))


OWN_TASK = """\
from prunesearch.methods.tasks import ClassificationTask


class Picky(ClassificationTask):
    name = "picky"

    def __init__(self, data, *, refuses="fgp", **sizes):
        super().__init__(data, **sizes)
        self.refuses = refuses

    def supports(self, method):
        return "it asks for more than there is" if method == self.refuses else None
"""


def test_a_task_of_ones_own_refuses_methods(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_picky_task.py").write_text(OWN_TASK, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)

    def posed(refuses: str, **more: Any) -> Any:
        task = {"my_picky_task:Picky": {"refuses": refuses}}
        return pose(parse_config({**DIGITS, "task": task, **more}))

    criteria = {"space": {"criteria": ["magnitude_l1", "fgp"], "blocks": {"mode": "none"}}}
    for refuses, more, key in (
        ("fgp", criteria, "`space.criteria` (=fgp)"),
        ("greedy", {"space": {"blocks": {"order": "greedy"}}}, "`space.blocks.order` (=greedy)"),
        ("distill", {"recover": {"distill": 0.5}}, "`recover.distill` (=0.5)"),
        ("reconstruct", {"recover": {"reconstruct": {"steps": 1}}}, "`recover.reconstruct.steps`"),
    ):
        with pytest.raises(ConfigError) as caught:
            posed(refuses, **more)
        message = str(caught.value)
        assert message.startswith(key) and "must make sense for picky: it asks for more" in message
    problem = posed("hessian", **criteria)
    assert problem.task.name == "picky" and "source" in problem.key("scores")["task"]
    with pytest.raises(ConfigError, match=r"`task` \(=os:system\) must name a module of yours"):
        pose(parse_config({**DIGITS, "task": "os:system"}))
