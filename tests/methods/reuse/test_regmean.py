"""reuse.regmean: least squares over each layer's inputs, against closed forms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import tiny
from case import Case
from lfm import models
from lfm.core import Codec, Gradients, Model
from lfm.core.errors import ConfigError, DataError
from lfm.data import records as data
from lfm.data.files import write
from lfm.methods.reuse import linear, regmean
from lfm.models import forward, layers
from lfm.models.gram import grams, scaled, solve
from methods.reuse import eight
from methods.reuse.merging import merge, tensors

TEXTS = [data.Text(text=line) for line in tiny.CORPUS]


def case(here: Path) -> Case:
    for seed, name in enumerate("ab"):
        tiny.causal(here / name, seed=seed)
    write(TEXTS, here / "texts.jsonl")
    return Case({"models": ("a", "b")}, {"data": "texts.jsonl"}, {"batch_size": 4})


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Model]:
    here = tmp_path_factory.mktemp("pair")
    return [models.load(tiny.causal(here / str(seed), seed=seed)) for seed in (0, 1)]


def inputs_of(model: Model, name: str, records: list[data.Text]) -> torch.Tensor:
    """(rows, in) fp64: one text at a time, so that nothing is padded."""
    module, kept = model.ask(Gradients).module(), []
    module.get_submodule(name).register_forward_pre_hook(lambda _, args: kept.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for record in records:
            forward(module, model.ask(Codec).texts([record.text]))
    return torch.cat(kept).double()


@pytest.mark.parametrize("scale", [1.0, 0.9, 0.0])
def test_each_layer_is_the_closed_form_of_the_paper(scale: float, pair: list[Model], tmp_path: Path) -> None:
    """W = (Σ Gᵢ)⁻¹ Σ Gᵢ Wᵢ with inputs gathered one text at a time, where regmean pads them to batches of four."""
    made, _ = eight.fuse(regmean, tmp_path, {"models": pair}, {"data": TEXTS}, scale=scale, batch_size=4, ridge=1e-12)
    found = tensors(made)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head"):
        total, answer = torch.zeros(1), torch.zeros(1)
        for model in pair:
            x, weight = inputs_of(model, name, TEXTS), tensors(model)[f"{name}.weight"].double()
            gram = x.T @ x / len(x)
            gram = torch.where(torch.eye(len(gram), dtype=torch.bool), gram, scale * gram)
            total, answer = total + gram, answer + gram @ weight.T
        expected = torch.linalg.solve(total, answer).T
        torch.testing.assert_close(found[f"{name}.weight"].double(), expected, rtol=1e-3, atol=1e-4)


def test_what_is_no_linear_layer_is_averaged(pair: list[Model], tmp_path: Path) -> None:
    made, _ = eight.fuse(regmean, tmp_path, {"models": pair}, {"data": TEXTS}, head=False)
    found, mean = tensors(made), tensors(merge(linear, tmp_path, {"models": pair}))
    averaged = {name for name in mean if torch.allclose(found[name], mean[name], rtol=1e-6, atol=1e-7)}
    assert {name for name in mean if "norm" in name or "embed" in name} | {"lm_head.weight"} == averaged


@pytest.mark.parametrize("how", ["own", "merged"])
def test_equal_models_stay_as_they_are(how: str, pair: list[Model], tmp_path: Path) -> None:
    made, _ = eight.fuse(regmean, tmp_path, {"models": [pair[0]] * 3}, {"data": TEXTS}, inputs=how)
    for name, value in tensors(pair[0]).items():
        torch.testing.assert_close(tensors(made)[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["causal", "masked", "classifier", "seq2seq", "vit", "gpt2"])
def test_all_the_weight_on_one_model_gives_that_model(name: str, tmp_path: Path) -> None:
    if name == "gpt2":  # its linear layers hold their weights as (in, out), its head is tied
        from transformers import GPT2Config, GPT2LMHeadModel

        shape = GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2)
        paths = [tiny._write(tmp_path / str(s), s, lambda: GPT2LMHeadModel(shape), tiny.byte_bpe()) for s in (0, 1)]
    else:
        paths = [getattr(tiny, name)(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    given = [models.load(path) for path in paths]
    records = {
        "classifier": [data.Label(text=line, label="") for line in tiny.CORPUS],
        "vit": [data.Image(image=torch.full((8, 8), 9 * i, dtype=torch.uint8).numpy(), label="") for i in range(5)],
        "seq2seq": [data.Completion(prompt=line, completion=line) for line in tiny.CORPUS],
    }.get(name, TEXTS)
    made, _ = eight.fuse(regmean, tmp_path, {"models": given}, {"data": records}, weights=[1, 0], inputs="merged")
    for key, value in tensors(given[0]).items():
        torch.testing.assert_close(tensors(made)[key], value, rtol=1e-4, atol=1e-5)


def test_merged_inputs_are_those_of_the_merged_layers_before(pair: list[Model], tmp_path: Path) -> None:
    """RegMean++ in its own words: the second block's Grams are read behind the first one as it was merged."""
    made, _ = eight.fuse(
        regmean, tmp_path, {"models": pair}, {"data": TEXTS}, inputs="merged", scale=1.0, ridge=1e-12, batch_size=4
    )
    done, name = tensors(made), "model.layers.1.self_attn.q_proj"
    total, answer = torch.zeros(1), torch.zeros(1)
    for model in pair:
        module = model.ask(Gradients).module()
        early = {key: value for key, value in done.items() if "embed" in key or "layers.0." in key}
        module.load_state_dict(early, strict=False)
        x = inputs_of(model.ask(Gradients).rewrap(module), name, TEXTS)
        gram = x.T @ x / len(x)
        total, answer = total + gram, answer + gram @ tensors(model)[f"{name}.weight"].double().T
    torch.testing.assert_close(
        done[f"{name}.weight"].double(), torch.linalg.solve(total, answer).T, rtol=1e-3, atol=1e-4
    )


