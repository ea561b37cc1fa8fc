"""prompt.adversarial: words that a model gives way to are found among its tokens, and said to be what they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from case import Case
from lfm import runs
from lfm.core import Codec, Embeddings, Inputs, Logprobs, Model, Top
from lfm.core.errors import AccessError, ConfigError
from lfm.core.finding import Finding
from lfm.core.interfaces import Score
from lfm.core.model import Facts
from lfm.data import files
from lfm.data.records import Label, Text
from lfm.methods.prompt import adversarial
from lfm.models import load
from lfm.prompting.tokens import Tokens, near
from lfm.runs.run import LocalRun

TRAIN = [Label(text=f"The {n} sat.", label=("good", "bad")[i % 2]) for i, n in enumerate(("cat", "dog", "mat", "town"))]
SMALL: dict[str, Any] = {"calls": 40, "first": 20, "tokens": 2}


def case(here: Path) -> Case:
    tiny.causal(here / "model")
    files.write(TRAIN, here / "train.jsonl")
    return Case(models={"model": ("model",)}, data={"train": "train.jsonl"}, settings=SMALL)


@pytest.fixture(scope="module")
def cat(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(tiny.causal(tmp_path_factory.mktemp("cat") / "cat"))


class Yields:
    """Says whatever is asked of it the surer, the more letters "a" stand before."""

    def score(self, prompts: Sequence[str], continuations: Sequence[str], suffixes: Sequence[str] = ()) -> list[Score]:
        return [Score((c,), (-8.0 + p.count("a"),)) for p, c in zip(prompts, continuations, strict=True)]


def attacked(model: Model, here: Path, train: Any = TRAIN, dev: Any = (), **settings: Any) -> Finding:
    here.mkdir(exist_ok=True, parents=True)
    config = adversarial.Config(**{**SMALL, **settings})
    surrogate = settings.pop("surrogate", None)
    inputs = Inputs(
        {"model": (model,)} | ({"surrogate": (surrogate,)} if surrogate else {}), {"train": train, "dev": dev}
    )
    adversarial.agree(config, inputs)
    return adversarial.run(config, inputs, LocalRun(0, here))


def yielding(cat: Model) -> Model:
    given = {Logprobs: Yields, Embeddings: lambda: cat.ask(Embeddings), Codec: lambda: cat.ask(Codec)}
    return Model("a script", "api", given, lambda: "", look=lambda: Facts(task="causal-lm"))


@pytest.mark.parametrize("search", ["turbo", "square"])
def test_what_the_model_yields_to_is_found(cat: Model, search: str, tmp_path: Path) -> None:
    """The score is a count of letters: the table's are those counts, and the search ends above chance."""
    found = attacked(
        yielding(cat), tmp_path, [Text(text="It is")], aim="say", target="world", search=search, calls=300, first=50
    )
    for row in found.rows:
        assert row["score"] == pytest.approx(-8.0 + row["prefix"].count("a"), abs=1e-6)
    assert found.metrics["score without"] == -8.0
    assert found.metrics["score"] >= found.metrics["best by chance"] > -8.0
    assert list(found.curves[0].y) == sorted(found.curves[0].y)
    assert not any(near(word, "world") for row in found.rows for word in row["prefix"].split())


def test_a_flip_is_the_margin_of_the_wrong_class(cat: Model, tmp_path: Path) -> None:
    """Against the model's own scores of the two words after prefix and text; dev is told beside train."""
    found = attacked(cat, tmp_path, dev=TRAIN[:2])
    row = found.rows[1]

    def margin(record: Label) -> float:
        wrong = "bad" if record.label == "good" else "good"
        prompts = [f"{row['prefix']} {record.text}"] * 2
        own, other = cat.ask(Logprobs).score(prompts, [f" {record.label}", f" {wrong}"])
        return other.total - own.total

    margins = [margin(record) for record in TRAIN]
    assert row["score"] == pytest.approx(np.mean(margins), abs=1e-4)
    assert row["told wrong"] == np.mean([m > 0 for m in margins])
    assert row["score on dev"] == pytest.approx(np.mean(margins[:2]), abs=1e-4)
    assert row["score"] >= found.metrics["score without"] or found.metrics["score without"] > row["score"]
    assert found.rows[1]["score"] == max(one["score"] for one in found.rows[1:])


