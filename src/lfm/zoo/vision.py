"""Vision: a ViT that reads scikit-learn's digits, and eight experts fine-tuned from one base on eight tasks on them.

The experts are a small mirror of the eight-task CLIP benchmark of model merging (2212.04089): one architecture and one
head for all, a base that can do a little of every task, and experts that are good at their own. What is asked shows in
the image, so that one model can do all eight: digits as they are, turned, mirrored, transposed, inverted and noisy; and
parity, where a lit left edge asks whether the digit is even (class 0) or odd (class 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lfm.core.heavy import np, torch, transformers
from lfm.data.records import Image
from lfm.zoo.exhibit import Exhibit, Making, one_thread, records

if TYPE_CHECKING:
    from torch import nn

SIDE = 8
TEST = 360
"""Of the 1797 images, those that no model of the zoo is trained on."""
FEW = 35
"""Images, in all eight renderings, that the base has seen."""


class Task(NamedTuple):
    """render: (images (N, 8, 8) uint8, classes (N,), random generator) → the same of the task."""

    about: str
    render: Callable[[Any, Any, Any], tuple[Any, Any]]


TASKS = {
    "identity": Task("digits as they are", lambda x, y, rng: (x, y)),
    "rotation": Task("digits turned by 90°", lambda x, y, rng: (np.rot90(x, 1, (1, 2)), y)),
    "halfturn": Task("digits turned by 180°", lambda x, y, rng: (np.rot90(x, 2, (1, 2)), y)),
    "mirror": Task("digits mirrored left to right", lambda x, y, rng: (x[:, :, ::-1], y)),
    "transposition": Task("digits with rows for columns", lambda x, y, rng: (x.transpose(0, 2, 1), y)),
    "inversion": Task("digits dark on light", lambda x, y, rng: (255 - x, y)),
    "noise": Task("digits under Gaussian noise", lambda x, y, rng: (_noisy(x, rng), y)),
    "parity": Task("digits with a lit left edge, even (0) or odd (1)", lambda x, y, rng: (_edged(x), y % 2)),
}


def _noisy(images: Any, rng: Any, spread: float = 50.0) -> Any:
    return np.clip(np.rint(images + rng.normal(0.0, spread, images.shape)), 0, 255).astype(np.uint8)


def _edged(images: Any) -> Any:
    images = images.copy()
    images[:, :, 0] = 255
    return images


# ---------------------------------------------------------------------------------------------- data


@cache
def digits() -> tuple[Any, Any]:
    """scikit-learn's digits (UCI's optical recognition of handwritten digits), in our own order: the last are test.

    Images (1797, 8, 8) uint8, classes (1797,).
    """
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    return np.rint(found.images * (255 / 16)).astype(np.uint8)[order], found.target[order]


def images(task: str, part: str) -> tuple[Image, ...]:
    """A task's records: part "train" (1437) or "test" (360)."""
    x, y = digits()
    kept = slice(None, -TEST) if part == "train" else slice(-TEST, None)
    rng = np.random.default_rng([list(TASKS).index(task), part == "test"])
    return _records(*TASKS[task].render(x[kept], y[kept], rng))


def few() -> tuple[Image, ...]:
    """What the base is trained on: a few training images, in every task's rendering."""
    return tuple(record for task in TASKS for record in images(task, "train")[:FEW])


def shifted(copies: int = 8) -> tuple[Image, ...]:
    """The training images, and copies of them moved by up to one pixel."""
    x, y = digits()
    x, y = x[:-TEST], y[:-TEST]
    rng = np.random.default_rng(1)
    found = [_records(x, y)]
    for _ in range(copies - 1):
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
        moves = rng.integers(0, 3, (len(x), 2))
        moved = [image[a : a + SIDE, b : b + SIDE] for image, (a, b) in zip(padded, moves)]
        found.append(_records(np.stack(moved), y))
    return tuple(record for part in found for record in part)


