"""The ResNets for CIFAR-10 of He et al. (1512.03385), for state dicts that say nothing of their architecture.

A 3 × 3 stem, three stages of 16, 32 and 64 channels with n blocks each (depth 6n + 2), and shortcuts without
parameters: every second place, and zeros for the channels that are new.
"""

from __future__ import annotations

import io
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow.parquet as parquet
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTImageProcessorPil

from lfm.core import Codec, Model, Weights
from lfm.core.model import Facts
from lfm.data.records import Image
from lfm.models import load
from lfm.models.codec import ImageCodec
from lfm.train import seeded

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHAPE = (3, 32, 32)


class Block(nn.Module):
    def __init__(self, given: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(given, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.stride, self.new = stride, out - given

    def forward(self, x: Tensor) -> Tensor:
        made = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.new:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.new // 2, self.new // 2))
        return F.relu(made + x)


class ResNet(nn.Module):
    """Pictures (B, 3, 32, 32) → logits (B, 10)."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(*(Block(given if i == 0 else out, out, stride if i == 0 else 1) for i in range(blocks)))
            for given, out, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2))
        )
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


def known(root: Path, depth: int) -> Model:
    """The published weights of that depth, under LFM_REAL_DATA."""
    return load(
        root / "models" / "resnet_cifar10" / f"resnet{depth}.safetensors", module=partial(ResNet, (depth - 2) // 6)
    )


def new(depth: int, seed: int, here: Path) -> Model:
    """New weights, written there."""
    with seeded(seed):
        module = ResNet((depth - 2) // 6)
        for child in module.modules():
            if isinstance(child, nn.Conv2d):
                nn.init.kaiming_normal_(child.weight, mode="fan_out")
    path = here / f"resnet{depth}-{seed}.safetensors"
    if not path.exists():
        save_file({name: t for name, t in module.state_dict().items() if t.ndim}, path)
    return load(path, module=partial(ResNet, (depth - 2) // 6))


def images(file: Path) -> tuple[Tensor, Tensor]:
    """A parquet file's pictures as those networks read them (N, 3, 32, 32), and their classes (N,)."""
    table = parquet.read_table(file).to_pydict()
    arrays = np.stack([np.asarray(PIL.Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in table["image"]])
    unit = torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255
    centre, spread = (torch.tensor(each)[:, None, None] for each in (MEAN, STD))
    return (unit - centre) / spread, torch.tensor(table["label"])


LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def reading(model: Model) -> Model:
    """The same, with a codec of pictures and the names of its classes, which a state dict does not tell."""
    processor = ViTImageProcessorPil(do_resize=False, image_mean=list(MEAN), image_std=list(STD))
    parameters = sum(math.prod(t.shape) for t in model.ask(Weights).tensors().values())
    facts = Facts(task="image-classification", labels=LABELS, parameters=parameters, bytes=4 * parameters)
    gives = {**model.gives, Codec: lambda: ImageCodec(processor)}
    return replace(model, gives=gives, look=lambda: facts, _opened={})


def pictures(file: Path) -> list[Image]:
    """A parquet file's pictures and classes as records."""
    table = parquet.read_table(file).to_pydict()
    return [Image(image=row["bytes"], label=LABELS[label]) for row, label in zip(table["image"], table["label"])]
