"""distill.samples: a student of a teacher's own words, and of what the teacher makes of each."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from case import Case
from lfm import runs
from lfm.core import Codec, Gradients, Inputs, Logits, Model, Sizes, Text
from lfm.core.config import configure
from lfm.core.errors import AccessError, ConfigError, DataError, MismatchError, ModelError
from lfm.core.interfaces import Top
from lfm.core.method import RECORDS
from lfm.data import records as data
from lfm.data.files import read
from lfm.data.task import task_for
from lfm.methods.distill import samples
from lfm.models import forward, load
from lfm.runs.run import LocalRun
from lfm.train import fit
from teaching import means

SMALL: dict[str, Any] = {"steps": 3, "batch_size": 4, "samples": 8, "max_tokens": 6}


def case(here: Path) -> Case:
    tiny.causal(here / "big", num_hidden_layers=3)
    tiny.causal(here / "small", seed=1)
    settings = SMALL | {"checkpoint_every": 0.0, "first": 4, "greedy": 1}
    return Case({"teacher": ("big",), "student": ("small",)}, {}, settings)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model]:
    here = tmp_path_factory.mktemp("models")
    return load(tiny.causal(here / "big", num_hidden_layers=3)), load(tiny.causal(here / "small", seed=1))


def taught(
    teacher: Model, student: Model, work: Path, seed: int = 0, **settings: Any
) -> tuple[Model, LocalRun, list[str]]:
    inputs = Inputs({"teacher": (teacher,), "student": (student,)}, {})
    config = samples.Config(**(SMALL | settings))
    samples.agree(config, inputs)
    work.mkdir(exist_ok=True)
    run = LocalRun(seed, work)
    made = samples.run(config, inputs, run)
    assert isinstance(made, Model)
    return made, run, [r.text for r in read(work / "scratch" / RECORDS)]  # type: ignore[attr-defined]


class Script:
    """Says the next of these each time; tells that A, B and C are the likeliest first tokens."""

    def __init__(self, said: Sequence[str]) -> None:
        self.said, self.prompts, self.temperatures = said, list[str](), set[float]()

    def generate(self, prompts: Sequence[str], *, temperature: float = 0.0, **_: Any) -> list[str]:
        if temperature == 0:
            return [" greedy" for _ in prompts]
        self.temperatures.add(temperature)
        first = len(self.prompts)
        self.prompts += prompts
        return [self.said[(first + i) % len(self.said)] for i in range(len(prompts))]

    def top(self, prompts: Sequence[str], k: int, *_: Any) -> list[Any]:
        return [[(token, -1.0) for token in "ABCDE"[:k]] for _ in prompts]

    def model(self, *kinds: type) -> Model:
        return Model("a script", "api", {kind: lambda: self for kind in kinds}, lambda: "")


def test_the_first_loss_is_the_divergence_over_the_samples(pair: tuple[Model, Model], tmp_path: Path) -> None:
    """KL(teacher ‖ student) at every place of all samples in one batch, written out from both models' logits."""
    teacher, student = pair
    _, run, texts = taught(teacher, student, tmp_path, steps=1, batch_size=8, precision="fp32")
    records = [data.Text(text=text) for text in texts]
    task = task_for(records, student.ask(Codec), student.facts)
    batch = task.collate(records)
    p, q = (task.scored(m.ask(Logits).logits(batch), batch)[0].double().log_softmax(-1) for m in pair)
    assert run.notes["loss_before"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)


def test_a_cut_that_the_config_cannot_say_is_refused_before_anything_is_asked(
    pair: tuple[Model, Model], tmp_path: Path
) -> None:
    script = Script(["never said"])
    with pytest.raises(ModelError, match="cannot say what would be left"):
        taught(script.model(Text), load(tiny.conv1d(tmp_path / "gpt2")), tmp_path / "a", heads=0.5, alpha=0.0)
    assert not script.prompts


