"""distill.rerank: the sure are left alone, the unsure are asked about, and no more than that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from case import Case
from lfm import runs
from lfm.core import Codec, Inputs, Logits, Model, Text
from lfm.core.errors import AccessError, ConfigError, MismatchError
from lfm.core.interfaces import Classes
from lfm.core.model import Facts
from lfm.data.files import write
from lfm.data.records import Label
from lfm.methods.distill import rerank
from lfm.methods.prompt import api_few_shot
from lfm.models import load
from lfm.prompting import choosing
from lfm.runs.run import LocalRun

LABELS = ("bird", "cat", "dog", "fish")


def case(here: Path) -> Case:
    tiny.classifier(here / "small")
    tiny.causal(here / "large")
    write([Label(text=f"the {w} sat on the mat", label=w) for w in ("cats", "dogs", "birds") * 4], here / "dev.jsonl")
    return Case({"small": ("small",), "large": ("large",)}, {"dev": "dev.jsonl"}, {"most": 0.5, "top": 2})


class Told:
    """Classes by a table: text → probabilities."""

    labels = LABELS

    def __init__(self, table: Mapping[str, Sequence[float]]) -> None:
        self.table, self.asked = table, list[str]()

    def tell(self, records: Sequence[Any]) -> Any:
        self.asked += [record.text for record in records]
        return np.log(np.array([self.table[record.text] for record in records]))


class Speaker:
    """Text that answers a multiple choice with the letter of what a table says, or in words."""

    def __init__(self, table: Mapping[str, str], *, letters: bool = True) -> None:
        self.table, self.letters, self.asked = table, letters, list[str]()

    def generate(self, prompts: Sequence[str], **_: Any) -> list[str]:
        self.asked += prompts
        said = []
        for prompt in prompts:
            name = self.table[prompt.splitlines()[0]]
            place = prompt.partition(f") {name}")[0][-1:]
            said.append("I cannot tell." if name not in prompt else f"{place}) {name}" if self.letters else name)
        return said


def model(kind: type, what: Any, name: str = "a script", **facts: Any) -> Model:
    return Model(name, "api", {kind: lambda: what}, lambda: name, look=lambda: Facts(**facts))


def made(small: Model, large: Model, dev: Sequence[Label], here: Path, **settings: Any) -> tuple[Model, LocalRun]:
    config = rerank.Config(**settings)
    inputs = Inputs({"small": (small,), "large": (large,)}, {"dev": dev} if dev else {})
    rerank.agree(config, inputs)
    here.mkdir(exist_ok=True)
    run = LocalRun(0, here)
    program = rerank.run(config, inputs, run)
    assert isinstance(program, Model)
    return program, run


@pytest.mark.parametrize("letters", [True, False])
def test_the_unsure_are_asked_about_and_the_mass_is_shared_anew(letters: bool, tmp_path: Path) -> None:
    """Above θ the small model's numbers; below it the large one's choice of the top two, as a distribution."""
    small = Told({"sure": (0.7, 0.1, 0.1, 0.1), "unsure": (0.1, 0.4, 0.35, 0.15), "lost": (0.3, 0.3, 0.2, 0.2)})
    large = Speaker({"unsure": "dog", "lost": "fish"}, letters=letters)
    program, _ = made(model(Classes, small), model(Text, large), [], tmp_path, threshold=0.6, top=2)
    told = np.exp(program.ask(Classes).tell([Label(text=t, label="") for t in ("sure", "unsure", "lost")]))
    assert told.sum(1) == pytest.approx(1.0)
    assert told[0] == pytest.approx(small.table["sure"])
    assert told[1] == pytest.approx((0.1, 0.0, 0.75, 0.15), abs=1e-9)
    assert told[2] == pytest.approx(small.table["lost"])  # the fish was no choice: what the small one said stands
    assert [prompt.splitlines()[:3] for prompt in large.asked] == [
        ["unsure", "(A) cat", "(B) dog"],
        ["lost", "(A) bird", "(B) cat"],
    ]


def test_whatever_the_large_model_says_its_choice_is_the_answer() -> None:
    """The largest share is 1/top of the candidates' mass at least, which no other class has: on random tables."""
    random = np.random.default_rng(0)
    for top in (2, 3, 5):
        told = np.log(random.dirichlet(np.full(6, 0.5), size=200).clip(1e-9))
        told -= np.logaddexp.reduce(told, axis=1, keepdims=True)
        shares = random.dirichlet(np.ones(top), size=200)
        again = choosing.reranked(told, shares)
        best = choosing.candidates(told, top)
        assert (again.argmax(1) == best[np.arange(200), shares.argmax(1)]).all()
        assert np.logaddexp.reduce(again, axis=1) == pytest.approx(0.0, abs=1e-9)


