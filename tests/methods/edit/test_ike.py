"""edit.ike: what goes before a prompt, that other prompts reach the model untouched, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs

import lfm
import tiny
from case import Case
from lfm import runs
from lfm.core import Facts, Features, Inputs, Logprobs, Model, Parts
from lfm.core import Text as Speaks
from lfm.core.errors import DataError, EditError, MismatchError, SlotError
from lfm.core.interfaces import Score
from lfm.core.method import Amount, Sizes, check
from lfm.data.alike import by_words
from lfm.data.files import write
from lfm.data.records import Edit
from lfm.editing import told as words
from lfm.methods.edit import ike
from lfm.models import load
from lfm.models.api import open_api
from lfm.retrieval import demonstrations
from lfm.retrieval.demonstrations import HEADING
from lfm.runs import verification
from lfm.runs.run import LocalRun
from lfm.serve import running

# What the tiny model says after these, told so: its embeddings are tied, and it goes on from "born in" with "word".
EDITS = (
    Edit(subject="Ada Ashby", relation="born", object="a", new_object="word", prompt="Ada Ashby was born in"),
    Edit(subject="the mountain", relation="born", object="a", new_object="word", prompt="the mountain was born in"),
)
OTHERS = (
    Edit(
        subject="Bob",
        relation="in",
        object="Rome",
        new_object="Vienna",
        prompt="Bob is in",
        paraphrases=("Bob lives in",),
        neighbours=(("Berlin is the capital of", "Germany"), ("Paris is in", "France")),
    ),
)


def base(path: Path) -> Path:
    return tiny.causal(path, tie_word_embeddings=True, max_position_embeddings=1024)


def case(here: Path) -> Case:
    base(here / "model")
    write(EDITS, here / "edits.jsonl")
    write(OTHERS, here / "others.jsonl")
    return Case({"model": ("model",)}, {"edits": "edits.jsonl", "demonstrations": "others.jsonl"}, {"k": 2})


KNOWN = {"Ada lives in": "Paris", "Ada works as a": "painter", "Bob lives in": "Rome", "The home of Ada is in": "Paris"}


class Reader:
    """A model that reads: it believes the last new fact where the prompt is about its subject and relation."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def generate(self, prompts: Sequence[str], **how: Any) -> list[str]:
        self.asked += prompts
        return [self._answer(prompt) for prompt in prompts]

    def _answer(self, asked: str) -> str:
        prompt = asked.rsplit("Prompt: ", 1)[-1]
        told = re.findall(r"New Fact: (\w+) lives in (\w+)", asked)
        if told and prompt in (f"{told[-1][0]} lives in", f"The home of {told[-1][0]} is in"):
            return f" {told[-1][1]}\n\nNew Fact: and so on"
        return f" {KNOWN.get(prompt, 'nothing')}. And on it goes."

    def score(self, prompts: Sequence[str], continuations: Sequence[str], suffixes: Sequence[str] = ()) -> list[Score]:
        said = self.generate(prompts)
        return [Score((c,), (0.0 if s.startswith(c) else -9.0,)) for s, c in zip(said, continuations, strict=True)]


def reader() -> tuple[Model, Reader]:
    made = Reader()
    gives: dict[type, Any] = {Speaks: lambda: made, Logprobs: lambda: made}
    return Model(ref="a reader", kind="checkpoint", gives=gives, identify=lambda: "reader"), made


MOVED = Edit(
    subject="Ada",
    relation="lives in",
    object="Paris",
    new_object="Oslo",
    prompt="Ada lives in",
    paraphrases=("The home of Ada is in",),
    neighbours=(("Ada works as a", "painter"), ("Bob lives in", "Rome")),
)


def told(model: Model, work: Path, edits: Sequence[Edit], others: Sequence[Edit] = (), **settings: Any) -> Any:
    models = {"model": (model,)} | ({"memory": (settings.pop("memory"),)} if "memory" in settings else {})
    given = Inputs(models, {"edits": list(edits), "demonstrations": list(others)})
    run = LocalRun(0, work)
    made = ike.run(ike.Config(**settings), check("edit.ike", ike.METHOD, given), run)
    return made, run


