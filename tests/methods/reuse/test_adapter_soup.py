"""reuse.adapter_soup: the adapters of those domains that a text is like, averaged exactly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from case import Case
from lfm import models
from lfm.core import Adaptation, Inputs, Model
from lfm.core.config import configure
from lfm.core.errors import DataError, MismatchError
from lfm.data.files import write
from lfm.data.records import Text
from lfm.methods.reuse import adapter_soup
from lfm.runs.run import LocalRun
from lfm.tensors.lowrank import delta
from methods.reuse.lora import adapter_over

WORDS = {"cats": "the cat sat on the mat", "sums": "Q: two plus two? A: four", "towns": "Rome is the capital of Italy"}


def domains(count: int = 12) -> list[Text]:
    return [Text(text=f"{words} {i}", group=name) for i in range(count) for name, words in WORDS.items()]


def case(here: Path) -> Case:
    base = tiny.causal(here / "base")
    adapter_over(base, here / "math", seed=1)
    adapter_over(base, here / "news", seed=2, r=2)
    write([record for record in domains() if record.group != "towns"], here / "domains.jsonl")
    write([Text(text=f"the dog sat on the mat {i}") for i in range(5)], here / "new.jsonl")
    tiny.encoder(here / "encoder")
    roles = {"models": ("math", "news"), "encoder": ("encoder",)}
    return Case(roles, {"domains": "domains.jsonl", "text": "new.jsonl"}, {"count": 1})


@pytest.fixture
def given(tmp_path: Path) -> list[Model]:
    base = tiny.causal(tmp_path / "base")
    return [models.load(adapter_over(base, tmp_path / name, seed=i, r=2 + i)) for i, name in enumerate(WORDS)]


def soup(given: Sequence[Model], new: Sequence[str], work: Path, **settings: Any) -> tuple[Model, dict[str, Any]]:
    config = configure(adapter_soup.Config, settings)
    records = [Text(text=text) for text in new]
    inputs = Inputs({"models": tuple(given)}, {"domains": domains(), "text": records})
    adapter_soup.agree(config, inputs)
    work.mkdir()
    run = LocalRun(0, work)
    return adapter_soup.run(config, inputs, run), dict(run.notes)


@pytest.mark.parametrize("choose", ["clusters", "similarity"])
@pytest.mark.parametrize("name", WORDS)
def test_a_domains_own_text_chooses_its_adapter(choose: str, name: str, given: list[Model], tmp_path: Path) -> None:
    new = [f"{WORDS[name]} {i}" for i in range(20, 28)]
    made, notes = soup(given, new, tmp_path / "work", choose=choose, count=1)
    assert notes["chosen"] == name
    assert max(WORDS, key=lambda other: notes[f"score of {other}"]) == name
    known = given[list(WORDS).index(name)].ask(Adaptation).changes()
    for module, change in made.ask(Adaptation).changes().items():
        torch.testing.assert_close(delta(change), delta(known[module]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("choose", ["clusters", "similarity"])
def test_a_mixture_takes_both_and_averages_their_changes(choose: str, given: list[Model], tmp_path: Path) -> None:
    new = [f"{WORDS[name]} {i}" for i in range(20, 26) for name in ("cats", "towns")]
    made, notes = soup(given, new, tmp_path / "work", choose=choose, count=2)
    assert notes["chosen"] == "cats, towns"
    if choose == "clusters":
        assert sum(notes[f"score of {name}"] for name in WORDS) == pytest.approx(1)
    cats, _, towns = (model.ask(Adaptation).changes() for model in given)
    for module, change in made.ask(Adaptation).changes().items():
        torch.testing.assert_close(
            delta(change), (delta(cats[module]) + delta(towns[module])) / 2, rtol=1e-5, atol=1e-6
        )
        assert change.a.shape[0] == 2 + 4
    cut, _ = soup(given, new, tmp_path / "cut", choose=choose, count=2, rank=3)
    assert {change.a.shape[0] for change in cut.ask(Adaptation).changes().values()} == {3}


@pytest.mark.parametrize("choose", ["clusters", "similarity"])
def test_no_more_than_are_like_the_text(choose: str, given: list[Model], tmp_path: Path) -> None:
    new = [f"{WORDS['sums']} {i}" for i in range(20, 28)]
    _, notes = soup(given, new, tmp_path / "work", choose=choose, count=3)
    assert notes["chosen"] == "sums"


def test_domains_and_adapters_are_as_many(given: list[Model], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 adapters, and texts of 3 domains"):
        soup(given[:2], ["the cat"], tmp_path / "work")
    other = adapter_over(tiny.causal(tmp_path / "other", seed=3), tmp_path / "o")
    with pytest.raises(MismatchError, match="adapt different models"):
        soup([*given[:2], models.load(other)], ["the cat"], tmp_path / "work")
