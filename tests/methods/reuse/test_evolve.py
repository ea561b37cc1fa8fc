"""reuse.evolve: it finds a known optimum, tells what it found without flattery, and refuses what it cannot search."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from case import Case
from lfm import models
from lfm.core import Codec, Gradients, Inputs, Logits, Model, Weights
from lfm.core.config import configure
from lfm.core.errors import ConfigError, CorruptError, DataError, SlotError
from lfm.data.files import write
from lfm.data.records import Label
from lfm.methods.reuse import evolve, task_arithmetic
from lfm.runs.run import LocalRun
from lfm.train.examine import Score, examiner
from methods.reuse import eight
from methods.reuse.merging import merge, tensors

WORDS = ("cats", "dogs", "birds")
DEV = [Label(text=f"the {w} sat on the mat {i}", label=w) for i in range(4) for w in WORDS]
VALID = [Label(text=f"{i} {w} looked at the dog", label=w) for i in range(3) for w in WORDS]


def case(here: Path) -> Case:
    for seed, name in enumerate(("base", "math", "code")):
        tiny.classifier(here / name, seed=seed)
    write(DEV, here / "dev.jsonl")
    return Case({"base": ("base",), "models": ("math", "code")}, {"dev": "dev.jsonl"}, {"budget": 12, "population": 4})


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Model]:
    """A base and two neighbours of it."""
    base = models.load(tiny.classifier(tmp_path_factory.mktemp("three") / "base"))
    return [base, moved(base, 1), moved(base, 2)]


def moved(model: Model, seed: int, scale: float = 0.03) -> Model:
    module = model.ask(Gradients).module()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random), alpha=scale)
    return model.ask(Gradients).rewrap(module)


def towards(target: Model) -> Callable[..., Any]:
    """An examiner whose loss is how far a model's logits are from the target's: least, 0, where it is the target."""

    def examiner(records: Sequence[Label], model: Model) -> Callable[..., Score]:
        batch = model.ask(Codec).texts([record.text for record in records])
        known = target.ask(Logits).logits(batch)
        return lambda logits: Score(0.0, float((logits(batch) - known).square().mean()))

    return examiner


def test_it_finds_the_weights_that_a_target_was_made_with(
    three: list[Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, *others = three
    roles = {"base": [base], "models": others}
    target = merge(task_arithmetic, tmp_path, roles, weights=[0.9, 0.3], scale=1.0)
    monkeypatch.setattr(evolve, "examiner", towards(target))
    made, run = eight.fuse(
        evolve, tmp_path, roles, {"dev": DEV, "valid": VALID}, by="loss", budget=120, settings={"scale": 1.0}
    )
    found = json.loads(str(run.notes["settings"]))
    assert found["weights"] == pytest.approx([0.9, 0.3], abs=0.03)
    assert found["scale"] == 1.0
    for name, value in tensors(target).items():
        torch.testing.assert_close(tensors(made)[name], value, atol=5e-3, rtol=0)
    curve = run.curves["best loss on dev"]
    assert curve == sorted(curve, reverse=True)
    assert curve[-1] < curve[0] / 100


@pytest.mark.slow
def test_groups_of_blocks_are_searched_by_themselves(
    three: list[Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A target that has more of the other model in its first block: one weight for all cannot reach it."""
    base, other, _ = three
    start, end = tensors(base), tensors(other)
    known = {name: 0.9 if ".layer.0." in name else 0.6 if ".layer.1." in name else 0.3 for name in start}
    assert set(known.values()) == {0.9, 0.6, 0.3}
    target = base.ask(Weights).replace({name: start[name].lerp(end[name], share) for name, share in known.items()})
    monkeypatch.setattr(evolve, "examiner", towards(target))
    roles = {"base": [base], "models": [other]}
    told = {}
    for groups in (1, 2):
        _, told[groups] = eight.fuse(
            evolve,
            tmp_path,
            roles,
            {"dev": DEV, "valid": VALID},
            by="loss",
            budget=130 if groups == 2 else 40,
            groups=groups,
            settings={"weights": [1.0]},
            space={"scale": (0.0, 1.2)},
        )
    found = [settings["scale"] for settings in json.loads(str(told[2].notes["settings"]))]
    assert found == pytest.approx([0.9, 0.6, 0.3], abs=0.08), "the first block, the second, and what is outside"
    assert told[2].notes["valid_loss_evolved"] < float(told[1].notes["valid_loss_evolved"]) / 5  # type: ignore[operator]


