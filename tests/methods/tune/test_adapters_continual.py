"""tune.adapters_continual: an adapter a task, nothing forgotten, and inputs sent where they belong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

import tiny
from case import Case
from lfm import models, zoo
from lfm.core import Codec, Gradients, Inputs, Logits, Logprobs, Model, Text
from lfm.core.errors import DataError, MismatchError
from lfm.data import files
from lfm.data import records as data
from lfm.data.files import write
from lfm.data.shares import by_group
from lfm.data.task import task_for
from lfm.methods.tune import adapters_continual as method
from lfm.models import dispatch, forward
from lfm.runs.run import LocalRun
from lfm.train import Fit, fit
from lfm.train.examine import examiner
from methods.reuse import eight
from methods.reuse.eight import fuse

FIRST = [data.Label(text=f"the {w} sat on the mat", label=w, group="a") for w in ("cats", "dogs", "birds")]
SECOND = [data.Label(text=f"{x} is the capital", label="dogs", group="b") for x in ("paris", "rome", "berlin")]
FACTS = [data.Fact(subject=w, relation="is", object="happy", prompt=f"{w} are", group="a") for w in ("cats", "dogs")]
FACTS += [data.Fact(subject=w, relation="in", object="Rome", prompt=f"{w} is in", group="b") for w in ("Ada", "Paris")]
SMALL: dict[str, Any] = {"steps": 4, "batch_size": 2, "rank": 2, "lr": 0.02}


def case(here: Path) -> Case:
    tiny.classifier(here / "base")
    write([*FIRST, *SECOND], here / "tasks.jsonl")
    return Case({"base": ("base",)}, {"train": "tasks.jsonl"}, {**SMALL, "checkpoint_every": 0.0})


def taught(base: Model, records: Any, work: Path, earlier: Any = (), **settings: Any) -> tuple[Model, LocalRun]:
    roles = {"base": [base], "earlier": list(earlier)}
    made, run = fuse(method, work, {k: v for k, v in roles.items() if v}, {"train": records}, **{**SMALL, **settings})
    return made, run


def test_nearest_means_under_the_pooled_scatter_by_hand() -> None:
    """Means (0, 0) and (2, 0), equal spreads: the border is the line x = 1. Two far tasks added later keep it."""
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    router = method.routed(None, [corners, corners + torch.tensor([2.0, 0.0])])
    assert torch.equal(router.scatter, 8 * torch.eye(2).double())
    points = torch.tensor([[0.9, 5.0], [1.1, -5.0]])
    assert router.choose(points).tolist() == [0, 1]
    more = method.routed(router, [corners + 50.0])
    assert more.choose(torch.cat([points, torch.tensor([[49.0, 51.0]])])).tolist() == [0, 1, 2]
    whole = method.routed(None, [corners, corners + torch.tensor([2.0, 0.0]), corners + 50.0])
    assert all(torch.equal(a, b) for a, b in zip(more, whole))  # as if all had been there at once


def test_a_direction_in_which_inputs_scatter_anyway_does_not_decide() -> None:
    """Task means differ by 1 along x, where the spread is .3, and by 1 along y, where it is 3: x decides."""
    random = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 400, 2, generator=random) * torch.tensor([0.3, 3.0])
    router = method.routed(None, [noise[0], noise[1] + 1.0])
    asked = torch.tensor([[0.1, 9.0], [0.9, -9.0]])
    assert router.choose(asked).tolist() == [0, 1]
    assert torch.cdist(asked.double(), router.means).argmin(-1).tolist() == [1, 0]  # the nearest mean errs


def test_separable_tasks_are_told_apart_and_each_row_gets_its_own_answer(tmp_path: Path) -> None:
    base = models.load(tiny.classifier(tmp_path / "base"))
    made, run = taught(base, [*FIRST, *SECOND], tmp_path)
    assert run.notes["routing_accuracy"] == 1.0
    batch = task_for(FIRST, base.ask(Codec), base.facts).collate([FIRST[0], SECOND[0], FIRST[1]])
    told = made.ask(Logits).logits(batch)
    for row, name in enumerate("aba"):
        alone = made.ask(method.Adapters).task(name).ask(Logits).logits(batch)
        torch.testing.assert_close(told[row], alone[row], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(told, base.ask(Logits).logits(batch))


def test_a_task_answers_bit_for_bit_as_before_others_came(tmp_path: Path) -> None:
    base = models.load(tiny.classifier(tmp_path / "base"))
    first, _ = taught(base, FIRST, tmp_path)
    both, _ = taught(base, SECOND, tmp_path, [first])
    batch = task_for(FIRST, base.ask(Codec), base.facts).collate([*FIRST, *SECOND])
    before, after = (m.ask(method.Adapters).task("a") for m in (first, both))
    assert before.digest == after.digest
    assert torch.equal(before.ask(Logits).logits(batch), after.ask(Logits).logits(batch))
    routed = task_for(FIRST, base.ask(Codec), base.facts).collate(FIRST)  # all of them go to a, before and after
    assert torch.equal(first.ask(Logits).logits(routed), both.ask(Logits).logits(routed))
    at_once, _ = taught(base, [*FIRST, *SECOND], tmp_path)
    assert at_once.digest == both.digest  # in one run or two, by the same seed


def test_a_task_saved_by_itself_is_a_plain_adapter(tmp_path: Path) -> None:
    base = models.load(tiny.classifier(tmp_path / "base"))
    made, _ = taught(base, [*FIRST, *SECOND], tmp_path)
    task = made.ask(method.Adapters).task("b")
    (tmp_path / "b").mkdir()
    task.save(tmp_path / "b")
    batch = base.ask(Codec).texts(["paris"])
    again = models.load(tmp_path / "b")
    assert torch.equal(again.ask(Logits).logits(batch), task.ask(Logits).logits(batch))
    with pytest.raises(DataError, match=r"no task 'c' was learned.*'a', 'b'"):
        made.ask(method.Adapters).task("c")


@pytest.mark.parametrize("kind", ["causal", "masked", "seq2seq", "vit"])
def test_every_kind_of_model_learns_saves_and_comes_back(kind: str, tmp_path: Path) -> None:
    records: Any = FACTS
    if kind == "vit":
        records = [
            data.Image(image=np.full((8, 8), 28 * i, np.uint8), label=str(i), group="ab"[i % 2]) for i in range(8)
        ]
    if kind == "seq2seq":
        records = [data.Completion(prompt=f.prompt, completion=f" {f.object}", group=f.group) for f in FACTS]
    base = models.load(getattr(tiny, kind)(tmp_path / kind))
    made, run = taught(base, records, tmp_path, steps=20)
    assert run.notes["tasks"] == 2
    (tmp_path / "out").mkdir()
    made.save(tmp_path / "out")
    again = models.load(tmp_path / "out")
    assert again.digest == made.digest
    if kind == "vit":
        batch = task_for(records, base.ask(Codec), base.facts).collate(records)
        assert torch.equal(again.ask(Logits).logits(batch), made.ask(Logits).logits(batch))
        return
    asked, said = ["cats are", "Ada is in"], [" happy", " Rome"]
    scores = made.ask(Logprobs).score(asked, said, ["."] * 2)
    assert scores == again.ask(Logprobs).score(asked, said, ["."] * 2)
    better = zip(scores, base.ask(Logprobs).score(asked, said, ["."] * 2), strict=True)
    assert all(new.total > old.total for new, old in better)
    if kind != "masked":
        assert made.ask(Text).generate(asked, max_tokens=4) == again.ask(Text).generate(asked, max_tokens=4)


def test_what_does_not_fit_is_refused_before_a_weight_is_read(tmp_path: Path) -> None:
    base = models.load(tiny.classifier(tmp_path / "base"))
    other = models.load(tiny.classifier(tmp_path / "other", seed=1))
    made, _ = taught(base, FIRST, tmp_path)
    with pytest.raises(MismatchError, match="over another base"):
        taught(other, SECOND, tmp_path, [made])
    with pytest.raises(DataError, match="has learned 'a' already"):
        taught(base, FIRST, tmp_path, [made])
    with pytest.raises(DataError, match=f"label {len(SECOND) + 1}: 'group' names no task"):
        taught(base, [*SECOND, msgspec.structs.replace(SECOND[0], group="")], tmp_path)


@pytest.mark.slow
def test_nothing_is_forgotten_and_what_routing_costs_is_known(tmp_path: Path) -> None:
    """The zoo's eight tasks on digits, one after another: by task, routed, and one model tuned on each in turn."""
    base = eight.base()
    train, test = by_group(eight.images("train", 400)), by_group(eight.images("test"))
    for seed in range(3):
        settings = {"lr": 2e-3, "epochs": 4.0, "batch_size": 16}
        run = LocalRun(seed, tmp_path / str(seed))
        inputs = Inputs({"base": (base,)}, {"train": [r for records in train.values() for r in records]})
        made = method.run(method.Config(**settings), inputs, run)
        assert isinstance(made, Model)
        module, task = base.ask(Gradients).module(), task_for(train["identity"], base.ask(Codec), base.facts)

        def loss(module: Any, batch: Any, task: Any = task) -> torch.Tensor:
            return task.loss(forward(module, batch), batch)

        for name, records in train.items():
            fit(module, records, task.collate, loss, Fit(**settings), run, name=name)
        sequential = base.ask(Gradients).rewrap(module)
        told: dict[str, list[float]] = {"base": [], "by task": [], "routed": [], "sequential": []}
        for name, records in test.items():
            examine = examiner(records, base)
            answering = {
                "base": base,
                "by task": made.ask(method.Adapters).task(name),
                "routed": made,
                "sequential": sequential,
            }
            for how, model in answering.items():
                told[how].append(examine(model.ask(Logits).logits).accuracy)
        mean = {how: sum(values) / len(values) for how, values in told.items()}
        print(seed, {how: round(value, 3) for how, value in mean.items()}, told["sequential"][0])
        assert mean["by task"] > mean["routed"] > mean["sequential"] + 0.2
        assert mean["routed"] > mean["base"]


