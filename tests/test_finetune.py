"""Recovery: batch norms averaged over the batches, and a seeded, warmed-up, decaying SGD."""

import copy
import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from prunesearch.methods import finetune as module
from prunesearch.methods.data import load_data
from prunesearch.methods.finetune import (
    BATCH_NORMS,
    FinetuneOptions,
    Finetuning,
    finetune,
    recalibrate_batch_norm,
)
from prunesearch.methods.models.build import build_model
from prunesearch.methods.tasks.classification import ClassificationTask


@pytest.fixture(scope="module")
def task() -> ClassificationTask:
    data = load_data("digits", image_size=8, limit=240)
    return ClassificationTask(data, batch_size=32, calibration_size=32)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return build_model("resnet20", num_classes=10)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def steps_of(task: ClassificationTask, model: nn.Module, **options: object) -> int:
    """Training steps of one `finetune`, counted by its calls of the loss."""
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "loss", lambda *a: calls.append(1) or nn.functional.cross_entropy(*a))
        finetune(model, task, lr=0.01, generator=seeded(), **options)  # type: ignore[arg-type]
    return len(calls)


# --- precision -------------------------------------------------------------------------------


def test_autocast_computes_in_bfloat16_and_keeps_float32_weights(task, model):
    seen = []
    model.layer1[0].conv1.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    plain = copy.deepcopy(model)
    finetune(plain, task, epochs=1, lr=0.05, generator=seeded())
    assert set(seen) == {torch.float32}
    seen.clear()
    losses = []
    finetune(
        model,
        task,
        epochs=2,
        lr=0.05,
        generator=seeded(),
        autocast=True,
        on_epoch=lambda epoch, loss: losses.append(loss),
    )
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert losses[1] < losses[0]  # it learns
    model(task.example_input(2))
    assert seen[-1] == torch.float32  # only training is autocast


# --- batch norm recalibration ----------------------------------------------------------------


def test_recalibration_is_the_plain_average_over_the_batches(task, model):
    by_hand = copy.deepcopy(model).eval()
    norms = {n: m for n, m in by_hand.named_modules() if isinstance(m, BATCH_NORMS)}
    seen = {name: ([], []) for name in norms}

    def remember(name):
        def hook(norm, args):
            (x,) = args
            seen[name][0].append(x.mean((0, 2, 3)))
            seen[name][1].append(x.var((0, 2, 3), unbiased=True))

        return hook

    for name, norm in norms.items():
        norm.train()
        norm.register_forward_pre_hook(remember(name))
    with torch.no_grad():
        for images, _ in task.train_batches(seeded(5), max_images=96, augment=False):
            by_hand(images)
    assert len(seen["bn1"][0]) == 3  # of 32 images; the 4 left over would weigh as much
    recalibrate_batch_norm(model, task, generator=seeded(5), num_images=100)
    for name, (means, variances) in seen.items():
        norm = model.get_submodule(name)
        torch.testing.assert_close(norm.running_mean, torch.stack(means).mean(0))
        torch.testing.assert_close(norm.running_var, torch.stack(variances).mean(0))


def test_recalibration_touches_no_weight_and_restores_modes_and_momentum(task, model):
    model.layer2.train()
    model.layer1[0].bn1.momentum = 0.3
    before, modes = weights(model), [m.training for m in model.modules()]
    recalibrate_batch_norm(model, task, generator=seeded(), num_images=64)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert [m.training for m in model.modules()] == modes
    assert model.layer1[0].bn1.momentum == 0.3 and model.bn1.momentum == 0.1
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(b.is_inference() for b in model.buffers())


def test_recalibration_forgets_old_statistics_and_leaves_other_layers_in_eval(task):
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.BatchNorm1d(192))
    images = next(task.train_batches(seeded(1), max_images=32, augment=False))[0].flatten(1)
    model[2].running_mean.fill_(1e6)
    recalibrate_batch_norm(model, task, generator=seeded(1), num_images=32)
    torch.testing.assert_close(model[2].running_mean, images.mean(0))  # no dropout
    torch.testing.assert_close(model[2].running_var, images.var(0))


def test_recalibration_without_batch_norm_draws_nothing(task):
    generator = seeded()
    recalibrate_batch_norm(nn.Sequential(nn.Flatten()), task, generator=generator)
    assert torch.equal(generator.get_state(), seeded().get_state())


# --- fine-tuning -----------------------------------------------------------------------------


