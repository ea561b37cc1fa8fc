"""prompt.lpaqa: prompts mined by hand, weights at their optimum, sums of logarithms, more facts than by one prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

import tiny
from case import Case
from lfm import runs
from lfm.core import Inputs, Logprobs, Model, Text
from lfm.core.errors import ConfigError, DataError
from lfm.core.interfaces import Score
from lfm.core.model import Facts
from lfm.data import files
from lfm.data.records import Fact
from lfm.methods.prompt import lpaqa
from lfm.methods.prompt.lpaqa import Config, learned
from lfm.models import load
from lfm.prompting.relations import mined, own, paraphrased, spotted
from lfm.runs.run import LocalRun


def fact(subject: str, answer: str) -> Fact:
    return Fact(
        subject=subject,
        relation="capital",
        object=answer,
        prompt=f"The capital of {subject} is",
        paraphrases=(f"{subject} has the town",),
    )


FACTS = [fact("France", "Paris"), fact("Italy", "Rome"), fact("Germany", "Berlin")]


def case(here: Path) -> Case:
    tiny.causal(here / "model")
    files.write(FACTS, here / "facts.jsonl")
    return Case(models={"model": ("model",)}, data={"train": "facts.jsonl"})


def test_prompts_are_the_words_between_and_a_text_is_known_by_them() -> None:
    texts = [
        "We know that Italy is ruled from Rome. Rome is in Italy.",
        "France is ruled from Paris, and Paris is large.",
    ]
    assert mined(FACTS, texts) == ["{subject} is ruled from"]
    assert own(FACTS) == ["The capital of {subject} is", "{subject} has the town"]
    known = {"capital": own(FACTS), "other": ["{subject} is"]}
    assert spotted("The capital of Great Spain is", known) == ("capital", "Great Spain")
    assert spotted("Spain is", known) == ("other", "Spain") and spotted("Spain was", known) is None


def test_weights_are_at_the_optimum_and_leave_a_useless_prompt_out() -> None:
    random = torch.Generator().manual_seed(0)
    gold = torch.randint(4, (40,), generator=random)
    told = torch.randn(40, 3, 4, generator=random, dtype=torch.float64)
    told[:, 0] += 2 * torch.eye(4, dtype=torch.float64)[gold]
    told = told.log_softmax(2)

    def value(w: Any) -> float:
        mixed = torch.einsum("nto,t->no", told, torch.tensor(w).softmax(0))
        return float(torch.nn.functional.cross_entropy(mixed, gold)) + lpaqa.RIDGE / 2 * float(np.square(w).sum())

    found = learned(told, gold)
    assert float(found.sum()) == pytest.approx(1) and found[0] > 0.8
    w = found.log() - found.log().mean()  # the ridge makes w of mean 0
    for i in range(3):
        step = np.zeros(3)
        step[i] = 1e-4
        assert value(w.numpy() + step) == pytest.approx(value(w.numpy() - step), abs=1e-7)


def test_a_known_prompt_is_asked_in_all_ways_and_another_as_it_is(tmp_path: Path) -> None:
    model = load(tiny.causal(tmp_path / "model"))
    made = lpaqa.run(Config(weigh="even"), Inputs({"model": (model,)}, {"train": FACTS}), LocalRun(0, tmp_path))
    ours, theirs = made.ask(Logprobs), model.ask(Logprobs)
    each = theirs.score(["The capital of Rome is", "Rome has the town"], [" Paris"] * 2)
    (told,) = ours.score(["The capital of Rome is"], [" Paris"])
    assert told.total == pytest.approx(sum(score.total for score in each) / 2, abs=1e-5)
    assert ours.score(["The cat sat on"], [" the mat"]) == theirs.score(["The cat sat on"], [" the mat"])
    (best,) = ours.top(["The capital of Rome is"], 3)
    tops = [dict(reversed(theirs.top([text], 400)[0])) for text in ("The capital of Rome is", "Rome has the town")]
    expected = sorted((sum(top[t] for top in tops) / 2 for t in tops[0]), reverse=True)[:3]
    assert [value for _, value in best] == pytest.approx(expected, abs=1e-4)


def test_prompts_without_subjects_are_refused() -> None:
    bad = [Fact(subject="France", relation="capital", object="Paris", prompt="The capital is")]
    with pytest.raises(DataError, match="holds its subject"):
        lpaqa.agree(Config(), Inputs({}, {"train": bad}))


class Writer:
    """Says what a function makes of each text it is asked for, and of its place among them."""

    def __init__(self, say: Callable[[str, int], str]) -> None:
        self.say, self.asked = say, list[str]()

    def generate(self, prompts: Sequence[str], **_: Any) -> list[str]:
        self.asked += prompts
        return [self.say(prompt, i) for i, prompt in enumerate(prompts)]

    def model(self) -> Model:
        return Model(ref="writer", kind="module", gives={Text: lambda: self}, identify=lambda: "w", look=Facts)


def test_paraphrases_name_the_subject_and_end_with_the_object_the_commonest_first() -> None:
    lines = [
        " [X] is governed from [Y].",
        "- [X] is governed from [Y]",
        "3. “Go to [X] and see [Y]”",
        "[Y] is the capital of [X].",  # the object comes first: a causal model could not be asked
        "[X] has [Y] in it",  # words after the object
        "[X] of [X] is [Y].",
        "[X] [Y]",
        "no idea",
        "",
        "The capital of [X] is [Y].",  # known
    ]
    writer = Writer(lambda _, i: lines[i])
    templates = own(FACTS)
    assert paraphrased([writer], templates, len(lines), 0) == [
        "{subject} is governed from",
        "Go to {subject} and see",
    ]
    assert all("\n- The capital of [X] is [Y].\n- [X] has the town [Y].\n-" in asked for asked in writer.asked)


def test_two_writers_translate_there_and_back() -> None:
    there = Writer(lambda text, _: text.replace("The capital of", "Die Hauptstadt von").replace(" is ", " ist "))
    back = Writer(
        lambda text, i: text.replace("Die Hauptstadt von", ("The seat of", "The main town of")[i % 2 or i > 3])
    )
    said = paraphrased([there, back], own(FACTS), 6, 0)
    assert said == ["The main town of {subject} ist", "The seat of {subject} ist"]
    assert there.asked == ["The capital of [X] is [Y]."] * 6 and back.asked[0].startswith("Die Hauptstadt von [X] ist")


def test_a_paraphrase_that_tells_the_facts_gets_the_weight(tmp_path: Path) -> None:
    """A model that knows the capitals in one wording alone, which no fact brings and only the paraphraser says."""

    class Knows:
        def score(self, prompts: Sequence[str], continuations: Sequence[str], suffixes: Sequence[str] = ()) -> Any:
            known = {f.subject: f.object for f in FACTS}
            return [
                Score((said,), (-0.1 if said.strip() == known[prompt.removesuffix(" is ruled from")] else -5.0,))
                if prompt.endswith(" is ruled from")
                else Score((said,), (-1.0,))
                for prompt, said in zip(prompts, continuations, strict=True)
            ]

    knows = Model(
        ref="k", kind="module", gives={Logprobs: Knows}, identify=lambda: "k", look=lambda: Facts(task="causal-lm")
    )
    writer = Writer(lambda _, i: "[X] is ruled from [Y]." if i % 2 else "[X] is near [Y].")
    inputs = Inputs({"model": (knows,), "paraphraser": (writer.model(),)}, {"train": FACTS})
    for config, told in ((Config(mine=0), 1 / 3), (Config(paraphrases=2), 1.0)):
        (tmp_path / str(told)).mkdir()
        run = LocalRun(0, tmp_path / str(told))
        made = lpaqa.run(config, inputs, run)
        assert run.notes["accuracy_together"] == pytest.approx(told)
    score = made.ask(Logprobs).score(["The capital of Italy is"] * 2, [" Rome", " Paris"])
    assert score[0].total > score[1].total + 1
    assert len(writer.asked) == lpaqa.DRAWS * 2


def test_paraphrases_that_nobody_writes_are_refused(tmp_path: Path) -> None:
    writer = Writer(lambda *_: "").model()
    model = load(tiny.masked(tmp_path / "model"))
    with pytest.raises(ConfigError, match=r"nobody writes.*paraphraser=REF"):
        lpaqa.agree(Config(paraphrases=2), Inputs({"model": (model,)}, {"train": FACTS}))
    lpaqa.agree(Config(paraphrases=2), Inputs({"model": (model,), "paraphraser": (writer,)}, {"train": FACTS}))
    with pytest.raises(ConfigError, match="asked for nothing"):
        lpaqa.agree(Config(), Inputs({"model": (model,), "paraphraser": (writer,)}, {"train": FACTS}))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zoo:lm", "zoo:mlm"])
def test_together_they_tell_more_facts_than_one_prompt_by_hand(name: str, tmp_path: Path) -> None:
    """Prompts in words that the model was not taught; weighed on 8 people's facts, asked of others."""
    model = runs.model(name)
    facts = [
        msgspec.structs.replace(f, prompt=f.paraphrases[0], paraphrases=f.paraphrases[1:])
        for f in runs.records("zoo:facts")
    ]
    people = sorted({f.subject for f in facts})
    train = [f for f in facts if f.subject in people[:8]]
    test = [f for f in facts if f.subject in people[8:]][::4]
    made = lpaqa.run(Config(), Inputs({"model": (model,)}, {"train": train}), LocalRun(0, tmp_path))

    def right(asked: Any, prompts: list[str]) -> float:
        tops = asked.ask(Logprobs).top(prompts, 1, [f.suffix for f in test])
        return float(np.mean([top[0][0].strip() == f.object for top, f in zip(tops, test, strict=True)]))

    together = right(made, [f.prompt for f in test])
    alone = [right(model, [(f.prompt, *f.paraphrases)[i] for f in test]) for i in range(4)]
    assert together >= max(alone) and together > np.mean(alone) + 0.05, (alone, together)
