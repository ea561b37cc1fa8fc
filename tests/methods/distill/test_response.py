"""Response distillation: the paper's loss, who may teach whom, and what it is worth."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import tiny
from case import Case
from lfm.core import Codec, Gradients, Inputs, Logits, Model, Sizes, Top
from lfm.core.errors import DataError, MismatchError, ModelError
from lfm.core.method import Amount, check
from lfm.data import records as data
from lfm.data.files import write
from lfm.data.task import task_for
from lfm.methods.distill import response
from lfm.models import forward, load
from lfm.runs.run import LocalRun
from lfm.train import Fit, fit, once
from teaching import means, mute

LABELS = [data.Label(text=f"the {w} sat on the mat", label=w) for w in ("cats", "dogs", "birds") * 4]
TEXTS = [data.Text(text=line) for line in tiny.CORPUS]


def distill(teacher: Model, student: Model, records: Any, work: Path, seed: int = 0, **settings: Any) -> Any:
    inputs = Inputs({"teacher": (teacher,), "student": (student,)}, {"train": records})
    config = response.Config(**({"steps": 20, "lr": 5e-3, "batch_size": 4} | settings))
    response.agree(config, inputs)
    run = LocalRun(seed, work)
    made = response.run(config, check("distill.response", response.METHOD, inputs), run)
    assert isinstance(made, Model)
    return made, run


def supervised(model: Model, records: Any, config: Fit, work: Path, seed: int = 0) -> Model:
    task = task_for(records, model.ask(Codec), model.facts)
    module = model.ask(Gradients).module()
    numbers, collate = once(records, task.collate)
    fit(module, numbers, collate, lambda m, b: task.loss(forward(m, b), b), config, LocalRun(seed, work))
    return model.ask(Gradients).rewrap(module)


def logits_of(model: Model, records: Any) -> tuple[torch.Tensor, torch.Tensor]:
    task = task_for(records, model.ask(Codec), model.facts)
    batch = task.collate(records)
    return task.scored(model.ask(Logits).logits(batch), batch)


def case(here: Path) -> Case:
    tiny.classifier(here / "big", hidden_size=48)
    tiny.classifier(here / "small", seed=1)
    write(LABELS, here / "texts.jsonl")
    settings = {"steps": 6, "batch_size": 4, "checkpoint_every": 0.0}
    return Case({"teacher": ("big",), "student": ("small",)}, {"train": "texts.jsonl"}, settings)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        tiny.classifier(root / f"classifier{seed}", seed=seed)
        tiny.causal(root / f"causal{seed}", seed=seed, num_hidden_layers=3)
        tiny.masked(root / f"masked{seed}", seed=seed)
    return root


@pytest.mark.parametrize("name", ["classifier", "causal", "masked"])
@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_the_first_loss_is_the_papers_written_out(name: str, kind: Any, root: Path, tmp_path: Path) -> None:
    """(1 − α) CE + α T² D over what the task scores, from both models' logits alone, dropout off."""
    records = LABELS[:4] if name == "classifier" else TEXTS[:4]
    teacher, student = load(root / f"{name}0"), load(_still(root / f"{name}1"))
    _, run = distill(
        teacher, student, records, tmp_path, steps=1, temperature=3.0, alpha=0.7, divergence=kind, precision="fp32"
    )
    (t, _), (s, labels) = logits_of(teacher, records), logits_of(student, records)
    p, q = (t / 3).softmax(-1).double(), (s / 3).softmax(-1).double()
    m = (p + q) / 2
    apart = {
        "forward": (p * (p / q).log()).sum(-1),
        "reverse": (q * (q / p).log()).sum(-1),
        "jsd": ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2,
    }[kind].mean()
    expected = 0.3 * F.cross_entropy(s, labels).item() + 0.7 * 9 * apart.item()
    assert run.notes["loss_before"] == pytest.approx(expected, rel=1e-4)