def test_the_order_of_the_blocks_is_found(three: list[Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A target whose two blocks have changed places: no weight of any model makes it."""
    base, other, _ = three
    start = tensors(base)
    swap = {".layer.0.": ".layer.1.", ".layer.1.": ".layer.0."}
    swapped = {name: start[name.replace(a, b)] for a, b in swap.items() for name in start if a in name}
    monkeypatch.setattr(evolve, "examiner", towards(base.ask(Weights).replace(swapped)))
    made, run = eight.fuse(
        evolve,
        tmp_path,
        {"base": [base], "models": [other]},
        {"dev": DEV, "valid": VALID},
        by="loss",
        budget=90,
        order=1,
        sigma=0.5,
        space={"scale": (0.0, 0.4)},
    )
    assert json.loads(str(run.notes["moves"])) == [1, -1]
    scale = json.loads(str(run.notes["settings"]))["scale"]
    plain = tensors(merge(task_arithmetic, tmp_path, {"base": [base], "models": [other]}, scale=scale))
    for name, value in tensors(made).items():
        known = next((plain[name.replace(a, b)] for a, b in swap.items() if a in name), plain[name])
        assert torch.equal(value, known)


def test_what_is_told_is_measured_on_records_that_took_no_part(three: list[Model], tmp_path: Path) -> None:
    base, *others = three
    roles = {"base": [base], "models": others}
    made, run = eight.fuse(evolve, tmp_path, roles, {"dev": DEV, "valid": VALID}, budget=12, by="loss")
    exams = {"dev": examiner(DEV, others[0]), "valid": examiner(VALID, others[0])}
    found = json.loads(str(run.notes["settings"]))
    by_hand = merge(task_arithmetic, tmp_path, roles, **found)
    assert made.digest == by_hand.digest
    plain = merge(task_arithmetic, tmp_path, roles)
    for where, exam in exams.items():
        for what, model in (("evolved", made), ("defaults", plain)):
            assert run.notes[f"{where}_loss_{what}"] == exam(model.ask(Logits).logits).loss
    assert run.notes["valid_loss_base"] == exams["valid"](base.ask(Logits).logits).loss
    best = min(others, key=lambda m: exams["dev"](m.ask(Logits).logits).loss)
    assert run.notes["valid_loss_best_model"] == exams["valid"](best.ask(Logits).logits).loss
    assert run.notes["dev_loss_evolved"] <= run.notes["dev_loss_defaults"]  # type: ignore[operator]


def test_without_valid_a_part_of_dev_is_set_aside() -> None:
    told = evolve.parted(Inputs({}, {"dev": DEV}), 0.25, seed=3)
    assert len(told["valid"]) == 3 and len(told["dev"]) == 9
    assert sorted(r.text for part in told.values() for r in part) == sorted(r.text for r in DEV)
    assert told == evolve.parted(Inputs({}, {"dev": DEV}), 0.25, seed=3)
    assert told != evolve.parted(Inputs({}, {"dev": DEV}), 0.25, seed=4)
    two = evolve.parted(Inputs({}, {"dev": DEV[:2]}), 0.9, seed=0)
    assert len(two["valid"]) == len(two["dev"]) == 1


def test_other_merges_are_searched_too(three: list[Model], tmp_path: Path) -> None:
    """A random merge (its masks are the same in every try), one with thresholds, and one without a base."""
    base, *others = three
    for method, space in (
        ("reuse.dare_ties", {"density": (0.2, 1.0), "scale": (0.1, 1.0)}),
        ("reuse.ties", {"density": (0.1, 0.9)}),
        ("reuse.slerp", {"t": (0.0, 1.0)}),
        ("reuse.lines", {"alpha": (0.0, 1.0), "beta": (0.0, 1.0)}),
    ):
        roles = {"models": others} if method == "reuse.slerp" else {"base": [base], "models": others}
        _, run = eight.fuse(evolve, tmp_path, roles, {"dev": DEV}, method=method, space=space, budget=5)
        assert json.loads(str(run.notes["settings"])).keys() <= space.keys()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"method": "reuse.fisher"}, "reuse.fisher is no merge by weights alone"),
        ({"method": "reuse.evolve"}, "reuse.evolve is no merge by weights alone"),
        ({"space": {"scales": [0, 1]}}, "did you mean 'scale'"),
        ({"method": "reuse.ties", "space": {"density": [0.0, 1.0]}}, "density"),
        ({"settings": {"normalize": 3}}, "normalize"),
        ({"groups": 3}, "3 groups of 2 blocks"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_is_read(
    settings: dict[str, Any], says: str, three: list[Model], tmp_path: Path
) -> None:
    base, *others = three
    with pytest.raises(ConfigError, match=says):
        eight.fuse(evolve, tmp_path, {"base": [base], "models": others}, {"dev": DEV}, **settings)


def test_models_and_data_that_do_not_suffice(three: list[Model], tmp_path: Path) -> None:
    base, *others = three
    with pytest.raises(SlotError, match="base"):
        eight.fuse(evolve, tmp_path, {"models": others}, {"dev": DEV})
    with pytest.raises(DataError, match="one record"):
        eight.fuse(evolve, tmp_path, {"base": [base], "models": others}, {"dev": DEV[:1]})


def test_an_interrupted_generation_goes_on_from_the_candidate_that_it_had_reached(
    three: list[Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every candidate is measured once, however often the search is begun, and the result is the same."""
    base, *others = three
    inputs = Inputs({"base": (base,), "models": tuple(others)}, {"dev": DEV, "valid": VALID})
    config = configure(evolve.Config, {"budget": 12, "population": 6})
    whole = evolve.run(config, inputs, LocalRun(0, tmp_path / "whole"))
    measured, left = [], 5
    plain = evolve.examiner

    def counting(records: Sequence[Label], model: Model) -> Callable[..., Score]:
        exam = plain(records, model)

        def examine(logits: Any) -> Score:
            if len(measured) == left:
                raise KeyboardInterrupt
            measured.append(len(records))
            return exam(logits)

        return examine

    monkeypatch.setattr(evolve, "examiner", counting)
    for left in (5, 11, 1000):
        notes = LocalRun(0, tmp_path / "cut")
        if left < 1000:
            with pytest.raises(KeyboardInterrupt):
                evolve.run(config, inputs, notes)
        else:
            assert evolve.run(config, inputs, notes).digest == whole.digest
    asked = 1 + 12 + 2  # on dev: the defaults, the candidates, and each model
    assert measured.count(len(DEV)) == asked
    assert measured.count(len(VALID)) == 4  # the result, the defaults, the base, and the best model
    assert notes.notes["candidates"] == 12


@pytest.mark.parametrize("error", [CorruptError("leaves the range of fp16"), ConfigError("the weights sum to zero")])
def test_a_candidate_that_cannot_be_is_no_end_of_the_search(
    error: Exception, three: list[Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, *others = three
    plain = evolve.merged

    def merged(config: Any, inputs: Inputs, recipe: evolve.Recipe, run: Any) -> Model:
        if recipe.settings[0].get("scale", 0.0) > 0.4:
            raise error
        return plain(config, inputs, recipe, run)

    monkeypatch.setattr(evolve, "merged", merged)
    roles = {"base": [base], "models": others}
    _, run = eight.fuse(evolve, tmp_path, roles, {"dev": DEV}, budget=12, space={"scale": (0.0, 0.8)})
    assert json.loads(str(run.notes["settings"])).get("scale", 0.4) <= 0.4


@pytest.mark.slow
def test_evolved_weights_of_the_zoos_experts_hold_on_images_that_took_no_part(tmp_path: Path) -> None:
    """Measured with 200 candidates: defaults .674, λ alone searched .756, a weight a model .771; on dev it has .804."""
    roles = {"base": [eight.base()], "models": eight.experts()}
    data = {"dev": eight.images("train", 64), "valid": eight.images("test")}
    _, run = eight.fuse(evolve, tmp_path, roles, data, budget=60)
    told = {name: value for name, value in run.notes.items() if isinstance(value, float)}
    assert told["valid_accuracy_evolved"] > told["valid_accuracy_defaults"] + 0.05
    assert told["valid_accuracy_evolved"] > told["valid_accuracy_best_model"] + 0.05
    assert told["dev_accuracy_evolved"] > told["dev_accuracy_defaults"]
