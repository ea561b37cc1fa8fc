"""Born-again networks: who teaches whom, new weights each time, and what the generations come to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import tiny
from case import Case
from lfm.core import Gradients, Model
from lfm.core.errors import DataError
from lfm.data import records as data
from lfm.data.files import write
from lfm.distilling.student import formed
from lfm.methods.distill import response, self
from lfm.models import load
from lfm.runs.run import LocalRun
from teaching import QUICK, accuracy, answers, digits, loss, made, means, mute, still, supervised

LABELS = [data.Label(text=f"the {w} sat on the mat", label=w) for w in ("cats", "dogs", "birds") * 4]
TEXTS = [data.Text(text=line) for line in tiny.CORPUS]


def case(here: Path) -> Case:
    tiny.classifier(here / "base")
    write(LABELS, here / "texts.jsonl")
    settings = {"steps": 4, "batch_size": 4, "generations": 2, "checkpoint_every": 0.0}
    return Case({"model": ("base",)}, {"train": "texts.jsonl"}, settings)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    still(tiny.classifier(root / "classifier", num_hidden_layers=3))
    tiny.causal(root / "causal")
    return root


def born(model: Model, records: Any, work: Path, **settings: Any) -> Any:
    return made(self.METHOD, {"model": [model]}, {"train": records}, work, **settings)


def students(model: Model, work: Path, generations: int) -> list[Model]:
    """The generations before they learn: new weights keyed by their number."""
    config = self.Config(**QUICK)
    gradients, run = model.ask(Gradients), LocalRun(0, work)
    return [gradients.rewrap(formed(gradients.module(), config, run, g)) for g in range(1, generations + 1)]


@pytest.mark.parametrize("name", ["classifier", "causal"])
def test_the_first_loss_is_the_papers_written_out(name: str, root: Path, tmp_path: Path) -> None:
    """½ (CE + KL(teacher ‖ student)) at T = 1, of a student with new weights."""
    records, model = LABELS[:4] if name == "classifier" else TEXTS[:4], load(root / name)
    _, run = born(model, records, tmp_path / "a", steps=1)
    (student,) = students(model, tmp_path / "b", 1)
    (t, _), (s, labels) = answers(model, records), answers(student, records)
    apart = F.kl_div(s.log_softmax(-1), t.log_softmax(-1), log_target=True, reduction="batchmean").item()
    assert run.notes["loss_1"] == pytest.approx((F.cross_entropy(s, labels).item() + apart) / 2, rel=1e-4)


def test_every_generation_begins_anew_and_learns_from_the_last(root: Path, tmp_path: Path) -> None:
    """Two generations are a response distillation from the first one's result, into the second one's new weights."""
    model = load(root / "classifier")
    first, second = students(model, tmp_path / "w", 2)
    assert not torch.equal(answers(first, LABELS)[0], answers(second, LABELS)[0])
    whole: dict[str, Any] = {"batch_size": len(LABELS)}  # so that the order of the records is no matter
    one, _ = born(model, LABELS, tmp_path / "a", **whole)
    two, run = born(model, LABELS, tmp_path / "b", generations=2, **whole)
    models = {"teacher": [one], "student": [second]}
    by_response, taught = made(
        response.METHOD, models, {"train": LABELS}, tmp_path / "c", temperature=1.0, alpha=0.5, **whole
    )
    assert run.notes["loss_2"] == pytest.approx(taught.notes["loss_after"], rel=1e-3)
    torch.testing.assert_close(answers(two, LABELS)[0], answers(by_response, LABELS)[0], rtol=1e-2, atol=1e-2)


def test_a_generation_from_the_models_own_weights_has_no_more_to_hear(root: Path, tmp_path: Path) -> None:
    _, run = born(load(root / "classifier"), LABELS, tmp_path, start="weights", alpha=1.0, steps=1)
    assert run.notes["loss_1"] == pytest.approx(0.0, abs=1e-5)


def test_without_weight_the_last_generation_is_not_asked(root: Path, tmp_path: Path) -> None:
    model = load(root / "classifier")
    one, other = (
        born(asked, LABELS, tmp_path / name, alpha=0.0)[0] for name, asked in (("a", model), ("b", mute(model)))
    )
    assert one.digest == other.digest


def test_a_nameless_net_cannot_be_born_again(tmp_path: Path) -> None:
    from lfm.core import Inputs

    nameless = [data.Label(text=record.text, label="") for record in LABELS]
    model = load(tiny.classifier(tmp_path / "m"))
    with pytest.raises(DataError, match="is blank"):
        born(model, nameless, tmp_path / "a")
    born(model, nameless, tmp_path / "b", alpha=1.0, steps=1)
    self.agree(self.Config(), Inputs({"model": (model,)}, {"train": LABELS}))


@pytest.mark.slow
def test_a_born_again_network_is_no_worse_than_its_teacher(tmp_path: Path) -> None:
    """Small ViTs on 300 of scikit-learn's digits: the teacher, two generations, and one more without a teacher."""
    every = digits()
    scores: dict[str, list[float]] = {}
    for seed in range(3):
        some = [every[i] for i in np.random.default_rng(seed).permutation(1200)[:300]]
        shape: dict[str, Any] = {"hidden_size": 64, "initializer_range": 0.1}
        fit: dict[str, Any] = {"steps": 150, "batch_size": 32, "lr": 3e-3}
        model = load(tiny.vit(tmp_path / f"{seed}", seed=seed, **shape))
        found = {"teacher": supervised(model, some, tmp_path / f"t{seed}", seed, **fit)}
        for name, settings in (("untaught", {"alpha": 0.0}), ("first", {}), ("second", {"generations": 2})):
            work = tmp_path / f"{name}{seed}"
            found[name], _ = born(found["teacher"], some, work, seed=seed, **fit, **settings)
        for name, made_ in found.items():
            scores.setdefault(f"{name}: accuracy", []).append(accuracy(made_, every[1200:]))
            scores.setdefault(f"{name}: loss", []).append(loss(made_, every[1200:]))
    mean = means(scores)
    for generation in ("first", "second"):
        assert mean[f"{generation}: loss"] < mean["untaught: loss"] + 0.02
        assert mean[f"{generation}: accuracy"] > mean["untaught: accuracy"] - 0.02
