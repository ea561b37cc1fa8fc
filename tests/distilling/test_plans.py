"""What a plan says a teacher behind HTTP will be asked is what the run then counts, or about that."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest

import tiny
from lfm import recipe as recipes
from lfm import runs
from lfm.data import files, places
from lfm.data import records as data
from lfm.distilling import asking
from lfm.distilling.answers import finer
from lfm.models import load
from lfm.recipe.plan import plan as recipe_plans
from lfm.runs import planning

TEXTS = tuple(data.Text(text=line) for line in tiny.CORPUS[:6])


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    monkeypatch.setenv("LFM_HOME", str(tmp_path / "home"))
    for place in ("big", "small"):
        tiny.causal(tmp_path / place)
    return {"teacher": [f"serve:{tmp_path / 'big'}"], "student": [tmp_path / "small"]}


def test_queries_and_tokens_of_texts_are_near_those_of_the_run(models: dict[str, list[Any]], tmp_path: Path) -> None:
    """The teacher of random weights says anything, ends nothing and lists no prompt: the most is nearly reached."""
    how: dict[str, Any] = {"max_tokens": 4, "repeats": 1.0, "steps": 1, "batch_size": 2}
    order = runs.Order("distill.text", models, {"prompts": TEXTS}, how, out=tmp_path / "out")
    planned = planning.plan(runs.prepare(order))
    done = runs.execute(order)
    assert done.queries is not None and done.tokens is not None
    assert 0.75 < planned.queries / done.queries < 1.4
    assert 0.8 < planned.tokens / done.tokens < 1.5, (planned.tokens, done.tokens)


ASKING = {
    "texts, one of them twice, one longer than the context": [*TEXTS, TEXTS[0], data.Text(text=" ".join(tiny.CORPUS))],
    "answers": [data.Completion(prompt=t.text, completion=" and so on") for t in TEXTS[:3]],
}


@pytest.mark.parametrize("records", ASKING.values(), ids=ASKING)
def test_a_question_for_each_token_that_is_scored_is_planned_to_the_last(
    records: Any, models: dict[str, list[Any]], tmp_path: Path
) -> None:
    """Where a text is cut within a word, the server reads other tokens there than the student: a few at most."""
    settings = {"temperature": 1.0, "steps": 1, "batch_size": 2}
    order = runs.Order("distill.response", models, {"train": records}, settings, out=tmp_path / "out")
    planned = planning.plan(runs.prepare(order))
    done = runs.execute(order)
    assert planned.queries == done.queries
    assert planned.tokens == pytest.approx(done.tokens, rel=0.005)


def test_of_many_records_a_sample_is_counted(
    models: dict[str, list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, records = load(models["student"][0]), [data.Text(text=f"{n} {tiny.CORPUS[n % 6]}") for n in range(60)]
    whole = places.questions(records, reader)
    monkeypatch.setattr(places, "SAMPLE", 12)
    assert places.questions(records, reader) == pytest.approx(whole, rel=0.1)


def test_a_recipe_plans_what_a_teacher_behind_http_is_asked(models: dict[str, list[Any]], tmp_path: Path) -> None:
    files.write(TEXTS, tmp_path / "texts.jsonl")
    text = f"""
        name: taught
        steps:
          - {{id: tuned, method: tune.full, models: {{model: {tmp_path}/big}}, data: {{train: texts.jsonl}}}}
          - {{id: far, method: distill.response, models: {{teacher: "serve:${{tuned}}", student: {tmp_path}/small}},
             data: {{train: texts.jsonl}}}}
          - {{id: near, method: distill.response, models: {{teacher: "${{tuned}}", student: {tmp_path}/small}},
             data: {{train: texts.jsonl}}}}
    """
    recipe = recipes.parse(textwrap.dedent(text), str(tmp_path / "r.yaml"))
    plans = recipe_plans(recipe, recipes.expand(recipe), tmp_path / "out")
    asked = places.questions(TEXTS, load(models["student"][0]))
    assert {name: (p.queries, p.tokens) for name, p in plans.items()} == {
        "tuned": (0, 0),
        "far": asked,
        "near": (0, 0),
    }


@pytest.mark.parametrize("shown", [2, 6])
def test_a_request_for_new_prompts_is_as_long_as_is_reckoned(shown: int) -> None:
    """Its own words and numbers too: of short prompts they are a third of it."""
    tokenizer = tiny.byte_bpe()
    prompts = [text.text for text in TEXTS[:shown]]
    length = sum(len(tokenizer(prompt)["input_ids"]) for prompt in prompts) / shown
    told = len(tokenizer(asking.request(prompts))["input_ids"])
    assert 0.8 < asking.reading(shown, length, finer(len(tokenizer))) / told < 1.25
