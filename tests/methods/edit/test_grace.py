"""edit.grace: how far each edit reaches, that one goes without another, and what the module says with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from msgspec.structs import replace

import tiny
from case import Case
from edits import ADA, MOUNTAIN, ROME, TEXT
from lfm import runs
from lfm.core import Codec, Gradients, Inputs, Logits, Model
from lfm.core import Text as Speaks
from lfm.core.errors import AccessError, DataError, EditError, MismatchError, SlotError
from lfm.core.method import Amount, Sizes, check
from lfm.data.files import write
from lfm.data.records import Edit, Text
from lfm.editing import asking, keys, memory, recall
from lfm.editing.memory import Memory
from lfm.editing.setting import Setting
from lfm.methods.edit import grace
from lfm.models import forward, load
from lfm.models.language import CausalText
from lfm.runs.run import LocalRun

EDITS = (ADA, MOUNTAIN, replace(ROME, new_object="capital"))
QUICK: dict[str, Any] = {"layer": 0, "prefixes": 3, "tokens": 200, "collapse": 100.0, "accept": 0.3, "lr": 1.0}


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
    config = grace.Config(**given)
    grace.agree(config, inputs)
    return grace.run(config, check("edit.grace", grace.METHOD, inputs), run), run


def by_hand(places: list[float], objects: list[str], radii: list[float]) -> Memory:
    """Keys on a line; each value is its edit's number."""
    edits = tuple(Edit(subject="", relation="", object="", new_object=o, prompt=str(i)) for i, o in enumerate(objects))
    values = torch.arange(len(places), dtype=torch.float32)[:, None]
    owner = torch.arange(len(edits))
    return Memory("base", 0, edits, owner, torch.tensor(places)[:, None], values, torch.tensor(radii))


@pytest.mark.parametrize(
    ("places", "objects", "radii", "expected"),
    [
        ([0.0, 5.0], ["a", "b"], [1.0, 1.0], [1.0, 1.0]),  # far apart: each its radius
        ([0.0, 1.0], ["a", "b"], [1.0, 1.0], [0.5, 0.5]),  # a conflict splits the distance
        ([0.0, 1.5], ["a", "a"], [1.0, 1.0], [1.5, 1.5]),  # agreement expands over the other
        ([0.0, 5.0], ["a", "a"], [1.0, 1.0], [1.0, 1.0]),  # but not to where neither would have reached
        ([0.0, 1.5, 2.0], ["a", "a", "b"], [1.0, 1.0, 1.0], [1.0, 0.25, 0.25]),  # and never past a conflict's middle
        ([0.0, 1.0], ["a", "b"], [0.2, 1.0], [0.2, 0.5]),
    ],
)
def test_ranges_by_hand(places: list[float], objects: list[str], radii: list[float], expected: list[float]) -> None:
    assert memory.ranges(by_hand(places, objects, radii)).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("agree", [True, False])
@pytest.mark.parametrize("apart", [0.3, 0.9, 1.1, 1.9, 2.1])
def test_for_two_edits_ranges_are_those_of_the_papers_algorithm(agree: bool, apart: float) -> None:
    """2211.11031, algorithm 1, written out for a second key at a distance from the first, all radii 1."""
    first = second = 1.0
    if apart <= 1.0 + first:  # ε_init + ε of the nearest
        if agree:
            first = second = max(first, apart)  # one key there, which covers both
        else:
            first = second = apart / 2
    found = memory.ranges(by_hand([0.0, apart], ["a", "a" if agree else "b"], [1.0, 1.0]))
    assert found.tolist() == pytest.approx([first, second])


def test_the_nearest_key_answers_if_it_reaches() -> None:
    kept = by_hand([0.0, 1.0, 4.0], ["a", "b", "c"], [1.0, 1.0, 1.0])
    index, inside = memory.lookup(kept.keys, memory.ranges(kept), torch.tensor([[-0.4], [0.6], [2.2], [4.9], [-0.6]]))
    assert index[inside].tolist() == [0, 1, 2]
    assert inside.tolist() == [True, True, False, True, False]


