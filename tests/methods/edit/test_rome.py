"""edit.rome: what the update is, what it leaves alone, how it comes off, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import tiny
from case import Case
from lfm import runs
from lfm.core import Codec, Gradients, Inputs, Logits, Model, Weights
from lfm.core.errors import DataError, EditError, MismatchError
from lfm.core.method import Amount, Sizes, check
from lfm.data.files import write
from lfm.data.records import Edit, Text
from lfm.editing import keys, rows, setting, value
from lfm.methods.edit import rome
from lfm.models import load
from lfm.runs.run import LocalRun

# Prompts that end with their subject: what is written there decides the next token, so that an edit takes hold even in
# a model that knows nothing.
EDITS = (
    Edit(
        subject="Ada Ashby",
        relation="named after",
        object="in",
        new_object="cat",
        prompt="Here lives Ada Ashby",
        paraphrases=("In that town works Ada Ashby",),
        neighbours=(("Berlin is the capital of", "Germany"),),
    ),
    Edit(subject="the mountain", relation="named after", object="in", new_object="dog", prompt="From the mountain"),
)
TEXT = tuple(Text(text=line) for line in tiny.CORPUS)
QUICK: dict[str, Any] = {
    "layer": 0,
    "prefixes": 3,
    "tokens": 200,
    "reach": 10.0,
    "steps": 60,
    "collapse": 100.0,
    "accept": 0.25,
}


def case(here: Path) -> Case:
    tiny.causal(here / "base")
    write(EDITS[:1], here / "edits.jsonl")
    return Case({"model": ("base",)}, {"edits": "edits.jsonl"}, QUICK)


MODELS = {"linear": tiny.causal, "conv1d": tiny.conv1d}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {name: make(root / name) for name, make in MODELS.items()}


def edited(directory: Path, work: Path, edits: tuple[Edit, ...] = EDITS, **settings: Any) -> tuple[Model, LocalRun]:
    given = Inputs({"model": (load(directory),)}, {"edits": edits, "text": TEXT})
    run = LocalRun(0, work)
    return rome.run(rome.Config(**(QUICK | settings)), check("edit.rome", rome.METHOD, given), run), run


@pytest.mark.parametrize("name", MODELS)
def test_the_mean_key_gives_the_value_that_was_found(name: str, directories: dict[str, Path], tmp_path: Path) -> None:
    """W'k* + b = v̄ + δ: with the value and key recomputed on the edited model itself."""
    config = rome.Config(**QUICK)
    run = LocalRun(0, tmp_path)
    here = setting.opened(load(directories[name]), TEXT, run, prefixes=3, tokens=200)
    read, found, (b, a) = rome.solver(config, here, run)(0, EDITS[0])
    k, v = keys.at_subject(here.module, 0, read)
    _, layer = keys.projection(here.module, 0)
    keys.put(layer, keys.weight(layer), [(b, a)], torch.float32)
    after_k, after_v = keys.at_subject(here.module, 0, read)
    torch.testing.assert_close(after_k, k)  # the keys of a block do not depend on what it writes
    torch.testing.assert_close(keys.mean(after_v), keys.mean(v) + found.delta, rtol=1e-4, atol=1e-5)


def test_the_first_variant_gives_the_prompts_own_key_the_value(directories: dict[str, Path], tmp_path: Path) -> None:
    run = LocalRun(0, tmp_path)
    here = setting.opened(load(directories["linear"]), TEXT, run, prefixes=3, tokens=200)
    read, found, (b, a) = rome.solver(rome.Config(**QUICK, variant="rome"), here, run)(0, EDITS[0])
    k, _ = keys.at_subject(here.module, 0, read)
    torch.testing.assert_close(b * (a @ k[0]), found.delta)
    assert abs(float(a @ k.mean(0)) - 1) > 1e-6  # the mean key, which u is made from, is not given it


@pytest.mark.parametrize("name", MODELS)
def test_edits_change_one_weight_by_one_rank_each(name: str, directories: dict[str, Path], tmp_path: Path) -> None:
    made, run = edited(directories[name], tmp_path)
    before, after = (m.ask(Weights).tensors() for m in (load(directories[name]), made))
    changed = [n for n in before if not torch.equal(before[n].read(), after[n].read())]
    assert changed == [f"{run.notes['module']}.weight"]
    difference = after[changed[0]].read().double() - before[changed[0]].read().double()
    sizes = torch.linalg.svdvals(difference)
    assert run.notes["edits"] == 2
    assert sizes[1] > 1e-3 * sizes[0] and sizes[2] < 1e-5 * sizes[0]


def test_the_new_objects_are_said_and_what_was_measured_is_noted(directories: dict[str, Path], tmp_path: Path) -> None:
    from lfm.core import Text as Speaks

    made, run = edited(directories["linear"], tmp_path)
    said = made.ask(Speaks).generate([e.prompt for e in EDITS], max_tokens=8)
    assert [s.lstrip().startswith(e.new_object) for s, e in zip(said, EDITS, strict=True)].count(True) / 2 == (
        run.notes["efficacy"]
    )
    assert {"perplexity_before", "perplexity_after", "paraphrase", "layer", "covariance_tokens"} <= run.notes.keys()
    assert len(run.curves["perplexity by edit"]) == 1 + len(EDITS)


