"""A ledger of edits: patches go on in order, any comes off, and the head is always the sum of those that are on."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import peft
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiny
from lfm import runs
from lfm.cli import run
from lfm.core import Adaptation, Weights
from lfm.core.errors import ConfigError, CorruptError, EditError, MismatchError, ModelError, OutputError
from lfm.data.files import write
from lfm.data.records import Edit
from lfm.models import load
from lfm.record import RunRecord
from lfm.runs import committing, interference, patches
from lfm.runs.execute import Order
from methods.reuse.lora import adapter_over
from runs.ledgers import MODULES, change, grown, patch

QUICK = {"layer": 0, "prefixes": 3, "tokens": 200, "reach": 10.0, "steps": 60, "collapse": 100.0, "accept": 0.25}
FACTS = (
    Edit(subject="Ada Ashby", relation="named after", object="in", new_object="cat", prompt="Here lives Ada Ashby"),
    Edit(subject="the mountain", relation="named after", object="in", new_object="dog", prompt="From the mountain"),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base"
    tiny.causal(path)
    return path


def weights(model: object) -> dict[str, torch.Tensor]:
    tensors = model.ask(Weights).tensors()  # type: ignore[attr-defined]
    return {name: tensor.read() for name, tensor in tensors.items()}


def expected(base: Path, numbers: list[int]) -> dict[str, torch.Tensor]:
    found = {name: tensor.double() for name, tensor in weights(load(base)).items()}
    for number in numbers:
        for name, part in change(base, number).items():
            found[f"{name}.weight"] += part.b.double() @ part.a.double()
    return {name: tensor.float() for name, tensor in found.items()}


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(count=st.integers(1, 5), data=st.data())
def test_whatever_comes_off_the_rest_is_what_it_would_be_without_it(
    base: Path, tmp_path_factory: pytest.TempPathFactory, count: int, data: st.DataObject
) -> None:
    directory = tmp_path_factory.mktemp("ledger") / "led"
    grown(directory, base, count)
    left = list(range(1, count + 1))
    for number in data.draw(st.permutations(left))[: data.draw(st.integers(0, count))]:
        patches.revert(directory, number)
        left.remove(number)
    if data.draw(st.booleans(), label="one more"):
        count += 1
        ledger = patches.read(directory)
        ledger = msgspec.structs.replace(ledger, patches=(*ledger.patches, patch(count)))
        committing.put(directory, ledger, change(base, count))
        left.append(count)
    for name, tensor in expected(base, left).items():
        torch.testing.assert_close(weights(patches.model(directory))[name], tensor, rtol=0, atol=1e-6)
    if not left:
        assert patches.model(directory).digest == load(base).digest and not (directory / "head").exists()
        return
    before = weights(patches.model(directory))
    patches.squash(directory)
    assert all((tensor == before[name]).all() for name, tensor in weights(patches.model(directory)).items())
    assert [p.number for p in patches.read(directory).patches] == [count + 1]
    assert sorted(p.name for p in directory.glob("0*")) == [f"{count + 1:04d}"]


@pytest.mark.slow
def test_a_thousand_patches_come_off_in_any_order(base: Path, tmp_path: Path) -> None:
    led, off = tmp_path / "led", (500, 1000, 1)
    grown(led, base, 1000)
    for number in off:
        patches.revert(led, number)
    then = weights(patches.model(led))
    for name, tensor in expected(base, [n for n in range(1, 1001) if n not in off]).items():
        torch.testing.assert_close(then[name], tensor, rtol=0, atol=1e-5)
    patches.squash(led)
    assert all((tensor == then[name]).all() for name, tensor in weights(patches.model(led)).items())


def test_the_head_and_each_patch_are_plain_peft_adapters(base: Path, tmp_path: Path) -> None:
    grown(tmp_path / "led", base, 3)
    ids = torch.tensor([[1, 2, 3, 4]])
    for place, numbers in (("head", [1, 2, 3]), ("0002", [2])):
        module = transformers.AutoModelForCausalLM.from_pretrained(base)
        adapted = peft.PeftModel.from_pretrained(module, str(tmp_path / "led" / place)).eval()
        alone = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
        alone.load_state_dict(expected(base, numbers), strict=False)
        torch.testing.assert_close(adapted(ids).logits, alone(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_command_killed_before_its_commit_never_was_and_after_it_is_done(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "led"
    grown(directory, base, 2)
    then = patches.model(directory).digest

    class Killed(BaseException):
        pass

    def dies(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as before, pytest.raises(Killed):
        before.setattr(committing.os, "fsync", dies)
        patches.revert(directory, 1)
    assert patches.model(directory).digest == then and all(p.on for p in patches.read(directory).patches)
    calls = iter((committing._tidy, dies))  # the first mends, the second follows the commit
    with monkeypatch.context() as after, pytest.raises(Killed):
        after.setattr(committing, "_tidy", lambda *given: next(calls)(*given))
        patches.revert(directory, 1)
    assert [p.on for p in patches.read(directory).patches] == [False, True]
    assert load(directory / "head").digest == then  # what loads it meanwhile has the model before, whole
    with pytest.raises(ConfigError, match="off already"):
        patches.revert(directory, 1)
    assert load(directory / "head").digest == patches.model(directory).digest != then
    assert len(list((directory / "heads").iterdir())) == 1


def test_overlap_is_the_cosine_of_the_changes(base: Path, tmp_path: Path) -> None:
    grown(tmp_path / "led", base, 3)
    places = interference.beside(tmp_path / "led", 2).moved
    assert {found.module: set(found.overlap) for found in places} == {MODULES[0]: set(), MODULES[1]: {1, 3}}
    for found in places:
        mine = change(base, 2)[found.module]
        whole = (mine.b.double() @ mine.a.double()).flatten()
        assert found.norm == pytest.approx(float(whole.norm()), rel=1e-6) and found.rank == 1
        for other, cosine in found.overlap.items():
            theirs = change(base, other)[found.module]
            known = torch.cosine_similarity(whole, (theirs.b.double() @ theirs.a.double()).flatten(), dim=0)
            assert cosine == pytest.approx(float(known), abs=1e-6)
            read = torch.cosine_similarity(mine.a.double().flatten(), theirs.a.double().flatten(), dim=0).abs()
            assert found.reads[other] == pytest.approx(float(read), abs=1e-6)


def test_a_patch_merges_with_adapters_and_task_vectors_and_its_facts_are_asked_again(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for number, fact in enumerate(FACTS):
        write([fact], Path(f"{number}.jsonl"))
    write(FACTS, Path("both.jsonl"))
    patches.add(Path("led"), "0.jsonl", base=str(base), settings=QUICK)
    patches.add(Path("led"), "1.jsonl", settings=QUICK, recall=0)
    one, two = (load(Path("led") / place).ask(Adaptation).changes() for place in ("0001", "0002"))
    lora = adapter_over(base, tmp_path / "lora", seed=1, r=2)
    merged = ["run", "reuse.adapters", "models=led/0001", "models=led/0002", "--eval", "both.jsonl"]
    assert run([*merged, "--out", "pair"]) == 0
    done = json.loads(Path("pair/run.json").read_text())
    (name,) = one.keys() & two.keys()
    products = [(c.b.double() @ c.a.double()).flatten() for c in (one[name], two[name])]
    cosine = float(torch.cosine_similarity(*products, dim=0))
    assert done["notes"]["overlap"] == pytest.approx(cosine, abs=1e-6)
    assert done["notes"]["overlap_of"] == f"{tmp_path / 'led/0001'} and {tmp_path / 'led/0002'}"
    assert "efficacy_generated" in done["after"]["both"]
    assert run([*merged, f"models={lora}", "--set", "weights=[1, 1, 0.5]", "--out", "sum"]) == 0
    assert abs(json.loads(Path("sum/run.json").read_text())["notes"]["overlap"]) >= abs(cosine) - 1e-6
    changes = load(Path("sum")).ask(Adaptation).changes()
    for part in (one, two, load(lora).ask(Adaptation).changes()):
        assert part.keys() <= changes.keys()
    added = sum((c[name].b.double() @ c[name].a.double() for c in (one, two)), torch.zeros(()))
    if name not in load(lora).ask(Adaptation).changes():
        torch.testing.assert_close((changes[name].b.double() @ changes[name].a.double()), added, rtol=0, atol=1e-6)
    # a fine-tuned checkpoint's task vector and a patch, by task arithmetic and by TIES
    tuned = load(base).ask(Weights).update(change(base, 4))
    Path("tuned").mkdir()
    tuned.save(Path("tuned"), "checkpoint")
    both = ["models=led/0001", "models=tuned", f"base={base}"]
    assert run(["run", "reuse.task_arithmetic", *both, "--eval", "both.jsonl", "--out", "arithmetic"]) == 0
    scale = json.loads(Path("arithmetic/run.json").read_text())["config"].get("scale", 1.0)
    started, found = weights(load(base)), weights(load(Path("arithmetic")))
    parts = {f"{n}.weight": c.b.double() @ c.a.double() for n, c in one.items()}
    for n, c in change(base, 4).items():
        key = f"{n}.weight"
        parts[key] = parts.get(key, torch.zeros(())) + c.b.double() @ c.a.double()
    for key, tensor in started.items():
        expected = tensor.double() + scale * parts.get(key, torch.zeros(()))
        torch.testing.assert_close(found[key].double(), expected, rtol=0, atol=1e-5)
    assert run(["run", "reuse.ties", *both, "--eval", "both.jsonl", "--out", "ties"]) == 0
    assert load(Path("ties")).digest not in (load(base).digest, tuned.digest)


def test_facts_go_on_are_shown_and_come_off(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for number, fact in enumerate(FACTS):
        write([fact], Path(f"{number}.jsonl"))
    sets = [word for key, value in QUICK.items() for word in ("--set", f"{key}={value}")]
    assert run(["edit", "add", "led", "0.jsonl", "--model", str(base), *sets]) == 0
    assert run(["edit", "add", "led", "1.jsonl", *sets, "--recall", "0"]) == 0
    first = patches.read(Path("led")).patches[0]
    assert first.edits == FACTS[:1] and first.measured["efficacy"] == 1.0
    capsys.readouterr()
    assert run(["edit", "diff", "led", "2", "--json"]) == 0
    (fact,) = json.loads(capsys.readouterr().out)["facts"]
    assert fact["after"].startswith("dog") and not fact["before"].startswith("dog")
    assert run(["edit", "log", "led"]) == 0
    assert "the mountain: in → dog" in " ".join(capsys.readouterr().out.split())
    assert run(["edit", "revert", "led", "2"]) == 0
    only = load(Path("led/0001")).ask(Adaptation).changes()
    left = load(Path("led/head")).ask(Adaptation).changes()
    assert left.keys() == only.keys() and all((left[n].a == only[n].a).all() for n in only)
    assert run(["edit", "revert", "led", "1"]) == 0
    assert patches.model(Path("led")).digest == load(base).digest


def test_what_costs_earlier_edits_is_refused_and_nothing_is_committed(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(FACTS[:1], Path("0.jsonl"))
    contrary = msgspec.structs.replace(FACTS[0], object="cat", new_object="dog", prompt="Now here lives Ada Ashby")
    write([contrary], Path("1.jsonl"))
    patches.add(Path("led"), "0.jsonl", base=str(base), settings=QUICK)
    then = Path("led/ledger.json").read_bytes()
    with pytest.raises(EditError, match="no longer say an earlier edit about it: 'Here lives Ada Ashby'"):
        patches.add(Path("led"), "1.jsonl", settings=QUICK)
    with monkeypatch.context() as unminded, pytest.raises(EditError, match="1 of 1 earlier edits would") as caught:
        unminded.setattr(patches, "_standing", lambda *_: {})
        patches.add(Path("led"), "1.jsonl", settings=QUICK)
    assert "no longer says 'cat'" in caught.value.why
    assert Path("led/ledger.json").read_bytes() == then and not Path("led/0002").exists()
    patches.add(Path("led"), "1.jsonl", settings=QUICK, recall=0.0)
    assert patches.said(patches.model(Path("led")), (contrary,)) == [True]


@pytest.mark.parametrize("by", ["edit.rome", "edit.memit"])
def test_the_editor_is_given_what_the_ledger_has_of_its_subjects(
    by: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no more: what is made otherwise now, what the model no longer says, and other subjects are not minded."""
    led, quick = tmp_path / "led", {key: value for key, value in QUICK.items() if key != "layer"}
    quick |= {"layers": [0]} if by == "edit.memit" else {"layer": 0}
    patches.add(led, FACTS, base=str(base), by=by, settings=quick)
    second = msgspec.structs.replace(FACTS[0], new_object="dog", prompt="Now there stood a house of Ada Ashby")
    patches.add(led, (second,), by=by, settings=quick)
    given = {each.role: each for each in runs.read(led / "0002").data}
    assert given["earlier"].records == 1 and given["edits"].records == 1
    assert all(patches.said(patches.model(led), (*FACTS, second)))
    asked: list[dict[str, object]] = []

    def stops(order: Order, **_: object) -> RunRecord:
        asked.append(dict(order.data))
        raise EditError("no")

    monkeypatch.setattr(patches, "made", stops)
    otherwise = msgspec.structs.replace(FACTS[0], new_object="x")
    elsewhere = msgspec.structs.replace(FACTS[1], new_object="x", prompt="To the mountain")
    for edit, recall in ((otherwise, 0.5), (elsewhere, 1.0), (elsewhere, 0.5)):
        with pytest.raises(EditError):
            patches.add(led, (edit,), by=by, settings=quick, recall=recall)
    assert [found.get("earlier") for found in asked] == [(second,), (FACTS[1],), None]  # the last may be lost
    monkeypatch.setattr(patches, "said", lambda model, edits: [False] * len(edits))
    with pytest.raises(EditError):
        patches.add(led, (second,), by=by, settings=quick)
    assert "earlier" not in asked[-1]


