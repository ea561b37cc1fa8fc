"""tune.mixture_ft: a task's loss beside the first task's, on text that the model tells itself."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch.nn.utils import parameters_to_vector

import tiny
from case import Case
from lfm import models, zoo
from lfm.core import Codec, Gradients, Inputs, Model, Sizes
from lfm.core.errors import DataError, MismatchError
from lfm.core.method import Amount, check
from lfm.data import files
from lfm.data import records as data
from lfm.data.files import write
from lfm.data.task import task_for
from lfm.methods.probe import frequency
from lfm.methods.tune import mixture_ft, model_mixing
from lfm.models import forward
from lfm.runs.run import LocalRun
from methods.reuse.eight import fuse

FACTS = [data.Fact(subject=w, relation="is", object="happy", prompt=f"{w} are") for w in ("cats", "dogs", "birds")]
TEXTS = [data.Text(text=text) for text in ("the cat sat on the mat", "a small model learns", "up and down")]


def case(here: Path) -> Case:
    tiny.causal(here / "base")
    write(FACTS, here / "facts.jsonl")
    settings = {"steps": 6, "batch_size": 2, "samples": 5, "tokens": 8, "checkpoint_every": 0.0}
    return Case({"model": ("base",)}, {"train": "facts.jsonl"}, settings)


@pytest.fixture
def base(tmp_path: Path) -> Model:
    return models.load(tiny.causal(tmp_path / "base"))


def tuned(base: Model, work: Path, text: Any = TEXTS, **settings: Any) -> tuple[Model, LocalRun]:
    return fuse(mixture_ft, work, {"model": [base]}, {"train": FACTS, "text": text}, **settings)


def test_the_loss_is_the_tasks_and_a_share_of_the_texts(base: Model, tmp_path: Path) -> None:
    """One step over all records and all texts: L_task + share · L_text of the untouched model, by hand."""
    module = base.ask(Gradients).module()
    told = []
    for records in (FACTS, TEXTS):
        task = task_for(records, base.ask(Codec), base.facts)
        batch = task.collate(records)
        told.append(float(task.loss(forward(module, batch), batch).detach()))
    for share in (0.0, 0.5, 2.0):
        _, run = tuned(base, tmp_path, steps=1, share=share)
        assert run.notes["loss_before"] == pytest.approx(told[0] + share * told[1], rel=1e-5)


def test_a_step_goes_down_both_losses_and_held_out_is_the_tasks_alone(base: Model, tmp_path: Path) -> None:
    """AdamW's first step goes against the gradient's sign: against that of L_task + share · L_text, where the two
    losses want opposite things too."""
    module = base.ask(Gradients).module()
    slopes, told = [], []
    for records in (FACTS, TEXTS):
        task = task_for(records, base.ask(Codec), base.facts)
        batch = task.collate(records)
        value = task.loss(forward(module, batch), batch)
        told.append(float(value.detach()))
        slopes.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, [*module.parameters()])]))
    before = parameters_to_vector(module.parameters()).detach()
    settings: dict[str, Any] = {"steps": 1, "lr": 1e-3, "warmup": 0.0, "weight_decay": 0.0, "schedule": "constant"}
    made, _ = tuned(base, tmp_path, share=2.0, **settings)
    moved = parameters_to_vector(made.ask(Gradients).module().parameters()).detach() - before
    both = slopes[0] + 2.0 * slopes[1]
    clear = both.abs() > 1e-3 * both.abs().max()
    for other in slopes:
        assert int((clear & (other.sign() == -both.sign())).sum()) > 100
    assert torch.equal(moved[clear].sign(), -both[clear].sign())
    _, run = fuse(
        mixture_ft,
        tmp_path,
        {"model": [base]},
        {"train": FACTS, "dev": FACTS, "text": TEXTS},
        **settings | {"lr": 1e-30, "share": 2.0},
    )
    assert run.curves["fit held out"] == [pytest.approx(told[0], rel=1e-5)]


@pytest.mark.parametrize(
    ("adds", "bos", "eos", "start"),
    [([1], "<s>", "</s>", ""), ([], "<s>", "</s>", "<s>"), ([], None, "</s>", "</s>"), ([], None, None, "")],
)
def test_texts_are_drawn_as_the_model_believes_from_its_opening(
    adds: list[int], bos: str | None, eos: str | None, start: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """At temperature 1, which is the model's own distribution; from the opening token, put there once."""
    asked: list[Any] = []

    class Speaker:
        def __init__(self, *_: object) -> None: ...

        def generate(self, prompts: list[str], **how: Any) -> list[str]:
            asked.append((prompts, how))
            return said

    class Tokenizer:
        bos_token, eos_token = bos, eos

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": adds}

    monkeypatch.setattr(mixture_ft, "LocalText", Speaker)
    config, run = mixture_ft.Config(samples=3, tokens=7), LocalRun(0, tmp_path)
    codec: Any = type("Codec", (), {"tokenizer": Tokenizer()})()
    said = [" a town ", "", "  ", "b"]
    assert mixture_ft.samples(config, torch.nn.Identity(), codec, run) == ["a town", "b"]
    how = {"max_tokens": 7, "temperature": 1.0, "seed": run.seed_for("samples")}
    assert asked == [([start] * 3, how)]
    said = ["", " "]
    with pytest.raises(DataError, match=r"tells nothing of its own.*text=FILE"):
        mixture_ft.samples(config, torch.nn.Identity(), codec, run)


