"""edit.ultra: one step from gradients, normalised over all facts seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from case import Case
from edits import AT_THE_SUBJECT, TEXT
from lfm.core import Codec, Gradients, Inputs, Logits, Model, Weights
from lfm.core import Text as Speaks
from lfm.core.errors import ConfigError, DataError, EditError, MismatchError
from lfm.core.method import Amount, Sizes, check
from lfm.data.files import write
from lfm.data.records import Edit
from lfm.editing import keys, rows, setting, slopes
from lfm.methods.edit import ultra
from lfm.models import forward, load
from lfm.runs import configured
from lfm.runs.run import LocalRun
from moves import moves

EDITS = AT_THE_SUBJECT
QUICK: dict[str, Any] = {"collapse": 1000.0}
SHAPE: dict[str, Any] = {"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.3}
"""Of a random model in which what one block writes can make it say anything."""


def case(here: Path) -> Case:
    tiny.causal(here / "base", **SHAPE)
    write(EDITS[:2], here / "edits.jsonl")
    return Case({"model": ("base",)}, {"edits": "edits.jsonl"}, QUICK)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.causal(tmp_path_factory.mktemp("base") / "base", **SHAPE)


def edited(base: Path, work: Path, edits: tuple[Edit, ...] = EDITS, **settings: Any) -> tuple[Model, LocalRun]:
    given = Inputs({"model": (load(base),)}, {"edits": edits, "text": TEXT})
    run = LocalRun(0, work)
    return ultra.run(ultra.Config(**(QUICK | settings)), check("edit.ultra", ultra.METHOD, given), run), run


def test_keys_and_gradients_are_those_of_the_loss(base: Path, tmp_path: Path) -> None:
    """Σ g hᵀ over tokens is the gradient of the facts' losses by the projection's weight, as autograd has it."""
    here = setting.opened(load(base), TEXT, LocalRun(0, tmp_path), prefixes=0, tokens=200)
    reads = [rows.rows(here.codec.tokenizer, edit, here.prefixes) for edit in EDITS]
    module = load(base).ask(Gradients).module()
    loss: Any = 0
    for read in reads:
        labels = read.labels[:1, 1:]
        logits = forward(module, {name: x[:1] for name, x in read.batch.items()})[:, :-1]
        loss = loss + torch.nn.functional.cross_entropy(logits[labels != rows.IGNORED], labels[labels != rows.IGNORED])
    weights = [keys.projection(module, block)[1].weight for block in (1, 2)]
    expected = torch.autograd.grad(loss, weights)
    for each, slope in zip(slopes.seen(here, (1, 2), reads).values(), expected, strict=True):
        torch.testing.assert_close((each.g.T @ each.h).float(), slope, rtol=1e-3, atol=1e-5)
        assert len(each.h) == sum(int(read.last[0]) for read in reads)  # all but each one's last token


def test_the_normalisation_is_of_all_that_was_seen() -> None:
    """Chunk by chunk the mean and the deviation of the whole."""
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)).double() * 3 + 1
    running = slopes.Running(0, torch.zeros(4).double(), torch.zeros(4).double())
    for part in x.split([1, 9, 20]):
        running = running.also(part)
    torch.testing.assert_close(running.normal(x), (x - x.mean(0)) / x.std(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [5, 40])
def test_the_change_is_the_papers_closed_form(tokens: int) -> None:
    """(HᵀH + ρI)⁻¹ HᵀV, dense, V = −η‖ĥ‖² ĝ with η = s·rms(v)/in; also where there are more tokens than dimensions."""
    random = torch.Generator().manual_seed(tokens)
    h, g, v = (torch.randn(tokens, size, generator=random).double() for size in (12, 7, 7))
    running = slopes.Running(0, torch.zeros(19).double(), torch.zeros(19).double()).also(torch.cat([h, g], 1))
    owner = torch.arange(tokens) % 3
    b, a = ultra.change(slopes.Seen(h, g, v, owner), running, [0, 1, 2], 0.5, 0.01)
    hat, slope = running.normal(torch.cat([h, g], 1)).split([12, 7], 1)
    wanted = -(0.5 * v.square().mean().sqrt() / 12) * hat.square().sum(1, keepdim=True) * slope
    load = 0.01 * h.square().sum(1).mean() * torch.eye(12).double()
    dense = torch.linalg.solve(h.T @ h + load, h.T @ wanted).T
    torch.testing.assert_close(b.double() @ a.double(), dense, rtol=1e-4, atol=1e-5)
    alone, _ = ultra.change(slopes.Seen(h, g, v, owner), running, [1], 0.5, 0.01)
    assert alone.shape[1] == int((owner == 1).sum())


def test_facts_are_said_and_the_upper_half_is_changed(base: Path, tmp_path: Path) -> None:
    made, run = edited(base, tmp_path)
    said = made.ask(Speaks).generate([edit.prompt for edit in EDITS], max_tokens=8)
    assert [text.lstrip().startswith(edit.new_object) for text, edit in zip(said, EDITS, strict=True)] == [True] * 3
    assert run.notes["efficacy"] == 1.0 and run.notes["edits"] == 3 and run.notes["layers"] == "1, 2"
    assert run.notes["strength"] in ultra.STRENGTHS
    assert {"perplexity_before", "perplexity_after"} <= run.notes.keys()
    before, after = (m.ask(Weights).tensors() for m in (load(base), made))
    changed = [n for n in before if not torch.equal(before[n].read(), after[n].read())]
    assert ", ".join(n.removesuffix(".weight") for n in changed) == run.notes["modules"]


def test_the_order_of_facts_does_not_matter(base: Path, tmp_path: Path) -> None:
    one, _ = edited(base, tmp_path / "one")
    other, _ = edited(base, tmp_path / "other", EDITS[::-1])
    assert one.digest == other.digest


def test_batches_come_one_after_another_and_resume(base: Path, tmp_path: Path) -> None:
    """With the first run's steps at hand a second makes the same, though the normalisation is worked out anew."""
    made, run = edited(base, tmp_path / "work", batch_size=1, on_failure="skip")
    assert len(run.curves["perplexity by batch"]) == 1 + len(EDITS)
    again, _ = edited(base, tmp_path / "work", batch_size=1, on_failure="skip")
    assert made.digest == again.digest


