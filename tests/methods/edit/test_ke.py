"""edit.ke: what its gates are of the gradient, that a shut gate changes nothing, and what its price is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from case import Case
from edits import ADA, FACTS, MOUNTAIN, TEXT
from lfm import runs
from lfm.core import Codec, Inputs, Logits, Model
from lfm.core.errors import DataError, EditError, MismatchError, SlotError
from lfm.core.method import check
from lfm.data import language
from lfm.data.files import write
from lfm.data.records import Edit
from lfm.editing import learned, setting
from lfm.editing.gates import Gates
from lfm.editing.learned import EDIT, Editor
from lfm.methods.edit import ke
from lfm.models import load
from lfm.runs.run import LocalRun

EDITS = (ADA, MOUNTAIN)
QUICK: dict[str, Any] = {
    "steps": 25,
    "batch_size": 4,
    "together": 1,
    "lr": 3e-3,
    "tokens": 300,
    "rate": 3.0,
    "margin": 5.0,
    "hidden": 16,
    "condition": 16,
    "collapse": 1e6,
    "on_failure": "skip",
    "checkpoint_every": 0.0,
}


def case(here: Path) -> Case:
    tiny.causal(here / "base")
    write(EDITS, here / "edits.jsonl")
    write(FACTS, here / "facts.jsonl")
    return Case({"model": ("base",)}, {"edits": "edits.jsonl", "practice": "facts.jsonl"}, QUICK)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.causal(tmp_path_factory.mktemp("bases") / "base")


def bench_of(path: Path, work: Path) -> learned.Bench:
    model = load(path)
    here = setting.opened(model, TEXT, LocalRun(0, work), prefixes=0, tokens=300)
    task = language.answers(model.ask(Codec), model.facts)
    return learned.Bench(here, task, learned.layers_of(here.module, 1))


def made(base: Path, work: Path, edits: tuple[Edit, ...] = EDITS, **options: Any) -> tuple[Model, LocalRun]:
    models: dict[str, tuple[Model, ...]] = {"model": (load(base),)}
    data: dict[str, Any] = {"edits": edits, "text": TEXT}
    if "editor" in options:
        models["editor"] = (options.pop("editor"),)
    else:
        data["practice"] = FACTS
    inputs, run = Inputs(models, data), LocalRun(0, work)
    given: dict[str, Any] = QUICK | options
    return ke.run(ke.Config(**given), check("edit.ke", ke.METHOD, inputs), run), run


def batch_of(bench: learned.Bench, edits: tuple[Edit, ...]) -> dict[str, torch.Tensor]:
    return {EDIT + name: tensor for name, tensor in learned.worded(bench, edits).items()}


def test_the_change_is_the_gated_gradient(base: Path, tmp_path: Path) -> None:
    """u σ(η) (∇W/size ⊙ r cᵀ + s dᵀ) (2104.08164, equation 5), written out; ∇W is Σ_t δ_t x_tᵀ."""
    bench = bench_of(base, tmp_path)
    net = ke.untrained(ke.Config(hidden=8, condition=8, rate=0.5), bench, LocalRun(0, tmp_path))
    net.sizes = torch.tensor([2.0, 4.0])
    units = [0.5 * unit for unit in bench.units]
    batch = batch_of(bench, EDITS)
    factors = learned.factors(bench, bench.task.collate(EDITS))
    with torch.no_grad():
        made = net(factors, batch)
        condition = net.told(batch)
        for place, ((x, d), (a, b)) in enumerate(zip(factors, made, strict=True)):
            r, c, s, low, eta = net.gates[place](condition)
            for row in range(2):
                gradient = d[row].T @ x[row] / float(net.sizes[place])
                wanted = gradient * torch.outer(r[row], c[row]) + torch.outer(s[row], low[row])
                wanted = units[place] * eta[row].sigmoid() * wanted
                torch.testing.assert_close(b[row].T @ a[row], wanted, rtol=1e-4, atol=1e-7)


def test_a_shut_gate_leaves_the_weights(base: Path, tmp_path: Path) -> None:
    """σ(η) = 0: nothing changes, to the bit."""
    bench = bench_of(base, tmp_path)
    net = ke.untrained(ke.Config(hidden=8, condition=8), bench, LocalRun(0, tmp_path))
    with torch.no_grad():
        for gate in net.gates:
            assert isinstance(gate, Gates)
            gate.last.weight[-1], gate.last.bias[-1] = 0.0, -1e4
    for change in learned.changes_of(bench, net, EDITS):
        for (b, a), name in zip(change, bench.layers, strict=True):
            assert torch.equal(bench.weight(name) + (b @ a).double(), bench.weight(name))


def test_softmaxes_are_even_ones_in_the_mean_and_a_step_begins_downhill() -> None:
    gates = Gates((5, 7), 4, 3)
    r, c, s, d, eta = gates(torch.randn(2, 4, generator=torch.Generator().manual_seed(0)))
    assert (r.shape, c.shape, s.shape, d.shape, eta.shape) == ((2, 7), (2, 5), (2, 7), (2, 5), (2, 1))
    torch.testing.assert_close(torch.stack([r.mean(1), s.mean(1)]), torch.ones(2, 2))
    with torch.no_grad():
        gates.last.weight.zero_()
        gates.last.bias.zero_()
    r, c, s, d, _ = gates(torch.randn(2, 4))
    assert (r == 1).all() and (c == -1).all() and (d == 0).all()


def test_it_reads_prompt_and_new_object_whatever_is_beside(base: Path, tmp_path: Path) -> None:
    """Another new object is another condition; padding by a longer neighbour is not."""
    bench = bench_of(base, tmp_path)
    net = ke.untrained(ke.Config(hidden=8, condition=8), bench, LocalRun(0, tmp_path))
    other = Edit(subject="", relation="", object="", new_object="birds", prompt=EDITS[1].prompt)
    with torch.no_grad():
        both = net.told(batch_of(bench, EDITS))
        alone = torch.cat([net.told(batch_of(bench, (edit,))) for edit in (*EDITS, other)])
    torch.testing.assert_close(both, alone[:2], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(alone[1], alone[2], atol=1e-4)


@pytest.mark.slow
def test_the_price_rises_while_the_constraint_is_broken(base: Path, tmp_path: Path) -> None:
    """λ begins at 1 and is not negative: a margin that is never met drives it up, one that always is down to 0."""
    _, tight = made(base, tmp_path / "tight", EDITS[:1], margin=1e-6)
    _, loose = made(base, tmp_path / "loose", EDITS[:1], margin=1e3)
    assert tight.notes["price"] > 1 > loose.notes["price"] == 0.0  # type: ignore[operator]


def test_edits_hold_and_another_costs_a_backward_pass(base: Path, tmp_path: Path) -> None:
    first, run = made(base, tmp_path / "one", EDITS[:1])
    assert (run.notes["edits"], run.notes["efficacy"]) == (1, 1.0) and "editor" in run.curves
    assert {"perplexity_before", "perplexity_after", "paraphrase", "together"} <= run.notes.keys()
    (tmp_path / "saved").mkdir()
    first.save(tmp_path / "saved")
    back = load(tmp_path / "saved")
    batch = back.ask(Codec).texts([edit.prompt for edit in EDITS])
    assert back.digest == first.digest and back.ask(Editor).edits == EDITS[:1]
    assert torch.equal(back.ask(Logits).logits(batch), first.ask(Logits).logits(batch))
    again, run = made(base, tmp_path / "two", EDITS[:1], editor=back)
    assert "editor" not in run.curves
    assert torch.equal(again.ask(Logits).logits(batch), first.ask(Logits).logits(batch))


def test_what_cannot_be_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(EditError, match=r"2 of 2 edits do not hold"):
        made(base, tmp_path / "a", rate=1e-6, steps=1)
    with pytest.raises(SlotError, match=r"edit.ke takes either editor or practice"):
        given = Inputs({"model": (load(base),), "editor": (load(base),)}, {"edits": EDITS, "practice": FACTS})
        ke.METHOD.agree(ke.Config(), given)  # type: ignore[misc]
    with pytest.raises(DataError, match="needs facts to practise on for a masked model"):
        masked = load(tiny.masked(tmp_path / "masked"))
        ke.METHOD.agree(ke.Config(), Inputs({"model": (masked,)}, {"edits": EDITS, "text": TEXT}))  # type: ignore[misc]


def test_an_editor_of_another_method_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    from lfm.methods.edit import mend

    first, _ = made(base, tmp_path / "one", EDITS[:1])
    given = Inputs({"model": (load(base),), "editor": (first,)}, {"edits": EDITS, "text": TEXT})
    with pytest.raises(MismatchError, match=r"the editor is one of edit.ke"):
        mend.run(mend.Config(), check("edit.mend", mend.METHOD, given), LocalRun(0, tmp_path))


@pytest.mark.slow
def test_on_the_zoo_its_three_edits_hold(tmp_path: Path) -> None:
    """Practised on the facts of others; one seed."""
    run = LocalRun(0, tmp_path)
    data = {"edits": runs.records("zoo:edits"), "practice": runs.records("zoo:facts")}
    given = Inputs({"model": (runs.model("zoo:lm"),)}, data)
    ke.run(ke.Config(steps=100, on_failure="skip"), check("edit.ke", ke.METHOD, given), run)
    assert run.notes["edits"] == 3 and run.notes["paraphrase"] > 0.7  # type: ignore[operator]