@pytest.mark.parametrize("name", MODELS)
def test_peft_alone_loads_the_adapter_with_the_same_logits(
    name: str, directories: dict[str, Path], tmp_path: Path
) -> None:
    made, _ = edited(directories[name], tmp_path / "work")
    (tmp_path / "adapter").mkdir()
    made.save(tmp_path / "adapter", "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(directories[name])
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    batch = made.ask(Codec).texts([e.prompt for e in EDITS])
    with torch.no_grad():
        logits = theirs(**batch).logits
    torch.testing.assert_close(logits, made.ask(Logits).logits(batch), rtol=1e-3, atol=1e-4)


def test_undone_it_is_the_base_to_the_byte(
    directories: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LFM_HOME", str(tmp_path / "home"))
    write(EDITS, tmp_path / "edits.jsonl")
    order = runs.Order(
        id="edit.rome",
        models={"model": [directories["linear"]]},
        data={"edits": tmp_path / "edits.jsonl"},
        settings=QUICK,
        out=tmp_path / "out",
    )
    done = runs.execute(order)
    assert done.undo
    from lfm.runs.undoing import undo

    undo(tmp_path / "out", tmp_path / "back", runs.model)
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (
        directories["linear"] / "model.safetensors"
    ).read_bytes()


def test_a_value_that_was_not_found_is_refused_and_nothing_is_made(
    directories: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(EditError, match=r"'Here lives Ada Ashby' cannot be made to say 'cat'.*best value found"):
        edited(directories["linear"], tmp_path, steps=1, lr=1e-6)


def test_an_edit_that_would_break_the_model_is_refused(directories: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(EditError, match="would break the model: perplexity on other text from"):
        edited(directories["linear"], tmp_path, collapse=1.0 + 1e-9)


def test_where_told_to_a_failed_edit_is_left_out_and_named(
    directories: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = value.search

    def fails_for_the_mountain(module: Any, block: int, read: Any, *rest: Any) -> Any:
        best = found(module, block, read, *rest)
        return best._replace(probability=0.1) if read.contexts and next(turn) else best

    turn = iter((False, True))
    monkeypatch.setattr(value, "search", fails_for_the_mountain)
    made, run = edited(directories["linear"], tmp_path, on_failure="skip")
    assert (run.notes["edits"], run.notes["skipped"]) == (1, 1)
    assert "From the mountain" in str(run.notes["skipped_because"])
    alone, _ = edited_alone(directories["linear"], tmp_path / "alone", monkeypatch, found)
    assert made.digest == alone.digest


def edited_alone(directory: Path, work: Path, patch: pytest.MonkeyPatch, found: Any) -> tuple[Model, LocalRun]:
    patch.setattr(value, "search", found)
    return edited(directory, work, EDITS[:1])


def test_if_no_edit_holds_there_is_no_model(directories: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(EditError, match="no edit held"):
        edited(directories["linear"], tmp_path, steps=1, lr=1e-6, on_failure="skip")


def test_a_block_is_chosen_where_none_is_named(directories: dict[str, Path], tmp_path: Path) -> None:
    _, run = edited(directories["linear"], tmp_path, layer=None)
    assert run.notes["layer"] == 0  # of two blocks the last is never tried
    assert len(run.curves["gain by block tried"]) == 1


def test_what_cannot_be_edited_is_said_before_anything_is_read(directories: dict[str, Path], tmp_path: Path) -> None:
    base = load(directories["linear"])
    stray = Edit(subject="Bob", relation="", object="a", new_object="b", prompt="Ada lives in")
    with pytest.raises(DataError, match="does not name its subject 'Bob'"):
        rome.agree(rome.Config(), Inputs({"model": (base,)}, {"edits": [stray]}))
    with pytest.raises(MismatchError, match="no block 9"):
        rome.agree(rome.Config(layer=9), Inputs({"model": (base,)}, {"edits": EDITS}))
    with pytest.raises(MismatchError, match="edits language models"):
        encoder = load(tiny.encoder(tmp_path / "encoder"))
        rome.agree(rome.Config(), Inputs({"model": (encoder,)}, {"edits": EDITS}))


def test_cost_grows_with_the_edits_and_with_the_blocks_to_try(directories: dict[str, Path]) -> None:
    facts = load(directories["linear"]).facts

    def flops(records: int, **settings: Any) -> float:
        sizes = Sizes({"model": (facts,)}, {"edits": Amount(records, 20 * records)})
        return rome.cost(rome.Config(**settings), sizes).flops

    assert flops(100, layer=0) > flops(10, layer=0)
    assert flops(10) > flops(10, layer=0)


def test_rows_find_the_subject_and_the_object(directories: dict[str, Path]) -> None:
    tokenizer = load(directories["linear"]).ask(Codec).tokenizer
    read = rows.rows(tokenizer, EDITS[0], ["", "Birds sing. "])
    assert load(directories["linear"]).can(Gradients)
    for row in range(2):
        ids = read.batch["input_ids"][row]
        said = tokenizer.decode(ids[: int(read.subject[row]) + 1], skip_special_tokens=True)
        assert said.endswith("Ada Ashby")
        assert tokenizer.decode(ids[read.labels[row] != rows.IGNORED]) == " cat"
    assert (read.labels[-1] == rows.IGNORED).all()