def test_saved_as_an_adapter_it_is_the_same_model(base: Path, tmp_path: Path) -> None:
    made, _ = edited(base, tmp_path / "work")
    (tmp_path / "adapter").mkdir()
    made.save(tmp_path / "adapter", "adapter")
    given = made.ask(Codec).texts([edit.prompt for edit in EDITS])
    again = load(tmp_path / "adapter").ask(Logits).logits(given)
    torch.testing.assert_close(again, made.ask(Logits).logits(given), rtol=1e-3, atol=1e-3)


def test_what_cannot_be_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(EditError, match="3 of 3 edits fail; the first: 'And Rome' cannot be made to say 'four'"):
        edited(base, tmp_path / "one", strength=1e-6)
    with pytest.raises(EditError, match="would break the model"):
        edited(base, tmp_path / "two", strength=1000.0, collapse=1.01)
    with pytest.raises(ConfigError, match="strength"):
        configured("edit.ultra", {"strength": 0})
    agree = ultra.METHOD.agree
    assert agree
    with pytest.raises(MismatchError, match="no block 9"):
        agree(ultra.Config(layers=(9,)), Inputs({"model": (load(base),)}, {"edits": EDITS}))
    with pytest.raises(DataError, match="contradicts another"):
        two = [EDITS[0], Edit(subject="Ada Ashby", relation="", object="", new_object="x", prompt=EDITS[0].prompt)]
        agree(ultra.Config(), Inputs({"model": (load(base),)}, {"edits": two}))
    with pytest.raises(MismatchError, match=r"edit\.ultra edits causal language models and masked"):
        agree(ultra.Config(), Inputs({"model": (load(tiny.seq2seq(tmp_path / "seq2seq")),)}, {"edits": EDITS}))


def test_cost_grows_with_the_edits(base: Path) -> None:
    facts = load(base).facts
    flops = [
        ultra.METHOD.cost(ultra.Config(), Sizes({"model": (facts,)}, {"edits": Amount(n, 20 * n)})).flops
        for n in (10, 1000)
    ]
    assert flops[1] > flops[0]


@pytest.mark.slow
def test_on_the_zoo_twenty_facts_of_twenty_people_hold(tmp_path: Path) -> None:
    """Of one relation, all at once: efficacy 1.00, paraphrases 1.00, but neighbours of that relation .40."""
    from lfm import runs

    given = Inputs({"model": (runs.model("zoo:lm"),)}, {"edits": moves()})
    run = LocalRun(0, tmp_path)
    ultra.run(ultra.Config(on_failure="skip"), check("edit.ultra", ultra.METHOD, given), run)
    assert run.notes["efficacy"] > 0.9 and run.notes["edits"] >= 18  # type: ignore[operator]
    assert run.notes["paraphrase"] > 0.6 and run.notes["neighbours_kept"] > 0.3  # type: ignore[operator]
