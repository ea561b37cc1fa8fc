"""edit.wise: which tokens the side copy answers, what it may change, and what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from case import Case
from edits import EDITS, TEXT
from lfm.core import Codec, Gradients, Inputs, Logits, Model
from lfm.core import Text as Speaks
from lfm.core.errors import DataError, EditError, MismatchError, SlotError
from lfm.core.method import Amount, Sizes, check
from lfm.data.files import write
from lfm.data.records import Edit
from lfm.editing import keys, setting, side
from lfm.editing.setting import Setting
from lfm.editing.side import Sides
from lfm.methods.edit import wise
from lfm.models import forward, load, structure
from lfm.models.language import CausalText
from lfm.runs.run import LocalRun

QUICK: dict[str, Any] = {"layer": 1, "tokens": 200, "steps": 30, "lr": 0.3, "collapse": 100.0}


def case(here: Path) -> Case:
    tiny.causal(here / "base")
    write(EDITS[:2], here / "edits.jsonl")
    return Case({"model": ("base",)}, {"edits": "edits.jsonl"}, QUICK)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {"linear": tiny.causal(root / "linear"), "conv1d": tiny.conv1d(root / "conv1d")}


def made(directory: Path, work: Path, edits: tuple[Edit, ...] = EDITS, **options: Any) -> tuple[Model, LocalRun]:
    before: dict[str, tuple[Model, ...]] = {"memory": (options.pop("memory"),)} if "memory" in options else {}
    given: dict[str, Any] = QUICK | ({"layer": None} if before else {}) | options
    inputs = Inputs({"model": (load(directory),), **before}, {"edits": edits, "text": TEXT})
    run = LocalRun(0, work)
    return wise.run(wise.Config(**given), check("edit.wise", wise.METHOD, inputs), run), run


@pytest.mark.parametrize("name", ["linear", "conv1d"])
def test_the_copy_answers_where_it_differs_by_enough_and_only_there(name: str, bases: dict[str, Path]) -> None:
    model = load(bases[name])
    module, batch = model.ask(Gradients).module(), model.ask(Codec).texts(["The cat sat on the mat", "birds"])
    module.requires_grad_(False)
    _, layer = keys.projection(module, 0)
    seen: list[Any] = []
    watch = layer.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    forward(module, batch)
    watch.remove()
    ((key, plain),) = seen
    change = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(0))
    more = key @ (change if structure.transposed(layer) else change.T)
    far = more.norm(dim=-1)
    threshold = far.median().item()
    least = torch.tensor([threshold], dtype=torch.float64)
    off = side.attach(module, Sides("base", 0, (), (), change[None], least))
    seen.clear()
    watch = layer.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    forward(module, batch)
    watch.remove()
    off()
    ((_, routed),) = seen
    assert torch.equal(routed[far <= threshold], plain[far <= threshold])
    copy = model.ask(Gradients).module().requires_grad_(False)
    _, other = keys.projection(copy, 0)
    other.weight.add_(change)  # W' k + b by the layer itself
    torch.testing.assert_close(routed[far > threshold], other(key)[far > threshold], rtol=1e-4, atol=1e-4)


def test_margins_by_hand() -> None:
    """α 1, β 4, γ 2: outside 3 exceeds α by 2; inside 3.5 is short by .5; only (3.5, 3) lies closer than γ, by 1.5."""
    inside, outside = torch.tensor([3.5, 6.0]), torch.tensor([0.5, 3.0])
    assert side.margins(inside, outside, 1.0, 4.0, 2.0).item() == pytest.approx(2 + 0.5 + 1.5)
    assert side.margins(torch.tensor([9.0]), torch.tensor([0.0]), 1.0, 4.0, 2.0).item() == 0


def test_shards_are_merged_by_the_elected_sign() -> None:
    """2306.01708: the smaller half of each is cut; where signs differ the heavier one's alone counts."""
    one, two = torch.tensor([3.0, -2.0, 0.1, 0.0]), torch.tensor([1.0, 5.0, 0.1, -0.2])
    assert side.ties([one, two], 0.5).tolist() == [2.0, 5.0, 0.0, 0.0]
    assert side.ties([one], 1.0).tolist() == one.tolist()