@pytest.mark.slow
def test_inputs_that_were_not_seen_are_sent_where_they_belong() -> None:
    """By the base's features alone: prompts of three kinds to zoo:lm, digits rendered in eight ways to zoo:vit-base."""
    language, names = models.load(zoo.model("lm")), ("topics", "moods", "qa")
    for count in (60, 400):
        train, test = ([files.read(zoo.data(name + part)) for name in names] for part in ("", "-test"))
        found = sent(language, [records[:count] for records in train], [records[:100] for records in test])
        print(count, dict(zip(names, found)))
        assert min(found) > 0.8
    images, unseen = by_group(eight.images("train", 400)), by_group(eight.images("test"))
    found = sent(eight.base(), list(images.values()), list(unseen.values()))
    print(dict(zip(images, found)))
    assert sum(found) / 8 > 0.7 and min(found) > 3 / 8


def sent(base: Model, train: Sequence[Any], test: Sequence[Any]) -> list[float]:
    """The share of each task's test records that go to it."""
    module = base.ask(Gradients).module()
    learned, asked = (
        [torch.cat([dispatch.features(module, b) for b in method.questions(base, records)]) for records in part]
        for part in (train, test)
    )
    router = method.routed(None, learned)
    return [round(float((router.choose(z) == i).double().mean()), 2) for i, z in enumerate(asked)]
