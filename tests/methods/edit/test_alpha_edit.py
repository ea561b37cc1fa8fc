"""edit.alpha_edit: what text uses stays as it is, and earlier facts keep their values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from case import Case
from edits import AT_THE_SUBJECT, TEXT
from lfm.core import Codec, Inputs, Logits, Model, Weights
from lfm.core import Text as Speaks
from lfm.core.errors import ConfigError, EditError, MismatchError
from lfm.core.method import check
from lfm.data.files import write
from lfm.data.records import Edit
from lfm.editing import batch, keys, rows, setting, solve
from lfm.editing.covariance import loaded, moments, second_moment
from lfm.methods.edit import alpha_edit
from lfm.models import load
from lfm.runs import configured
from lfm.runs.run import LocalRun
from moves import moves

# Prompts that end with their subject: what is written there decides the next token, so that an edit takes hold even in
# a model that knows nothing.
EDITS = AT_THE_SUBJECT
QUICK: dict[str, Any] = {
    "layers": [0, 1],
    "prefixes": 2,
    "tokens": 200,
    "collapse": 100.0,
    "threshold": 0.3,
    "weight": 0.01,
}
SHAPE: dict[str, Any] = {"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.3}
"""Of a random model in which what one block writes can make it say anything."""


def case(here: Path) -> Case:
    tiny.causal(here / "base", **SHAPE)
    write(EDITS[:2], here / "edits.jsonl")
    return Case({"model": ("base",)}, {"edits": "edits.jsonl"}, QUICK | {"batch_size": 1})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.causal(tmp_path_factory.mktemp("base") / "base", **SHAPE)


def edited(base: Path, work: Path, edits: tuple[Edit, ...] = EDITS, **settings: Any) -> tuple[Model, LocalRun]:
    given = Inputs({"model": (load(base),)}, {"edits": edits, "text": TEXT})
    run = LocalRun(0, work)
    config = alpha_edit.Config(**(QUICK | settings))
    return alpha_edit.run(config, check("edit.alpha_edit", alpha_edit.METHOD, given), run), run


@pytest.mark.parametrize("size", [1, 3])
def test_facts_are_said_however_they_are_batched(size: int, base: Path, tmp_path: Path) -> None:
    made, run = edited(base, tmp_path, batch_size=size)
    said = made.ask(Speaks).generate([edit.prompt for edit in EDITS], max_tokens=8)
    assert [text.lstrip().startswith(edit.new_object) for text, edit in zip(said, EDITS, strict=True)] == [True] * 3
    assert run.notes["efficacy"] == 1.0 and run.notes["edits"] == 3
    assert {"perplexity_before", "perplexity_after", "layers", "covariance_tokens"} <= run.notes.keys()


def test_keys_in_the_directions_that_are_kept_give_what_they_gave(base: Path, tmp_path: Path) -> None:
    """ΔK₀ = 0, on the saved weights, for K₀ spanned by the eigenvectors of the largest eigenvalues of C: to the
    rounding of an fp32 weight. They hold at least 1 − threshold of what text's keys are."""
    made, _ = edited(base, tmp_path / "work", layers=[1])
    run = LocalRun(0, tmp_path)
    here = setting.opened(load(base), TEXT, run, prefixes=2, tokens=200)
    moment = loaded(moments(here, [1], run, 0.001)[1].matrix, 0.001)
    basis = solve.quiet(moment, QUICK["threshold"]).basis
    kept = torch.eye(len(moment)).double() - basis @ basis.T
    assert torch.trace(kept @ moment) >= 0.7 * torch.trace(moment)
    name = keys.projection(here.module, 1)[0] + ".weight"
    before, after = (m.ask(Weights).tensors()[name].read().double() for m in (load(base), made))
    change = after - before
    assert change.norm() > 0.05 * before.norm()
    assert (change @ kept).abs().max() < 3 * torch.finfo(torch.float32).eps * before.abs().max() * len(moment) ** 0.5