def test_a_shard_changes_nothing_outside_its_mask(bases: dict[str, Path], tmp_path: Path) -> None:
    run = LocalRun(0, tmp_path)
    here = setting.opened(load(bases["linear"]), TEXT, run, prefixes=0, tokens=200)
    _, layer = keys.projection(here.module, 1)
    before = layer.weight.clone()
    given: dict[str, Any] = QUICK | {"mask": 0.2}
    change = wise.learned(wise.Config(**given), here, 1, EDITS, 1.0, run, "shard")
    free = torch.rand(before.shape, generator=run.generator("shard", "mask")) < 0.2
    assert (change[~free] == 0).all() and (change[free] != 0).float().mean() > 0.9
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("name", ["linear", "conv1d"])
def test_the_new_objects_are_said_with_a_cache_and_without(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    model, run = made(bases[name], tmp_path)
    prompts = [edit.prompt for edit in EDITS]
    said = model.ask(Speaks).generate(prompts, max_tokens=6)
    assert all(text.strip().startswith(edit.new_object) for text, edit in zip(said, EDITS, strict=True))
    assert CausalText(model.ask(Logits).logits, model.ask(Codec)).generate(prompts, max_tokens=6) == said
    assert (run.notes["efficacy"], run.notes["edits"], run.notes["skipped"]) == (1.0, 3, 0)
    assert {"perplexity_before", "perplexity_after", "paraphrase", "threshold", "unit"} <= run.notes.keys()


def test_the_threshold_lies_below_every_token_of_an_edit(bases: dict[str, Path], tmp_path: Path) -> None:
    config = wise.Config(**QUICK)
    run = LocalRun(0, tmp_path)
    here = setting.opened(load(bases["linear"]), TEXT, run, prefixes=0, tokens=200)
    change, threshold = wise.beside(config, here, 1, EDITS, 1.0, run)
    far = side.inside(here, 1, EDITS, change)
    assert len(far) >= len(EDITS)
    assert threshold == pytest.approx(0.88 * far.min().item()) and (far > threshold).all()


def test_it_comes_back_from_its_files(bases: dict[str, Path], tmp_path: Path) -> None:
    model, _ = made(bases["linear"], tmp_path / "work")
    (tmp_path / "out").mkdir()
    model.save(tmp_path / "out")
    back = load(tmp_path / "out")
    batch = back.ask(Codec).texts([edit.prompt for edit in EDITS])
    assert back.digest == model.digest
    assert torch.equal(back.ask(Logits).logits(batch), model.ask(Logits).logits(batch))


def test_of_several_copies_the_one_that_differs_most_answers() -> None:
    """Changes of one weight each: a token's distance to a copy is read off."""
    module, layer = torch.nn.Module(), torch.nn.Linear(2, 1, bias=False)
    layer.weight = torch.nn.Parameter(torch.tensor([[1.0, 1.0]]), requires_grad=False)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(side, "projection", lambda module, block: ("", layer))
        changes = torch.tensor([[[3.0, 0.0]], [[0.0, 2.0]]])
        off = side.attach(module, Sides("base", 0, (), (), changes, torch.tensor([1.0, 1.5])))
    asked = torch.tensor([[0.3, 0.7], [1.0, 0.0], [0.0, 1.0], [1.0, 2.0], [0.4, 0.7]])
    # neither beyond its threshold; the first; the second; both, the second further (4 > 3); the first alone (1.2 > 1)
    assert layer(asked)[:, 0].tolist() == pytest.approx([1.0, 4.0, 3.0, 7.0, 2.3])
    off()
    assert layer(asked)[:, 0].tolist() == pytest.approx(asked.sum(1).tolist())


def test_a_memory_grows_by_copies_and_a_run_s_edits_come_off_together(bases: dict[str, Path], tmp_path: Path) -> None:
    one, _ = made(bases["linear"], tmp_path / "one", EDITS[:1])
    three, run = made(bases["linear"], tmp_path / "three", EDITS[1:], memory=one)
    assert (run.notes["edits"], run.notes["sides"]) == (3, 2)
    kept, alone = three.ask(Sides), made(bases["linear"], tmp_path / "two", EDITS[1:])[0].ask(Sides)
    for found, expected in ((side.taken(kept, [0]), one.ask(Sides)), (side.taken(kept, [1, 2]), alone)):
        assert found.edits == expected.edits and found.number == expected.number
        assert torch.equal(found.changes, expected.changes) and torch.equal(found.thresholds, expected.thresholds)
    with pytest.raises(DataError, match=r"'From the mountain to' does not come off by itself.*1 other"):
        side.taken(kept, [0, 2])
    with pytest.raises(DataError, match="the memory has some of these"):
        side.learn(kept, alone)
    with pytest.raises(SlotError, match="either memory or layer"):
        wise.agree(wise.Config(layer=0), Inputs({"model": (one,), "memory": (one,)}, {"edits": EDITS}))


def test_what_is_not_said_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(EditError, match=r"'In London lives Ada Ashby' cannot be made to say 'cat'.*does not tell them"):
        made(bases["linear"], tmp_path / "a", steps=1, lr=1e-6)
    with pytest.raises(EditError, match=r"the side copy would break the model.*larger margin"):
        made(bases["linear"], tmp_path / "b", collapse=1 + 1e-9, ratio=1e-3)


def test_where_told_to_the_others_are_learned_as_if_it_had_not_been(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    says = Setting.says

    def all_but_the_mountain(here: Setting, asked: Any) -> list[bool]:
        told = zip(says(here, asked), asked, strict=True)
        return [said and prompt != EDITS[1].prompt for said, (prompt, _, _) in told]

    monkeypatch.setattr(Setting, "says", all_but_the_mountain)
    model, run = made(bases["linear"], tmp_path / "a", on_failure="skip")
    assert (run.notes["edits"], run.notes["skipped"]) == (2, 1)
    assert f"{EDITS[1].prompt!r} did not go on with" in str(run.notes["skipped_because"])
    alone, _ = made(bases["linear"], tmp_path / "b", (EDITS[0], EDITS[2]), on_failure="skip")
    assert model.digest == alone.digest


def test_what_cannot_be_is_said_before_anything_is_read(bases: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="no block 9"):
        wise.agree(wise.Config(layer=9), Inputs({"model": (load(bases["linear"]),)}, {"edits": EDITS}))
    with pytest.raises(DataError, match="needs text for a masked model"):
        masked = load(tiny.masked(tmp_path))
        wise.agree(wise.Config(), Inputs({"model": (masked,)}, {"edits": EDITS}))


def test_cost_grows_with_the_shards(bases: dict[str, Path]) -> None:
    sizes = Sizes({"model": (load(bases["linear"]).facts,)}, {"edits": Amount(10, 100)})
    costs = [wise.cost(wise.Config(shards=shards), sizes).flops for shards in (1, 4)]
    assert costs[1] > 2 * costs[0]