def test_a_model_that_reads_says_the_new_fact_and_keeps_the_others(tmp_path: Path) -> None:
    model, asked = reader()
    made, run = told(model, tmp_path, [MOVED], OTHERS)
    assert {k: run.notes[k] for k in ("efficacy", "paraphrase", "neighbours_kept", "edits")} == {
        "efficacy": 1.0,
        "paraphrase": 1.0,
        "neighbours_kept": 1.0,
        "edits": 1,
    }
    asked.asked.clear()
    prompts = ["Ada lives in", "The home of Ada is in", "Ada works as a", "Bob lives in"]
    said = made.ask(Speaks).generate(prompts)
    assert said == [" Oslo", " Oslo", " painter. And on it goes.", " Rome. And on it goes."]
    assert asked.asked[3] == "Bob lives in"  # it names no edited subject, and is asked as it is
    assert asked.asked[0].endswith(HEADING.format(fact="Ada lives in Oslo") + "Ada lives in")


def test_the_context_is_the_papers(tmp_path: Path) -> None:
    """Copy, update and retain, each of another fact, then the new fact and the prompt."""
    model, asked = reader()
    made, _ = told(model, tmp_path, [MOVED], OTHERS, k=8)
    asked.asked.clear()
    made.ask(Speaks).generate(["Ada lives in"])
    *examples, last = asked.asked[0].split("\n\n")
    heading = "New Fact: Bob is in Vienna\nPrompt: "
    assert sorted(examples) == sorted(
        heading + text
        for text in (
            "Bob is in Vienna",
            "Bob lives in Vienna",
            "Berlin is the capital of Germany",
            "Paris is in France",
        )
    )
    assert examples[-1] == heading + "Bob lives in Vienna"  # the most like what is asked stands nearest to it
    assert last == "New Fact: Ada lives in Oslo\nPrompt: Ada lives in"


@pytest.mark.parametrize(
    ("k", "counts"), [(0, (0, 0, 0)), (1, (0, 0, 1)), (8, (1, 3, 4)), (16, (2, 6, 8)), (32, (4, 12, 16))]
)
def test_kinds_are_as_one_to_three_to_four(k: int, counts: tuple[int, ...]) -> None:
    """Of 32 the authors' code has 4 copies, 12 updates and 16 retained."""
    assert tuple(demonstrations.shares(k).values()) == counts


def test_kinds_always_add_up() -> None:
    assert all(sum(demonstrations.shares(k).values()) == k for k in range(64))


def test_of_a_subjects_facts_the_one_most_like_the_prompt_is_told(tmp_path: Path) -> None:
    model, _ = reader()
    job = Edit(subject="Ada", relation="job", object="painter", new_object="pilot", prompt="Ada works as a")
    made, _ = told(model, tmp_path, [MOVED, job], OTHERS, k=0, on_failure="skip")
    assert made.ask(Speaks).generate(["Ada lives in"]) == [" Oslo"]
    contexts = demonstrations.Contexts(
        Parts({}, {}, {"facts": [["Ada", "Ada lives in Oslo"], ["Ada", "Ada works as a pilot"]], "examples": []}),
        0,
        everywhere=False,
    )
    assert contexts.before("Now Ada works as a").startswith("New Fact: Ada works as a pilot")
    assert contexts.before("The place ada lives in is").startswith("New Fact: Ada lives in Oslo")
    assert contexts.before("Bob works as a") == ""


