"""Few-shot tasks: what is drawn, under which numbers, and when there is too little to draw from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from lfm.core import Model
from lfm.core.errors import DataError, MismatchError
from lfm.data import records as data
from lfm.models import load
from lfm.train import episodes

IMAGES = [
    data.Image(image=np.full((8, 8), 25 * c + i, np.uint8), label=f"class {c}") for c in range(8) for i in range(6)
]


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(tiny.vit(tmp_path_factory.mktemp("vit"), labels=("a", "b", "c", "d")))


def test_a_task_is_so_many_classes_with_so_many_examples_each_in_turn(vit: Model) -> None:
    given = episodes.pool(IMAGES, vit, 3, least=6)
    seen, numbered = set(), set()
    for seed in range(20):
        examples = episodes.draw(given, 4, torch.Generator().manual_seed(seed))
        assert len(examples) == len({number for number, _ in examples}) == 12
        assert [place for _, place in examples] == [0, 1, 2] * 4
        classes = {place: {IMAGES[n].label for n, p in examples if p == place} for place in range(3)}
        assert all(len(c) == 1 for c in classes.values()) and len(set.union(*classes.values())) == 3
        seen |= set.union(*classes.values())
        numbered |= {(next(iter(c)), place) for place, c in classes.items()}
    assert len(seen) == 8  # all classes take their turn …
    assert len(numbered) > 16  # … under different numbers


def test_batches_are_the_images_under_their_numbers(vit: Model) -> None:
    given = episodes.pool(IMAGES, vit, 3, least=6)
    batch = episodes.batch_of(given, [(7, 2), (0, 0)])
    assert batch["labels"].tolist() == [2, 0]
    shade = (batch["pixel_values"].mean(dim=(1, 2, 3)) * 0.5 + 0.5) * 255
    torch.testing.assert_close(shade, torch.tensor([26.0, 0.0]), rtol=0, atol=0.01)


def test_samples_go_through_the_shots_in_rounds(vit: Model) -> None:
    given = episodes.pool(IMAGES, vit, 2, least=6)
    batch = episodes.sample(given, 3, 4, 2, 8, torch.Generator().manual_seed(0))
    assert batch["pixel_values"].shape == (3, 2, 8, 3, 8, 8) and batch["labels"].shape == (3, 2, 8)
    for task in range(3):
        for step in range(2):  # eight shots, eight a step: each step sees each shot once
            assert sorted(batch["labels"][task, step].tolist()) == [0] * 4 + [1] * 4
            assert len(batch["pixel_values"][task, step].mean(dim=(1, 2, 3)).unique()) == 8


def test_equal_labels_of_different_groups_are_different_classes(vit: Model) -> None:
    grouped = [data.Image(image=r.image, label="same", group=r.label) for r in IMAGES]
    assert len(episodes.pool(grouped, vit, 3, least=6).members) == 8


def test_groups_are_tasks_where_no_classes_are_asked(tmp_path: Path) -> None:
    model = load(tiny.causal(tmp_path))
    texts = [data.Text(text=f"{w} sat on the mat {i}", group=w) for w in ("cats", "dogs") for i in range(4)]
    given = episodes.pool(texts, model, 0, least=2)
    examples = episodes.draw(given, 3, torch.Generator().manual_seed(0))
    assert len(examples) == 3 and len({texts[n].group for n, _ in examples}) == 1
    batch = episodes.sample(given, 2, 3, 2, 4, torch.Generator().manual_seed(0))
    assert batch["input_ids"].shape[:3] == batch["labels"].shape[:3] == (2, 2, 4)


def test_too_little_is_said_with_what_there_is(vit: Model) -> None:
    with pytest.raises(DataError, match=r"needs 3 classes of 7 examples or more, 0 have.*class 0 \(6\)"):
        episodes.pool(IMAGES, vit, 3, least=7)
    with pytest.raises(MismatchError, match=r"5 ways need a head of 5 classes.*has 4.*ways=4"):
        episodes.pool(IMAGES, vit, 5, least=2)
