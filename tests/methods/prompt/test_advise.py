"""prompt.advise: the cheapest first, never beyond the budget, nothing asked twice, and when it stops."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

import tiny
from case import Case
from lfm import runs
from lfm.core import Inputs, Logprobs, Model, Text, finding, registry
from lfm.core.errors import ConfigError, DataError, EndpointError, MismatchError
from lfm.core.interfaces import Classes, Score
from lfm.data import files
from lfm.data.records import Label
from lfm.methods.prompt import advise
from lfm.models import load
from lfm.models.api import Budget, Meter, open_api
from lfm.prompting.advice import Attempt, best, expected
from lfm.runs.run import LocalRun
from lfm.serve import running

SEEN = {"bright": "good", "warm": "good", "dull": "bad", "cold": "bad"}
RECORDS = [Label(text=f"day {n} was {word}", label=label) for n in range(6) for word, label in SEEN.items()]
MANUAL = ("prompt.manual",)


def case(here: Path) -> Case:
    tiny.causal(here / "model")
    files.write(RECORDS, here / "train.jsonl")
    return Case({"model": ("model",)}, {"train": "train.jsonl"}, {"queries": 200, "methods": ["prompt.manual"]})


class Knowing:
    """A model that knows what most words mean, and counts."""

    def __init__(self, stop_at: int = 0) -> None:
        self.asked: list[tuple[str, str]] = []
        self.stop_at = stop_at

    def score(self, prompts: Sequence[str], continuations: Sequence[str], suffixes: Sequence[str] = ()) -> list[Score]:
        if self.stop_at and len(self.asked) >= self.stop_at:
            raise KeyboardInterrupt
        self.asked += zip(prompts, continuations, strict=True)
        found = []
        for prompt, said in zip(prompts, continuations, strict=True):
            right = any(word in prompt and label == said.strip() for word, label in SEEN.items() if word != "cold")
            found.append(Score((said,), (-0.2 if right else -2.0 - len(said) / 10,)))
        return found

    def top(self, prompts: Sequence[str], k: int, suffixes: Sequence[str] = ()) -> list[Any]:
        return [[("good", -1.0), ("bad", -1.5)][:k] for _ in prompts]


def model(spoken: Any) -> Model:
    return Model("knowing", "module", {Logprobs: lambda: spoken}, lambda: "digest")


def advised(spoken: Any, here: Path, records: Sequence[Label] = RECORDS, **settings: Any) -> tuple[Model, LocalRun]:
    here.mkdir(exist_ok=True)
    config = advise.Config(**{"methods": MANUAL, **settings})
    inputs = Inputs({"model": (model(spoken),)}, {"train": records})
    advise.agree(config, inputs)
    run = LocalRun(0, here)
    return advise.run(config, inputs, run), run


@pytest.mark.parametrize("queries", [1, 20, 60, 400])
def test_no_more_is_asked_than_allowed_and_what_is_told_is_what_was_asked(queries: int, tmp_path: Path) -> None:
    spoken = Knowing()
    try:
        _, run = advised(spoken, tmp_path, queries=queries)
    except MismatchError as error:
        enough = int(error.fix.split()[1])
        assert queries < enough <= 60
        for allowed, fits in ((enough - 1, False), (enough, True)):  # what is told is just enough
            with nullcontext() if fits else pytest.raises(MismatchError):
                advised(Knowing(), tmp_path / str(allowed), queries=allowed)
    else:
        assert run.notes["asked"] == len(spoken.asked) == len(set(spoken.asked))
    assert len(spoken.asked) <= queries


def test_the_best_is_kept_with_its_interval_and_table(tmp_path: Path) -> None:
    made, run = advised(Knowing(), tmp_path, queries=400)
    found = finding.read(tmp_path / "scratch")
    assert str(run.notes["advice"]).startswith("Best for 400 queries: prompt.manual (examples 9), accuracy 0.")
    low, value, high = (float(run.notes[name]) for name in ("accuracy_low", "accuracy", "accuracy_high"))
    assert low < value < high
    assert found.rows[-1]["spent"] == run.notes["asked"] and found.curves[0].x[-1] == run.notes["asked"]
    told = made.ask(Classes)
    assert told.labels[told.tell([Label(text="day 9 was bright", label="")]).argmax()] == "good"


def test_a_killed_search_asks_nothing_again(tmp_path: Path) -> None:
    whole = Knowing()
    made, run = advised(whole, tmp_path / "whole", queries=400)
    killed = Knowing(stop_at=30)
    with pytest.raises(KeyboardInterrupt):
        advised(killed, tmp_path / "killed", queries=400)
    assert killed.asked
    going_on = Knowing()
    again, resumed = advised(going_on, tmp_path / "killed", queries=400)
    assert not set(killed.asked) & set(going_on.asked)
    assert sorted(killed.asked + going_on.asked) == sorted(whole.asked)
    assert again.digest == made.digest and resumed.notes["accuracy"] == run.notes["accuracy"]


def test_over_http_the_tokens_are_those_that_the_endpoint_was_charged(tmp_path: Path) -> None:
    """By the server's own count, which is far from the bytes that a client without its tokenizer has to reckon with."""
    with running(load(tiny.causal(tmp_path / "model"))) as url:
        meter = Meter(Budget())
        over = open_api(f"api:{url}", cache=tmp_path / "cache", meter=meter)
        (tmp_path / "run").mkdir()
        run = LocalRun(0, tmp_path / "run")
        before = meter.spent()
        advise.run(advise.Config(queries=400, methods=MANUAL), Inputs({"model": (over,)}, {"train": RECORDS}), run)
        after = meter.spent()
    assert run.notes["asked"] == after.queries - before.queries
    assert run.notes["asked_tokens"] == after.tokens - before.tokens > 0


