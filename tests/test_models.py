"""Every model of the zoo, the other sources of models, and checkpoints."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from prunesearch.methods.models import MODELS
from prunesearch.methods.models.build import (
    build_model,
    default_image_size,
    input_channels,
    load_checkpoint,
)
from prunesearch.methods.models.resnet_cifar import ZeroPadShortcut

CLASSIFIERS = [name for name in MODELS if name.startswith(("resnet", "vgg"))]
ZOO = [
    *((name, {}) for name in CLASSIFIERS),
    ("resnet20", {"shortcut": "A"}),
    ("resnet110", {"shortcut": "A"}),
]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.mark.parametrize(("name", "kwargs"), ZOO, ids=str)
def test_zoo_contract(name, kwargs):
    model = build_model(name, num_classes=7, kwargs=kwargs)
    assert not any(module.training for module in model.modules())
    assert all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())
    assert default_image_size(name) == 32
    assert input_channels(model) == 3
    with torch.inference_mode():
        assert model(torch.randn(1, 3, 16, 16)).shape == (1, 7)
    logits = model(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert MODELS[name].__doc__


@pytest.mark.parametrize("name", ["resnet20", "resnet50_cifar", "vgg16_cifar"])
def test_single_channel_model(name):
    model = build_model(name, num_classes=10, kwargs={"in_channels": 1})
    assert input_channels(model) == 1
    with torch.inference_mode():
        assert model(torch.randn(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "kwargs", "num_params", "macs"),
    [
        ("vgg16_cifar", {}, 14.728e6, 313.20e6),
        ("resnet20", {"shortcut": "A"}, 0.2697e6, 40.55e6),
        ("resnet20", {"shortcut": "B"}, 0.2725e6, 40.81e6),
        ("resnet56", {"shortcut": "A"}, 0.8530e6, 125.49e6),
        ("resnet56", {"shortcut": "B"}, 0.8558e6, 125.75e6),
        ("resnet50_cifar", {}, 23.521e6, 1297.8e6),
    ],
)
def test_published_counts(name, kwargs, num_params, macs):
    model = build_model(name, num_classes=10, kwargs=kwargs)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(num_params, rel=2e-4)
    assert counter.get_total_flops() / 2 == pytest.approx(macs, rel=1e-4)


def test_the_seed_gives_the_weights():
    torch.manual_seed(3)
    first = build_model("resnet20", num_classes=10).state_dict()
    torch.manual_seed(3)
    second = build_model("resnet20", num_classes=10).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_zero_pad_shortcut_is_a_strided_pad():
    x = torch.randn(2, 4, 7, 7, requires_grad=True)
    shortcut = ZeroPadShortcut(4, 8, stride=2)
    expected = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
    assert torch.equal(shortcut(x), expected)
    (grad,) = torch.autograd.grad(shortcut(x).square().sum(), x)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), x)
    assert torch.equal(grad, expected_grad)


def test_zero_pad_shortcut_loses_channels_by_its_buffers():
    x = torch.randn(2, 4, 6, 6)
    shortcut = ZeroPadShortcut(4, 8)
    full = shortcut(x)
    # Without input 1 (which fed output 3) and without the outputs 0 and 4 (fed by input 2).
    shortcut.src, shortcut.dst = torch.tensor([0, 2]), torch.tensor([1, 3])
    shortcut.in_channels, shortcut.out_channels = 3, 6
    kept = full[:, [1, 2, 3, 5, 6, 7]].clone()
    kept[:, 2] = 0
    assert torch.equal(shortcut(x[:, [0, 2, 3]]), kept)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "googlenet"])
def test_torchvision_models_download_nothing_and_say_nothing(name, monkeypatch):
    def no_download(*args, **kwargs):
        raise AssertionError("a download was tried")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", no_download)
    model = build_model(f"torchvision:{name}", num_classes=5)
    assert default_image_size(f"torchvision:{name}") == 224
    with torch.inference_mode():
        assert model(torch.randn(1, 3, 64, 64)).shape == (1, 5)


def test_torchvision_segmentation_backbone_is_not_downloaded(monkeypatch):
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", lambda *a, **k: 1 / 0)
    model = build_model("torchvision:lraspp_mobilenet_v3_large", num_classes=4)
    assert isinstance(model, nn.Module)
    assert default_image_size("torchvision:inception_v3") == 299


def test_timm_models():
    pytest.importorskip("timm", reason="timm is an optional extra")
    model = build_model("timm:resnet18", num_classes=6, kwargs={"in_chans": 1})
    assert input_channels(model) == 1
    assert default_image_size("timm:resnet18") == 224
    with pytest.raises(ValueError, match=r"Did you mean `resnet18`"):
        build_model("timm:resnet18x", num_classes=6)


def test_user_callables(tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(
        "from torch import nn\n"
        "def with_classes(num_classes, width=4):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(width, num_classes))\n"
        "def without_classes():\n"
        "    return nn.Linear(4, 2)\n"
        "def no_module():\n"
        "    return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert default_image_size("my_models:with_classes") is None
    model = build_model("my_models:with_classes", num_classes=5, kwargs={"width": 8})
    assert model[1].weight.shape == (5, 8)
    assert build_model("my_models:with_classes", num_classes=5, kwargs={"num_classes": 3})[
        1
    ].weight.shape == (3, 4)
    assert build_model("my_models:without_classes", num_classes=5).weight.shape == (2, 4)
    assert input_channels(model) == 3
    with pytest.raises(ValueError, match="returned a int"):
        build_model("my_models:no_module", num_classes=5)
    with pytest.raises(ValueError, match="Did you mean `my_models:with_classes`"):
        build_model("my_models:with_clases", num_classes=5)
    with pytest.raises(
        ValueError, match=r"`model.kwargs` \(=\{'depth': 1\}\).*num_classes, width"
    ):
        build_model("my_models:with_classes", num_classes=5, kwargs={"depth": 1})


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("resnet-20", {}, r"`model.name` \(=resnet-20\).*resnet56.*Did you mean `resnet20`"),
        ("torchvision:resnet19", {}, "Did you mean `resnet1"),
        ("no_such_package.models:make", {}, "no module no_such_package"),
        ("resnet20", {"shortcut": "C"}, "must be 'A'"),
        ("resnet20", {"depth": 3}, r"must suit resnet20\(num_classes, in_channels, shortcut\)"),
    ],
)
def test_wrong_models(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        build_model(name, num_classes=10, kwargs=kwargs)


@pytest.mark.parametrize("form", ["model.safetensors", "model.pt", "nested.pth", "parallel.pt"])
def test_checkpoints_give_the_same_outputs(form, tmp_path):
    model = build_model("resnet20", num_classes=4, kwargs={"shortcut": "A"})
    model.bn1.running_mean.normal_()
    path, state = tmp_path / form, model.state_dict()
    if form == "model.safetensors":
        save_file(state, path)
    elif form == "nested.pth":
        torch.save({"state_dict": state, "epoch": 3}, path)
    elif form == "parallel.pt":
        torch.save({f"module.{key}": value for key, value in state.items()}, path)
    else:
        torch.save(state, path)
    torch.manual_seed(1)
    loaded = build_model("resnet20", num_classes=4, kwargs={"shortcut": "A"}, checkpoint=path)
    x = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        assert torch.equal(loaded(x), model(x))


def test_checkpoints_that_do_not_fit(tmp_path):
    model = build_model("resnet20", num_classes=4)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    path = tmp_path / "other.pt"
    torch.save(build_model("resnet20", num_classes=10).state_dict(), path)
    with pytest.raises(
        ValueError, match=r"fc.weight has shape \[10, 64\] in the file and \[4, 64"
    ):
        load_checkpoint(model, path)
    torch.save({"fc.weight": before["fc.weight"], "extra": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"conv1.weight is missing.*and \d+ more"):
        load_checkpoint(model, path)
    torch.save(model, path)  # a pickled module could run code
    with pytest.raises(ValueError, match="must hold weights only"):
        load_checkpoint(model, path)
    for name in ("damaged.safetensors", "damaged.pt"):
        (tmp_path / name).write_bytes(b"not weights at all")
        with pytest.raises(ValueError, match="must hold weights only"):
            load_checkpoint(model, tmp_path / name)
    with pytest.raises(ValueError, match=r"`model.checkpoint`.*must be a file"):
        load_checkpoint(model, tmp_path / "missing.pt")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