def test_a_memory_grows_and_what_is_taken_out_leaves_what_had_been_told_without_it(tmp_path: Path) -> None:
    model, _ = reader()
    second = structs.replace(MOVED, subject="Bob", prompt="Bob lives in", object="Rome", paraphrases=(), neighbours=())
    one, _ = told(model, tmp_path / "one", [MOVED], OTHERS)
    both, run = told(model, tmp_path / "both", [second], memory=one)
    assert both.ask(Speaks).generate(["Ada lives in", "Bob lives in"]) == [" Oslo", " Oslo"]
    assert (run.notes["edits"], run.notes["examples"]) == (2, 5)  # four of Bob's other facts, and the second itself
    kept, alone = both.ask(words.Told), told(model, tmp_path / "alone", [second])[0]
    assert words.taken(kept, [1]) == alone.ask(words.Told) and words.taken(kept, [0]) == one.ask(words.Told)
    assert words.learn(words.taken(kept, []), alone.ask(words.Told)) == alone.ask(words.Told)
    with pytest.raises(DataError, match=r"'Ada lives in' cannot become 'Rome': the memory has 'Oslo'"):
        told(model, tmp_path / "rival", [structs.replace(MOVED, new_object="Rome")], memory=both)
    other = replace(model, identify=lambda: "another", _opened={})
    with pytest.raises(MismatchError, match="the memory is of another model"):
        told(other, tmp_path / "other", [second], memory=both)


def test_one_run_s_examples_go_with_the_last_of_its_edits(tmp_path: Path) -> None:
    model, _ = reader()
    second = structs.replace(MOVED, subject="Bob", prompt="Bob lives in", object="Rome", paraphrases=(), neighbours=())
    kept = told(model, tmp_path / "both", [MOVED, second], OTHERS)[0].ask(words.Told)
    assert words.taken(kept, [0]).examples == kept.examples and words.taken(kept, []).examples == ()


def test_a_model_that_gives_text_alone_is_enough_and_held_against_what_was_saved(tmp_path: Path) -> None:
    model, made = reader()
    silent = replace(model, gives={Speaks: lambda: made}, _opened={})
    program, _ = told(silent, tmp_path / "work", [MOVED], OTHERS)
    assert set(program.gives) == {Speaks, words.Told}
    assert verification.compare(program, program).max_abs == 0
    found = verification.compare(program, silent)
    assert (found.quantity, found.max_abs) == ("text", 0.0)  # the probes name nobody
    changed = replace(silent, gives={Speaks: lambda: Louder()}, _opened={})
    assert verification.compare(program, changed).max_abs == len(verification.PROBES)


class Louder:
    def generate(self, prompts: Sequence[str], **how: Any) -> list[str]:
        return ["!"] * len(prompts)


def test_told_everywhere_every_prompt_has_a_fact_before_it(tmp_path: Path) -> None:
    model, asked = reader()
    made, _ = told(model, tmp_path, [MOVED], OTHERS, k=0, scope="all")
    asked.asked.clear()
    assert made.ask(Speaks).generate(["Bob lives in"]) == [" Rome. And on it goes."]
    assert asked.asked == ["New Fact: Ada lives in Oslo\nPrompt: Bob lives in"]


def test_an_edit_is_never_its_own_example(tmp_path: Path) -> None:
    model, asked = reader()
    second = structs.replace(MOVED, subject="Cleo", prompt="Cleo lives in", paraphrases=("The home of Cleo is in",))
    made, _ = told(model, tmp_path, [MOVED, second], k=16)
    asked.asked.clear()
    made.ask(Speaks).generate(["Ada lives in"])
    *examples, _ = asked.asked[0].split("\n\n")
    assert examples and all(example.startswith("New Fact: Cleo lives in Oslo") for example in examples)


def test_likeness_by_words_is_a_cosine_that_weighs_rare_words() -> None:
    alike = by_words(["the cat", "the dog", "the the cat"])
    assert alike("the cat") == pytest.approx([1.0, *alike("the cat")[1:]])
    assert alike("a dog")[1] > alike("the bird")[1] > 0 == alike("a dog")[0]
    assert by_words([])("x") == [] and alike("") == [0.0, 0.0, 0.0]