def test_tokens_that_are_too_few_are_told_as_that(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"0 of 5 tokens are spent.*allow more tokens"):
        advised(Knowing(), tmp_path, queries=400, tokens=5)


class Mumbling:
    """It says the right word after each record, and counts."""

    def __init__(self) -> None:
        self.asked = 0

    def generate(self, prompts: Sequence[str], **_: Any) -> list[str]:
        self.asked += len(prompts)
        return [next((f" {label}" for word, label in SEEN.items() if word in prompt), " so") for prompt in prompts]


def test_votes_are_tried_at_a_size_that_leaves_room_for_others(tmp_path: Path) -> None:
    """Forty samples a record cost nothing to make and all of the budget to judge."""
    spoken = Mumbling()
    asked = Model("mumbling", "module", {Text: lambda: spoken}, lambda: "digest")
    config = advise.Config(queries=400, methods=("prompt.self_consistency", "prompt.manual"), patience=9)
    run = LocalRun(0, tmp_path)
    advise.run(config, Inputs({"model": (asked,)}, {"train": RECORDS}), run)
    rows = {row["method"]: row for row in reversed(finding.read(tmp_path / "scratch").rows)}
    assert not any(row.get("why not") for row in rows.values())
    assert rows["prompt.self_consistency"]["queries"] <= 400 // 16 + 2 * 12 and rows["prompt.manual"]["accuracy"] == 1.0


def test_it_does_not_end_before_each_method_was_tried(tmp_path: Path) -> None:
    """One that takes more than a fourth of the budget waits for the last round, though all that was tried last gained
    nothing."""
    settings: dict[str, Any] = {"methods": (*MANUAL, "prompt.demonstrations", "prompt.boosting"), "patience": 1}
    advised(Knowing(), tmp_path, queries=200, judged=12, **settings)
    rows = finding.read(tmp_path / "scratch").rows
    assert {row["method"] for row in rows} == set(settings["methods"])


def test_few_records_are_no_hindrance_to_asking_for_less(tmp_path: Path) -> None:
    _, run = advised(Knowing(), tmp_path, records=RECORDS[:8], queries=20)
    assert float(run.notes["asked"]) <= 20


def test_methods_too_large_for_what_is_left_are_told_with_what_they_take(tmp_path: Path) -> None:
    """What is told is enough: with so many queries it is tried."""
    both = ("prompt.manual", "prompt.demonstrations")
    _, run = advised(Knowing(), tmp_path / "few", queries=24, judged=4, methods=both)
    id, enough = str(run.notes["advice"]).partition("for want of queries: ")[2].split(" (")
    _, run = advised(Knowing(), tmp_path / "enough", queries=int(enough.split()[0]), judged=4, methods=(id,))
    assert run.notes["method"] == id and "want of queries" not in str(run.notes["advice"])


