"""edit.t_patcher: where neurons fire, that they are the layer made wider, that one goes without another."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

import lfm
import tiny
from case import Case
from edits import EDITS, TEXT
from lfm.core import Codec, Gradients, Inputs, Logits, Model, Weights
from lfm.core import Text as Speaks
from lfm.core.errors import DataError, EditError, MismatchError, ModelError, OutputError, SlotError
from lfm.core.method import Amount, Sizes, check
from lfm.data.files import write
from lfm.data.records import Edit
from lfm.editing import neuron_search, neurons, wider
from lfm.editing.neurons import Neurons
from lfm.editing.setting import Setting
from lfm.methods.edit import t_patcher
from lfm.models import forward, load, structure
from lfm.models.language import CausalText
from lfm.runs.run import LocalRun
from moves import moves

QUICK: dict[str, Any] = {"tokens": 200, "steps": 30, "lr": 0.2, "collapse": 100.0, "accept": 0.3}


def case(here: Path) -> Case:
    tiny.causal(here / "base")
    write(EDITS[:2], here / "edits.jsonl")
    return Case({"model": ("base",)}, {"edits": "edits.jsonl"}, QUICK)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {"gated": tiny.causal(root / "gated"), "plain": tiny.conv1d(root / "plain")}


def made(base: Path, work: Path, edits: tuple[Edit, ...] = EDITS, **options: Any) -> tuple[Model, LocalRun]:
    before: dict[str, tuple[Model, ...]] = {"memory": (options.pop("memory"),)} if "memory" in options else {}
    inputs = Inputs({"model": (load(base),), **before}, {"edits": edits, "text": TEXT})
    run = LocalRun(0, work)
    config = t_patcher.Config(**(QUICK | options))
    t_patcher.agree(config, inputs)
    return t_patcher.run(config, check("edit.t_patcher", t_patcher.METHOD, inputs), run), run


def some(count: int, width: int, block: int = 1) -> Neurons:
    """Neurons at random, two for the first edit."""
    random = torch.Generator().manual_seed(0)
    edits = tuple(Edit(subject="", relation="", object="", new_object=str(i), prompt=str(i)) for i in range(count))
    owner = torch.tensor([0, *range(count)])
    n = len(owner)
    draws = [torch.randn(n, width, generator=random), torch.randn(n, generator=random)]
    return Neurons("base", block, edits, owner, draws[0], draws[1], torch.randn(n, width, generator=random))


@pytest.mark.parametrize("name", ["gated", "plain"])
def test_neurons_are_the_layer_made_wider(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """A plain checkpoint with the neurons in its own layers, read by transformers alone, says the same."""
    base = load(bases[name])
    module, batch = base.ask(Gradients).module().requires_grad_(False), base.ask(Codec).texts(["The cat sat", "birds"])
    kept = some(3, 32)
    wider.wider(base.ask(Weights), base.ask(Gradients), kept).save(tmp_path, "checkpoint")
    wide = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    plain = forward(module, batch)
    neurons.attach(module, kept)
    told = forward(module, batch)
    torch.testing.assert_close(told, forward(wide, batch), rtol=1e-4, atol=1e-4)
    assert (told - plain).abs().max() > 0.1
    inner = {layer: structure.feed_forward(wide, layer).inner for layer in structure.blocks(wide)}
    assert set(inner.values()) == {{"gated": 64, "plain": 128}[name] + 4}


def test_what_was_edited_is_saved_as_a_plain_checkpoint(bases: dict[str, Path], tmp_path: Path) -> None:
    model, _ = made(bases["gated"], tmp_path / "work")
    (tmp_path / "out").mkdir()
    model.save(tmp_path / "out", "checkpoint")
    back = load(tmp_path / "out")
    assert back.kind == "checkpoint"
    said = back.ask(Speaks).generate([edit.prompt for edit in EDITS], max_tokens=6)
    assert all(text.strip().startswith(edit.new_object) for text, edit in zip(said, EDITS, strict=True))


def test_where_there_is_no_room_for_biases_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        module = transformers.MistralForCausalLM(
            transformers.MistralConfig(
                vocab_size=len(tiny.byte_bpe()),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
            )
        )
    module.save_pretrained(tmp_path)
    tiny.byte_bpe().save_pretrained(tmp_path)
    with pytest.raises(OutputError, match="have no biases, and no setting gives them any"):
        wider.wider(load(tmp_path).ask(Weights), load(tmp_path).ask(Gradients), some(3, 32))


@pytest.mark.parametrize("name", ["gated", "plain"])
def test_what_is_taken_off_leaves_every_bit(name: str, bases: dict[str, Path]) -> None:
    module = load(bases[name]).ask(Gradients).module().requires_grad_(False)
    batch = load(bases[name]).ask(Codec).texts(["Rome is very"])
    before = forward(module, batch)
    off = neurons.attach(module, some(3, 32))
    off()
    assert torch.equal(forward(module, batch), before)
    kept = some(3, 32)
    neurons.attach(module, neurons.forget(kept, *kept.edits))
    assert torch.equal(forward(module, batch), before)


@settings(deadline=None, max_examples=50)
@drawn(data=st.data())
def test_forgetting_any_edits_in_any_order_is_never_having_learned_them(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 6))
    whole = some(count, 8)
    gone = data.draw(st.permutations(range(count)))[: data.draw(st.integers(0, count))]
    left = whole
    for number in gone:
        left = neurons.forget(left, whole.edits[number])
    rest = [i for i in range(count) if i not in gone]
    only = neurons.taken(whole, ())
    for number in rest:
        only = neurons.learn(only, neurons.taken(whole, [number]))
    assert left.edits == only.edits == tuple(whole.edits[i] for i in rest)
    for name in ("owner", "keys", "biases", "values"):
        assert torch.equal(getattr(left, name), getattr(only, name))


def test_an_edit_is_learned_once_and_never_against_another() -> None:
    kept = some(2, 8)
    assert torch.equal(neurons.learn(kept, kept).keys, kept.keys)
    with pytest.raises(DataError, match="'0' cannot become 'c': the memory has '0'"):
        neurons.learn(kept, Neurons("base", 1, _against(), *_one()))
    with pytest.raises(DataError, match="no edit of '0' to 'c'"):
        neurons.forget(kept, *_against())
    shared = Neurons("base", 1, kept.edits, torch.full((3,), neurons.SHARED), kept.keys, kept.biases, kept.values)
    with pytest.raises(DataError, match="of all their edits together"):
        neurons.forget(shared, kept.edits[0])


def _against() -> tuple[Edit, ...]:
    return (Edit(subject="", relation="", object="", new_object="c", prompt="0"),)


def _one() -> tuple[torch.Tensor, ...]:
    return torch.tensor([0]), torch.zeros(1, 8), torch.zeros(1), torch.zeros(1, 8)


def test_a_key_begins_as_the_widest_margin() -> None:
    """Three points about the origin's (2, 0): of them (0, ±1) are nearest in the direction that tells best, x₁ alone.

    The least-norm key with key·(x' − x) ≤ −1 is (½, 0), stretched here to 2·far; a small ridge moves it little.
    """
    x = torch.tensor([2.0, 0.0])
    others = torch.tensor([[0.0, 1.0], [0.0, -1.0], [-5.0, 0.3]])
    key, bias = neuron_search.begin(x, others, 3.0)
    torch.testing.assert_close(key, torch.tensor([3.0, 0.0]), atol=0.05, rtol=0)
    assert (key @ x + bias).item() == pytest.approx(3.0)
    assert (others @ key + bias).max().item() == pytest.approx(-3.0, abs=1e-4)


def test_where_none_can_be_told_apart_a_key_is_not_stretched_without_end() -> None:
    x = torch.tensor([1.0, 1.0])
    key, bias = neuron_search.begin(x, torch.stack([x, x]), 3.0)
    assert key.isfinite().all() and bias.isfinite()


def test_with_nothing_else_a_neuron_is_held_by_the_text(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt of one token, and no other subjects to put in: all of the text is held, and nothing is undefined."""
    monkeypatch.setattr(neuron_search, "_beside", lambda *_: torch.zeros(0, 32))
    model, run = made(bases["plain"], tmp_path, EDITS[:1], accept=0.01, on_failure="skip")
    kept = model.ask(Neurons)
    assert run.notes["edits"] == 1 and kept.keys.isfinite().all() and kept.biases.isfinite().all()


def test_the_losses_by_hand() -> None:
    """One neuron at 1, others at 0 and −2, margin 1: S(z) = log(1 + mean eᶻ)."""
    told = neuron_search.pushed(torch.tensor([1.0]), torch.tensor([[0.0], [-2.0]]), neuron_search.Losses(2.0, 5.0, 1.0))
    near = math.log1p((math.exp(0 - 1 + 1) + math.exp(-2 - 1 + 1)) / 2)
    far = math.log1p((math.exp(0 + 1) + math.exp(-2 + 1)) / 2)
    assert told.item() == pytest.approx(2 * math.log1p(math.exp(-1)) + 5 * (near + far), rel=1e-5)


def test_margins_are_where_a_function_has_died_away() -> None:
    assert neuron_search.quiet(torch.nn.GELU()) == 3.0  # the authors' margin
    assert neuron_search.quiet(torch.nn.ReLU()) == 1.0
    assert neuron_search.quiet(torch.nn.SiLU()) == 8.0  # 7.5 / (1 + e^7.5) = .00415 > .0041 > 8 / (1 + e^8)


def test_the_function_of_a_layer_is_found(bases: dict[str, Path]) -> None:
    x = torch.linspace(-3, 3, 5)
    for name, like in (("gated", torch.nn.SiLU()), ("plain", torch.nn.GELU(approximate="tanh"))):
        module = load(bases[name]).ask(Gradients).module()
        act = structure.activation(module, structure.blocks(module)[0])
        torch.testing.assert_close(act(x), like(x))
    with pytest.raises(ModelError, match="no activation function"):
        structure.activation(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Softmax(-1)), "0")


