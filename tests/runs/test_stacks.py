"""Ledgers of edits in memories: each patch is some facts' rows, and what is left is what had been made without it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import forms
import tiny
from lfm import runs
from lfm.cli import run
from lfm.core import Codec, Gradients, Logprobs, Model, Text, registry
from lfm.core.errors import ConfigError, DataError, EditError
from lfm.core.interfaces import LowRank
from lfm.data.files import write
from lfm.data.records import Edit, Fact
from lfm.editing import asking, indexed, scope
from lfm.editing.indexed import Blocks
from lfm.editing.keys import projection
from lfm.editing.memory import Memory
from lfm.editing.neurons import Neurons
from lfm.editing.scope import Scope
from lfm.editing.setting import Setting
from lfm.editing.side import Sides
from lfm.methods.edit import ike
from lfm.models import load, structure
from lfm.retrieval.demonstrations import examples_of
from lfm.runs import committing, interference, patches, stacks

WIDE = 1e4
"""A radius within which every token lies: what is answered hangs on which edits there are."""

PROMPTS = ("Here lives Ada Ashby", "From the mountain", "Rome is very", "Berlin is the capital of")
OBJECTS = ("cat", "dog", "town", "good")
QUICK = {"layer": 0, "prefixes": 3, "tokens": 200, "collapse": 100.0, "accept": 0.3, "lr": 1.0}
FACTS = (
    Edit(subject="Ada Ashby", relation="in", object="in", new_object="cat", prompt="In London lives Ada Ashby"),
    Edit(subject="the mountain", relation="from", object="in", new_object="dog", prompt="From the mountain to"),
    Edit(subject="Rome", relation="is", object="in", new_object="capital", prompt="Rome is very"),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base"
    tiny.causal(path)
    return path


def facts(number: int) -> tuple[Edit, ...]:
    """One or two edits of a patch."""
    prompts = (f"{PROMPTS[number % 4]} {number}", f"{number} of {PROMPTS[0]}")[: 1 + number % 2]
    object = OBJECTS[number % 4]
    return tuple(Edit(subject="", relation="", object="", new_object=object, prompt=prompt) for prompt in prompts)


Rows = Callable[[Model, int], Any]


def grace(model: Model, number: int) -> Memory:
    made, shape, n = torch.Generator().manual_seed(number), _shape(model), len(facts(number))
    owner, keys = _several(_keys(model, number), made)
    values = torch.randn(2 * n, shape.width, generator=made)
    return Memory(model.digest, 0, facts(number), owner, keys, values, torch.full((2 * n,), WIDE))


def _several(keys: torch.Tensor, made: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Two keys for each edit, as a masked model has them whose object fills two blanks."""
    keys = keys.repeat_interleave(2, 0)
    return torch.arange(len(keys)) // 2, keys + torch.randn(keys.shape, generator=made) / 9


