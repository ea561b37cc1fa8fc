"""Whether pictures made from noise are of the classes asked for: distill.noise against CIFAR-10's ResNet-56.

A line for each weight of R: R of the pictures as they end, beside R of as many real images and of noise; the
cross-entropy of the classes asked for, in nats; how many the teacher names so. Needs LFM_REAL_DATA.

    python benchmarks/inversion.py [--match 10 1] [--pictures 40] [--iterations 120]
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import cifar_resnet
import torch
from torch import Tensor

from lfm.distilling import datafree, statistics
from lfm.distilling.datafree import PIXELS, Scene
from lfm.distilling.telling import TOLD
from lfm.methods.distill import noise
from lfm.runs.run import LocalRun
from lfm.train import seeded


def far(scene: Scene, images: Tensor) -> float:
    """R of pictures."""
    assert scene.module is not None
    with torch.no_grad(), statistics.matched(scene.module, statistics.stored(scene.module)) as apart:
        scene.asked(images)
        return float(apart())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--match", type=float, nargs="+", default=[10.0, 1.0])
    parser.add_argument("--pictures", type=int, default=40)
    parser.add_argument("--iterations", type=int, default=120)
    given = parser.parse_args()
    data = Path(os.environ["LFM_REAL_DATA"])
    with tempfile.TemporaryDirectory() as scratch:
        here = Path(scratch)
        for match in given.match:
            config = noise.Config(
                image=cifar_resnet.SHAPE, mean=cifar_resnet.MEAN, std=cifar_resnet.STD, flip=True,
                match=match, pictures=given.pictures, iterations=given.iterations,
            )  # fmt: skip
            teacher, student = cifar_resnet.known(data, 56), cifar_resnet.new(20, 0, here)
            scene = datafree.scene(config, teacher, student, LocalRun(0, here))
            assert scene.module is not None
            real = cifar_resnet.images(data / "cifar10" / "test.parquet")[0][: given.pictures]
            with seeded(0):
                before = far(scene, scene.frame.noise(given.pictures))
            with seeded(0):
                made = noise.pictures(config, scene, noise.prior(config, scene, scene.module, None), None)
            with seeded(0):  # as the pictures' classes are drawn
                classes = torch.randperm(given.pictures) % scene.classes
            loss = torch.nn.functional.cross_entropy(made[TOLD], classes).item()
            named = (made[TOLD].argmax(-1) == classes).double().mean().item()
            print(
                f"match {match:g}: R {far(scene, made[PIXELS]):.0f} (noise {before:.0f}, real {far(scene, real):.0f}), "
                f"cross-entropy {loss:.2f}, named as asked {named:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