def test_directions_that_no_input_takes_keep_the_mean() -> None:
    x = torch.zeros(20, 4, dtype=torch.float64)
    x[:, :2] = torch.randn(20, 2, dtype=torch.float64)
    gram, own, mean = x.T @ x, torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    for ridge in (1e-9, 0.0):
        found = solve(gram, gram @ own, mean, ridge)
        torch.testing.assert_close(found, torch.cat([own[:2], mean[2:]]), rtol=1e-6, atol=1e-6)


def test_off_the_diagonal_and_only_there_a_gram_is_scaled() -> None:
    gram = torch.tensor([[4.0, 2.0], [2.0, 3.0]])
    assert scaled(gram, 0.5).tolist() == [[4.0, 1.0], [1.0, 3.0]]


def test_a_gram_is_the_mean_over_rows_that_are_no_padding() -> None:
    module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.ReLU(), nn.Linear(3, 2))
    x = torch.randn(2, 5, 3)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    found = grams(module, [{"x": x, "attention_mask": mask}, {"x": x, "attention_mask": mask}], ["0"])
    rows = x[mask.bool()].double()
    torch.testing.assert_close(found["0"], rows.T @ rows / 8)
    assert set(found) == {"0"}


def test_stages_hold_every_module_once_and_in_order(pair: list[Model]) -> None:
    module = pair[0].ask(Gradients).module()
    found = layers.stages(module)
    assert found[0] == ["model.embed_tokens"] and "lm_head" in found[-1] and len(found) == 4
    flat = [name for stage in found for name in stage]
    assert len(flat) == len(set(flat)) and all("layers.0." in name for name in found[1])
    assert {n.rpartition(".")[0] for n, _ in module.named_parameters()} <= set(flat)


def test_groups_must_fit_the_models(pair: list[Model], tmp_path: Path) -> None:
    grouped = [data.Text(text=line, group="ab"[i % 2]) for i, line in enumerate(tiny.CORPUS)]
    with pytest.raises(ConfigError, match="1 names for 2 models"):
        eight.fuse(regmean, tmp_path, {"models": pair}, {"data": grouped}, groups=["a"])
    with pytest.raises(DataError, match=r"no record is of group 'c'.*'a', 'b'"):
        eight.fuse(regmean, tmp_path, {"models": pair}, {"data": grouped}, groups=["a", "c"])
    one, _ = eight.fuse(regmean, tmp_path, {"models": pair}, {"data": grouped}, groups=["a", "b"])
    other, _ = eight.fuse(regmean, tmp_path, {"models": pair}, {"data": grouped}, groups=["b", "a"])
    assert one.digest != other.digest


@pytest.mark.slow
@pytest.mark.parametrize("how", ["own", "merged"])
def test_over_the_eight_tasks_it_is_far_better_than_the_mean(how: str, tmp_path: Path) -> None:
    """256 training images a task, each expert its own. Measured: mean .725, RegMean .779, RegMean++ .782; at scale 1
    RegMean is .775, and .778 with the head averaged."""
    seen, groups = eight.images("train", 256), list(eight.TASKS)
    made, _ = eight.fuse(regmean, tmp_path, {"models": eight.experts()}, {"data": seen}, groups=groups, inputs=how)
    assert eight.accuracy(made) > 0.76
