"""reuse.merge: a recipe as a method. What recipes say and give is tested in tests/merging."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny
from case import Case
from lfm.core.errors import ConfigError
from lfm.methods.reuse import merge as method
from lfm.methods.reuse import ties
from methods.reuse.merging import bare, merge, tensors

RECIPE = """
base_model: base
merge_method: ties
models:
  - {model: math, parameters: {weight: 1.0, density: [0.3, 0.8]}}
  - {model: code, parameters: {weight: [0.2, 1.0], density: 0.5}}
"""


def case(here: Path) -> Case:
    for seed, name in enumerate(("base", "math", "code")):
        tiny.causal(here / name, seed=seed)
    (here / "recipe.yml").write_text(RECIPE)
    return Case(models={"models": ("base", "math", "code")}, settings={"recipe": RECIPE})


def test_a_recipe_of_constants_is_the_method_itself(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    start = {"blocks.0.w": torch.randn(30, 10, generator=random), "blocks.1.w": torch.randn(30, 10, generator=random)}
    base, a, b = (
        bare(
            tmp_path / f"{i}.safetensors",
            {n: t + i * 0.1 * torch.randn(t.shape, generator=random) for n, t in start.items()},
        )
        for i in range(3)
    )
    recipe = "{merge_method: ties, base_model: '0', parameters: {density: 0.4, lambda: 0.7, weight: 1}, "
    recipe += "models: [{model: '1'}, {model: '2'}]}"
    by_recipe = tensors(merge(method, tmp_path, {"models": [base, a, b]}, recipe=recipe))
    settings = {"density": 0.4, "scale": 0.7, "scope": "tensor", "cancelled": "positive"}
    itself = tensors(merge(ties, tmp_path, {"base": [base], "models": [a, b]}, **settings))
    assert all(torch.equal(by_recipe[name], itself[name]) for name in start)


def test_as_many_models_as_the_recipe_names(tmp_path: Path) -> None:
    model = bare(tmp_path / "m.safetensors", {"w": torch.ones(2)})
    with pytest.raises(ConfigError, match="names 3 models, 1 were given"):
        merge(method, tmp_path, {"models": [model]}, recipe=RECIPE)
    with pytest.raises(ConfigError, match="not a mapping"):
        merge(method, tmp_path, {"models": [model]})


def test_a_recipe_with_names_in_place_of_numbers_is_filled_and_searched(tmp_path: Path) -> None:
    from lfm import models
    from lfm.core import Inputs
    from lfm.core.config import configure
    from lfm.core.method import check
    from lfm.data.records import Text
    from lfm.methods.reuse import evolve
    from lfm.runs.run import LocalRun

    case(tmp_path)
    recipe = """
        merge_method: linear
        models: [{model: math, parameters: {weight: "${a}"}}, {model: code, parameters: {weight: [1.0, "${b}"]}}]
    """
    given = [models.load(tmp_path / name) for name in ("math", "code")]
    made = tensors(merge(method, tmp_path, {"models": given}, recipe=recipe, values={"a": 1.0, "b": 0.0}))
    last = max(name for name in made if ".layers." in name or ".h." in name)
    assert torch.equal(made[last], tensors(given[0])[last])  # the gradient ends at no weight of the second
    with pytest.raises(ConfigError, match="differ in b"):
        merge(method, tmp_path, {"models": given}, recipe=recipe, values={"a": 1.0})
    settings = {
        "method": "reuse.merge",
        "settings": {"recipe": recipe},
        "space": {"values.a": (0.0, 1.0), "values.b": (0.0, 2.0)},
        "budget": 8,
        "by": "loss",
    }
    config = configure(evolve.Config, settings)
    texts = [Text(text=f"The cat sat on the {word}.") for word in ("mat", "dog", "hat", "rug")]
    inputs = check("reuse.evolve", evolve.METHOD, Inputs({"models": tuple(given)}, {"dev": texts}))
    evolve.agree(config, inputs)
    run = LocalRun(0, tmp_path / "work")
    assert isinstance(evolve.run(config, inputs, run), models.Model)
    assert run.notes["dev_loss_evolved"] <= run.notes["dev_loss_defaults"]