def test_samples_are_the_teachers_distribution(pair: tuple[Model, Model]) -> None:
    """First words of 400 samples of one token against the teacher's own probabilities, by total variation.

    The expected distance of n draws is at most ½ √(K / n) over K outcomes (Jensen); a distribution other than the
    teacher's (greedy, or at twice the temperature) is further off.
    """
    teacher, _ = pair
    batch = teacher.ask(Codec).texts([""])
    p = teacher.ask(Logits).logits(batch)[0, -1].softmax(-1).numpy()
    tokenizer = teacher.ask(Codec).tokenizer
    n = 400
    drawn = teacher.ask(Text).generate([""] * n, max_tokens=1, temperature=1.0, seed=3)
    spelled: dict[str, float] = defaultdict(float)
    for token, mass in enumerate(p):
        spelled[tokenizer.decode([token], skip_special_tokens=True)] += float(mass)
    said = Counter(drawn)
    apart = sum(abs(said[text] / n - mass) for text, mass in spelled.items()) / 2
    assert apart < 1.2 * 0.5 * np.sqrt(len(spelled) / n)


def test_openings_are_spread_and_copies_left_out(pair: tuple[Model, Model], tmp_path: Path) -> None:
    """Each of the likeliest first tokens begins as many; then the greedy token, then the draw; no two near copies."""
    script = Script([f" say {word} and be quiet" for word in ("one", "two", "three", "four", "five", "six", "seven")])
    teacher = script.model(Text, Top)
    _, _, texts = taught(teacher, pair[1], tmp_path / "a", alpha=0.0, first=3, greedy=1, samples=6)
    assert [text[0] for text in texts] == ["A", "B", "C"] * 2
    assert texts[0] == "A greedy say one and be quiet"
    # 6 of the 7 words of two of these are the same: ROUGE-L is 6/7 or 5/7, above .7
    _, run, texts = taught(script.model(Text, Top), pair[1], tmp_path / "b", alpha=0.0, samples=6, alike=0.7)
    assert len(texts) == 1 and run.notes["samples"] == 1
    assert len(script.prompts) == 6 + samples.ROUNDS * 6 and script.temperatures == {1.0}


def test_what_is_left_out_is_drawn_again_and_no_more_is_kept_or_asked_than_wanted(
    pair: tuple[Model, Model], tmp_path: Path
) -> None:
    words = ["one", "", "one", "two", "three", "four", "five"]
    script = Script(words)
    _, _, texts = taught(script.model(Text), pair[1], tmp_path / "a", alpha=0.0, samples=3, sampling=1.5)
    assert texts == ["one", "two", "three"] and len(script.prompts) == 6 and script.temperatures == {1.5}
    script = Script(["the same"])
    taught(script.model(Text), pair[1], tmp_path / "b", alpha=0.0, samples=70)
    assert len(script.prompts) == samples.ROUNDS * 70