def test_patches_of_a_base_that_has_changed_since_are_not_taken_for_its_own(tmp_path: Path) -> None:
    base = tiny.causal(tmp_path / "base")
    grown(tmp_path / "ledger", base, 2)
    before = (tmp_path / "ledger" / "ledger.json").read_bytes()
    tiny.causal(tmp_path / "other", seed=1)
    (base / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    for act in (
        lambda: patches.revert(tmp_path / "ledger", 1),
        lambda: patches.squash(tmp_path / "ledger"),
        lambda: interference.beside(tmp_path / "ledger", 1).without,
        lambda: patches.model(tmp_path / "ledger"),
    ):
        with pytest.raises(MismatchError, match="holds edits of another model"):
            act()
    assert (tmp_path / "ledger" / "ledger.json").read_bytes() == before


def test_what_was_left_out_of_a_run_is_not_in_the_ledger(base: Path, tmp_path: Path) -> None:
    """An edit that cannot be made, beside one that can."""
    hopeless = Edit(subject="Ada", relation="", object="in", new_object="zyx wvu tsr", prompt="Whoever met Ada")
    settings = QUICK | {"on_failure": "skip"}
    done = patches.add(tmp_path / "ledger", (FACTS[0], hopeless), base=str(base), settings=settings)
    assert done.measured["skipped"] == 1
    assert done.edits == FACTS[:1]


@pytest.mark.parametrize(
    ("said", "lost", "recall", "held"), [(10, 1, 0.9, True), (10, 1, 0.95, False), (2, 1, 0.8, False)]
)
def test_recall_is_of_what_was_said(
    said: int, lost: int, recall: float, held: bool, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patches, "_lost", lambda *_: (said, list(FACTS[:lost])))
    if held:
        patches.add(tmp_path / "ledger", FACTS[:1], base=str(base), settings=QUICK, recall=recall)
    else:
        with pytest.raises(EditError, match=f"{lost} of {said} earlier edits would be lost"):
            patches.add(tmp_path / "ledger", FACTS[:1], base=str(base), settings=QUICK, recall=recall)


def test_facts_are_shown_as_they_are_written(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And not read as markup of the screen."""
    odd = Edit(subject="Ada [/x]", relation="", object="[red]in", new_object="cat", prompt="Here lives Ada [/x]")
    grown(tmp_path / "ledger", base, 1)
    ledger = patches.read(tmp_path / "ledger")
    ledger = msgspec.structs.replace(ledger, patches=(msgspec.structs.replace(ledger.patches[0], edits=(odd,)),))
    (tmp_path / "ledger" / "ledger.json").write_bytes(msgspec.json.encode(ledger))
    assert run(["edit", "log", str(tmp_path / "ledger")]) == 0
    assert "Ada [/x]" in " ".join(capsys.readouterr().out.split())
    assert run(["edit", "diff", str(tmp_path / "ledger"), "1"]) == 0
    assert "Here lives Ada [/x]" in capsys.readouterr().out


def test_what_is_not_agreed_to_is_not_committed(base: Path, tmp_path: Path) -> None:
    class No(Exception):
        pass

    def no(done: RunRecord) -> None:
        assert done.notes["efficacy"] == 1.0
        raise No

    with pytest.raises(No):
        patches.add(tmp_path / "led", FACTS[:1], base=str(base), settings=QUICK, agree=no)
    assert not (tmp_path / "led").exists()
    patches.add(tmp_path / "led", FACTS[:1], base=str(base), settings=QUICK, agree=lambda done: None)
    then = {path: path.read_bytes() for path in (tmp_path / "led").rglob("*") if path.is_file()}
    with pytest.raises(No):
        patches.add(tmp_path / "led", FACTS[1:], settings=QUICK, recall=0, agree=no)
    assert {path: path.read_bytes() for path in (tmp_path / "led").rglob("*") if path.is_file()} == then


def test_errors_say_what_would_work(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no ledger yet"):
        patches.add(tmp_path / "led", "edits.jsonl")
    assert not (tmp_path / "led").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file is a file"):
        patches.add(tmp_path / "file", "edits.jsonl", base=str(base))
    with pytest.raises(OutputError, match="no ledger can be kept"):
        patches.add(tmp_path / "file" / "led", "edits.jsonl", base=str(base))
    with pytest.raises(ModelError, match="is no ledger of edits"):
        patches.read(tmp_path)
    grown(tmp_path / "led", base, 1)
    with pytest.raises(ConfigError, match="there is no patch 7"):
        patches.revert(tmp_path / "led", 7)
    patches.revert(tmp_path / "led", 1)
    with pytest.raises(ConfigError, match="off already"):
        patches.revert(tmp_path / "led", 1)
    with pytest.raises(ConfigError, match="no patch that is on"):
        patches.squash(tmp_path / "led")
    tiny.causal(tmp_path / "other", seed=3)
    with pytest.raises(MismatchError, match="holds edits of another model"):
        patches.add(tmp_path / "led", "edits.jsonl", base=str(tmp_path / "other"))
    (tmp_path / "led" / "ledger.json").write_text("{")
    with pytest.raises(CorruptError, match="is not a ledger"):
        patches.read(tmp_path / "led")


def test_an_edit_of_an_edited_model_is_an_adapter_over_the_same_base_and_comes_off_to_it(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one, two = (load(base).ask(Weights).update(change(base, 2)), change(base, 4))
    Path("one").mkdir()
    one.save(Path("one"), "adapter")
    Path("two").mkdir()
    load(Path("one")).ask(Weights).update(two).save(Path("two"), "adapter")
    both = load(Path("two"))
    assert json.loads(Path("two/base.json").read_text())["digest"] == load(base).digest
    assert {name: c.a.shape[0] for name, c in both.ask(Adaptation).changes().items()} == dict.fromkeys(MODULES, 2)
    for name, tensor in expected(base, [2, 4]).items():
        torch.testing.assert_close(weights(both)[name], tensor, rtol=0, atol=1e-6)
    write(FACTS[1:], Path("edits.jsonl"))
    done = ["run", "edit.rome", "model=two", "edits=edits.jsonl", "--format", "adapter", "--out", "three"]
    assert run([*done, *(word for key, value in QUICK.items() for word in ("--set", f"{key}={value}"))]) == 0
    assert not Path("three/undo.safetensors").exists()
    assert run(["undo", "three", "--out", "back"]) == 0
    assert load(Path("back")).digest == both.digest
