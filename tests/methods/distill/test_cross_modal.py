"""One modality teaches another: whose records are read by whom, and what it is worth without labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from torch.nn import functional as F

import tiny
from case import Case
from lfm.core import Codec, Model
from lfm.core.errors import DataError, MismatchError
from lfm.core.method import Amount, Inputs, Sizes
from lfm.core.model import Facts
from lfm.data import records as data
from lfm.data.files import write
from lfm.methods.distill import cross_modal, response
from lfm.models import load
from teaching import accuracy, answers, digits, made, means, mute, reordered, still, supervised, written


def images(count: int, seed: int = 0) -> list[data.Image]:
    draw = np.random.default_rng(seed)
    return [data.Image(image=draw.integers(0, 255, (8, 8), np.uint8), label=str(i % 10)) for i in range(count)]


def case(here: Path) -> Case:
    tiny.vit(here / "sees")
    tiny.classifier(here / "reads", labels=tiny.DIGITS)
    seen = images(12)
    write(seen, here / "images.jsonl")
    write([written(image) for image in seen], here / "texts.jsonl")
    settings = {"steps": 6, "batch_size": 4, "checkpoint_every": 0.0}
    models = {"teacher": ("sees",), "student": ("reads",)}
    return Case(models, {"seen": "images.jsonl", "train": "texts.jsonl"}, settings)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    still(tiny.vit(root / "sees"))
    still(tiny.classifier(root / "reads", labels=tiny.DIGITS))
    still(tiny.hearer(root / "hears"))
    still(tiny.classifier(root / "words", labels=tiny.TONES))
    tiny.causal(root / "speaks")
    return root


def taught(teacher: Model, student: Model, seen: Any, read: Any, work: Path, **settings: Any) -> Any:
    models = {"teacher": [teacher], "student": [student]}
    return made(cross_modal.METHOD, models, {"seen": seen, "train": read}, work, **settings)


def test_the_first_loss_is_between_the_two_views_of_each_thing(root: Path, tmp_path: Path) -> None:
    seen = images(4)
    read = [written(image) for image in seen]
    teacher, student = load(root / "sees"), load(root / "reads")
    _, run = taught(teacher, student, seen, read, tmp_path / "a", steps=1, alpha=0.6, temperature=3.0)
    (t, _), (s, labels) = answers(teacher, seen), answers(student, read)
    p, q = t.div(3).double().log_softmax(-1), s.div(3).double().log_softmax(-1)
    expected = 0.4 * F.cross_entropy(s, labels).item() + 0.6 * 9 * (p.exp() * (p - q)).sum(-1).mean().item()
    assert run.notes["loss_before"] == pytest.approx(expected, rel=1e-4)
    _, other = taught(teacher, student, [*seen[1:], seen[0]], read, tmp_path / "b", steps=1, alpha=0.6, temperature=3.0)
    assert other.notes["loss_before"] != pytest.approx(expected, rel=1e-3)


def test_of_one_modality_it_is_response_distillation(root: Path, tmp_path: Path) -> None:
    teacher, student = load(root / "sees"), load(tiny.vit(tmp_path / "small", seed=1))
    records, models = images(12), {"teacher": [teacher], "student": [student]}
    settings: dict[str, Any] = {"alpha": 0.7, "temperature": 2.0}
    one, _ = taught(teacher, student, records, records, tmp_path / "a", **settings)
    other, _ = made(response.METHOD, models, {"train": records}, tmp_path / "b", **settings)
    assert one.digest == other.digest


def test_a_sound_teaches_a_text_and_no_class_is_read(root: Path, tmp_path: Path) -> None:
    sounds = tiny.tones(2)
    words = [data.Label(text=f"a {record.label} tone", label="") for record in sounds]
    nameless = [unnamed(record) for record in sounds]
    teacher, student = load(root / "hears"), load(root / "words")
    one, run = taught(teacher, student, nameless, words, tmp_path / "a")
    other, _ = taught(teacher, student, sounds, words, tmp_path / "b")
    assert one.digest == other.digest and run.notes["loss_after"] < run.notes["loss_before"]
    with pytest.raises(DataError, match="is blank"):
        taught(teacher, student, nameless, words, tmp_path / "c", alpha=0.5)


def test_labels_alone_need_no_teacher(root: Path, tmp_path: Path) -> None:
    seen = images(4)
    read = [written(image) for image in seen]
    teacher, student = load(root / "sees"), load(root / "reads")
    one, other = (
        taught(asked, student, seen, read, tmp_path / name, alpha=0.0)[0]
        for name, asked in (("a", teacher), ("b", mute(teacher)))
    )
    assert one.digest == other.digest


def unnamed(record: Any) -> Any:
    return msgspec.structs.replace(record, label="")


def test_classes_are_matched_by_name(root: Path, tmp_path: Path) -> None:
    seen = images(8)
    read = [written(image) for image in seen]
    teacher, student = load(root / "sees"), load(root / "reads")
    moved = reordered(teacher, [*range(1, 10), 0])
    notes = [taught(t, student, seen, read, tmp_path / str(i))[1].notes for i, t in enumerate((teacher, moved))]
    assert notes[0] == pytest.approx(notes[1], rel=1e-3)


def test_what_cannot_go_together_is_said_before_a_weight_is_read(root: Path, tmp_path: Path) -> None:
    seen = images(4)
    read = [written(image) for image in seen]
    sees, reads, speaks, hears = (load(root / name) for name in ("sees", "reads", "speaks", "hears"))
    words = load(root / "words")
    more = load(tiny.vit(tmp_path / "more", labels=(*tiny.DIGITS, "ten")))
    for teacher, student, first, second, error, what in (
        (speaks, reads, read, read, MismatchError, "no classifier"),
        (sees, hears, seen, tiny.tones(2)[:4], MismatchError, "different classes"),
        (sees, reads, seen[:3], read, DataError, "3 records for the teacher"),
        (sees, reads, seen, read[:3], DataError, "4 records for the teacher"),
        (more, reads, seen, read, MismatchError, "different classes"),
        (reads, sees, [data.Label(text=" ", label=""), *read[1:]], seen, DataError, "blank"),
        (sees, reads, read, read, DataError, "label records set no task"),
        (
            hears,
            words,
            tiny.tones(1, seconds=0.01),
            [data.Label(text=t, label=t) for t in tiny.TONES],
            DataError,
            "short",
        ),
    ):
        blind = {"teacher": (teacher.only((Codec,)),), "student": (student.only((Codec,)),)}
        inputs = Inputs(blind, {"seen": first, "train": second})
        with pytest.raises(error, match=what):
            cross_modal.agree(cross_modal.Config(), inputs)


def test_a_plan_reckons_with_one_answer_to_each_thing_seen_and_with_the_teacher_beside(root: Path) -> None:
    """2 operations a weight and token that the teacher reads, and 4 bytes a weight; training is the student's alone."""
    teacher, student, read = load(root / "sees").facts, load(root / "reads").facts, Amount(12, 240)
    plans = [
        cross_modal.cost(
            cross_modal.Config(steps=3), Sizes({"teacher": (t,), "student": (student,)}, {"seen": seen, "train": read})
        )
        for t, seen in ((teacher, Amount(12, 100)), (teacher, Amount(12, 400)), (Facts(), Amount(12, 400)))
    ]
    assert plans[1].flops - plans[0].flops == 2 * teacher.parameters * 300
    assert plans[1].flops - plans[2].flops == 2 * teacher.parameters * 400
    assert plans[1].memory - plans[2].memory == 4 * teacher.parameters