@pytest.mark.parametrize("name", ["gated", "plain"])
def test_the_new_objects_are_said_with_a_cache_and_without(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    model, run = made(bases[name], tmp_path)
    prompts = [edit.prompt for edit in EDITS]
    said = model.ask(Speaks).generate(prompts, max_tokens=6)
    assert all(text.strip().startswith(edit.new_object) for text, edit in zip(said, EDITS, strict=True))
    assert CausalText(model.ask(Logits).logits, model.ask(Codec)).generate(prompts, max_tokens=6) == said
    before = load(bases[name]).ask(Speaks).generate(prompts, max_tokens=6)
    assert not any(text.strip().startswith(edit.new_object) for text, edit in zip(before, EDITS, strict=True))
    assert (run.notes["efficacy"], run.notes["edits"], run.notes["skipped"]) == (1.0, 3, 0)
    assert {"perplexity_before", "perplexity_after", "paraphrase", "layer", "neurons"} <= run.notes.keys()


def test_each_mistake_has_a_neuron_and_each_is_found_as_if_alone(bases: dict[str, Path], tmp_path: Path) -> None:
    long = Edit(subject="birds", relation="", object="", new_object="東京 cat", prompt="the birds and")
    together, _ = made(bases["gated"], tmp_path / "a", (*EDITS[:1], long), accept=0.01, on_failure="skip")
    kept = together.ask(Neurons)
    assert (kept.owner == kept.edits.index(EDITS[0])).sum() == 1
    alone, _ = made(bases["gated"], tmp_path / "b", EDITS[:1])
    first = neurons.taken(kept, [0])
    for name in ("keys", "biases", "values"):
        torch.testing.assert_close(getattr(first, name), getattr(alone.ask(Neurons), name), rtol=1e-3, atol=1e-3)


def test_it_grows_forgets_the_right_fact_and_comes_back_from_its_files(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["gated"]
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


def test_calinet_shares_its_slots(bases: dict[str, Path], tmp_path: Path) -> None:
    how: dict[str, Any] = {"variant": "calinet", "slots": 16, "prefixes": 1, "steps": 60, "quiet": 0.1}
    model, run = made(bases["gated"], tmp_path / "a", **how)
    kept = model.ask(Neurons)
    assert kept.keys.shape == (16, 32) and (kept.owner == neurons.SHARED).all() and (kept.biases == 0).all()
    assert (run.notes["efficacy"], run.notes["neurons"]) == (1.0, 16)
    with pytest.raises(DataError, match="of all their edits together"):
        made(bases["gated"], tmp_path / "b", EDITS[:1], memory=model, forget=True)
    with pytest.raises(EditError, match="16 slots, trained on all edits"):
        made(bases["gated"], tmp_path / "c", **(how | {"steps": 1, "lr": 1e-6}))


def test_what_does_not_hold_is_refused_or_left_out_and_named(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["gated"]
    with pytest.raises(EditError, match=r"'In London lives Ada Ashby' cannot be made to say 'cat'.*its neurons give"):
        made(base, tmp_path / "a", steps=1, lr=1e-6)
    with pytest.raises(EditError, match=r"the memory would break the model.*larger quiet"):
        made(base, tmp_path / "b", collapse=1.0 + 1e-9)


def test_where_told_to_what_is_not_said_is_left_out_and_named(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    says = Setting.says

    def all_but_the_mountain(here: Setting, asked: Any) -> list[bool]:
        told = zip(says(here, asked), asked, strict=True)
        return [said and prompt != EDITS[1].prompt for said, (prompt, _, _) in told]

    monkeypatch.setattr(Setting, "says", all_but_the_mountain)
    model, run = made(bases["gated"], tmp_path, on_failure="skip")
    assert model.ask(Neurons).edits == (EDITS[0], EDITS[2])
    assert run.notes["skipped"] == 1 and EDITS[1].prompt in str(run.notes["skipped_because"])


def test_what_cannot_be_is_said_before_anything_is_read(bases: dict[str, Path], tmp_path: Path) -> None:
    model = load(bases["gated"])

    def agree(base: Model, **options: Any) -> None:
        t_patcher.agree(t_patcher.Config(**options), Inputs({"model": (base,)}, {"edits": EDITS}))

    with pytest.raises(SlotError, match="nothing to forget from"):
        agree(model, forget=True)
    with pytest.raises(MismatchError, match="no block 9"):
        agree(model, layer=9)
    with pytest.raises(DataError, match="needs text for a masked model"):
        agree(load(tiny.masked(tmp_path / "masked")))
    patched, _ = made(bases["gated"], tmp_path / "made", EDITS[:1])
    with pytest.raises(MismatchError, match="the memory is of another model"):
        made(tiny.causal(tmp_path / "other", seed=1), tmp_path / "work", EDITS[1:], memory=patched)
    for options in ({"layer": 1}, {"variant": "calinet"}):
        with pytest.raises(SlotError):
            made(bases["gated"], tmp_path / "no", EDITS[1:], memory=patched, **options)


def test_cost_grows_with_the_edits(bases: dict[str, Path]) -> None:
    facts = load(bases["gated"]).facts
    costs = [
        t_patcher.cost(t_patcher.Config(), Sizes({"model": (facts,)}, {"edits": Amount(n, 20 * n)})).flops
        for n in (10, 100)
    ]
    assert costs[1] > 5 * costs[0]


@pytest.mark.slow
def test_twenty_people_move(tmp_path: Path) -> None:
    """19 of 20 held, paraphrases .82, neighbours kept .93, perplexity 2.32 → 2.36 when this was written; 2 s of CPU."""
    edits = moves()
    run = LocalRun(0, tmp_path)
    inputs = Inputs({"model": (lfm.load("zoo:lm"),)}, {"edits": edits})
    t_patcher.run(t_patcher.Config(on_failure="skip"), check("edit.t_patcher", t_patcher.METHOD, inputs), run)
    assert float(run.notes["edits"]) >= 17 and run.notes["efficacy"] == 1.0
    assert float(run.notes["paraphrase"]) > 0.7 and float(run.notes["neighbours_kept"]) > 0.85
    assert float(run.notes["perplexity_after"]) < 1.1 * float(run.notes["perplexity_before"])