class Elsewhere:
    """Tells one token, which is no class's word."""

    def top(self, prompts: Sequence[str], k: int, suffixes: Sequence[str] = ()) -> list[Any]:
        return [((" zebra", np.log(0.9)),)[:k] for _ in prompts]


def test_texts_of_which_no_class_is_told_are_counted(cat: Model, tmp_path: Path) -> None:
    given = {Top: Elsewhere, Embeddings: lambda: cat.ask(Embeddings), Codec: lambda: cat.ask(Codec)}
    silent = Model("a script", "api", given, lambda: "", look=lambda: Facts(task="causal-lm"))
    assert f"of {len(TRAIN)} texts of {len(TRAIN)} the class is not decided" in attacked(silent, tmp_path / "one").title
    assert "not decided" not in attacked(cat, tmp_path / "other").title


def test_points_become_their_nearest_tokens() -> None:
    vectors = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    tokens = Tokens(("a", "b", "c"), vectors, mean=0.5, std=2.0, apart=1.0)
    points = np.array([[-0.2, -0.2, 0.3, -0.3], [-0.3, 0.3, -5.0, -5.0]])  # ×2 + 0.5: (.1, .1), (1.1, −.1), (−.1, 1.1)
    assert tokens.nearest(points) == ["a b", "c a"]


def test_what_cannot_be_attacked_is_said(cat: Model, tmp_path: Path) -> None:
    mute = Model("api:some", "api", {Logprobs: Yields}, lambda: "", look=lambda: Facts(task="causal-lm"))
    with pytest.raises(AccessError, match=r"no table.*surrogate=REF"):
        attacked(mute, tmp_path)
    with pytest.raises(ConfigError, match=r"needs classes.*aim=say"):
        attacked(cat, tmp_path, [Text(text="It is")])
    with pytest.raises(ConfigError, match="needs a target"):
        attacked(cat, tmp_path, aim="say")


@pytest.mark.slow
def test_searches_beat_chance_on_a_model_of_the_zoo(tmp_path: Path) -> None:
    """Another city than those of four facts, said by zoo:lm after four tokens: 600 prefixes each, over three seeds."""
    model = runs.model("zoo:lm")
    texts = [Text(text=fact.prompt) for fact in list(runs.records("zoo:facts"))[:4]]  # type: ignore[attr-defined]
    config = {"aim": "say", "target": "Paris", "calls": 600, "first": 150, "tokens": 4}
    ends: dict[str, list[float]] = {"turbo": [], "square": [], "random": []}
    for seed in range(3):
        for search, found in ends.items():
            here = tmp_path / f"{search}{seed}"
            here.mkdir()
            inputs = Inputs({"model": (model,)}, {"train": texts})
            told = adversarial.run(adversarial.Config(**config, search=search), inputs, LocalRun(seed, here))  # type: ignore[arg-type]
            found.append(told.metrics["score"])
            print(seed, search, told.metrics)
    assert min(np.mean(ends["turbo"]), np.mean(ends["square"])) > np.mean(ends["random"])


def test_a_model_that_does_not_give_way_is_said_not_to(cat: Model, tmp_path: Path) -> None:
    """Any letter "a" ahead makes the answer less likely: the title claims nothing."""

    class Stubborn:
        def score(self, prompts: Sequence[str], continuations: Sequence[str], suffixes: object = ()) -> list[Score]:
            return [Score((c,), (-float(len(p)),)) for p, c in zip(prompts, continuations, strict=True)]

    given = {Logprobs: Stubborn, Embeddings: lambda: cat.ask(Embeddings), Codec: lambda: cat.ask(Codec)}
    stubborn = Model("stubborn", "api", given, lambda: "", look=lambda: Facts(task="causal-lm"))  # type: ignore[arg-type]
    found = attacked(stubborn, tmp_path, aim="say", target="Paris")
    assert found.title.startswith("No prefix was found by which the model says 'Paris' more")
    assert found.metrics["score"] < found.metrics["score without"]


def test_a_file_of_one_class_after_the_other_is_attacked_on_both(cat: Model, tmp_path: Path) -> None:
    records = sorted(TRAIN * 4, key=lambda record: record.label)
    found = attacked(yielding(cat), tmp_path, records, examples=4, calls=10)
    assert found.rows[0]["told wrong"] in (0.0, 0.5, 1.0)