memories = st.lists(
    st.tuples(st.floats(-4, 4, width=32), st.sampled_from("abc"), st.floats(0.125, 2, width=32)),
    min_size=1,
    max_size=7,
    unique_by=lambda entry: entry[0],
)


@settings(deadline=None, max_examples=60)
@drawn(entries=memories, data=st.data())
def test_forgetting_any_edits_in_any_order_is_never_having_learned_them(entries: Any, data: st.DataObject) -> None:
    whole = by_hand(*(list(column) for column in zip(*entries, strict=True)))
    gone = data.draw(st.permutations(range(len(entries))))[: data.draw(st.integers(0, len(entries)))]
    left = whole
    for number in gone:
        left = memory.forget(left, whole.edits[number])
    rest = [i for i in range(len(entries)) if i not in gone]
    only = memory.forget(whole, *whole.edits)
    for number in data.draw(st.permutations(rest)):  # learned one by one, in another order
        others = [edit for i, edit in enumerate(whole.edits) if i != number]
        only = memory.learn(only, memory.forget(whole, *others))
    assert left.edits == tuple(whole.edits[i] for i in rest) and set(only.edits) == set(left.edits)
    queries = torch.linspace(-6, 6, 97)[:, None]
    answers = []
    for kept in (left, only):
        if not kept.edits:
            assert not rest
            continue
        index, inside = memory.lookup(kept.keys, memory.ranges(kept), queries)
        answers.append([kept.values[i].item() if yes else None for i, yes in zip(index, inside, strict=True)])
    if answers:
        reach = dict(zip(left.edits, memory.ranges(left).tolist(), strict=True))
        assert dict(zip(only.edits, memory.ranges(only).tolist(), strict=True)) == reach
        tied = (memory.distances(queries, left.keys).sort(1).values.diff(dim=1) == 0).any(1).tolist()
        assert [a for a, t in zip(answers[0], tied, strict=True) if not t] == [
            a for a, t in zip(answers[1], tied, strict=True) if not t
        ]


def test_an_edit_is_learned_once_and_never_against_another() -> None:
    kept = by_hand([0.0, 1.0], ["a", "b"], [1.0, 1.0])
    again = memory.learn(kept, kept)
    assert again.edits == kept.edits and torch.equal(again.keys, kept.keys)
    other = by_hand([0.0], ["c"], [1.0])
    with pytest.raises(DataError, match="'0' cannot become 'c': the memory has 'a'"):
        memory.learn(kept, other)
    with pytest.raises(DataError, match=r"no edit of '0' to 'c'.*it has 2: '0' to 'a', '1' to 'b'"):
        memory.forget(kept, other.edits[0])


def test_an_edit_that_the_memory_has_changes_nothing(base: Path, tmp_path: Path) -> None:
    one, _ = made(base, tmp_path / "one", EDITS[:1])
    again, run = made(base, tmp_path / "again", EDITS[:1], memory=one)
    assert torch.equal(again.ask(Memory).values, one.ask(Memory).values)
    assert (run.notes["edits"], run.notes["efficacy"]) == (1, 1.0)
    with pytest.raises(DataError, match="edit 2 repeats edit 1"):
        made(base, tmp_path / "twice", EDITS[:1] * 2)


def test_where_no_key_reaches_every_bit_is_the_models(base: Path) -> None:
    model = load(base)
    module = model.ask(Gradients).module().requires_grad_(False)
    codec = model.ask(Codec)
    batch = codec.texts(["From the mountain to the town", "Rome is very"])
    (key,) = asking.read_at(Setting(module, codec, ("",), [], []), "ffn_key", 0, EDITS[1:2])
    value = torch.full((1, 32), 3.0)
    kept = Memory("base", 0, EDITS[1:2], torch.tensor([0]), key, value, torch.tensor([1e-3]))
    seen = []
    layer = keys.projection(module, 0)[1]
    plain = forward(module, batch)
    off = memory.attach(module, kept)
    watched = layer.register_forward_hook(lambda _, __, out: seen.append(out.clone()))
    told = forward(module, batch)
    watched.remove()
    at = codec.texts(["From the mountain to"])["input_ids"].shape[1] - 1
    assert torch.equal(seen[0][0, at], value[0])
    assert (seen[0] == 3.0).all(-1).sum() == 1  # nowhere else
    assert torch.equal(told[1], plain[1]) and torch.equal(told[0, :at], plain[0, :at])
    assert not torch.equal(told[0, at], plain[0, at])
    off()
    assert torch.equal(forward(module, batch), plain)