def test_the_threshold_is_the_best_cut_on_dev(tmp_path: Path) -> None:
    """By brute force over every threshold; and only the share that may be is asked about."""
    random = np.random.default_rng(1)
    small, truth, second = {}, {}, {}
    for i in range(60):
        p = random.dirichlet(np.ones(4))
        truth[f"r{i}"] = LABELS[int(random.choice(4, p=p))]
        small[f"r{i}"] = tuple(p)
        second[f"r{i}"] = truth[f"r{i}"] if random.random() < 0.8 else LABELS[int(random.integers(4))]
    dev = [Label(text=name, label=label) for name, label in truth.items()]
    told, large = Told(small), Speaker(second)
    program, run = made(model(Classes, told), model(Text, large), dev, tmp_path / "a", most=0.5, top=3)
    assert len(large.asked) == 30

    def accuracy(threshold: float) -> float:
        fixed, _ = made(
            model(Classes, Told(small)), model(Text, Speaker(second)), [], tmp_path / "b", threshold=threshold, top=3
        )
        return float(np.mean([LABELS[i] == r.label for i, r in zip(fixed.ask(Classes).tell(dev).argmax(1), dev)]))

    sure = sorted(max(p) for p in small.values())
    brute = max(accuracy(s) for s in sure[1:31])
    assert run.notes["accuracy"] == pytest.approx(brute)
    chosen = program.ask(Classes).tell(dev).argmax(1)
    assert np.mean([LABELS[i] == r.label for i, r in zip(chosen, dev)]) == pytest.approx(brute)
    assert float(run.notes["accuracy"]) > float(run.notes["accuracy_small"])
    assert len(large.asked) == 30 + round(float(run.notes["asked"]) * 60)


@pytest.mark.parametrize("answer", ["cat", "bird"])  # wrong, and right where the small one is right too
def test_a_large_model_that_never_helps_is_never_asked(answer: str, tmp_path: Path) -> None:
    small = {f"r{i}": (0.4 + i / 100, 0.3, 0.2, 0.1 - i / 100) for i in range(9)}
    dev = [Label(text=name, label="bird") for name in small]
    large = Speaker(dict.fromkeys(small, answer))
    program, run = made(model(Classes, Told(small)), model(Text, large), dev, tmp_path, most=1.0)
    assert run.notes["threshold"] == 0.0 and run.notes["asked"] == 0.0
    asked = len(large.asked)
    program.ask(Classes).tell(dev)
    assert len(large.asked) == asked == 9


def test_a_head_and_classes_by_another_program_will_do(tmp_path: Path) -> None:
    """A classifier's own probabilities where it is sure; another's classes, in another order, where it is not."""
    small = load(tiny.classifier(tmp_path / "small"))
    dev = [Label(text=f"the {w} sat on the mat", label=w) for w in ("cats", "dogs", "birds")]

    class Other(Told):
        labels = ("dogs", "birds", "cats")

    table = {record.text: [0.9 if name == record.label else 0.05 for name in Other.labels] for record in dev}
    program, _ = made(small, model(Classes, Other(table)), [], tmp_path / "a", threshold=1.0, top=3)
    told = program.ask(Classes)
    assert [told.labels[i] for i in told.tell(dev).argmax(1)] == [record.label for record in dev]
    logits = small.ask(Logits).logits(small.ask(Codec).texts([r.text for r in dev]))
    alone, _ = made(small, model(Classes, Other(table)), [], tmp_path / "b", threshold=1e-9, top=3)
    assert np.exp(alone.ask(Classes).tell(dev)) == pytest.approx(logits.softmax(-1).numpy(), abs=1e-6)


def test_what_cannot_go_together_is_said_before_anything_is_asked(tmp_path: Path) -> None:
    small, large = Told({}), Speaker({})
    with pytest.raises(ConfigError, match="how sure is sure enough"):
        made(model(Classes, small), model(Text, large), [], tmp_path)
    with pytest.raises(MismatchError, match="the small model has no class 'cow'"):
        made(model(Classes, small), model(Text, large), [Label(text="x", label="cow")], tmp_path)
    with pytest.raises(ConfigError, match=r"has no .text."):
        made(model(Classes, small), model(Text, large), [], tmp_path, threshold=0.5, template="What is it?")
    causal = load(tiny.causal(tmp_path / "causal"))
    with pytest.raises(AccessError, match="tells no classes"):
        made(replace(causal, ref="causal"), model(Text, large), [], tmp_path, threshold=0.5)
    assert not small.asked and not large.asked


@pytest.mark.slow
def test_the_unsure_are_told_better_on_the_zoo(tmp_path: Path) -> None:
    """Topics of stories, a head of 24 examples and one of 400 on zoo:lm's vectors: see docs/distilling.md."""
    teacher = runs.model("zoo:lm")
    records: list[Any] = list(runs.records("zoo:topics"))
    test: list[Any] = list(runs.records("zoo:topics-test"))[:200]

    def head(examples: int) -> Model:
        inputs = Inputs({"model": (teacher,)}, {"train": records[:400]})
        (tmp_path / str(examples)).mkdir()
        run = LocalRun(0, tmp_path / str(examples))
        return api_few_shot.run(api_few_shot.Config(examples=examples), inputs, run)

    def right(model: Model) -> Any:
        told = model.ask(Classes)
        return np.array([told.labels[i] == r.label for i, r in zip(told.tell(test).argmax(1), test, strict=True)])

    small, large = head(24), head(400)
    pair, run = made(small, large, records[400:], tmp_path / "pair", most=0.5)
    unsure = np.exp(small.ask(Classes).tell(test).max(1)) < float(run.notes["threshold"])
    three = (small, pair, large)
    print(*(f"{right(m).mean():.3f} (unsure {right(m)[unsure].mean():.3f})" for m in three), f"{unsure.mean():.2f}")
    assert right(pair).mean() > right(small).mean() + 0.05
    assert right(pair)[unsure].mean() > right(small)[unsure].mean() + 0.1 and unsure.mean() < 0.7
    assert (right(pair)[~unsure] == right(small)[~unsure]).all()