@pytest.mark.slow
def test_pairs_without_labels_beat_the_few_labels_there_are(tmp_path: Path) -> None:
    """The zoo's ViT sees 1200 digits and teaches a BERT that reads them as letters; or 60 of them have a label.

    Tested on the 360 that no model of the zoo has seen.
    """
    from lfm import zoo

    teacher, every = load(zoo.model("vit")), digits()
    seen, read, test = every[:1200], [written(r) for r in every[:1200]], [written(r) for r in every[-360:]]
    scores: dict[str, list[float]] = {"teacher": [accuracy(teacher, every[-360:])] * 2}
    for seed in range(3):
        student = load(tiny.classifier(tmp_path / f"s{seed}", seed=seed, labels=tiny.DIGITS, num_hidden_layers=1))
        fit: dict[str, Any] = {"steps": 250, "batch_size": 32, "lr": 3e-3}
        nameless = [unnamed(record) for record in read]
        paired, _ = taught(teacher, student, seen, nameless, tmp_path / f"p{seed}", seed=seed, **fit)
        scores.setdefault("pairs, no labels", []).append(accuracy(paired, test))
        for count in (60, 1200):
            alone = supervised(student, read[:count], tmp_path / f"{count}-{seed}", seed, **fit)
            scores.setdefault(f"{count} labels", []).append(accuracy(alone, test))
    mean = means(scores)
    assert mean["pairs, no labels"] > mean["60 labels"] + 0.1
    assert mean["pairs, no labels"] > mean["1200 labels"] - 0.15