def test_each_value_is_found_as_if_it_were_searched_for_alone(base: Path) -> None:
    model = load(base)
    module = model.ask(Gradients).module().requires_grad_(False)
    tokenizer = model.ask(Codec).tokenizer
    together = recall.search(module, 0, asking.asked(tokenizer, EDITS), steps=50, lr=0.5, stop=1.0)
    assert min(together.probabilities) > 0.36  # e⁻¹
    assert len(set(together.steps)) > 1  # each stops by itself
    for i, edit in enumerate(EDITS):
        alone = recall.search(module, 0, asking.asked(tokenizer, [edit]), steps=50, lr=0.5, stop=1.0)
        assert alone.steps == [together.steps[i]]
        torch.testing.assert_close(alone.values[0], together.values[i], rtol=1e-3, atol=1e-3)


def test_the_new_objects_are_said_with_a_cache_and_without(base: Path, tmp_path: Path) -> None:
    model, run = made(base, tmp_path)
    prompts = [edit.prompt for edit in EDITS]
    said = model.ask(Speaks).generate(prompts, max_tokens=6)
    assert all(text.strip().startswith(edit.new_object) for text, edit in zip(said, EDITS, strict=True))
    assert CausalText(model.ask(Logits).logits, model.ask(Codec)).generate(prompts, max_tokens=6) == said
    before = load(base).ask(Speaks).generate(prompts, max_tokens=6)
    assert not any(text.strip().startswith(edit.new_object) for text, edit in zip(before, EDITS, strict=True))
    assert (run.notes["efficacy"], run.notes["edits"], run.notes["skipped"]) == (1.0, 3, 0)
    assert {"perplexity_before", "perplexity_after", "paraphrase", "layer"} <= run.notes.keys()


def test_a_memory_grows_and_forgets_the_right_fact(base: Path, tmp_path: Path) -> None:
    """Forgetting the first of two leaves what would have been made of the second alone; of both, the model."""
    two, _ = made(base, tmp_path / "two", EDITS[:2])
    saved = tmp_path / "saved"
    saved.mkdir()
    two.save(saved)
    three, run = made(base, tmp_path / "three", EDITS[2:], memory=load(saved))
    assert (run.notes["edits"], run.notes["efficacy_of_all"]) == (3, 1.0)
    less, _ = made(base, tmp_path / "less", EDITS[:1], memory=three, forget=True)
    kept = less.ask(Memory)
    assert kept.edits == EDITS[1:]
    straight, _ = made(base, tmp_path / "straight", EDITS[1:])
    for name in ("keys", "values", "radii"):
        torch.testing.assert_close(getattr(kept, name), getattr(straight.ask(Memory), name), rtol=1e-3, atol=1e-3)
    none, _ = made(base, tmp_path / "none", EDITS[1:], memory=less, forget=True)
    batch = none.ask(Codec).texts([edit.prompt for edit in EDITS])
    assert torch.equal(none.ask(Logits).logits(batch), load(base).ask(Logits).logits(batch))


def test_a_memory_comes_back_from_its_files(base: Path, tmp_path: Path) -> None:
    model, _ = made(base, tmp_path / "work")
    (tmp_path / "out").mkdir()
    model.save(tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"program.json", "program.safetensors"}
    back = load(tmp_path / "out")
    assert back.digest == model.digest and back.ask(Memory).edits == EDITS
    batch = back.ask(Codec).texts([edit.prompt for edit in EDITS])
    assert torch.equal(back.ask(Logits).logits(batch), model.ask(Logits).logits(batch))


def test_a_block_is_chosen_where_none_is_named(base: Path, tmp_path: Path) -> None:
    _, run = made(base, tmp_path, layer=None)
    assert run.notes["layer"] in (0, 1)
    assert len(run.curves["log margin by block tried"]) == 2