def test_methods_are_found_by_what_they_declare() -> None:
    inputs = Inputs({"model": (model(Knowing()),)}, {"train": RECORDS})
    ids = advise.candidates(advise.Config(), inputs)
    assert "prompt.manual" in ids and not {"prompt.advise", "prompt.soft", "prompt.bbt"} & set(ids)
    for id in ids:
        assert not registry.get(id).method.models["model"].missing([Logprobs])


def test_a_server_that_fails_is_no_methods_fault(tmp_path: Path) -> None:
    class Broken(Knowing):
        def score(self, *_: Any, **__: Any) -> list[Score]:
            raise EndpointError("it gave no answer")

    with pytest.raises(EndpointError):
        advised(Broken(), tmp_path)


def test_what_cannot_be_tried_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prompt\.bbt cannot be tried.*these can: .*prompt\.manual"):
        advised(Knowing(), tmp_path, methods=("prompt.bbt",))
    with pytest.raises(ConfigError, match="no method that is tried has width"):
        advised(Knowing(), tmp_path, settings={"width": 3})
    with pytest.raises(DataError, match="have the label"):
        advised(Knowing(), tmp_path, [r for r in RECORDS if r.label == "good"])


@pytest.mark.parametrize("said", ["dog", ["dog"]])
def test_words_for_labels_go_to_methods_of_one_word_and_of_several(said: Any, tmp_path: Path) -> None:
    spoken = load(tiny.causal(tmp_path / "model"))
    settings = {"words": {"good": said, "bad": "cat"}}
    data = {"train": RECORDS}
    fits = Inputs({"model": (spoken,)}, data)
    config = advise.Config(queries=2000, settings=settings, methods=("prompt.manual", "prompt.bbt"), judged=4)
    assert advise.METHOD.agree
    advise.METHOD.agree(config, fits)
    (tmp_path / "work").mkdir()
    advise.run(config, fits, LocalRun(0, tmp_path / "work"))
    table = finding.read(tmp_path / "work" / "scratch").rows
    assert {row["method"] for row in table} == {"prompt.manual", "prompt.bbt"}
    assert not any(row.get("why not") for row in table)


def test_a_setting_out_of_range_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    spoken = load(tiny.causal(tmp_path / "model"))
    assert advise.METHOD.agree
    with pytest.raises(ConfigError, match=r"prompt\.bbt.*'popsize'"):
        advise.METHOD.agree(advise.Config(settings={"popsize": 1}), Inputs({"model": (spoken,)}, {"train": RECORDS}))


def attempt(id: str, right: int, queries: int, spent: int) -> Attempt:
    return Attempt(id, {}, [1.0] * right + [0.0] * (10 - right), queries, spent, 0, "")


def test_of_equals_the_first_is_the_best_however_few_queries_a_later_one_added() -> None:
    done = [attempt("prompt.manual", 6, 35, 35), attempt("prompt.demonstrations", 6, 16, 51)]
    found = best(done)
    assert found is not None and found.id == "prompt.manual"


def test_the_gain_expected_is_the_last_gain_for_each_doubling() -> None:
    """From .5 at 100 queries to .7 at 400 are two doublings; 400 more are one: .1. With no gain, none is expected."""
    done = [attempt("a", 5, 100, 100), attempt("b", 6, 100, 200), attempt("c", 7, 200, 400)]
    assert expected(done, 400, patience=2) == pytest.approx(0.1)
    assert expected(done, 400, patience=3) == float("inf")
    assert expected([*done, attempt("d", 7, 400, 800), attempt("e", 2, 800, 1600)], 99, patience=2) == 0
    assert best(done) == done[2]


@pytest.mark.parametrize("queries", [300])
def test_a_run_of_it_resumes_and_verifies(queries: int, tmp_path: Path) -> None:
    here = case(tmp_path)
    order = runs.Order(
        id="prompt.advise",
        models={"model": [tmp_path / "model"]},
        data={"train": tmp_path / here.data["train"]},
        settings={**here.settings, "queries": queries},
        out=tmp_path / "out",
    )
    done = runs.execute(order)
    assert done.queries == done.notes["asked"] and done.queries <= queries and done.tokens > 0
    assert runs.verify(tmp_path / "out").max_abs == 0 and finding.read(tmp_path / "out").scatters