def _still(directory: Path) -> Path:
    """The same model without dropout."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {key: 0.0 for key in config if key.endswith(("dropout", "dropout_prob"))}))
    return directory


@pytest.mark.parametrize("name", ["classifier", "causal"])
def test_without_the_teacher_it_is_supervised_training(name: str, root: Path, tmp_path: Path) -> None:
    """A teacher that cannot be asked will do."""
    records = LABELS if name == "classifier" else TEXTS
    teacher, student = load(root / f"{name}0"), load(root / f"{name}1")
    made, _ = distill(mute(teacher), student, records, tmp_path / "a", alpha=0.0, precision="fp32")
    config = response.Config(steps=20, lr=5e-3, batch_size=4, alpha=0.0, precision="fp32")
    expected = supervised(student, records, config, tmp_path / "b")
    (got, _), (wanted, _), (begun, _) = (logits_of(model, records) for model in (made, expected, student))
    # answers, not weights: where a gradient is none (a key's bias) Adam makes steps of its rounding
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-4)
    assert (got - begun).abs().max() > 0.05


@pytest.mark.parametrize(("name", "usual"), [("causal", 1.0), ("classifier", 4.0)])
def test_the_temperature_is_that_of_words_or_of_classes(name: str, usual: float, root: Path, tmp_path: Path) -> None:
    records = LABELS if name == "classifier" else TEXTS
    teacher, student = load(root / f"{name}0"), load(root / f"{name}1")
    first = [
        distill(teacher, student, records, tmp_path / str(i), steps=1, **how)[1].notes["loss_before"]
        for i, how in enumerate(({}, {"temperature": usual}, {"temperature": 5 - usual}))
    ]
    assert first[0] == first[1] != first[2]


def test_a_plan_without_the_teacher_asks_nobody(root: Path) -> None:
    teacher, student = load(root / "causal0").facts, load(root / "causal1").facts
    sizes = Sizes({"teacher": (teacher,), "student": (student,)}, {"train": Amount(10, 100)}, {"teacher": ((Top,),)})
    few, many = (response.cost(response.Config(alpha=alpha), sizes) for alpha in (0.0, 0.9))
    assert few.queries == few.tokens == 0 < many.queries and few.flops < many.flops


def test_a_teacher_has_nothing_to_teach_itself(root: Path, tmp_path: Path) -> None:
    model = load(_still(root / "causal0"))
    _, run = distill(model, model, TEXTS, tmp_path, steps=1, alpha=1.0)
    assert run.notes["loss_before"] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("name", ["classifier", "causal", "masked"])
def test_the_student_comes_to_answer_like_the_teacher_and_is_saved(name: str, root: Path, tmp_path: Path) -> None:
    records = LABELS if name == "classifier" else TEXTS
    teacher, student = load(root / f"{name}0"), load(root / f"{name}1")
    made, _ = distill(teacher, student, records, tmp_path / "work", steps=60, alpha=1.0, temperature=1.0)

    def apart(model: Model) -> float:
        t, s = logits_of(teacher, records)[0], logits_of(model, records)[0]
        return F.kl_div(s.log_softmax(-1), t.log_softmax(-1), reduction="batchmean", log_target=True).item()

    assert apart(made) < 0.5 * apart(student)
    (tmp_path / "out").mkdir()
    made.save(tmp_path / "out")
    again = load(tmp_path / "out")
    assert again.digest == made.digest
    assert torch.equal(logits_of(again, records)[0], logits_of(made, records)[0])


def test_classes_are_matched_by_name(root: Path, tmp_path: Path) -> None:
    """A teacher whose classes stand in another order teaches the same thing."""
    teacher, student = load(root / "classifier0"), load(root / "classifier1")
    turned = teacher.ask(Gradients).module()
    order = [2, 0, 1]
    with torch.no_grad():
        for parameter in turned.classifier.parameters():  # type: ignore[union-attr]
            parameter.copy_(parameter[order].clone())
    names = [tiny.LABELS[i] for i in order]
    turned.config.id2label, turned.config.label2id = dict(enumerate(names)), {n: i for i, n in enumerate(names)}
    moved = teacher.ask(Gradients).rewrap(turned)
    assert moved.facts.labels == tuple(names)
    results = [
        distill(t, student, LABELS, tmp_path / str(i), alpha=1.0)[1].notes for i, t in enumerate((teacher, moved))
    ]
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_classes_may_be_unknown_where_only_the_teacher_is_followed(root: Path, tmp_path: Path) -> None:
    teacher, student = load(root / "classifier0"), load(root / "classifier1")
    nameless = [data.Label(text=r.text, label="") for r in LABELS]
    named, _ = distill(teacher, student, LABELS, tmp_path / "a", alpha=1.0)
    made, _ = distill(teacher, student, nameless, tmp_path / "b", alpha=1.0)
    assert made.digest == named.digest
    with pytest.raises(DataError, match="alpha=1"):
        distill(teacher, student, nameless, tmp_path / "c")
    speaks, learns = load(root / "causal0"), load(root / "causal1")
    _, run = distill(speaks, learns, nameless, tmp_path / "d", alpha=1.0)  # it has no class to put in the place
    assert run.notes["loss_after"] < run.notes["loss_before"]


def test_who_cannot_teach_whom_is_said_before_a_weight_is_read(root: Path, tmp_path: Path) -> None:
    other = tiny.classifier(tmp_path / "classes", labels=("up", "down"))
    tokenizer = tiny.byte_bpe()
    tokenizer.add_tokens(["<new>"])
    longer = tiny.causal(tmp_path / "words", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(longer)
    for teacher, student, what in (
        (root / "causal0", root / "masked0", "a model for masked-lm cannot learn the answers of one for causal-lm"),
        (
            tiny.vit(tmp_path / "vit"),
            root / "causal0",
            "a model for causal-lm cannot learn the answers of one for image-class",
        ),
        (other, root / "classifier0", "different classes"),
        (longer, root / "causal0", "different vocabularies"),
    ):
        with pytest.raises(MismatchError, match=what):
            models = {"teacher": (_blind(teacher),), "student": (_blind(student),)}
            response.agree(response.Config(), Inputs(models, {"train": TEXTS}))


def _blind(directory: Path) -> Model:
    """The model with nothing to read weights by."""
    return load(directory).only((Codec,))


@pytest.mark.parametrize("start", ["weights", "random"])
def test_the_teachers_own_architecture_with_fewer_blocks(start: Any, root: Path, tmp_path: Path) -> None:
    teacher = load(root / "causal0")
    made, _ = distill(teacher, teacher, TEXTS, tmp_path / "work", layers=2, start=start)
    assert made.facts.layers == 2 and made.facts.parameters < teacher.facts.parameters
    (tmp_path / "out").mkdir()
    made.save(tmp_path / "out")
    assert torch.equal(logits_of(load(tmp_path / "out"), TEXTS)[0], logits_of(made, TEXTS)[0])


def test_the_blocks_kept_are_the_first_the_last_and_those_between(root: Path, tmp_path: Path) -> None:
    teacher = load(root / "causal0")
    made, _ = distill(teacher, teacher, TEXTS, tmp_path / "work", layers=2, steps=1, lr=1e-12)
    before, after = (m.ask(Gradients).module().state_dict() for m in (teacher, made))
    for kept, source in ((0, 0), (1, 2)):
        name = "model.layers.{}.mlp.down_proj.weight"
        torch.testing.assert_close(after[name.format(kept)], before[name.format(source)])
    with pytest.raises(ModelError, match="4 blocks cannot be kept of 3"):
        distill(teacher, teacher, TEXTS, tmp_path / "other", layers=4)


def test_a_classifying_teacher_is_asked_once_a_record(root: Path, tmp_path: Path) -> None:
    asked = 0
    teacher, student = load(root / "classifier0"), load(root / "classifier1")
    logits = teacher.ask(Logits)

    class Counting:
        def logits(self, batch: Any) -> torch.Tensor:
            nonlocal asked
            asked += len(batch["input_ids"])
            return logits.logits(batch)

    counting = replace(teacher, gives={**teacher.gives, Logits: Counting}, _opened={})
    distill(counting, student, LABELS, tmp_path, steps=12)  # four epochs
    assert asked == len(LABELS)


@pytest.mark.slow
def test_distilled_beats_trained_alone_on_the_same_records_and_steps(tmp_path: Path) -> None:
    """A one-block ViT on 300 of scikit-learn's digits, taught by one of three blocks; mean accuracy of three seeds."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    every = [data.Image(image=(digits.images[i] * 15.9).astype(np.uint8), label=str(digits.target[i])) for i in order]
    train, test = every[:1200], every[1200:]
    shape: dict[str, Any] = {"patch_size": 2, "initializer_range": 0.05}
    wide = shape | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    big = load(tiny.vit(tmp_path / "teacher", **wide))
    teacher = supervised(big, train, Fit(epochs=6, batch_size=32, lr=2e-3), tmp_path / "w")

    def accuracy(model: Model) -> float:
        logits, labels = logits_of(model, test)
        return (logits.argmax(-1) == labels).double().mean().item()

    scores: dict[float, list[float]] = {0.0: [], 0.9: []}
    for seed in range(3):
        student = load(tiny.vit(tmp_path / f"student{seed}", seed=10 + seed, num_hidden_layers=1, **shape))
        some = [train[i] for i in np.random.default_rng(seed).permutation(1200)[:300]]
        for alpha in scores:
            settings = {"alpha": alpha, "steps": 250, "batch_size": 32, "lr": 3e-3}
            made, _ = distill(teacher, student, some, tmp_path / f"{seed}{alpha}", seed, **settings)
            scores[alpha].append(accuracy(made))
    mean = means({"teacher": [accuracy(teacher)] * 3, "alone": scores[0.0], "taught": scores[0.9]})
    assert mean["teacher"] > mean["taught"] > mean["alone"] + 0.01, scores