def t_patcher(model: Model, number: int) -> Neurons:
    made, shape, n = torch.Generator().manual_seed(number), _shape(model), 2 * len(facts(number))
    keys, values = (torch.randn(n, shape.width, generator=made) for _ in range(2))
    return Neurons(model.digest, 0, facts(number), torch.arange(n) // 2, keys, torch.randn(n, generator=made), values)


def melo(model: Model, number: int) -> Blocks:
    made, n = torch.Generator().manual_seed(number), len(facts(number))
    module = model.ask(Gradients).module()
    layers = {name: module.get_submodule(name) for name in indexed.layers_of(module, 0, 2)}
    down = {name: torch.randn(1, 2, layer.in_features, generator=made) for name, layer in layers.items()}
    up = {name: torch.randn(1, layer.out_features, 2, generator=made) for name, layer in layers.items()}
    owner, keys = _several(_keys(model, number), made)
    radii, all_of_it = torch.full((2 * n,), WIDE), torch.zeros(n, dtype=torch.long)
    return Blocks(model.digest, 0, facts(number), owner, keys, radii, all_of_it, down, up)


def serac(model: Model, number: int) -> Scope:
    """The classifier and the second model are the ledger's; the rows are what it makes of the prompts."""
    made, module = torch.Generator().manual_seed(0), model.ask(Gradients).module()
    map = torch.randn(_shape(model).width, 8, generator=made) / 9
    name, layer = next((n, m) for n, m in module.named_modules() if n.endswith("down_proj"))
    change = LowRank(torch.ones(layer.out_features, 1) / 9, torch.ones(1, layer.in_features) / 9)
    seen = scope.means(module, model.ask(Codec), 0, [edit.prompt for edit in facts(number)])
    return Scope(model.digest, 0, facts(number), seen @ map, map, {name: change})


def ike_(model: Model, number: int) -> ike.Told:
    examples = tuple(example for edit in facts(number) for example in examples_of(edit))
    n, m = len(facts(number)), len(examples)
    return ike.Told(model.digest, facts(number), (0,) * n, examples, (0,) * m, {})


def wise(model: Model, number: int) -> Sides:
    made, n = torch.Generator().manual_seed(number), len(facts(number))
    _, layer = projection(model.ask(Gradients).module(), 0)
    changes = torch.randn(1, *layer.weight.shape, generator=made)
    return Sides(model.digest, 0, facts(number), (0,) * n, changes, torch.tensor([0.01], dtype=torch.float64))


def _keys(model: Model, number: int) -> torch.Tensor:
    """What is looked up at the end of each prompt."""
    here = Setting(model.ask(Gradients).module(), model.ask(Codec), ("",), [], [])
    return torch.cat(asking.read_at(here, "ffn_key", 0, facts(number)))


def _shape(model: Model) -> Any:
    module = model.ask(Gradients).module()
    return structure.feed_forward(module, structure.blocks(module)[0])


MEMORIES: dict[str, Rows] = {
    "edit.grace": grace,
    "edit.ike": ike_,
    "edit.melo": melo,
    "edit.serac": serac,
    "edit.t_patcher": t_patcher,
    "edit.wise": wise,
}
SETTINGS = {"edit.ike": {"k": 2}}


def begun(directory: Path, base: Path, id: str) -> patches.Ledger:
    directory.mkdir()
    return patches.Ledger(base=str(base), base_digest=load(base).digest, memory=id)


def put(directory: Path, ledger: patches.Ledger, number: int) -> patches.Ledger:
    id, config = ledger.memory, SETTINGS.get(ledger.memory, {})
    patch = patches.Patch(number=number, method=id, seed=0, config=config, edits=facts(number), measured={}, made="now")
    ledger = msgspec.structs.replace(ledger, patches=(*ledger.patches, patch))
    return committing.put(directory, ledger, MEMORIES[ledger.memory](load(ledger.base), number))


def said(model: Model) -> list[Any]:
    asked = [edit.prompt for number in range(1, 8) for edit in facts(number)]
    return [[tuple(one) for one in told] for told in model.ask(Logprobs).top(asked, 4)]


@pytest.mark.parametrize("id", MEMORIES)
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_in_whatever_order_patches_come_and_go_what_is_left_is_as_if_the_others_had_never_been(
    id: str, base: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    directory = tmp_path_factory.mktemp("ledger")
    ledger, left, last = begun(directory / "led", base, id), list[int](), 0
    for _ in range(data.draw(st.integers(1, 6), label="steps")):
        if left and data.draw(st.booleans(), label="revert"):
            number = data.draw(st.sampled_from(left), label="which")
            ledger = patches.revert(directory / "led", number)
            left.remove(number)
        else:
            last += 1
            ledger = put(directory / "led", ledger, last)
            left.append(last)
    found = patches.model(directory / "led")
    if not left:
        assert found.digest == load(base).digest and not (directory / "led" / "head").exists()
        return
    fresh = begun(directory / "fresh", base, id)
    for number in left:
        fresh = put(directory / "fresh", fresh, number)
    expected = patches.model(directory / "fresh")
    assert found.digest == expected.digest
    kept = registry.get(id).method.kept
    assert kept and [e.prompt for e in found.ask(kept.kind).edits] == [e.prompt for n in left for e in facts(n)]
    assert said(found) == said(expected)
    gone = next((n for n in range(1, last + 1) if n not in left), None)
    if gone is not None and len(left) < 3:  # what was reverted can still be looked at, and is not there
        assert interference.beside(directory / "led", gone).together.digest != found.digest
    then = said(found)
    patches.squash(directory / "led")
    assert patches.model(directory / "led").digest == found.digest and said(patches.model(directory / "led")) == then


@pytest.mark.parametrize("id", MEMORIES)
def test_a_patch_alone_and_the_head_are_programs_that_answer_otherwise(id: str, base: Path, tmp_path: Path) -> None:
    ledger = begun(tmp_path / "led", base, id)
    for number in (1, 2):
        ledger = put(tmp_path / "led", ledger, number)
    told = [said(load(base)), *(said(load(tmp_path / "led" / place)) for place in ("0001", "0002", "head"))]
    assert all(one != other for i, one in enumerate(told) for other in told[:i])
    (moved,) = interference.beside(tmp_path / "led", 1).moved
    if id in ("edit.ike", "edit.wise"):  # which have no keys
        assert (moved.rank, moved.reads) == (2, {})
        return
    mine, other = (MEMORIES[id](load(base), n).keys for n in (1, 2))
    cosines = torch.nn.functional.cosine_similarity(mine[:, None].double(), other[None].double(), dim=-1)
    assert (moved.rank, moved.norm, moved.overlap) == (2, None, {})
    assert moved.reads == {2: pytest.approx(float(cosines.max()), abs=1e-9)}


def test_killed_before_its_commit_it_never_was_and_after_it_is_done(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = begun(tmp_path / "led", base, "edit.grace")
    for number in (1, 2):
        ledger = put(tmp_path / "led", ledger, number)
    then = patches.model(tmp_path / "led").digest

    class Killed(BaseException):
        pass

    def dies(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as before, pytest.raises(Killed):
        before.setattr(committing.os, "fsync", dies)
        patches.revert(tmp_path / "led", 1)
    assert patches.model(tmp_path / "led").digest == load(tmp_path / "led" / "head").digest == then
    patches.revert(tmp_path / "led", 1)
    assert patches.model(tmp_path / "led").ask(Memory).edits == facts(2)


def words(given: dict[str, Any]) -> list[str]:
    return [word for key, value in given.items() for word in ("--set", f"{key}={value}")]


@pytest.mark.parametrize("name", ["bert", pytest.param("t5", marks=pytest.mark.slow)])
def test_a_memory_of_a_model_that_does_not_go_on_is_asked_again_too(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A masked model's program gives logits and no text; what is left of two patches is the other, bit for bit."""
    monkeypatch.chdir(tmp_path)
    auto = transformers.AutoModelForMaskedLM if name == "bert" else transformers.AutoModelForSeq2SeqLM
    base = forms.taught(forms.MODELS[name](tmp_path / "base"), auto)
    write(list(forms.TEXT), Path("text.jsonl"))
    for number, fact in enumerate(forms.EDITS):
        write([fact], Path(f"{number}.jsonl"))
    how = ["text=text.jsonl", *words(QUICK | {"collapse": 1e4, "steps": 100})]
    how[how.index("layer=0")] = f"layer={1 if name == 'bert' else 2}"
    assert run(["edit", "add", "led", "0.jsonl", "--model", str(base), "--by", "edit.grace", *how]) == 0
    one = load(Path("led/head")).digest
    assert run(["edit", "add", "led", "1.jsonl", *how]) == 0
    assert patches.said(load(Path("led/head")), forms.EDITS) == [True, True]
    assert run(["edit", "revert", "led", "2"]) == 0
    assert load(Path("led/head")).digest == one


def test_facts_go_into_a_memory_are_shown_and_come_off(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for number, fact in enumerate(FACTS):
        write([fact], Path(f"{number}.jsonl"))
    assert run(["edit", "add", "led", "0.jsonl", "--model", str(base), "--by", "edit.grace", *words(QUICK)]) == 0
    later = words({key: value for key, value in QUICK.items() if key != "layer"})
    assert run(["edit", "add", "led", "1.jsonl", *later]) == 0  # by the memory's own method
    assert run(["edit", "add", "led", "2.jsonl", *words(QUICK | {"layer": -2})]) == 0  # the block that it is of
    three = load(Path("led/head"))
    assert three.ask(Memory).edits == FACTS
    capsys.readouterr()
    assert run(["edit", "log", "led", "--json"]) == 0
    logged = json.loads(capsys.readouterr().out)
    assert [p["measured"]["efficacy"] for p in logged["patches"]] == [1.0] * 3 and logged["memory"] == "edit.grace"
    assert run(["edit", "diff", "led", "2"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "memory 1 edits patch 1: cosine of the nearest keys" in shown
        and "patch 3: 1 → 1 of 1" in shown
        and "+ dog" in shown
    )
    assert run(["edit", "revert", "led", "2"]) == 0
    left = load(Path("led/head"))
    assert left.ask(Memory).edits == (FACTS[0], FACTS[2])
    # never made: the first and the third alone, each found by itself, are these rows
    assert run(["edit", "add", "other", "0.jsonl", "--model", str(base), "--by", "edit.grace", *words(QUICK)]) == 0
    assert run(["edit", "add", "other", "2.jsonl", *later]) == 0
    assert load(Path("other/head")).digest == left.digest
    (answer,) = left.ask(Text).generate([FACTS[1].prompt], max_tokens=4)
    assert not answer.lstrip().startswith("dog")
    for number in ("1", "3"):
        assert run(["edit", "revert", "led", number]) == 0
    assert patches.model(Path("led")).digest == load(base).digest
    # with nothing on, the memory goes on where it was, and the block is not looked for again
    assert run(["edit", "add", "led", "1.jsonl", *later]) == 0
    assert load(Path("led/head")).ask(Memory).edits == (FACTS[1],)


@pytest.mark.parametrize(
    ("id", "given"),
    [
        ("edit.melo", QUICK | {"lr": 0.5, "share": 2}),
        ("edit.t_patcher", {"tokens": 200, "steps": 30, "lr": 0.2, "collapse": 100.0, "accept": 0.3, "layer": 0}),
        ("edit.wise", {"layer": 0, "tokens": 200, "steps": 30, "lr": 0.3, "collapse": 100.0}),
    ],
)
def test_an_editor_s_own_edit_that_comes_off_leaves_what_had_been_made_without_it(
    id: str, given: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    for name, facts_of in (("led", FACTS[:2]), ("fresh", FACTS[1:2])):
        for number, fact in enumerate(facts_of):
            settings = given if number == 0 else {key: value for key, value in given.items() if key != "layer"}
            patches.add(tmp_path / name, (fact,), base=str(base), by=id, settings=settings, recall=0)
    patches.revert(tmp_path / "led", 1)
    left, fresh = (patches.model(tmp_path / name) for name in ("led", "fresh"))
    kept = registry.get(id).method.kept
    assert kept is not None
    one, other = (model.ask(kept.kind).parts(model) for model in (left, fresh))
    assert one.state == other.state and one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())
    assert said(left) == said(fresh)


def test_an_editor_that_practises_does_so_once_for_a_ledger(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What told edits apart and the second model are the first patch's, whatever comes off."""
    given = {"steps": 40, "batch_size": 8, "lr": 0.01, "width": 16, "tokens": 300, "collapse": 1e6}
    practice = tuple(
        Fact(subject=s, relation="", object=OBJECTS[i % 4], prompt=f"{s} is the", paraphrases=(f"They say {s} is the",))
        for i, s in enumerate(["Paris", "Rome", "Berlin", "Vienna", "painter", "birds", "number", "capital"])
    )
    told = [Edit(subject=s, relation="is", object="in", new_object="cat", prompt=f"{s} is the") for s in ("Ada", "Bob")]
    write(practice, tmp_path / "practice.jsonl")
    for number, edit in enumerate(told):
        write([edit], tmp_path / f"{number}.jsonl")
    sets = words(given)
    first = ["edit", "add", str(tmp_path / "led"), str(tmp_path / "0.jsonl"), f"practice={tmp_path / 'practice.jsonl'}"]
    assert run([*first, "--model", str(base), "--by", "edit.serac", *sets]) == 0
    assert run(["edit", "add", str(tmp_path / "led"), str(tmp_path / "1.jsonl"), "--recall", "0", *sets]) == 0
    both = patches.model(tmp_path / "led").ask(Scope)
    patches.revert(tmp_path / "led", 1)
    left = patches.model(tmp_path / "led").ask(Scope)
    assert [edit.prompt for edit in left.edits] == ["Bob is the"]
    assert torch.equal(left.map, both.map) and torch.equal(left.keys, both.keys[1:])
    again = ["edit", "add", str(tmp_path / "led"), str(tmp_path / "0.jsonl"), "--recall", "0", *sets]
    capsys.readouterr()
    for words_, told in (
        (f"practice={tmp_path / 'practice.jsonl'}", "edit.serac takes either memory or practice"),
        (f"nowhere={tmp_path / 'practice.jsonl'}", "edit.serac has no data slot 'nowhere'"),
        ("practice", "'practice' is not ROLE=FILE"),
    ):
        assert run([*again, words_]) == 2
        assert told in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("id", "first", "other"),
    [
        ("edit.grace", {"layer": 0}, {"layer": 1}),
        ("edit.melo", {"layer": 0, "rank": 3, "depth": 2}, {"rank": 4}),
        ("edit.serac", {"width": 8, "layer": 0}, {"width": 16}),
        ("edit.ike", {"k": 2, "scope": "all"}, {"k": 3}),
    ],
)
def test_what_the_first_patch_settled_may_be_said_again_and_not_otherwise(
    id: str, first: dict[str, Any], other: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    config = {"edit.ike": {"k": 2, "scope": "all"}}.get(id, first)
    ledger = begun(tmp_path / "led", base, id)
    patch = patches.Patch(number=1, method=id, seed=0, config=config, edits=facts(1), measured={}, made="now")
    committing.put(tmp_path / "led", msgspec.structs.replace(ledger, patches=(patch,)), MEMORIES[id](load(base), 1))
    held = patches.model(tmp_path / "led").ask(registry.get(id).method.kept.kind)  # type: ignore[union-attr]
    as_words = {key: str(value) for key, value in first.items()}  # of a command line
    shared = {key: value for key, value in first.items() if key != "layer"}
    kept = stacks.settled(id, as_words | {"on_failure": "skip"}, patch.config, held, 2)
    assert kept == shared | {key: str(value) for key, value in shared.items()} | {"on_failure": "skip"}
    assert stacks.settled(id, {}, patch.config, held, 2) == shared  # whoever says nothing goes by it
    then, shown = (tmp_path / "led" / "ledger.json").read_bytes(), list[str]()
    name, value = next(iter(other.items()))
    with pytest.raises(ConfigError, match=f"{name}={value} is not what the ledger's memory has") as caught:
        patches.add(tmp_path / "led", FACTS[:1], settings=other, show=lambda label, *_: shown.append(label))
    assert f"{name}={first[name]}" in caught.value.why and f"leave {name} out" in caught.value.fix
    assert shown == [] and (tmp_path / "led" / "ledger.json").read_bytes() == then


def test_the_sum_is_read_as_its_memory_is_and_not_as_its_last_patch_was_made(base: Path, tmp_path: Path) -> None:
    """One patch more or less does not change what the others' sum is."""
    for name, settings_ in (("led", {"steps": 9, "lr": 0.5}), ("other", {"radius": 0.25})):
        ledger = begun(tmp_path / name, base, "edit.grace")
        for number, config in ((1, {"layer": 0}), (2, settings_)):
            patch = patches.Patch(
                number=number, method="edit.grace", seed=0, config=config, edits=facts(number), measured={}, made="now"
            )
            ledger = msgspec.structs.replace(ledger, patches=(*ledger.patches, patch))
            ledger = committing.put(tmp_path / name, ledger, grace(load(base), number))
    assert patches.model(tmp_path / "led").digest == patches.model(tmp_path / "other").digest


def test_a_patch_that_is_off_is_shown_in_place_of_what_contradicts_it(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    patches.add(tmp_path / "led", FACTS[:1], base=str(base), by="edit.grace", settings=QUICK)
    patches.add(tmp_path / "led", FACTS[1:2], settings=QUICK)
    patches.revert(tmp_path / "led", 1)
    other = msgspec.structs.replace(FACTS[0], new_object="dog")
    patches.add(tmp_path / "led", (other,), settings=QUICK)
    assert run(["edit", "diff", str(tmp_path / "led"), "1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    (fact,) = told["facts"]
    assert fact["before"].startswith("dog") and fact["after"].startswith("cat")
    assert [(a["patch"], a["without"], a["together"]) for a in told["others"]] == [(2, 1, 1), (3, 1, 0)]


def test_what_the_memory_has_is_not_told_it_twice_nor_against_it(base: Path, tmp_path: Path) -> None:
    patches.add(tmp_path / "led", FACTS[:1], base=str(base), by="edit.grace", settings=QUICK)
    then = (tmp_path / "led" / "ledger.json").read_bytes()
    with pytest.raises(DataError, match=r"repeats patch 1: 'In London lives Ada Ashby'"):
        patches.add(tmp_path / "led", FACTS[:1])
    other = msgspec.structs.replace(FACTS[0], new_object="dog")
    with pytest.raises(DataError, match="contradicts patch 1") as caught:
        patches.add(tmp_path / "led", (other,))
    assert "edit revert" in caught.value.fix
    with pytest.raises(ConfigError, match="forgets by patches"):
        patches.add(tmp_path / "led", FACTS[:1], settings={"forget": True})
    patches.revert(tmp_path / "led", 1)
    done = patches.add(tmp_path / "led", (other,), settings=QUICK | {"layer": None})  # what is off says nothing
    assert done.number == 2 and done.edits == (other,)
    assert then != (tmp_path / "led" / "ledger.json").read_bytes()


@pytest.mark.parametrize(
    ("id", "why"),
    [
        ("edit.ft", "it can be saved as checkpoint alone"),
        ("edit.unlearn", "takes no edits"),
        ("edit.task_vector", "takes no edits"),
        ("tune.lora", "takes no edits"),
    ],
)
def test_what_cannot_come_off_is_refused_before_anything_is_read(id: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        patches.add(tmp_path / "led", tmp_path / "no such file", base=str(tiny.causal(tmp_path / "base")), by=id)
    assert why in caught.value.why and "edit.grace" in caught.value.fix
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_weights_and_a_memory_do_not_stand_in_one_ledger(base: Path, tmp_path: Path) -> None:
    begun(tmp_path / "led", base, "edit.grace")
    put(tmp_path / "led", patches.Ledger(base=str(base), base_digest=load(base).digest, memory="edit.grace"), 1)
    for id in ("edit.rome", "edit.melo"):
        with pytest.raises(ConfigError, match=r"holds edits in the memory of edit\.grace") as caught:
            patches.add(tmp_path / "led", FACTS[:1], by=id)
        assert "--by edit.grace" in caught.value.fix
    assert not (tmp_path / "led" / ".next").exists()
    assert {id for id in stacks.editors() if registry.get(id).method.kept} >= set(MEMORIES)


def test_an_edit_that_costs_an_earlier_one_of_the_memory_is_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patches.add(tmp_path / "led", FACTS[:1], base=str(base), by="edit.grace", settings=QUICK)
    then = (tmp_path / "led" / "ledger.json").read_bytes()
    asked = iter([[True], [False]])
    monkeypatch.setattr(patches, "said", lambda model, edits: next(asked))
    with pytest.raises(EditError, match="1 of 1 earlier edits would be lost"):
        patches.add(tmp_path / "led", FACTS[1:2], settings=QUICK | {"layer": None})
    assert (tmp_path / "led" / "ledger.json").read_bytes() == then and not (tmp_path / "led" / "0002").exists()


def test_a_format_that_its_change_cannot_have_is_refused_before_the_run(base: Path, tmp_path: Path) -> None:
    write(FACTS[:1], tmp_path / "edits.jsonl")
    for id, form, fix in (("edit.ft", "adapter", "checkpoint"), ("edit.grace", "checkpoint", "program")):
        order = runs.Order(
            id=id,
            models={"model": (base,)},
            data={"edits": tmp_path / "edits.jsonl"},
            out=tmp_path / "out",
            form=form,
        )
        with pytest.raises(ConfigError, match=f"{id} has no format '{form}'") as caught:
            runs.prepare(order)  # no weight is read
        assert caught.value.fix == f"formats: {fix}"
