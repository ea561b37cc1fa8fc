"""Editors that keep edits beside weights, on masked models and encoder-decoders: they are said by every interface of
the program, and what is forgotten leaves no bit."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from forms import EDITS, TEXT
from lfm.core import Codec, Gradients, Inputs, Logits, Logprobs, Model
from lfm.core import Text as Speaks
from lfm.core.method import check
from lfm.data.records import Edit
from lfm.editing import asking, form, side
from lfm.methods.edit import grace, melo, t_patcher, wise
from lfm.models import load
from lfm.runs.run import LocalRun

QUICK: dict[str, Any] = {"tokens": 200, "collapse": 1e4}
KEYED: dict[str, Any] = QUICK | {"prefixes": 3, "accept": 0.3, "steps": 100}
SETTINGS: dict[ModuleType, dict[str, Any]] = {
    grace: KEYED | {"lr": 1.0},
    melo: KEYED,
    t_patcher: QUICK | {"accept": 0.3, "steps": 60, "lr": 0.2},
    wise: QUICK | {"steps": 80, "lr": 0.3, "shards": 1, "mask": 1.0},
}
PLACES = (("bert", 1), ("modern", 1), ("t5", 1), ("t5", 2), ("bart", 1), ("bart", 3))
"""Models, and blocks numbered through: of the t5 and the bart an encoder's and a decoder's."""
CASES = [(method, *place) for method in SETTINGS for place in PLACES]


def named(value: Any) -> str:
    return value.ID.removeprefix("edit.") if isinstance(value, ModuleType) else str(value)


def made(method: Any, directory: Path, work: Path, *edits: Edit, **options: Any) -> tuple[Model, LocalRun]:
    before: dict[str, tuple[Model, ...]] = {"memory": (options.pop("memory"),)} if "memory" in options else {}
    inputs = Inputs({"model": (load(directory),), **before}, {"edits": edits or EDITS, "text": TEXT})
    config = method.Config(**(SETTINGS[method] | options))
    method.agree(config, inputs)
    run = LocalRun(0, work)
    return method.run(config, check(method.ID, method.METHOD, inputs), run), run


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(named, case)))
def kept(request: pytest.FixtureRequest, directories: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(the method, the directory of its model, what it made of it as it comes back from its files, the run)."""
    method, name, block = request.param
    here = tmp_path_factory.mktemp("kept")
    model, run = made(method, directories[name], here, layer=block)
    (here / "out").mkdir()
    model.save(here / "out")
    return method, directories[name], load(here / "out"), run


def asked(model: Model, edits: tuple[Edit, ...] = EDITS) -> asking.Asked:
    """Each by itself, as `says` asks it: no padding."""
    base = model.ask(Gradients).module() if model.can(Gradients) else None
    assert base is not None
    return asking.asked(model.ask(Codec).tokenizer, edits, form.form_of(model, base))


def said(model: Model) -> list[str]:
    """By a program itself: what it writes, or fills in, of each edit."""
    if model.can(Speaks):
        return [text.strip() for text in model.ask(Speaks).generate([edit.prompt for edit in EDITS], max_tokens=4)]
    told = model.ask(Logprobs).score(*zip(*((e.prompt, f" {e.new_object}", e.suffix) for e in EDITS), strict=True))
    return [e.new_object if each.total > math.log(0.3) else "" for e, each in zip(EDITS, told, strict=True)]


def test_the_program_says_the_new_objects_by_itself(kept: Any) -> None:
    _, directory, model, run = kept
    assert (run.notes["edits"], run.notes["efficacy"], run.notes["skipped"]) == (2, 1.0, 0)
    assert all(text.startswith(edit.new_object) for edit, text in zip(EDITS, said(model), strict=True))
    assert said(load(directory)) != said(model)


def test_what_is_written_with_a_cache_is_what_is_written_without(kept: Any) -> None:
    """Token by token, by the logits of all that is written so far."""
    _, directory, model, _ = kept
    if not model.can(Speaks):
        return
    module: Any = load(directory).ask(Gradients).module()
    start, tokenizer = module.config.decoder_start_token_id, model.ask(Codec).tokenizer
    opening = getattr(module.generation_config, "forced_bos_token_id", None)
    for edit, text in zip(EDITS, said(model), strict=True):
        ids = torch.tensor([tokenizer(edit.prompt)["input_ids"]])
        written = [start, *([] if opening is None else [opening])]
        while (len(written) < 5 and written[-1] != tokenizer.eos_token_id) or len(written) == 1:
            batch = {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "decoder_input_ids": torch.tensor([written]),
            }
            written.append(int(model.ask(Logits).logits(batch)[0, -1].argmax()))
        assert tokenizer.decode(written, skip_special_tokens=True).strip() == text


def test_what_is_forgotten_leaves_no_bit(kept: Any, tmp_path: Path) -> None:
    method, directory, model, _ = kept
    whole = model.ask(method.METHOD.kept.kind)
    if method is wise:
        assert side.taken(whole, []).edits == ()
        return
    less, _ = made(method, directory, tmp_path / "less", EDITS[0], memory=model, forget=True, layer=None)
    left = less.ask(method.METHOD.kept.kind)
    assert left.edits == EDITS[1:]
    mine = whole.owner == 1
    assert (left.owner == 0).all() and torch.equal(left.keys, whole.keys[mine])
    none, _ = made(method, directory, tmp_path / "none", EDITS[1], memory=less, forget=True, layer=None)
    base = load(directory)
    batch = asked(base).batch
    assert torch.equal(none.ask(Logits).logits(batch), base.ask(Logits).logits(batch))
    assert not torch.equal(model.ask(Logits).logits(batch), base.ask(Logits).logits(batch))