def test_a_plan_counts_both_tasks_and_the_telling(base: Model) -> None:
    """A step is 6 P a token of a record and of a text beside it; told texts take 2 P a token more, and are tokens."""
    facts, config = base.facts, mixture_ft.Config(steps=5, batch_size=4, samples=10, tokens=8)
    train = Amount(6, 60)
    given = mixture_ft.cost(config, Sizes({"model": (facts,)}, {"train": train, "text": Amount(10, 80)}))
    told = mixture_ft.cost(config, Sizes({"model": (facts,)}, {"train": train}))
    assert given.flops == pytest.approx(5 * 4 * (10 + 8) * 6 * facts.parameters)
    assert told.flops == pytest.approx(given.flops + 2 * facts.parameters * 80)
    assert (given.steps, given.tokens, told.steps, told.tokens) == (5, 0, 5 + 8, 80)


def test_texts_that_the_model_tells_are_kept_over_a_kill_and_keyed_by_the_seed(base: Model, tmp_path: Path) -> None:
    module, codec = base.ask(Gradients).module(), base.ask(Codec)
    config = mixture_ft.Config(samples=6, tokens=8)
    first, again, other = (
        mixture_ft.samples(config, module, codec, LocalRun(seed, tmp_path / str(seed))) for seed in (0, 0, 1)
    )
    assert first == again != other
    assert len(set(first)) > 1 and all(text == text.strip() and text for text in first)


def test_fewer_texts_than_records_are_all_taken(base: Model, tmp_path: Path) -> None:
    _, run = tuned(base, tmp_path, text=TEXTS[:1], steps=2)
    assert run.notes["texts"] == 1


@pytest.mark.parametrize("kind", ["masked", "seq2seq"])
def test_other_language_models_take_the_texts_that_they_are_given(kind: str, tmp_path: Path) -> None:
    model = models.load(getattr(tiny, kind)(tmp_path / kind))
    made, run = tuned(model, tmp_path, steps=12, lr=0.01)
    assert float(run.notes["loss_after"]) < float(run.notes["loss_before"])
    assert made.facts.task == model.facts.task
    with pytest.raises(MismatchError, match="add text=FILE"):
        tuned(model, tmp_path, text=(), steps=1)


def test_a_classifier_is_refused(tmp_path: Path) -> None:
    model = models.load(tiny.classifier(tmp_path / "classifier"))
    with pytest.raises(MismatchError, match="language model"):
        tuned(model, tmp_path)


# ------------------------------------------------------------------------------- what the paper claims


def split(seed: int) -> tuple[list[data.Fact], list[data.Fact]]:
    """Of cities and jobs that zoo:lm knows, asked for in words it has not read: 16 facts to train on, of 8 objects each
    relation; and the 104 others, of 24 objects."""
    every = [
        msgspec.structs.replace(fact, prompt=f"These days {fact.subject} has the {fact.relation} of", paraphrases=())
        for fact in files.read(zoo.data("facts"))
        if isinstance(fact, data.Fact) and fact.relation in ("city", "job")
    ]
    order = random.Random(seed)
    train = []
    for relation in ("city", "job"):
        own = [fact for fact in every if fact.relation == relation]
        objects = sorted({fact.object for fact in own})
        order.shuffle(objects)
        train += [order.choice([fact for fact in own if fact.object == name]) for name in objects[:8]]
    held = [fact for fact in every if fact not in train]
    order.shuffle(held)
    return train, held


def probed(model: Model, train: list[data.Fact], facts: list[data.Fact], work: Path) -> dict[str, float]:
    inputs = Inputs({"model": (model,)}, {"train": train, "facts": facts})
    found = frequency.run(frequency.Config(), inputs, LocalRun(0, Path(tempfile.mkdtemp(dir=work))))
    return dict(found.metrics)


@pytest.mark.slow
def test_mixing_tasks_and_mixing_models_cure_the_shock(tmp_path: Path) -> None:
    """Fine-tuning hard on a few facts makes zoo:lm name their objects everywhere; each cure alone helps."""
    base = models.load(zoo.model("lm"))
    for seed in range(3):
        train, held = split(seed)
        dev, facts = held[:32], held[32:]
        told = {"base": probed(base, train, facts, tmp_path)}
        for name, share in (("tuned", 0.0), ("mixture", 1.0)):
            inputs = check("tune.mixture_ft", mixture_ft.METHOD, Inputs({"model": (base,)}, {"train": train}))
            config = mixture_ft.Config(share=share, samples=256, steps=150, lr=2e-3)
            run = LocalRun(seed, Path(tempfile.mkdtemp(dir=tmp_path)))
            made = mixture_ft.run(config, inputs, run)
            assert isinstance(made, Model)
            mixed, _ = fuse(model_mixing, tmp_path, {"base": [base], "tuned": [made]}, {"dev": dev})
            told |= {
                name: probed(made, train, facts, tmp_path),
                f"{name}, mixed": probed(mixed, train, facts, tmp_path),
            }
        for name, row in told.items():  # as docs/tuning.md has them
            print(seed, name, {key: round(row[key], 3) for key in ("accuracy", "accuracy_unseen", "range_shock")})
        assert told["tuned"]["accuracy"] < told["base"]["accuracy"] - 0.1  # beyond that point it harms
        assert told["tuned"]["range_shock"] > told["base"]["range_shock"] + 0.2
        for cure in ("mixture", "tuned, mixed"):
            assert told[cure]["accuracy"] > told["tuned"]["accuracy"] + 0.1, cure
            assert told[cure]["range_shock"] < told["tuned"]["range_shock"] - 0.1, cure
        assert told["mixture"]["accuracy"] > told["base"]["accuracy"] + 0.1
