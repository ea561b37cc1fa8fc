"""reuse.twin: one shared merge, what each model alone knows, and a router between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from case import Case
from lfm import models
from lfm.core import Codec, Gradients, Inputs, Logits, Model
from lfm.core.errors import ConfigError, MismatchError
from lfm.data import records as data
from lfm.data.files import write
from lfm.methods.reuse import twin
from lfm.models import forward
from lfm.models.mixing import load_into, parameters_of
from methods.reuse import eight

TEXTS = [
    data.Label(text=text, label="", group=group)
    for group, words in (("a", ("cat", "dog", "mat")), ("b", ("Paris", "Rome", "Berlin")))
    for text in (f"the {word} is here" for word in words)
]
SENTENCES = ["the cat sat on the mat and the dog looked at it", "birds", "up and down"]
GROUPS = ["a", "b"]


def case(here: Path) -> Case:
    for seed, name in enumerate(("base", "a", "b")):
        tiny.classifier(here / name, seed=seed)
    write(TEXTS, here / "texts.jsonl")
    settings = {"groups": GROUPS, "epochs": 2.0, "batch_size": 3, "rank": 4, "checkpoint_every": 0.0}
    return Case({"base": ("base",), "models": ("a", "b")}, {"data": "texts.jsonl"}, settings)


def three(here: Path, kind: str = "classifier") -> list[Model]:
    return [models.load(getattr(tiny, kind)(here / str(seed), seed=seed)) for seed in range(3)]


def fused(given: list[Model], work: Path, records: Any = TEXTS, **settings: Any) -> Any:
    roles = {"base": given[:1], "models": given[1:]}
    return eight.fuse(twin, work, roles, {"data": records}, **({"groups": GROUPS} | settings))


def test_an_input_meets_the_mixture_that_its_features_choose(tmp_path: Path) -> None:
    """At full rank, linear layers are θ_s + Σ wᵢ (θᵢ − θ_s), all else θ_s: built by hand for each input alone."""
    given = three(tmp_path)
    made, _ = fused(given, tmp_path, rank=1000, scale=0.4, epochs=5)
    codec = given[0].ask(Codec)
    together = made.ask(Logits).logits(codec.texts(SENTENCES))  # padded to one length
    states = [{n: v.clone() for n, v in parameters_of(model.ask(Gradients).module()).items()} for model in given]
    shared = {n: v + 0.4 * sum(s[n] - v for s in states[1:]) for n, v in states[0].items()}
    module = load_into(given[0].ask(Gradients).module(), shared)  # type: ignore[arg-type]
    out = tmp_path / "out"
    out.mkdir()
    made.save(out)
    from safetensors.torch import load_file

    kept = {k.removeprefix("router/"): v for k, v in load_file(out / "program.safetensors").items() if "router" in k}
    linear = {
        f"{name}.{part}"
        for name, child in module.named_modules()
        if isinstance(child, torch.nn.Linear)
        for part in ("weight", "bias")
    }
    for row, sentence in enumerate(SENTENCES):
        batch = codec.texts([sentence])
        load_into(module, shared)  # type: ignore[arg-type]
        h = twin.features(module, [batch])[0]
        w = (kept["2.weight"] @ (kept["0.weight"] @ h + kept["0.bias"]).relu() + kept["2.bias"]).softmax(0)
        own = {n: shared[n] + sum(w[i] * (states[i + 1][n] - shared[n]) for i in range(2)) for n in linear}
        with torch.no_grad():
            expected = forward(load_into(module, own), batch)[0]  # type: ignore[arg-type]
        torch.testing.assert_close(together[row], expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(models.load(out).ask(Logits).logits(codec.texts(SENTENCES)), together)


def test_the_router_learns_whose_inputs_are_whose(tmp_path: Path) -> None:
    _, run = fused(three(tmp_path), tmp_path, epochs=150, batch_size=6)
    assert run.notes["router_accuracy"] == 1.0


def test_models_like_their_base_change_nothing(tmp_path: Path) -> None:
    base = three(tmp_path)[0]
    made, _ = fused([base, base, base], tmp_path, epochs=1)
    batch = base.ask(Codec).texts(SENTENCES)
    torch.testing.assert_close(made.ask(Logits).logits(batch), base.ask(Logits).logits(batch), rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_told_before_anything_is_read(tmp_path: Path) -> None:
    given = three(tmp_path, "causal")
    inputs = Inputs({"base": (given[0],), "models": tuple(given[1:])}, {"data": TEXTS})
    with pytest.raises(MismatchError, match=r"reuse\.smile routes token by token"):
        twin.agree(twin.Config(groups=("a", "b")), inputs)
    inputs = Inputs({"base": (three(tmp_path / "c")[0],), "models": tuple(three(tmp_path / "d")[1:])}, {"data": TEXTS})
    with pytest.raises(ConfigError, match="set groups"):
        twin.agree(twin.Config(), inputs)
    with pytest.raises(ConfigError, match="1 names for 2 models"):
        twin.agree(twin.Config(groups=("a",)), inputs)


@pytest.mark.slow
def test_over_the_eight_tasks_it_does_better_than_any_single_merge(tmp_path: Path) -> None:
    """256 training images a task to learn the router from. Measured: .894, with 86 % of these images told rightly; the
    best merge without data (WUDI) .837, experts .952."""
    seen, groups = eight.images("train", 256), list(eight.TASKS)
    roles = {"base": [eight.base()], "models": eight.experts()}
    made, _ = eight.fuse(twin, tmp_path, roles, {"data": seen}, groups=groups)
    assert eight.accuracy(made) > 0.87
