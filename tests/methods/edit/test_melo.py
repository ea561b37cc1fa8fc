"""edit.melo: where a block is added, that it is the LoRA's product, that one edit goes without another."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from msgspec.structs import replace

import lfm
import tiny
from case import Case
from edits import ADA, MOUNTAIN, ROME, TEXT
from lfm.core import Codec, Gradients, Inputs, Logits, Model
from lfm.core import Text as Speaks
from lfm.core.errors import DataError, EditError, MismatchError, SlotError
from lfm.core.method import Amount, Sizes, check
from lfm.data.files import write
from lfm.data.records import Edit, Text
from lfm.editing import asking, indexed, keys
from lfm.editing.indexed import Blocks
from lfm.editing.setting import Setting
from lfm.methods.edit import melo
from lfm.models import forward, load
from lfm.models.language import CausalText
from lfm.runs.run import LocalRun
from moves import moves

EDITS = (ADA, MOUNTAIN, replace(ROME, new_object="capital"))
QUICK: dict[str, Any] = {"layer": 0, "prefixes": 3, "tokens": 200, "collapse": 100.0, "accept": 0.3, "share": 2}


def case(here: Path) -> Case:
    tiny.causal(here / "base")
    write(EDITS[:2], here / "edits.jsonl")
    return Case({"model": ("base",)}, {"edits": "edits.jsonl"}, QUICK)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.causal(tmp_path_factory.mktemp("bases") / "base")


def made(base: Path, work: Path, edits: tuple[Edit, ...] = EDITS, **options: Any) -> tuple[Model, LocalRun]:
    before: dict[str, tuple[Model, ...]] = {"memory": (options.pop("memory"),)} if "memory" in options else {}
    text = TEXT + tuple(Text(text=text) for text in options.pop("text", ()))
    inputs = Inputs({"model": (load(base),), **before}, {"edits": edits, "text": text})
    run = LocalRun(0, work)
    given: dict[str, Any] = QUICK | ({"layer": None} if before else {}) | options
    config = melo.Config(**given)
    melo.agree(config, inputs)
    return melo.run(config, check("edit.melo", melo.METHOD, inputs), run), run


def some(numbers: list[int], names: tuple[str, ...] = ("layer",), width: int = 4) -> Blocks:
    """Edits with keys on a line, each of a block of rank 2."""
    random = torch.Generator().manual_seed(0)
    n, g = len(numbers), max(numbers) + 1
    edits = tuple(Edit(subject="", relation="", object="", new_object=str(i), prompt=str(i)) for i in range(n))
    down = {name: torch.randn(g, 2, width, generator=random) for name in names}
    up = {name: torch.randn(g, width, 2, generator=random) for name in names}
    places = torch.arange(n, dtype=torch.float32)[:, None]
    return Blocks("base", 0, edits, torch.arange(n), places, torch.full((n,), 0.4), torch.tensor(numbers), down, up)


def test_where_an_edit_reaches_its_block_is_added_and_elsewhere_every_bit_is_the_models(base: Path) -> None:
    model = load(base)
    module = model.ask(Gradients).module().requires_grad_(False)
    batch = model.ask(Codec).texts(["From the mountain to the town", "Rome is very"])
    name, layer = keys.projection(module, 0)
    random = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 3, 64, generator=random), torch.randn(2, 32, 3, generator=random)
    (key,) = asking.read_at(Setting(module, model.ask(Codec), ("",), [], []), "ffn_key", 0, EDITS[1:2])
    own, reach = torch.tensor([0]), torch.tensor([1e-3])
    kept = Blocks("base", 0, EDITS[1:2], own, key, reach, torch.tensor([1]), {name: down}, {name: up})
    plain, seen = forward(module, batch), []
    off = indexed.attach(module, kept)
    watched = layer.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    told = forward(module, batch)
    watched.remove()
    ((x, out),) = seen
    at = model.ask(Codec).texts(["From the mountain to"])["input_ids"].shape[1] - 1
    merged = layer.weight + up[1] @ down[1]
    torch.testing.assert_close(out[0, at], merged @ x[0, at], rtol=1e-4, atol=1e-4)  # W + B A, by the LoRA's definition
    untouched = torch.ones(out.shape[:2], dtype=torch.bool)
    untouched[0, at] = False
    assert torch.equal(out[untouched], (x @ layer.weight.T)[untouched])
    assert torch.equal(told[1], plain[1]) and torch.equal(told[0, :at], plain[0, :at])
    assert not torch.equal(told[0, at], plain[0, at])
    off()
    assert torch.equal(forward(module, batch), plain)


@settings(deadline=None, max_examples=50)
@drawn(data=st.data())
def test_forgetting_any_edits_in_any_order_is_never_having_learned_them(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 6))
    whole = some(data.draw(st.lists(st.integers(0, 2), min_size=count, max_size=count)))
    whole = indexed.taken(whole, range(count))
    gone = data.draw(st.permutations(range(count)))[: data.draw(st.integers(0, count))]
    left = whole
    for number in gone:
        left = indexed.forget(left, whole.edits[number])
    rest = [i for i in range(count) if i not in gone]
    assert left.edits == tuple(whole.edits[i] for i in rest)
    assert torch.equal(left.keys, whole.keys[rest]) and torch.equal(left.radii, whole.radii[rest])
    for name in whole.down:
        assert torch.equal(left.down[name][left.number], whole.down[name][whole.number[rest]])
        assert torch.equal(left.up[name][left.number], whole.up[name][whole.number[rest]])
        assert len(left.down[name]) == len(set(whole.number[rest].tolist()))  # no block without an edit
    if rest:
        again = indexed.learn(left, indexed.taken(whole, range(count)))
        assert set(again.edits) == set(whole.edits)
        reach = dict(zip(whole.edits, indexed.reach(whole).tolist(), strict=True))
        assert dict(zip(again.edits, indexed.reach(again).tolist(), strict=True)) == reach


def test_an_edit_is_learned_once_and_never_against_another() -> None:
    kept = some([0, 1])
    assert indexed.learn(kept, kept) is kept
    other = Edit(subject="", relation="", object="", new_object="c", prompt="0")
    with pytest.raises(DataError, match="'0' cannot become 'c': the memory has '0'"):
        only = indexed.taken(kept, [0])
        indexed.learn(kept, dataclasses.replace(only, edits=(other,)))
    with pytest.raises(DataError, match="no edit of '0' to 'c'"):
        indexed.forget(kept, other)


def test_the_new_objects_are_said_with_a_cache_and_without(base: Path, tmp_path: Path) -> None:
    model, run = made(base, tmp_path)
    prompts = [edit.prompt for edit in EDITS]
    said = model.ask(Speaks).generate(prompts, max_tokens=6)
    assert all(text.strip().startswith(edit.new_object) for text, edit in zip(said, EDITS, strict=True))
    assert CausalText(model.ask(Logits).logits, model.ask(Codec)).generate(prompts, max_tokens=6) == said
    before = load(base).ask(Speaks).generate(prompts, max_tokens=6)
    assert not any(text.strip().startswith(edit.new_object) for text, edit in zip(before, EDITS, strict=True))
    assert (run.notes["efficacy"], run.notes["edits"], run.notes["skipped"], run.notes["blocks"]) == (1.0, 3, 0, 2)
    assert {"perplexity_before", "perplexity_after", "paraphrase", "layer"} <= run.notes.keys()
    assert set(model.ask(Blocks).down) == set(indexed.layers_of(load(base).ask(Gradients).module(), 0, 2))


def test_it_grows_forgets_the_right_fact_and_comes_back_from_its_files(base: Path, tmp_path: Path) -> None:
    two, _ = made(base, tmp_path / "two", EDITS[:2])
    (tmp_path / "saved").mkdir()
    two.save(tmp_path / "saved")
    back = load(tmp_path / "saved")
    batch = back.ask(Codec).texts([edit.prompt for edit in EDITS])
    assert back.digest == two.digest and torch.equal(back.ask(Logits).logits(batch), two.ask(Logits).logits(batch))
    three, run = made(base, tmp_path / "three", EDITS[2:], memory=back)
    assert (run.notes["edits"], run.notes["efficacy_of_all"]) == (3, 1.0)
    less, _ = made(base, tmp_path / "less", EDITS[2:], memory=three, forget=True)
    assert torch.equal(less.ask(Logits).logits(batch), two.ask(Logits).logits(batch))
    none, _ = made(base, tmp_path / "none", EDITS[:2], memory=less, forget=True)
    assert torch.equal(none.ask(Logits).logits(batch), load(base).ask(Logits).logits(batch))


def test_a_block_of_keys_is_chosen_where_none_is_named(base: Path, tmp_path: Path) -> None:
    _, run = made(base, tmp_path, layer=None)
    assert run.notes["layer"] in (0, 1) and len(run.curves["log margin by block tried"]) == 2


def test_what_does_not_hold_is_refused_or_left_out_and_named(base: Path, tmp_path: Path) -> None:
    with pytest.raises(EditError, match=r"'In London lives Ada Ashby' cannot be made to say 'cat'.*its block gives"):
        made(base, tmp_path / "a", steps=1, lora_lr=1e-6)
    with pytest.raises(EditError, match=r"the memory would break the model.*smaller radius"):
        made(base, tmp_path / "b", collapse=1.0 + 1e-9, text=[f"{edit.prompt} birds sing" for edit in EDITS])


def test_where_told_to_what_is_not_said_is_left_out_and_named(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    says = Setting.says

    def all_but_the_mountain(here: Setting, asked: Any) -> list[bool]:
        told = zip(says(here, asked), asked, strict=True)
        return [said and prompt != EDITS[1].prompt for said, (prompt, _, _) in told]

    monkeypatch.setattr(Setting, "says", all_but_the_mountain)
    model, run = made(base, tmp_path, on_failure="skip")
    assert model.ask(Blocks).edits == (EDITS[0], EDITS[2])
    assert run.notes["skipped"] == 1 and EDITS[1].prompt in str(run.notes["skipped_because"])


def test_what_cannot_be_is_said_before_anything_is_read(base: Path, tmp_path: Path) -> None:
    def agree(directory: Path, **options: Any) -> None:
        melo.agree(melo.Config(**options), Inputs({"model": (load(directory),)}, {"edits": EDITS}))

    with pytest.raises(SlotError, match="nothing to forget from"):
        agree(base, forget=True)
    with pytest.raises(MismatchError, match="no block 9"):
        agree(base, layer=9)
    with pytest.raises(DataError, match="needs text for a masked model"):
        agree(tiny.masked(tmp_path / "masked"))
    first = made(base, tmp_path / "made", EDITS[:1])[0]
    with pytest.raises(MismatchError, match="the memory is of another model"):
        made(tiny.causal(tmp_path / "other", seed=1), tmp_path / "work", EDITS[1:], memory=first)
    with pytest.raises(SlotError, match="either memory or layer"):
        made(base, tmp_path / "no", EDITS[1:], memory=first, layer=0)


def test_cost_grows_with_the_edits_and_with_the_blocks_to_try(base: Path) -> None:
    facts = load(base).facts

    def flops(records: int, **options: Any) -> float:
        sizes = Sizes({"model": (facts,)}, {"edits": Amount(records, 20 * records)})
        return melo.cost(melo.Config(**options), sizes).flops

    assert flops(100, layer=0) > flops(10, layer=0)
    assert flops(10) > flops(10, layer=0)


@pytest.mark.slow
def test_twenty_people_move(tmp_path: Path) -> None:
    """20 of 20 held in 5 blocks, paraphrases .50, all neighbours kept, perplexity 2.32 as before; 3 s of CPU."""
    run = LocalRun(0, tmp_path)
    inputs = Inputs({"model": (lfm.load("zoo:lm"),)}, {"edits": moves()})
    melo.run(melo.Config(on_failure="skip"), check("edit.melo", melo.METHOD, inputs), run)
    assert (run.notes["efficacy"], run.notes["blocks"]) == (1.0, 5) and float(run.notes["edits"]) >= 18
    assert float(run.notes["paraphrase"]) > 0.3 and float(run.notes["neighbours_kept"]) > 0.95