def test_what_does_not_hold_is_refused_or_left_out_and_named(base: Path, tmp_path: Path) -> None:
    with pytest.raises(EditError, match=r"'In London lives Ada Ashby' cannot be made to say 'cat'.*best value found"):
        made(base, tmp_path / "a", steps=1, lr=1e-6)
    with pytest.raises(EditError, match=r"the memory would break the model.*smaller radius"):
        made(base, tmp_path / "b", text=[f"{edit.prompt} birds sing" for edit in EDITS], collapse=1.0 + 1e-9)
    awkward = Edit(subject="birds", relation="", object="", new_object="東京", prompt="the birds and")
    model, run = made(base, tmp_path / "c", (*EDITS, awkward), accept=0.45, on_failure="skip")
    kept = model.ask(Memory).edits
    assert 0 < len(kept) < 4 and run.notes["skipped"] == 4 - len(kept)
    gone = next(edit for edit in (*EDITS, awkward) if edit not in kept)
    assert gone.prompt in str(run.notes["skipped_because"])


def test_what_cannot_be_is_said_before_anything_is_read(base: Path, tmp_path: Path) -> None:
    model = load(base)

    def agree(config: grace.Config, **data: Any) -> None:
        grace.agree(config, Inputs({"model": (model,)}, data))

    with pytest.raises(SlotError, match="nothing to forget from"):
        agree(grace.Config(forget=True), edits=EDITS)
    with pytest.raises(DataError, match="contradicts"):
        agree(
            grace.Config(),
            edits=[EDITS[0], Edit(subject="Ada", relation="", object="", new_object="x", prompt=EDITS[0].prompt)],
        )
    with pytest.raises(MismatchError, match="no block 9"):
        agree(grace.Config(layer=9), edits=EDITS)
    with pytest.raises(MismatchError, match="edits language models"):
        grace.agree(grace.Config(), Inputs({"model": (load(tiny.classifier(tmp_path / "c")),)}, {"edits": EDITS}))
    with pytest.raises(DataError, match="needs text for a masked model"):
        grace.agree(grace.Config(), Inputs({"model": (load(tiny.masked(tmp_path / "masked")),)}, {"edits": EDITS}))
    other = tiny.causal(tmp_path / "other", seed=1)
    with pytest.raises(MismatchError, match="the memory is of another model"):
        made(other, tmp_path / "work", EDITS[1:], memory=made(base, tmp_path / "made", EDITS[:1])[0])


def test_a_model_without_a_memory_is_refused_by_name(base: Path) -> None:
    inputs = Inputs({"model": (load(base),), "memory": (load(base),)}, {"edits": EDITS})
    with pytest.raises(AccessError, match="asks memory of 'memory'"):
        check("edit.grace", grace.METHOD, inputs)


def test_cost_grows_with_the_edits_and_with_the_blocks_to_try(base: Path) -> None:
    facts = load(base).facts

    def flops(records: int, **options: Any) -> float:
        sizes = Sizes({"model": (facts,)}, {"edits": Amount(records, 20 * records)})
        return grace.cost(grace.Config(**options), sizes).flops

    assert flops(100, layer=0) > flops(10, layer=0)
    assert flops(10) > flops(10, layer=0)


def test_the_command_forgets(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LFM_HOME", str(tmp_path / "home"))
    write(EDITS[:2], tmp_path / "edits.jsonl")
    write(EDITS[:1], tmp_path / "wrong.jsonl")
    first = {"model": [base]}
    runs.execute(
        runs.Order(
            id="edit.grace", models=first, data={"edits": tmp_path / "edits.jsonl"}, settings=QUICK, out=tmp_path / "a"
        )
    )
    done = runs.execute(
        runs.Order(
            id="edit.grace",
            models=first | {"memory": [tmp_path / "a"]},
            data={"edits": tmp_path / "wrong.jsonl"},
            settings={"collapse": 100.0, "tokens": 200, "forget": True},
            out=tmp_path / "b",
        )
    )
    assert done.verified.max_abs == 0
    assert load(tmp_path / "b").ask(Memory).edits == EDITS[1:2]
