"""Learning without forgetting: the loss written out, heads that grow, tasks in turn, and what is kept."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import tiny
from case import Case
from lfm.core import Gradients, Model
from lfm.core.errors import DataError, ModelError
from lfm.data import records as data
from lfm.data.files import write
from lfm.distilling.classes import widened
from lfm.methods.distill import lifelong
from lfm.models import load
from lfm.runs.run import LocalRun
from teaching import QUICK, accuracy, answers, digits, made, means, still, supervised

LABELS = [data.Label(text=f"the {w} sat on the mat", label=w) for w in ("cats", "dogs", "birds") * 4]
NEW = [data.Label(text=f"{w} is the capital of France", label=w) for w in ("paris", "rome") * 4]
TEXTS = [data.Text(text=line) for line in tiny.CORPUS]


def case(here: Path) -> Case:
    tiny.classifier(here / "base")
    tasks = [data.Label(text=r.text, label=r.label, group=g) for g, part in (("a", LABELS), ("b", NEW)) for r in part]
    write(tasks, here / "tasks.jsonl")
    settings = {"steps": 4, "batch_size": 4, "checkpoint_every": 0.0}
    return Case({"model": ("base",)}, {"train": "tasks.jsonl"}, settings)


def learned(model: Model, records: Any, work: Path, **settings: Any) -> Any:
    return made(lifelong.METHOD, {"model": [model]}, {"train": records}, work, **settings)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    still(tiny.classifier(root / "classifier"))
    still(tiny.vit(root / "vit"))
    still(tiny.hearer(root / "hearer"))
    tiny.causal(root / "causal")
    return root


def test_it_is_fine_tuning_where_nothing_is_kept(root: Path, tmp_path: Path) -> None:
    model = load(root / "classifier")
    one, _ = learned(model, LABELS, tmp_path / "a", keep=0.0)
    assert one.digest == supervised(model, LABELS, tmp_path / "b", name="task-0").digest


@pytest.mark.parametrize("name", ["classifier", "causal"])
def test_the_first_loss_is_the_labels_alone(name: str, root: Path, tmp_path: Path) -> None:
    """The model has not moved from what it answered before: KL is nought, and CE is left."""
    records = LABELS[:4] if name == "classifier" else TEXTS[:4]
    model = load(root / name)
    _, run = learned(model, records, tmp_path, steps=1, keep=5.0)
    assert run.notes["loss_0"] == pytest.approx(F.cross_entropy(*answers(model, records)).item(), rel=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_second_loss_is_the_formula_written_out(root: Path, tmp_path: Path, temperature: float) -> None:
    """CE + λ T² KL(before ‖ after a step), of all records in one batch."""
    model, before = load(root / "classifier"), answers(load(root / "classifier"), LABELS)[0] / temperature
    how: dict[str, Any] = {"batch_size": len(LABELS), "lr": 1e-2, "warmup": 0.0, "schedule": "constant"}
    keep: dict[str, Any] = {"keep": 3.0, "temperature": temperature}
    once, _ = learned(model, LABELS, tmp_path / "once", steps=1, **how, **keep)
    _, run = learned(model, LABELS, tmp_path / "twice", steps=2, **how, **keep)
    now, labels = answers(once, LABELS)
    apart = F.kl_div(
        (now / temperature).log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert apart > 1e-4
    expected = F.cross_entropy(now, labels) + 3.0 * temperature**2 * apart
    assert run.notes["loss_0"] == pytest.approx(expected.item(), rel=1e-4)


def test_new_classes_get_rows_and_the_old_ones_stay(root: Path, tmp_path: Path) -> None:
    """Before a step is made, what it answers of the old classes is bit for bit what it answered."""
    for name, old, new in (
        ("classifier", LABELS, NEW),
        ("vit", pictures(4), [data.Image(image=r.image, label=f"new{i % 3}") for i, r in enumerate(pictures(6))]),
        ("hearer", tiny.tones(1), [data.Audio(audio=r.audio, label="noise") for r in tiny.tones(1)]),
    ):
        model = load(root / name)
        after, run = learned(model, new, tmp_path / name, steps=1, lr=1e-12, weight_decay=0.0)
        more = list(dict.fromkeys(record.label for record in new))
        assert after.facts.labels == (*model.facts.labels, *more)
        assert run.notes["new_classes_0"] == len(more)
        count = len(model.facts.labels)
        torch.testing.assert_close(answers(after, old)[0][:, :count], answers(model, old)[0], rtol=1e-4, atol=1e-4)
        out = tmp_path / f"{name}-out"
        out.mkdir()
        after.save(out)
        again = load(out)
        assert again.digest == after.digest and again.facts.labels == after.facts.labels
        assert torch.equal(answers(again, new)[0], answers(after, new)[0])


def pictures(count: int) -> list[data.Image]:
    draw = np.random.default_rng(0)
    return [data.Image(image=draw.integers(0, 255, (8, 8), np.uint8), label=str(i % 10)) for i in range(count)]


def test_rows_of_new_classes_are_like_those_of_the_old() -> None:
    """Of rows that lie about (10, −5, 0) by 2, .5 and 1 so do 2000 new ones, and of biases about 3 by 1."""
    module: Any = torch.nn.Sequential(torch.nn.Linear(3, 40))
    module.config = SimpleNamespace()
    own = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([2, 0.5, 1, 1])
    own = own - own.mean(0) + torch.tensor([10.0, -5.0, 0.0, 3.0])
    module[0].weight.data, module[0].bias.data = own[:, :3], own[:, 3]
    names = [str(i) for i in range(2040)]
    widened(module, names[:40], names[40:], torch.Generator().manual_seed(1))
    made = torch.cat([module[0].weight, module[0].bias[:, None]], 1).detach()
    assert torch.equal(made[:40], own) and len(module.config.id2label) == 2040
    torch.testing.assert_close(made[40:].mean(0), own.mean(0), rtol=0, atol=4 * 2.4 / 2000**0.5)
    torch.testing.assert_close(made[40:].std(0), own.std(0), rtol=0.1, atol=0)


def test_what_it_said_of_the_new_inputs_is_kept_the_more_it_is_asked_to(root: Path, tmp_path: Path) -> None:
    model = load(root / "classifier")
    told = answers(model, LABELS)[0].log_softmax(-1)
    moved = []
    for keep in (0.0, 1.0, 30.0):
        other = [data.Label(text=r.text, label="birds") for r in LABELS]
        after, _ = learned(model, other, tmp_path / str(keep), keep=keep)
        moved.append(
            F.kl_div(answers(after, LABELS)[0].log_softmax(-1), told, log_target=True, reduction="batchmean").item()
        )
    assert moved[0] > 1.2 * moved[1] > 1.2 * 1.2 * moved[2], moved


def test_tasks_in_turn_are_runs_in_turn(root: Path, tmp_path: Path) -> None:
    """The second group is learned from the model that the first one made, which is then the teacher."""
    model = load(root / "classifier")
    grouped = [data.Label(text=r.text, label=r.label, group="b") for r in NEW]
    first, _ = learned(model, LABELS, tmp_path / "a")
    both, run = learned(model, [*LABELS, *grouped], tmp_path / "b")
    assert both.facts.labels == (*tiny.LABELS, "paris", "rome") and run.notes["new_classes_0"] == 0
    then = lifelong.learned(lifelong.Config(**QUICK), first, grouped, LocalRun(0, tmp_path / "c"), 1)
    assert both.digest == then.digest


def test_what_cannot_be_learned_is_said(root: Path, tmp_path: Path) -> None:
    model = load(root / "classifier")
    with pytest.raises(DataError, match="label 1: 'label' is blank"):
        learned(model, [data.Label(text="a", label="")], tmp_path / "a")
    module = model.ask(Gradients).module()
    from lfm.distilling.classes import widened

    with pytest.raises(ModelError, match="cannot be given new classes"):
        widened(module, ("one", "two"), ("three",), torch.Generator())


@pytest.mark.slow
def test_it_forgets_less_than_fine_tuning(tmp_path: Path) -> None:
    """A ViT that knows the digits 0 to 4 learns 5 to 9, by rows of its head that it is given; three seeds.

    Old and new: asked among all ten classes. Within: the old ones asked among the old classes alone, as in the paper.
    """
    every = digits()
    parts = [
        [r for r in every[a:b] if (r.label in OLD) == old]
        for old in (True, False)
        for a, b in ((0, 1200), (1200, 1797))
    ]
    old, old_test, new, new_test = parts
    scores: dict[str, list[float]] = {}
    for seed in range(3):
        small = load(tiny.vit(tmp_path / f"m{seed}", seed=seed, labels=OLD, initializer_range=0.05, patch_size=2))
        fit: dict[str, Any] = {"steps": 150, "batch_size": 32, "lr": 3e-3}
        base = supervised(small, old, tmp_path / f"b{seed}", seed, **fit)
        scores.setdefault("before: old", []).append(accuracy(base, old_test))
        for keep in (0.0, 1.0, 4.0):
            after, _ = learned(base, new, tmp_path / f"{seed}-{keep}", seed=seed, keep=keep, **(fit | {"steps": 80}))
            logits, labels = answers(after, old_test)
            within = (logits[:, :5].argmax(-1) == labels).double().mean().item()
            for name, found in (
                ("old", accuracy(after, old_test)),
                ("within", within),
                ("new", accuracy(after, new_test)),
            ):
                scores.setdefault(f"keep={keep:g}: {name}", []).append(found)
    mean = means(scores)
    assert mean["keep=1: within"] > mean["keep=0: within"] + 0.05
    assert mean["keep=4: within"] > mean["keep=0: within"] + 0.05
    assert mean["keep=1: new"] > mean["keep=0: new"] - 0.1


OLD = ("0", "1", "2", "3", "4")