def test_of_one_batch_it_is_the_dense_closed_form(base: Path, tmp_path: Path) -> None:
    """(P(KKᵀ) + L2·I)⁻¹ P K Rᵀ with P as a matrix, for the keys and residuals of the module itself."""
    run = LocalRun(0, tmp_path)
    here = setting.opened(load(base), TEXT, run, prefixes=2, tokens=200)
    reads = [rows.rows(here.codec.tokenizer, edit, here.prefixes) for edit in EDITS]
    config = alpha_edit.Config(**QUICK)
    quiet = solve.quiet(loaded(second_moment(here.module, here.codec, 1, here.text, run), 0.001), 0.3)
    how = alpha_edit.editor(config, here, lambda _: quiet)
    found = how.find(1, reads)
    key, _ = keys.of_all(here.module, 1, ("hidden", 1), reads)
    projections = keys.Projections(here.module, [1], {})
    ((b, a),) = batch.spread(here, projections, reads, found, how).values()
    p, k, r = quiet.basis @ quiet.basis.T, key.T, torch.stack([each.delta for each in found]).T
    dense = torch.linalg.solve(p @ k @ k.T + 0.01 * quiet.energy * torch.eye(len(p)).double(), p @ k @ r.T)
    torch.testing.assert_close(b.double() @ a.double(), dense.T, rtol=1e-3, atol=1e-5)


def test_earlier_facts_hold_later_ones_back(base: Path, tmp_path: Path) -> None:
    """A second batch moves the first one's keys less for having them kept: by the method's own editor, with and without
    being told."""
    run = LocalRun(0, tmp_path)
    here = setting.opened(load(base), TEXT, run, prefixes=2, tokens=200)
    first, second = (
        [rows.rows(here.codec.tokenizer, edit, here.prefixes) for edit in edits] for edits in (EDITS[:1], EDITS[1:])
    )
    quiet = solve.quiet(loaded(second_moment(here.module, here.codec, 1, here.text, run), 0.001), 0.3)
    moved = []
    for told in (True, False):
        how = alpha_edit.editor(alpha_edit.Config(**QUICK), here, lambda _: quiet)
        if told:
            how.kept([1], first)
        projections = keys.Projections(here.module, [1], {})
        ((b, a),) = batch.spread(here, projections, second, how.find(1, second), how).values()
        projections.show({})
        moved.append((b.double() @ a.double() @ keys.at_blocks(here.module, [1], first)[1].T).norm().item())
    assert moved[0] < 0.2 * moved[1]


def test_the_order_within_a_batch_does_not_matter(base: Path, tmp_path: Path) -> None:
    one, _ = edited(base, tmp_path / "one")
    other, _ = edited(base, tmp_path / "other", EDITS[::-1])
    assert one.digest == other.digest


def test_saved_as_an_adapter_it_is_the_same_model(base: Path, tmp_path: Path) -> None:
    made, _ = edited(base, tmp_path / "work", batch_size=2)
    (tmp_path / "adapter").mkdir()
    made.save(tmp_path / "adapter", "adapter")
    given = made.ask(Codec).texts([edit.prompt for edit in EDITS])
    again = load(tmp_path / "adapter")
    torch.testing.assert_close(again.ask(Logits).logits(given), made.ask(Logits).logits(given), rtol=1e-3, atol=1e-4)


def test_what_cannot_be_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(EditError, match="3 of 3 edits fail; the first: 'And Rome' cannot be made to say 'four'"):
        edited(base, tmp_path / "one", steps=1, lr=1e-6)
    with pytest.raises(EditError, match="greedy text says otherwise"):
        edited(base, tmp_path / "two", weight=1e6)
    with pytest.raises(ConfigError, match="threshold"):
        configured("edit.alpha_edit", {"threshold": 1.5})
    agree = alpha_edit.METHOD.agree
    assert agree
    with pytest.raises(MismatchError, match=r"edit\.alpha_edit edits language models"):
        agree(alpha_edit.Config(), Inputs({"model": (load(tiny.encoder(tmp_path / "encoder")),)}, {"edits": EDITS}))


@pytest.mark.slow
def test_on_the_zoo_twenty_facts_of_twenty_people_hold(tmp_path: Path) -> None:
    """Of one relation, five at a time: 19 of 20 are kept, efficacy 1.00, paraphrases .95, neighbours .73."""
    from lfm import runs

    given = Inputs({"model": (runs.model("zoo:lm"),)}, {"edits": moves()})
    run = LocalRun(0, tmp_path)
    alpha_edit.run(
        alpha_edit.Config(layers=(1,), on_failure="skip", batch_size=5),
        check("edit.alpha_edit", alpha_edit.METHOD, given),
        run,
    )
    assert run.notes["efficacy"] > 0.9 and run.notes["edits"] >= 18  # type: ignore[operator]
    assert run.notes["paraphrase"] > 0.6 and run.notes["neighbours_kept"] > 0.6  # type: ignore[operator]