def test_what_a_teacher_does_not_tell_is_said_before_anything_is_asked(
    pair: tuple[Model, Model], tmp_path: Path
) -> None:
    script = Script(["on and on and on and on and on"])
    text_alone = script.model(Text)
    with pytest.raises(AccessError, match="does not give logits") as caught:
        taught(text_alone, pair[1], tmp_path / "a")
    assert "alpha=0" in str(caught.value)
    with pytest.raises(AccessError, match="tells no next tokens"):
        taught(text_alone, pair[1], tmp_path / "a", alpha=0.0, first=2)
    with pytest.raises(ConfigError, match="openings"):
        configure(samples.Config, {"openings": []})
    tokenizer = tiny.byte_bpe()
    tokenizer.add_tokens(["<new>"])
    longer = tiny.causal(tmp_path / "words", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(longer)
    with pytest.raises(MismatchError, match="different vocabularies") as other:
        taught(load(longer), pair[1], tmp_path / "a")
    assert "alpha=0" in other.value.fix
    with pytest.raises(MismatchError, match="running text"):
        taught(pair[0], load(tiny.masked(tmp_path / "masked")), tmp_path / "a")
    assert not script.prompts
    with pytest.raises(DataError, match="nothing to learn from"):
        taught(text_alone, pair[1], tmp_path / "b", alpha=0.0, repeats=0.2)


def test_a_sample_is_judged_by_what_is_said_after_its_opening(pair: tuple[Model, Model], tmp_path: Path) -> None:
    again = "so it is, so it is, so it is, so it is:"
    script = Script(["", " a new thing"])
    _, _, texts = taught(script.model(Text), pair[1], tmp_path, alpha=0.0, openings=(again,), samples=1)
    assert texts == [f"{again} a new thing"]


@pytest.mark.parametrize("more", [{}, {"greedy": 2}, {"greedy": 2, "first": 3}, {"openings": ("the cats", "a")}])
def test_a_plan_counts_no_fewer_questions_than_are_asked(
    more: dict[str, Any], pair: tuple[Model, Model], tmp_path: Path
) -> None:
    """Nothing is left out of these samples but copies, so that both rounds are drawn."""
    asked = Counter[str]()
    teacher, student = pair

    class Counting(Script):
        def generate(self, prompts: Sequence[str], **how: Any) -> list[str]:
            asked["queries"] += len(prompts)
            tokenizer = teacher.ask(Codec).tokenizer
            asked["tokens"] += sum(len(tokenizer(one)["input_ids"]) + how["max_tokens"] for one in prompts)
            return super().generate(prompts, **how) if how.get("temperature") else [" a"] * len(prompts)

        def top(self, prompts: Sequence[str], k: int, *_: Any) -> list[Any]:
            asked["queries"] += len(prompts)
            return super().top(prompts, k)

    script = Counting(["the same"])
    settings = SMALL | {"alpha": 0.0, "samples": 70} | more
    taught(script.model(Text, Top), student, tmp_path, **settings)
    sizes = Sizes({"teacher": (teacher.facts,), "student": (student.facts,)}, {}, {})
    told = samples.cost(configure(samples.Config, settings), sizes)
    assert told.queries == asked["queries"]
    assert asked["tokens"] <= told.tokens <= 3 * asked["tokens"]


def supervised(student: Model, records: Sequence[Any], config: Any, work: Path, seed: int) -> Model:
    """The student alone: next tokens of these records, from new weights, in as many steps."""
    task = task_for(records, student.ask(Codec), student.facts)
    module = samples.formed(student.ask(Gradients).module(), config, LocalRun(seed, work))
    fit(module, records, task.collate, lambda m, b: task.loss(forward(m, b), b), config, LocalRun(seed, work))
    return student.ask(Gradients).rewrap(module)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_student_of_samples_knows_of_more_than_one_of_a_few_stories(tmp_path: Path) -> None:
    """zoo:lm into one block with new weights, 80 steps, 3 seeds; loss on facts, which no story states in such words.
    Texts that a thousand first tokens begin, as in LLM-QAT, are worth more than those that the teacher begins.

    On stories themselves the one that read stories is ahead, by as much: docs/distilling.md has both.
    """
    teacher = runs.model("zoo:lm")
    facts, real = list(runs.records("zoo:facts"))[:200], list(runs.records("zoo:stories"))[:128]
    settings: dict[str, Any] = {"samples": 128, "max_tokens": 64, "steps": 80, "batch_size": 8, "lr": 3e-3}
    settings |= {"layers": 1, "start": "random", "precision": "fp32"}

    def loss(model: Model) -> float:
        task = task_for(facts, model.ask(Codec), model.facts)
        batch = task.collate(facts)
        return task.loss(model.ask(Logits).logits(batch), batch).item()

    found: dict[str, list[float]] = {"samples": [], "spread": [], "stories": []}
    for seed in range(3):
        found["samples"].append(loss(taught(teacher, teacher, tmp_path / f"{seed}", seed, **settings)[0]))
        spread = settings | {"first": 1000, "greedy": 2}
        found["spread"].append(loss(taught(teacher, teacher, tmp_path / f"s{seed}", seed, **spread)[0]))
        config = samples.Config(**settings)
        found["stories"].append(loss(supervised(teacher, real, config, tmp_path / f"a{seed}", seed)))
    mean = means(found)
    assert mean["samples"] < mean["stories"] - 0.3 and mean["spread"] < mean["samples"] - 0.2, found
