"""probe.lama: ranks, averages and calibration of a model whose every probability is known."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from case import Case
from lfm import models
from lfm.core.errors import DataError
from lfm.core.finding import Finding
from lfm.core.interfaces import Logprobs, Score
from lfm.core.method import Amount, Inputs, Sizes
from lfm.core.model import Facts, Model
from lfm.data.facts import questions, rank
from lfm.data.files import write
from lfm.data.records import Fact
from lfm.methods.probe import lama
from lfm.runs.run import LocalRun


def case(here: Path) -> Case:
    tiny.causal(here / "model")
    write(WORLD, here / "facts.jsonl")
    return Case(models={"model": ("model",)}, data={"facts": "facts.jsonl"})


def fact(subject: str, relation: str, answer: str, *paraphrases: str) -> Fact:
    prompt = f"{subject} {relation}"
    return Fact(subject=subject, relation=relation, object=answer, prompt=prompt, paraphrases=paraphrases)


WORLD = [
    fact("Ada", "lives in", "Rome", "Ada, of", "Home of Ada:"),
    fact("Bo", "lives in", "Paris", "Bo, of"),
    fact("Cy", "lives in", "Rome"),
    fact("Di", "lives in", "New Oslo"),
    fact("Ada", "works as", "a painter"),
    fact("Bo", "works as", "a baker"),
]
TOLD = {  # probabilities of each candidate; of two tokens where it has two words
    "Ada lives in": {"Rome": 0.5, "Paris": 0.2, "New Oslo": 0.1},  # Rome, rank 1
    "Ada, of": {"Rome": 0.5, "Paris": 0.2, "New Oslo": 0.1},
    "Home of Ada:": {"Rome": 0.1, "Paris": 0.2, "New Oslo": 0.1},  # Paris: agrees with neither
    "Bo lives in": {"Rome": 0.5, "Paris": 0.2, "New Oslo": 0.3},  # Paris, rank 3
    "Bo, of": {"Rome": 0.5, "Paris": 0.2, "New Oslo": 0.3},
    "Cy lives in": {"Rome": 0.25, "Paris": 0.25, "New Oslo": 0.2},  # Rome, tied with Paris: rank 2
    "Di lives in": {"Rome": 0.3, "Paris": 0.2, "New Oslo": 0.4},  # New Oslo, rank 1
    "Ada works as": {"a painter": 0.6, "a baker": 0.2},  # rank 1
    "Bo works as": {"a painter": 0.6, "a baker": 0.2},  # rank 2
}


class Known:
    """Log-probabilities from the table above, halved over the words of an answer; next tokens are its first words."""

    def __init__(self, told: dict[str, dict[str, float]], calls: list[int] | None = None) -> None:
        self._told, self._calls = told, calls if calls is not None else []

    def score(self, prompts: Sequence[str], continuations: Sequence[str], suffixes: Sequence[str] = ()) -> list[Score]:
        self._calls.append(len(prompts))
        found = []
        for prompt, answer in zip(prompts, continuations):
            assert answer.startswith(" "), "running text has a space here"
            words = tuple(answer.split())
            found.append(Score(words, (log(self._told[prompt][answer.strip()]) / len(words),) * len(words)))
        return found

    def top(self, prompts: Sequence[str], k: int, suffixes: Sequence[str] = ()) -> list[Any]:
        self._calls.append(len(prompts))
        ranked = [sorted(self._told[p].items(), key=lambda item: -item[1]) for p in prompts]
        return [[(f" {token}", log(value)) for token, value in tokens][:k] for tokens in ranked]


def known(told: dict[str, dict[str, float]], calls: list[int] | None = None) -> Model:
    return Model("known", "api", {Logprobs: lambda: Known(told, calls)}, lambda: "0" * 64)


def probed(model: Model, facts: Sequence[Fact], here: Path, **settings: Any) -> Finding:
    found = lama.run(lama.Config(**settings), Inputs({"model": (model,)}, {"facts": facts}), LocalRun(0, here))
    assert isinstance(found, Finding)
    return found


def test_ranks_and_averages_are_those_computed_by_hand(tmp_path: Path) -> None:
    found = probed(known(TOLD), WORLD, tmp_path)
    assert [e["rank"] for e in found.evidence] == [1, 3, 2, 1, 1, 2]
    assert [e["answer"] for e in found.evidence] == ["Rome", "Rome", "Paris", "New Oslo", "a painter", "a painter"]
    lives, works = found.rows
    assert (lives["p_at_1"], lives["p_at_10"], lives["mrr"]) == (0.5, 1.0, pytest.approx((1 + 1 / 3 + 1 / 2 + 1) / 4))
    assert (works["p_at_1"], works["p_at_10"], works["mrr"]) == (0.5, 1.0, 0.75)
    assert (lives["facts"], lives["candidates"], lives["majority"]) == (4, 3, 0.5)
    assert found.metrics["p_at_1"] == 0.5  # the mean over relations, 0.5 and 0.5; over facts it would be 3 / 6 too
    assert found.metrics["mrr"] == pytest.approx((lives["mrr"] + 0.75) / 2)
    assert found.metrics["majority"] == 0.5
    # Rome, Rome, Paris: one pair of three agrees; Rome, Rome: one of one.
    assert found.metrics["consistency"] == pytest.approx((1 / 3 + 1) / 2)
    assert found.metrics["paraphrase_p_at_1"] == pytest.approx(1 / 3)
    assert (found.metrics["facts"], found.metrics["left_out"], found.metrics["relations"]) == (6, 0, 2)


def test_relations_weigh_alike_however_many_facts_they_have(tmp_path: Path) -> None:
    facts = [*WORLD[:4], WORLD[4]]
    assert probed(known(TOLD), facts, tmp_path).metrics["p_at_1"] == (0.5 + 1.0) / 2


def test_confidence_is_the_probability_among_the_candidates(tmp_path: Path) -> None:
    found = probed(known(TOLD), WORLD, tmp_path)
    assert found.evidence[0]["confidence"] == pytest.approx(0.5 / 0.8)
    assert found.evidence[1]["probability"] == pytest.approx(0.2 / 1.0)
    sure = [0.5 / 0.8, 0.5, 0.25 / 0.7, 0.4 / 0.9, 0.75, 0.75]
    right = [1, 0, 0, 1, 1, 0]
    bins: dict[int, list[int]] = {}
    for i, value in enumerate(sure):
        bins.setdefault(int(value * 15), []).append(i)  # none lies on a bin's edge
    expected = sum(abs(sum(sure[i] - right[i] for i in part)) for part in bins.values()) / 6
    assert found.metrics["ece"] == pytest.approx(expected)
    curve = {c.name: c for c in found.curves}
    assert curve["P@k"].y == (0.5, pytest.approx(0.875), 1.0)
    assert all(0 <= x <= 1 and 0 <= y <= 1 for x, y in zip(curve["calibration"].x, curve["calibration"].y))


def test_objects_that_are_all_impossible_are_equally_so(tmp_path: Path) -> None:
    class Nothing(Known):
        def score(self, prompts: Sequence[str], continuations: Sequence[str], _: Sequence[str] = ()) -> list[Score]:
            return [Score(("x",), (float("-inf"),)) for _ in prompts]

    model = Model("nothing", "api", {Logprobs: lambda: Nothing({})}, lambda: "0" * 64)
    found = probed(model, WORLD, tmp_path)
    assert found.metrics["p_at_1"] == 0.0 and found.evidence[0]["confidence"] == pytest.approx(1 / 3)


def test_an_object_that_is_also_true_does_not_compete(tmp_path: Path) -> None:
    facts = [fact("Bo", "lives in", "Paris"), fact("Bo", "lives in", "Rome"), fact("Di", "lives in", "New Oslo")]
    # Of Bo's two, Rome (0.5) would come before Paris (0.2); New Oslo (0.3) still does.
    assert [e["rank"] for e in probed(known(TOLD), facts, tmp_path).evidence] == [2, 1, 1]


def test_the_whole_vocabulary_can_compete(tmp_path: Path) -> None:
    told = {
        "Ada lives in": {"the": 0.4, "Rome": 0.3, "Oslo": 0.2},
        "Bo lives in": {"the": 0.4, "Rome": 0.3, "Oslo": 0.2, "Paris": 0.1},
        "Di lives in": {"the": 1.0, "New Oslo": 0.5},
    }
    facts = [WORLD[0], WORLD[1], WORLD[3]]
    found = probed(known(told), facts, tmp_path, candidates="vocabulary", paraphrases=0, depth=3)
    assert found.metrics["left_out"] == 1  # New Oslo is two tokens
    assert [e["rank"] for e in found.evidence] == [2, None]  # Paris comes fourth, and three were looked at
    assert found.metrics["mrr"] == 0.25 and found.metrics["p_at_10"] == 0.5
    assert found.evidence[0]["confidence"] == pytest.approx(0.4)
    with pytest.raises(DataError, match=r"no fact's object is one token.*candidates=objects"):
        probed(known(told), [WORLD[3]], tmp_path / "none", candidates="vocabulary")


def test_a_tokenizer_without_capitals_is_met_without_them(tmp_path: Path) -> None:
    told = {
        "Ada lives in": {"rome": 0.6, "[CLS]": 0.4, "Rome": 0.1},
        "Bo lives in": {"paris": 0.5, "the": 0.5, "Paris": 1},
    }

    class Lower(Known):
        def top(self, prompts: Sequence[str], k: int, suffixes: Sequence[str] = ()) -> list[Any]:
            return [
                [(t, v) for t, v in ranked if t.strip() not in ("Rome", "Paris")]
                for ranked in super().top(prompts, k, suffixes)
            ]

    model = Model("lower", "api", {Logprobs: lambda: Lower(told)}, lambda: "0" * 64)
    found = probed(model, WORLD[:2], tmp_path, candidates="vocabulary", paraphrases=0)
    assert [e["rank"] for e in found.evidence] == [1, 2]  # the second is tied, and a tie counts against it


def test_nothing_is_asked_twice_and_paraphrases_are_asked_as_told(tmp_path: Path) -> None:
    calls: list[int] = []
    probed(known(TOLD, calls), [*WORLD, WORLD[0]], tmp_path / "a")
    assert sum(calls) == 7 * 3 + 2 * 2  # prompts of the first relation times its objects; and of the second
    calls.clear()
    found = probed(known(TOLD, calls), WORLD, tmp_path / "b", paraphrases=0)
    assert sum(calls) == 4 * 3 + 2 * 2
    assert "consistency" not in found.metrics and found.rows[0]["consistency"] is None


@pytest.mark.parametrize("name", ["causal", "masked", "seq2seq"])
def test_every_kind_of_language_model_is_probed(tmp_path: Path, name: str) -> None:
    model = models.load(getattr(tiny, name)(tmp_path / name)).only([Logprobs])
    found = probed(model, WORLD, tmp_path / "run")
    assert 0 < found.metrics["mrr"] <= 1 and len(found.evidence) == 6
    assert probed(model, WORLD, tmp_path / "again").digest == found.digest


def test_a_rank_is_that_of_log_probabilities_of_the_model(tmp_path: Path) -> None:
    model = models.load(tiny.masked(tmp_path / "m"))
    found = probed(model, WORLD[:2], tmp_path / "run", candidates="vocabulary", paraphrases=0, depth=10**6)
    [ranked] = model.ask(Logprobs).top(["Bo lives in"], 10**6, ["."])
    place = next(i for i, (token, _) in enumerate(ranked, start=1) if token.strip() == "paris")
    said = next(e for e in found.evidence if e["object"] == "Paris")
    assert said["rank"] == place
    assert said["probability"] == pytest.approx(exp(dict(ranked)[ranked[place - 1][0]]))


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=8), st.data())
def test_a_rank_counts_those_not_worse(scores: list[int], data: st.DataObject) -> None:
    right = data.draw(st.integers(0, len(scores) - 1))
    expected = sorted(scores, reverse=True)[::-1]
    assert rank(scores, right) == len(scores) - expected.index(scores[right])


def test_candidates_are_the_objects_of_the_relation() -> None:
    assert [q.candidates for q in questions(WORLD)][3:5] == [("New Oslo", "Paris", "Rome"), ("a baker", "a painter")]


def test_a_plan_counts_a_query_for_each_prompt_and_candidate() -> None:
    sizes = Sizes({"model": (Facts(parameters=10),)}, {"facts": Amount(30, 300)})
    whole = lama.cost(lama.Config(candidates="vocabulary", paraphrases=1), sizes)
    assert (whole.queries, whole.tokens, whole.flops) == (60, 600, 2 * 10 * 600)
    assert lama.cost(lama.Config(paraphrases=0), sizes).queries == 30 * 20