def test_finetune_is_deterministic_by_generator_and_learns(task, model):
    same, other = copy.deepcopy(model), copy.deepcopy(model)
    losses: list[float] = []
    options = {"epochs": 3, "lr": 0.05}
    finetune(
        model, task, **options, generator=seeded(1), on_epoch=lambda n, loss: losses.append(loss)
    )
    torch.rand(7)  # the global generator must not matter
    finetune(same, task, **options, generator=seeded(1))
    finetune(other, task, **options, generator=seeded(2))
    assert all(torch.equal(a, b) for a, b in zip(*map(_state, (model, same)), strict=True))
    assert not torch.equal(model.fc.weight, other.fc.weight)
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert not model.training


def _state(model: nn.Module) -> list[torch.Tensor]:
    return list(model.state_dict().values())


@pytest.mark.parametrize("epochs", [0.1, 0.5, 1.0, 1.5, 2.25])
def test_fractional_epochs_train_on_that_share_of_the_images(task, epochs):
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    per_epoch = math.ceil(task.num_train / 32)
    rest = (epochs % 1) * task.num_train
    assert steps_of(task, model, epochs=epochs) == int(epochs) * per_epoch + math.ceil(rest / 32)


def test_no_epochs_change_nothing(task, model):
    before = _state(copy.deepcopy(model))
    finetune(model, task, epochs=0, lr=0.1, generator=seeded())
    assert all(torch.equal(a, b) for a, b in zip(_state(model), before, strict=True))


def test_frozen_parameters_stay(task, model):
    model.conv1.requires_grad_(False)
    before = weights(model)
    finetune(model, task, epochs=0.5, lr=0.1, generator=seeded())
    assert torch.equal(model.conv1.weight, before["conv1.weight"])
    assert not torch.equal(model.fc.weight, before["fc.weight"])


@pytest.mark.parametrize("broken", ["weight", "rate"])
def test_a_loss_that_is_not_finite_is_an_error_that_names_the_rate(task, model, broken):
    if broken == "weight":
        with torch.no_grad():
            model.fc.weight[0, 0] = float("nan")
    lr = 1e12 if broken == "rate" else 0.01
    with pytest.raises(FloatingPointError, match=rf"epoch \d.*`lr` \(={lr}\)"):
        finetune(model, task, epochs=3, lr=lr, generator=seeded())


def test_distillation_weight_zero_ignores_the_teacher(task, model):
    teacher, plain = build_model("resnet20", num_classes=10), copy.deepcopy(model)
    finetune(plain, task, epochs=0.5, lr=0.05, generator=seeded())
    finetune(model, task, epochs=0.5, lr=0.05, generator=seeded(), teacher=teacher, distill=0.0)
    assert torch.equal(model.fc.weight, plain.fc.weight)


def test_distillation_weight_one_ignores_the_labels_and_leaves_the_teacher(task, model):
    teacher = build_model("resnet20", num_classes=10).eval()
    state, other = _state(copy.deepcopy(teacher)), copy.deepcopy(model)
    options = {"epochs": 0.5, "lr": 0.05, "teacher": teacher, "distill": 1.0}
    finetune(model, task, **options, generator=seeded())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "loss", lambda logits, target: -100 * logits.mean())
        finetune(other, task, **options, generator=seeded())
    assert torch.equal(model.fc.weight, other.fc.weight)
    assert all(torch.equal(a, b) for a, b in zip(_state(teacher), state, strict=True))
    assert all(p.grad is None for p in teacher.parameters())


def test_a_student_like_its_teacher_has_no_distillation_loss(task, model):
    model.eval()
    images, target = next(iter(task.batches("val")))
    both = module._loss(model, task, images, target, copy.deepcopy(model), 0.25)
    torch.testing.assert_close(both, 0.75 * task.loss(model(images), target))


@pytest.mark.parametrize("total", [20, 50, 1000])
def test_the_schedule_warms_up_to_the_peak_and_ends_near_zero(total):
    rates = [module._cosine(step, total) for step in range(total)]
    peak = rates.index(1.0)
    assert peak == max(1, total // 10) - 1
    assert rates[:peak] == sorted(rates[:peak]) and rates[0] > 0
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] < 0.01


@pytest.mark.parametrize(("epochs", "batch_size"), [(4, 32), (0.5, 8), (2, 8)])
def test_the_rate_of_the_last_step_is_near_zero(task, epochs, batch_size):
    rates = _rates(ClassificationTask(task.data, batch_size=batch_size), epochs)
    assert max(rates) == pytest.approx(0.1) and rates[-1] < 0.1 * 0.05


