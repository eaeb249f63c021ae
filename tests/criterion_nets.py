"""A network with every kind of layer that can be scored, and a task: for the criteria's tests."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

NUM_CLASSES = 3
LAYERS = ["stem", "block.conv1", "block.conv2", "up", "fc1", "fc2"]
FGP_OPTIONS = {
    "feature_point": ["conv", "act"],
    "class_agg": ["sum", "min", "mean"],
    "presence": ["predicted", "label"],
    "map_norm": ["none", "layer_max"],
    "criterion": ["both", "feature_only", "gradient_only"],
    "classes": [None, [2, 0]],
}


class Block(nn.Module):
    """A residual block whose one ReLU is used twice, in place, and whose sum is in place."""

    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, groups=2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class Net(nn.Module):
    """Every kind of layer that can be scored, dropout, functional and in-place activations."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.block = Block(4)
        self.up = nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2)
        self.norm = nn.BatchNorm2d(6)
        self.fc1 = nn.Linear(6, 5)
        self.drop = nn.Dropout(0.5)
        self.fc2 = nn.Linear(5, NUM_CLASSES)
        self.spare = nn.Conv2d(3, 2, 1)  # never run

    def forward(self, x):
        x = self.block(F.relu(self.stem(x), inplace=True))
        x = F.silu(self.norm(self.up(x))).mean((2, 3))
        return self.fc2(self.drop(torch.tanh(self.fc1(x))))


@dataclass
class Task:
    batches: list
    num_classes: int = NUM_CLASSES
    dtype: torch.dtype = torch.float32

    def calibration_batches(self):
        return self.batches

    def example_input(self, batch_size=1):
        return torch.zeros(batch_size, 3, 6, 6, dtype=self.dtype)

    def training_loss(self, model, images, target):
        return self.loss(model(images), target)

    def loss(self, logits, target):
        return F.cross_entropy(logits, target)


def make_model():
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(-1, 2)
                module.bias.normal_()
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.3, 1.0)
        model.eval()
        images = torch.cat([images for images, _ in make_task().batches])
        model.fc2.bias -= model(images).mean(0)  # so that every class is predicted for an image
    return model


def make_task():
    generator = torch.Generator().manual_seed(1)
    images = 2 * torch.randn(11, 3, 6, 6, generator=generator)
    labels = torch.arange(11) % NUM_CLASSES
    return Task([(images[:6], labels[:6]), (images[6:], labels[6:])])


def unrolled(model, image):
    """`Net.forward` written out, every feature kept: ({layer: (conv, act)}, logits)."""
    block = model.block
    stem = model.stem(image)
    stem_act = stem.relu()
    conv1 = block.conv1(stem_act)
    conv1_act = block.bn1(conv1).relu()
    conv2 = block.conv2(conv1_act)
    conv2_act = block.bn2(conv2)  # the sum ends the way
    up = model.up((conv2_act + stem_act).relu())
    up_act = F.silu(model.norm(up))
    fc1 = model.fc1(up_act.mean((2, 3)))
    fc1_act = fc1.tanh()
    fc2 = model.fc2(fc1_act)
    features = [(stem, stem_act), (conv1, conv1_act), (conv2, conv2_act), (up, up_act)]
    features += [(fc1, fc1_act), (fc2, fc2)]
    return dict(zip(LAYERS, features, strict=True)), fc2