def test_likeness_by_a_retriever_is_the_cosine_of_mean_hidden_states(tmp_path: Path) -> None:
    model = load(tiny.encoder(tmp_path / "encoder"))
    texts = ["The cat sat on the mat.", "Paris is the capital of France."]
    rows = demonstrations.embedded(model, texts)
    for text, row in zip(texts, rows, strict=True):
        batch = model.ask(lfm.Codec).texts([text])
        (hidden,) = model.ask(Features).features(batch, [("hidden", -1)])
        mean = hidden[0].mean(0)
        torch.testing.assert_close(row, mean / mean.norm(), rtol=1e-4, atol=1e-5)


def test_with_a_retriever_it_is_saved_and_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LFM_HOME", str(tmp_path / "home"))
    case(tmp_path)
    tiny.encoder(tmp_path / "encoder")
    models = {"model": tmp_path / "model", "retriever": tmp_path / "encoder"}
    data = {"edits": tmp_path / "edits.jsonl", "demonstrations": tmp_path / "others.jsonl"}
    lfm.run("edit.ike", models, data, out=tmp_path / "out", set={"k": 2})
    again = runs.model(tmp_path / "out")
    assert set(again.gives) == {Speaks, Logprobs, words.Told}
    assert [s.lstrip()[:4] for s in again.ask(Speaks).generate([e.prompt for e in EDITS], max_tokens=4)] == ["word"] * 2
    other = ["Berlin is the capital of"]
    assert again.ask(Speaks).generate(other) == load(tmp_path / "model").ask(Speaks).generate(other)
    score = again.ask(Logprobs).score(other, [" France"])
    assert score == load(tmp_path / "model").ask(Logprobs).score(other, [" France"])


def test_over_http_it_is_the_same(tmp_path: Path) -> None:
    model = load(base(tmp_path / "model"))
    here, _ = told(model, tmp_path / "here", EDITS, OTHERS, k=2)
    with running(model) as url:
        there, run = told(open_api(f"api:{url}", cache=tmp_path / "cache"), tmp_path / "there", EDITS, OTHERS, k=2)
        prompts = [*(e.prompt for e in EDITS), "Berlin is the capital of"]
        assert there.ask(Speaks).generate(prompts, max_tokens=6) == here.ask(Speaks).generate(prompts, max_tokens=6)
    assert run.notes["efficacy"] == 1.0


def test_what_is_not_said_is_refused_or_left_out(tmp_path: Path) -> None:
    model, _ = reader()
    unread = Edit(subject="Bob", relation="job", object="cook", new_object="pilot", prompt="Bob works as a")
    with pytest.raises(EditError, match="1 of 2 edits were not said: 'Bob works as a' did not go on with 'pilot'"):
        told(model, tmp_path / "a", [MOVED, unread], OTHERS)
    made, run = told(model, tmp_path / "b", [MOVED, unread], OTHERS, on_failure="skip")
    assert (run.notes["edits"], run.notes["skipped"]) == (1, 1)
    assert "Bob works as a" in str(run.notes["skipped_because"])
    assert made.digest == told(model, tmp_path / "c", [MOVED], OTHERS, on_failure="skip")[0].digest
    with pytest.raises(EditError, match="1 of 1 edits"):
        told(model, tmp_path / "d", [unread], OTHERS, on_failure="skip")


def test_contradicting_edits_are_refused_before_anything_is_asked() -> None:
    model, asked = reader()
    rival = structs.replace(MOVED, new_object="Rome")
    with pytest.raises(DataError, match="contradicts another"):
        ike.agree(ike.Config(), Inputs({"model": (model,)}, {"edits": [MOVED, rival]}))
    with pytest.raises(SlotError, match="either memory or retriever"):
        ike.agree(ike.Config(), Inputs(dict.fromkeys(("model", "memory", "retriever"), (model,)), {"edits": [MOVED]}))
    assert not asked.asked


def test_cost_grows_with_the_examples() -> None:
    sizes = Sizes({"model": (Facts(parameters=1000),)}, {"edits": Amount(10, 100)})
    assert ike.cost(ike.Config(k=4), sizes).tokens < ike.cost(ike.Config(k=32), sizes).tokens
