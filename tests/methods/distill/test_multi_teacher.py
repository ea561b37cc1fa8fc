"""Several teachers: their weights by hand, the loss written out, and whom an example is learned from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from case import Case
from lfm.core import Inputs, Model
from lfm.core.errors import ConfigError, DataError, MismatchError
from lfm.data import records as data
from lfm.data.files import write
from lfm.distilling.telling import IDS, TOLD
from lfm.methods.distill import cache, multi_teacher, response
from lfm.models import load
from lfm.runs.run import LocalRun
from teaching import accuracy, answers, made, means, mute, still, supervised

LABELS = [data.Label(text=f"the {w} sat on the mat", label=w) for w in ("cats", "dogs", "birds") * 4]
TEXTS = [data.Text(text=line) for line in tiny.CORPUS]
WEIGHTINGS = ("fixed", "confidence", "entropy", "agreement")


def case(here: Path) -> Case:
    tiny.classifier(here / "one", hidden_size=48)
    tiny.classifier(here / "two", seed=2)
    tiny.classifier(here / "small", seed=1)
    write(LABELS, here / "texts.jsonl")
    settings = {"steps": 6, "batch_size": 4, "checkpoint_every": 0.0}
    return Case({"teacher": ("one", "two"), "student": ("small",)}, {"train": "texts.jsonl"}, settings)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for seed in range(4):
        still(tiny.classifier(root / f"classifier{seed}", seed=seed))
    for seed in range(3):
        tiny.causal(root / f"causal{seed}", seed=seed)
        still(tiny.masked(root / f"masked{seed}", seed=seed))
    return root


def distill(teachers: Any, student: Model, records: Any, work: Path, **settings: Any) -> Any:
    return made(multi_teacher.METHOD, {"teacher": teachers, "student": [student]}, {"train": records}, work, **settings)


def by_hand(told: torch.Tensor, labels: torch.Tensor, weighting: str) -> torch.Tensor:
    """(K, N) in fp64, row by row, from the formulas of the docstring."""
    count, rows = told.shape[:2]
    p = told.double().softmax(-1)
    found = torch.zeros(count, rows, dtype=torch.float64)
    for n in range(rows):
        losses = [-p[k, n, labels[n]].log() for k in range(count)]
        entropies = [-(p[k, n] * p[k, n].log()).sum() for k in range(count)]
        mean = p[:, n].mean(0)
        apart = [(p[k, n] * (p[k, n] / mean).log()).sum() for k in range(count)]
        for k in range(count):
            share = {
                "fixed": torch.tensor(0.0),
                "confidence": losses[k].exp() / sum(one.exp() for one in losses),
                "entropy": entropies[k] / sum(entropies),
                "agreement": apart[k] / sum(apart),
            }[weighting]
            found[k, n] = 1 / count if weighting == "fixed" else (1 - share) / (count - 1)
    return found


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("count", [2, 3])
def test_weights_are_the_papers_and_come_to_one(weighting: Any, count: int) -> None:
    random = torch.Generator().manual_seed(0)
    told = 3 * torch.randn(count, 8, 5, generator=random)
    labels = torch.randint(5, (8,), generator=random)
    found = multi_teacher.weights(told, labels, multi_teacher.Config(weighting=weighting))
    torch.testing.assert_close(found.double(), by_hand(told, labels, weighting), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.sum(0), torch.ones(8))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_teachers_of_one_mind_weigh_the_same(weighting: Any) -> None:
    one = torch.randn(1, 4, 5, generator=torch.Generator().manual_seed(0)).expand(3, -1, -1)
    sure = torch.full((3, 4, 5), -100.0).index_fill(-1, torch.tensor([2]), 100.0)
    for told in (one, sure):
        found = multi_teacher.weights(told, torch.zeros(4, dtype=torch.long), multi_teacher.Config(weighting=weighting))
        torch.testing.assert_close(found, torch.full((3, 4), 1 / 3), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("weighting", "first"), [("confidence", 0.0), ("entropy", 1.0), ("agreement", 0.5)])
def test_an_answer_that_a_teacher_gives_no_probability_is_weighed(weighting: Any, first: float) -> None:
    """One is sure of a wrong answer, the other thinks all the same: H is 0 and log 3, CE infinite and log 3."""
    told = torch.tensor([[[1.0, 0.0, 0.0]], [[1 / 3, 1 / 3, 1 / 3]]]).log()
    found = multi_teacher.weights(told, torch.tensor([1]), multi_teacher.Config(weighting=weighting))
    torch.testing.assert_close(found.sum(0), torch.ones(1))
    if weighting == "agreement":  # KL of each from their mean
        mean = torch.tensor([2 / 3, 1 / 6, 1 / 6])
        apart = [-mean[0].log(), (torch.log(1 / 3 / mean) / 3).sum()]
        first = float(1 - apart[0] / sum(apart))
    torch.testing.assert_close(found[0], torch.tensor([first]), rtol=1e-4, atol=1e-4)
    answers = multi_teacher.mixture(told, found, 2.0)
    assert not answers.isnan().any()


@pytest.mark.parametrize("name", ["classifier", "causal", "masked"])
def test_the_mixtures_gradient_is_that_of_the_weighted_divergences(name: str, root: Path, tmp_path: Path) -> None:
    """Σ_k w_k KL(pᵏ ‖ p) and KL(Σ_k w_k pᵏ ‖ p) differ by what no student changes: H(Σ w p) − Σ w H(p)."""
    records = LABELS[:4] if name == "classifier" else TEXTS[:4]
    models = [load(root / f"{name}{seed}") for seed in range(3)]
    _, run = distill(models[:2], models[2], records, tmp_path, steps=1, temperature=3.0, alpha=1.0, weighting="entropy")
    if name == "masked":  # which words are hidden is drawn, so that what it was is not known here
        assert run.notes["loss_before"] > 0
        return
    (*told, s), (*_, labels) = zip(*(answers(model, records) for model in models), strict=True)
    w = by_hand(torch.stack(told), labels, "entropy")
    t, q = torch.stack(told).div(3).double().softmax(-1), s.div(3).double().log_softmax(-1)
    each = (w * (t * (t.log() - q)).sum(-1)).sum(0)
    mixed = (w[..., None] * t).sum(0)
    unlearned = -(mixed * mixed.log()).sum(-1) - (w * -(t * t.log()).sum(-1)).sum(0)
    assert run.notes["loss_before"] == pytest.approx(9 * (each - unlearned).mean().item(), rel=1e-4)


def test_a_teacher_given_twice_is_one_teacher(root: Path, tmp_path: Path) -> None:
    teacher, student = load(root / "classifier0"), load(root / "classifier1")
    settings: dict[str, Any] = {"temperature": 2.0, "alpha": 0.7}
    twice, _ = distill([teacher, teacher], student, LABELS, tmp_path / "a", **settings)
    models = {"teacher": [teacher], "student": [student]}
    once, _ = made(response.METHOD, models, {"train": LABELS}, tmp_path / "b", **settings)
    torch.testing.assert_close(answers(twice, LABELS)[0], answers(once, LABELS)[0], rtol=1e-3, atol=1e-3)


def test_one_weight_of_nought_leaves_the_other_alone(root: Path, tmp_path: Path) -> None:
    one, other, student = (load(root / f"classifier{seed}") for seed in (0, 2, 1))
    settings: dict[str, Any] = {"weighting": "fixed", "alpha": 1.0}
    made_, _ = distill([one, other], student, LABELS, tmp_path / "a", weights=(1.0, 0.0), **settings)
    alone, _ = distill([one, one], student, LABELS, tmp_path / "b", **settings)
    torch.testing.assert_close(answers(made_, LABELS)[0], answers(alone, LABELS)[0], rtol=1e-3, atol=1e-3)


def test_the_likeliest_answers_alone_are_completed() -> None:
    """Of all V likeliest answers nothing is left out, so they are the teacher."""
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    best = logits.log_softmax(-1).topk(6)
    whole = multi_teacher.told([{TOLD: best.values, IDS: best.indices}, {TOLD: logits}], 6)
    torch.testing.assert_close(whole[0].softmax(-1), whole[1].softmax(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "k"), [("classifier", 3), ("causal", 400)])
def test_teachers_of_different_access_teach_together(name: str, k: int, root: Path, tmp_path: Path) -> None:
    """One here and one whose answers were kept, all of them: as if both were here."""
    records = LABELS if name == "classifier" else TEXTS
    one, two, student = (load(root / f"{name}{seed}") for seed in (0, 2, 1))
    given = Inputs({"teacher": (two,)}, {"train": records})
    kept = cache.run(cache.Config(k=k), given, LocalRun(0, tmp_path / "w"))
    (tmp_path / "kept").mkdir()
    kept.save(tmp_path / "kept")
    mixed, _ = distill([one, load(tmp_path / "kept")], student, records, tmp_path / "a", steps=6)
    both, _ = distill([one, two], student, records, tmp_path / "b", steps=6)
    before, after, expected = (answers(model, records)[0] for model in (student, mixed, both))
    assert (expected - before).abs().max() > 0.05
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-3)


def test_what_cannot_go_together_is_said_first(root: Path, tmp_path: Path) -> None:
    one, two, student = (load(root / f"classifier{seed}") for seed in range(3))
    with pytest.raises(ConfigError, match="for 2 teachers"):
        distill([one, two], student, LABELS, tmp_path, weighting="fixed", weights=(1.0,))
    with pytest.raises(ConfigError, match="finds the weights itself"):
        distill([one, two], student, LABELS, tmp_path, weights=(1.0, 1.0))
    with pytest.raises(MismatchError, match="cannot learn the answers of one for causal-lm"):
        distill([one, load(root / "causal0")], student, LABELS, tmp_path)
    nameless = [data.Label(text=record.text, label="") for record in LABELS]
    with pytest.raises(DataError, match="is blank"):
        distill([one, two], student, nameless, tmp_path, alpha=1.0)
    distill([one, two], student, nameless, tmp_path, alpha=1.0, weighting="agreement", steps=1)


def test_labels_alone_need_no_teacher(root: Path, tmp_path: Path) -> None:
    one, two, student = (load(root / f"classifier{seed}") for seed in range(3))
    made = [
        distill(teachers, student, LABELS, tmp_path / name, alpha=0.0)[0]
        for name, teachers in (("a", [one, two]), ("b", [mute(one), mute(two)]))
    ]
    assert made[0].digest == made[1].digest
    expected = supervised(student, LABELS, tmp_path / "c")
    torch.testing.assert_close(answers(made[0], LABELS)[0], answers(expected, LABELS)[0], rtol=1e-4, atol=2e-4)


@pytest.mark.slow
def test_each_example_is_learned_from_who_knows_it(tmp_path: Path) -> None:
    """Two experts of the zoo, of digits upright and turned, teach both to one small ViT; three seeds, 300 records."""
    from lfm import zoo
    from lfm.zoo.vision import images

    experts = [load(zoo.model(f"vit-{name}")) for name in ("identity", "rotation")]
    both = [r for pair in zip(*(images(n, "train") for n in ("identity", "rotation")), strict=True) for r in pair]
    test = [r for name in ("identity", "rotation") for r in images(name, "test")]
    scores: dict[str, list[float]] = {f"expert {k}": [accuracy(expert, test)] * 2 for k, expert in enumerate(experts)}
    for seed in range(3):
        student = load(tiny.vit(tmp_path / f"s{seed}", seed=seed, hidden_size=64))
        some = [both[i] for i in np.random.default_rng(seed).permutation(len(both))[:300]]
        fit: dict[str, Any] = {"steps": 200, "batch_size": 32, "lr": 3e-3}
        alone = supervised(student, some, tmp_path / f"a{seed}", seed, **fit)
        scores.setdefault("alone", []).append(accuracy(alone, test))
        for weighting in WEIGHTINGS:
            work = tmp_path / f"{weighting}{seed}"
            after, _ = distill(experts, student, some, work, seed=seed, weighting=weighting, **fit)
            scores.setdefault(weighting, []).append(accuracy(after, test))
    mean = means(scores)
    assert mean["confidence"] > mean["fixed"] and mean["confidence"] > mean["alone"]
