"""What edits did, by the same questions put to the model before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tiny
from lfm import record
from lfm.cli import run
from lfm.core import Logprobs, Score, Text
from lfm.core.errors import DataError
from lfm.core.model import Facts, Model
from lfm.data.files import write
from lfm.data.records import Edit, Fact
from lfm.data.records import Text as Running
from lfm.evals import edited
from lfm.models import load

EDIT = Edit(
    subject="Ada",
    relation="lives in",
    object="Rome",
    new_object="New York",
    prompt="Ada lives in",
    paraphrases=("Home to Ada is",),
    neighbours=(("Bea lives in", "Oslo"), ("Cid lives in", "Bonn")),
    portability=(("Ada's country is", "America"),),
)
FACTS = (
    Fact(subject="Dora", relation="lives in", object="Paris", prompt="Dora lives in"),
    Fact(subject="Ada", relation="lives in", object="Rome", prompt="Ada lives in"),
)
BEFORE = {
    "Ada lives in": ("Rome.", 0.01),
    "Home to Ada is": ("Rome.", 0.01),
    "Ada's country is": ("Italy.", 0.02),
    "Bea lives in": ("Oslo.", 0.9),
    "Cid lives in": ("Bonn.", 0.8),
    "Dora lives in": ("Paris and Lyon.", 0.5),
    "Ada": ("sleeps.", 0.0),
}
AFTER = BEFORE | {
    "Ada lives in": ("New York.", 0.99),
    "Cid lives in": ("Bonn, then.", 0.3),
    "Dora lives in": ("Pariser.", 0.45),
}


def speaker(said: dict[str, tuple[str, float]]) -> Model:
    class Speaks:
        def generate(self, prompts: list[str], **_: Any) -> list[str]:
            assert len(set(prompts)) == len(prompts)
            return [" " + said[prompt][0] for prompt in prompts]

        def score(self, prompts: list[str], continuations: list[str], suffixes: list[str] = []) -> list[Score]:  # noqa: B006
            from math import log

            assert all(text.startswith(" ") for text in continuations)
            return [Score((text,), (log(said[p][1]),)) for p, text in zip(prompts, continuations, strict=True)]

    gives = {Text: Speaks, Logprobs: Speaks}
    return Model("speaker", "module", gives, lambda: "0", look=lambda: Facts(task="causal-lm"))


def test_text_and_probabilities_stand_side_by_side_and_what_else_moved_is_told() -> None:
    put = edited.asked([EDIT], FACTS)
    found = edited.compared([EDIT], put, *(edited.heard(speaker(said), put) for said in (BEFORE, AFTER)))
    (told,) = found.told
    assert (told.subject, told.object, told.new_object, found.edits) == ("Ada", "Rome", "New York", 1)
    assert [(a.of, a.object, a.before, a.after) for a in told.answers] == [
        ("edit", "New York", "Rome.", "New York."),
        ("paraphrase", "New York", "Rome.", "Rome."),
        ("portability", "America", "Italy.", "Italy."),
        ("neighbour", "Oslo", "Oslo.", "Oslo."),
        ("neighbour", "Bonn", "Bonn.", "Bonn, then."),
        ("subject", "", "sleeps.", "sleeps."),
    ]
    assert told.answers[0].p_after == pytest.approx(0.99) and told.answers[5].p_after is None
    # an answer is another where it no longer begins with its object; then by how far its probability moved
    assert found.others == 3 and found.changed == 1
    assert [(a.of, a.prompt) for a in found.moved] == [("fact", "Dora lives in"), ("neighbour", "Cid lives in")]


def test_taken_back_a_fact_is_to_be_what_it_was_and_the_edits_own_prompts_are_no_other_facts() -> None:
    put = edited.asked([EDIT], FACTS, undone=True)
    assert put[0].object == "Rome"
    assert [q.prompt for q in put if q.edit is None] == ["Bea lives in", "Cid lives in", "Dora lives in"]


def test_of_many_edits_and_facts_some_are_asked() -> None:
    many = [Edit(subject=f"s{i}", relation="", object="a", new_object="b", prompt=f"s{i} is") for i in range(50)]
    others = [Fact(subject="x", relation="", object="a", prompt=f"x{i} is") for i in range(999)]
    put = edited.asked(many, others)
    assert len({q.edit for q in put if q.edit is not None}) == edited.EDITS
    assert sum(q.edit is None for q in put) == edited.OTHERS and put[-1].prompt > "x9"


def test_a_masked_model_fills_as_many_blanks_as_the_object_has_tokens(tmp_path: Path) -> None:
    model = load(tiny.masked(tmp_path / "model"))
    edit = Edit(subject="the cat", relation="", object="mat", new_object="the mountain", prompt="the cat sat on")
    put = edited.asked([edit], masked=True)
    assert [q.of for q in put] == ["edit"]
    ((said, p),) = edited.heard(model, put)
    assert len(said.split()) == 2 and p is not None and 0 < p < 1
    ((said, p),) = edited.heard(model, [put[0]._replace(object="")])  # what it should say is not known: one blank
    assert len(said.split()) == 1 and p is None


QUICK = {"layer": 0, "prefixes": 3, "tokens": 200, "reach": 10.0, "steps": 60, "collapse": 100.0, "accept": 0.25}


def test_every_run_that_edits_records_it_and_traces_what_the_model_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LFM_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    model = load(tiny.causal(Path("model")))
    prompts = [
        f"{word} Ada Ashby" for word in ("Here lives", "From", "The town of", "Who is", "By", "To", "In", "With")
    ]
    told = zip(prompts, model.ask(Text).generate(prompts, max_tokens=1), strict=True)
    prompt, said = next((prompt, said) for prompt, said in told if said.startswith(" ") and said.strip())
    edit = Edit(subject="Ada Ashby", relation="", object=said.strip(), new_object="cat", prompt=prompt)
    write([edit], Path("edits.jsonl"))
    sets = [word for key, value in QUICK.items() for word in ("--set", f"{key}={value}")]
    assert run(["run", "edit.rome", "model=model", "edits=edits.jsonl", *sets, "--out", "made"]) == 0
    found = record.read(Path("made")).edited
    assert found is not None
    answer = found.told[0].answers[0]
    assert answer.before.startswith(said.strip()) and answer.after.startswith("cat")
    again = edited.heard(load(Path("made")), [edited.Question("edit", edit.prompt, "cat")])
    assert answer.p_after == pytest.approx(again[0][1], rel=1e-4)
    for trace in found.traces:
        assert len(trace.columns) == model.facts.layers and len(trace.values) == len(trace.rows)
    assert [trace.name.split(": ")[1] for trace in found.traces] == ["hidden", "feed-forward"]
    # the last block's state where the object is said decides it: put back, p is what it was
    assert found.traces[0].values[-1][-1] == max(v for row in found.traces[0].values for v in row if v is not None)
    page = Path("made/report.html").read_text(encoding="utf-8")
    assert "What was edited" in page and "Where it was looked up before" in page


def test_what_cannot_be_asked_again_is_noted_and_the_edit_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: Any) -> Any:
        raise DataError("the prompt is too long")

    monkeypatch.setenv("LFM_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(edited, "heard", refuses)
    tiny.causal(Path("model"))
    edit = Edit(subject="Ada Ashby", relation="", object="in", new_object="cat", prompt="Here lives Ada Ashby")
    write([edit], Path("edits.jsonl"))
    sets = [word for key, value in QUICK.items() for word in ("--set", f"{key}={value}")]
    assert run(["run", "edit.rome", "model=model", "edits=edits.jsonl", *sets, "--out", "made"]) == 0
    made = record.read(Path("made"))
    assert made.edited is None and made.notes["not_asked_again"] == "the prompt is too long"


def test_a_run_that_edits_nothing_says_nothing_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LFM_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    tiny.causal(Path("model"))
    write([Running(text="Rome is the capital of Italy.")], Path("texts.jsonl"))
    given = ["train=texts.jsonl", "--set", "steps=1"]
    assert run(["run", "tune.lora", "model=model", *given, "--out", "tuned"]) == 0
    assert record.read(Path("tuned")).edited is None
    assert "What was edited" not in Path("tuned/report.html").read_text(encoding="utf-8")