def _rates(task: ClassificationTask, epochs: float) -> list[float]:
    """The learning rate of every step."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    return _rates_of(lambda: finetune(model, task, epochs=epochs, lr=0.1, generator=seeded()))


def _rates_of(train: Callable[[], None]) -> list[float]:
    rates: list[float] = []
    step = module.sgd

    def watched(*tensors, lr, **options):
        rates.append(lr)
        step(*tensors, lr=lr, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "sgd", watched)
        train()
    return rates


def test_the_rate_falls_at_the_milestones(task, model):
    """As the block removal paper has it: halved after 40, 60 and 80 % of the training."""
    options = {"milestones": (0.4, 0.6, 0.8), "gamma": 0.5}
    rates = _rates_of(
        lambda: finetune(model, task, epochs=2, lr=0.8, generator=seeded(), **options)
    )
    total = len(rates)
    halvings = [sum(step >= total * part for part in (0.4, 0.6, 0.8)) for step in range(total)]
    assert set(halvings) == {0, 1, 2, 3}
    assert rates == pytest.approx([0.8 / 2**count for count in halvings])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_step_is_that_of_torchs_optimizer(task, momentum):
    """To the last bit, also where a parameter has no gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    model.unused = nn.Parameter(torch.ones(3))
    twin = copy.deepcopy(model).train()
    options = {"momentum": momentum, "weight_decay": 0.01}
    rates = _rates_of(
        lambda: finetune(model, task, epochs=2, lr=0.1, generator=seeded(), **options)
    )
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, nesterov=momentum > 0, **options)
    generator, steps = seeded(), iter(rates)
    for _ in range(2):
        for images, target in task.train_batches(generator, max_images=task.num_train):
            optimizer.param_groups[0]["lr"] = next(steps)
            optimizer.zero_grad()
            task.loss(twin(images), target).backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(_state(model), _state(twin), strict=True))


def test_a_trial_does_not_import_torchs_compiler():
    """Which takes seconds in each process."""
    code = (
        "import sys, torch\n"
        "from prunesearch.methods.data import load_data\n"
        "from prunesearch.methods.finetune import finetune\n"
        "from prunesearch.methods.measure import count_macs, peak_memory_mib\n"
        "from prunesearch.methods.models.build import build_model\n"
        "from prunesearch.methods.tasks.classification import ClassificationTask\n"
        "task = ClassificationTask(load_data('digits', image_size=8, limit=120), batch_size=32)\n"
        "model = build_model('resnet20', num_classes=10)\n"
        "finetune(model, task, epochs=1, lr=0.1, generator=torch.Generator())\n"
        "count_macs(model, task.example_input())\n"
        "peak_memory_mib(model, task.example_input())\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- pauses ----------------------------------------------------------------------------------


def _dropping() -> nn.Module:
    """Momentum, batch norm statistics and both sources of randomness matter to this model."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(192, 24), nn.BatchNorm1d(24), nn.Dropout(0.5), nn.Linear(24, 10)
    )


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_paused_training_ends_with_the_weights_of_one_that_was_not(task, momentum):
    """Stopped within an epoch, at its end and within the next; each time on a new machine."""
    options = FinetuneOptions(epochs=2.5, lr=0.1, momentum=momentum, distill=0.3)
    teacher = _dropping().eval()
    whole, losses = _dropping(), []
    torch.manual_seed(7)
    once = Finetuning(whole, task, options, generator=seeded(1), teacher=teacher)
    once.run(on_epoch=lambda *epoch: losses.append(epoch))
    per_epoch, pieces = math.ceil(task.num_train / 32), []
    torch.manual_seed(7)
    model, training = _dropping(), None
    torch.manual_seed(7)
    for until in (0, 2, 2, per_epoch, per_epoch + 3, None):
        state = None if training is None else save(training.state() | {"x": torch.zeros(1)})
        weights, model = model.state_dict(), _dropping()
        model.load_state_dict(weights)
        torch.manual_seed(7 if state is None else 99)
        training = Finetuning(
            model, task, options, generator=seeded(1 if state is None else 5), teacher=teacher
        )
        if state is not None:
            training.load_state(load(state))
        training.run(until, on_epoch=lambda *epoch: pieces.append(epoch))
        assert not model.training
    assert training.step == training.num_steps == once.step
    assert all(torch.equal(a, b) for a, b in zip(_state(model), _state(whole), strict=True))
    assert pieces == losses and [epoch for epoch, _ in losses] == [1, 2, 3]


def test_a_pause_finds_a_loss_that_is_not_finite(task, model):
    training = Finetuning(model, task, FinetuneOptions(1, 1e12), generator=seeded())
    with pytest.raises(FloatingPointError, match="epoch 1"):
        training.run(4)