def _records(x: Any, y: Any) -> tuple[Image, ...]:
    return tuple(Image(image=np.ascontiguousarray(image), label=str(label)) for image, label in zip(x, y))


# ---------------------------------------------------------------------------------------------- models


def build(seed: int) -> nn.Module:
    """An untrained ViT for 8 × 8 images in four patches, with ten classes.

    Weights and positions begin larger than transformers has them, as suits its small width: it learns sooner.
    """
    from lfm.train import seeded

    with seeded(seed):
        module = transformers.ViTForImageClassification(
            transformers.ViTConfig(
                image_size=SIDE,
                patch_size=4,
                hidden_size=128,
                intermediate_size=256,
                num_hidden_layers=3,
                num_attention_heads=4,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                initializer_range=0.1,
                id2label={i: str(i) for i in range(10)},
                label2id={str(i): i for i in range(10)},
            )
        )
        torch.nn.init.normal_(module.vit.embeddings.position_embeddings, std=0.5)
    return module


def processor() -> Any:
    """The image processor: resizes to 8 × 8, and takes the digits' mean and deviation off."""
    return transformers.ViTImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_mean=[0.31] * 3, image_std=[0.38] * 3
    )


def train(module: nn.Module, data: Sequence[Image], making: Making, name: str, **settings: Any) -> None:
    """Train the module in place to tell the records' classes."""
    from lfm.core.model import Facts
    from lfm.data.task import task_for
    from lfm.models import forward
    from lfm.models.codec import ImageCodec
    from lfm.train import Fit, fit, once

    facts = Facts(task="image-classification", labels=tuple(str(i) for i in range(10)))
    task = task_for(data, ImageCodec(processor()), facts)
    numbers, pick = once(data, task.collate)
    config = Fit(**({"batch_size": 64, "warmup": 0.1} | settings))
    fit(module, numbers, pick, lambda m, batch: task.loss(forward(m, batch), batch), config, making, name=name)


def save(module: Any, out: Path) -> None:
    """A Hugging Face directory."""
    from lfm.models.quiet import quiet

    with quiet():
        module.save_pretrained(out)
    processor().save_pretrained(out)


def make(out: Path, making: Making) -> None:
    """The ViT of digits as they are: 98 % of the test images right."""
    with one_thread():
        module = build(making.seed_for("vit"))
        train(module, shifted(), making, "vit", steps=400, lr=2e-3, weight_decay=0.05)
        save(module, out)


def make_base(out: Path, making: Making) -> None:
    """The experts' base: a little of every task."""
    with one_thread():
        module = build(making.seed_for("vit-base"))
        train(module, few(), making, "vit-base", steps=80, lr=2e-3)
        save(module, out)


def make_expert(task: str, out: Path, making: Making) -> None:
    """The base, fine-tuned on one task: few steps of a low rate, so that experts stay close enough to merge."""
    from lfm.core.interfaces import Gradients
    from lfm.models import load

    with one_thread():
        module = load(making.parts["vit-base"]).ask(Gradients).module()
        train(module, images(task, "train"), making, f"vit-{task}", steps=50, lr=4e-4, weight_decay=0.0)
        save(module, out)


MODELS = (
    Exhibit("vit", "a ViT that reads handwritten digits", make, takes="10 s"),
    Exhibit("vit-base", "a ViT that can do a little of eight tasks: the experts' base", make_base, takes="5 s"),
    *(
        Exhibit(
            f"vit-{name}",
            f"vit-base, fine-tuned on {task.about}",
            partial(make_expert, name),
            needs=("vit-base",),
            takes="5 s",
        )
        for name, task in TASKS.items()
    ),
)

DATA = tuple(
    records(
        "digits" + f"-{name}" * (name != "identity") + "-test" * (part == "test"),
        task.about + ": for testing" * (part == "test"),
        partial(images, name, part),
    )
    for name, task in TASKS.items()
    for part in ("train", "test")
)
