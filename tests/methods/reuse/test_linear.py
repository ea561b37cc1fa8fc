"""reuse.linear: a weighted mean, exactly, of models that go together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import tiny
from case import Case
from lfm import models
from lfm.core import Inputs, Weights
from lfm.core.errors import ConfigError, CorruptError, MismatchError, SlotError
from lfm.methods.reuse import linear
from methods.reuse.merging import bare, merge, tensors
from methods.reuse.reference import CASES, checkpoint


def case(here: Path) -> Case:
    for seed, name in enumerate(("a", "b")):
        tiny.causal(here / name, seed=seed)
    return Case(models={"models": ("a", "b")}, settings={"weights": [3, 1]})


RECORDED = json.loads(Path(__file__).with_name("mergekit.json").read_text())


def test_closed_form(tmp_path: Path) -> None:
    a = bare(tmp_path / "a.safetensors", {"w": torch.tensor([[1.0, 2.0], [4.0, -8.0]])})
    b = bare(tmp_path / "b.safetensors", {"w": torch.tensor([[5.0, -2.0], [0.0, 8.0]])})
    assert tensors(merge(linear, tmp_path, {"models": [a, b]}))["w"].tolist() == [[3.0, 0.0], [2.0, 0.0]]
    weighted = merge(linear, tmp_path, {"models": [a, b]}, weights=[3, 1])
    assert tensors(weighted)["w"].tolist() == [[2.0, 1.0], [3.0, -4.0]]
    plain = merge(linear, tmp_path, {"models": [a, b]}, weights=[1, -1], normalize=False)
    assert tensors(plain)["w"].tolist() == [[-4.0, 4.0], [4.0, -16.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_all_the_weight_on_one_model_gives_its_bytes(dtype: torch.dtype, tmp_path: Path) -> None:
    kept = torch.cat([torch.randn(300_000), torch.tensor([0.0, -0.0, 1e-7, -1e4])]).to(dtype)
    a = bare(tmp_path / "a.safetensors", {"w": kept})
    b = bare(tmp_path / "b.safetensors", {"w": torch.full_like(kept, float("nan"))})
    for weights, both in (([1, 0], [a, b]), ([0, 2.5], [b, a])):
        merged = merge(linear, tmp_path, {"models": both}, weights=weights)
        assert merged.digest == a.digest


@pytest.mark.parametrize("count", [2, 4])
def test_models_that_are_equal_stay_so(count: int, tmp_path: Path) -> None:
    a = bare(tmp_path / "a.safetensors", {"w": torch.randn(1000), "ids": torch.arange(4)})
    assert merge(linear, tmp_path, {"models": [a] * count}).digest == a.digest


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), max_size=3),
    weights=st.lists(st.floats(0.01, 4), min_size=2, max_size=4),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 10**6),
    cut=st.integers(1, 50),
)
def test_it_is_the_plain_mean(
    tmp_path: Path, shape: list[int], weights: list[float], dtype: torch.dtype, seed: int, cut: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    values = [torch.randn(shape, generator=random).to(dtype) for _ in weights]
    given = [bare(tmp_path / f"{i}.safetensors", {"w": value}) for i, value in enumerate(values)]
    merged = merge(linear, tmp_path, {"models": given}, weights=weights)
    exact = sum(w * v.double() for w, v in zip(weights, values)) / sum(weights)
    found = merged.ask(Weights).tensors()["w"]
    torch.testing.assert_close(
        found.read(), exact.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6 if dtype == torch.float32 else 1e-4
    )
    pieces = [found.read_flat(i, min(i + cut, exact.numel())) for i in range(0, exact.numel(), cut)]
    assert torch.equal(torch.cat([torch.empty(0, dtype=dtype), *pieces]).reshape(shape), found.read())


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case["method"] == "linear"])
def test_it_agrees_with_mergekit(name: str, tmp_path: Path) -> None:
    """Values recorded from mergekit 0.1.5 by reference.py."""
    case = CASES[name]
    given = [models.load(checkpoint(tmp_path / str(i), i)) for i in (1, 2)]
    normalize = case.get("normalize", True)
    merged = tensors(merge(linear, tmp_path, {"models": given}, weights=case["weights"], normalize=normalize))
    for tensor, known in RECORDED[name].items():
        torch.testing.assert_close(merged[tensor].reshape(-1), torch.tensor(known), rtol=2.4e-7, atol=6e-8)


def test_the_result_has_the_first_models_dtypes_and_saves(tmp_path: Path) -> None:
    a = bare(tmp_path / "a.safetensors", {"w": torch.ones(4).bfloat16(), "ids": torch.arange(3)})
    b = bare(tmp_path / "b.safetensors", {"w": torch.full((4,), 2.0), "ids": torch.arange(3)})
    merged = merge(linear, tmp_path, {"models": [a, b]})
    out = tmp_path / "out"
    out.mkdir()
    merged.save(out)
    found = load_file(out / "model.safetensors")
    assert torch.equal(found["w"], torch.full((4,), 1.5).bfloat16()) and torch.equal(found["ids"], torch.arange(3))
    assert models.load(out).digest == merged.digest


def test_transformers_loads_a_merged_checkpoint(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    paths = [tiny.causal(tmp_path / str(seed), seed=seed) for seed in range(2)]
    out = tmp_path / "out"
    out.mkdir()
    merge(linear, tmp_path, {"models": [models.load(path) for path in paths]}).save(out)
    a, b, merged = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict() for path in (*paths, out)
    )
    for name in merged:
        torch.testing.assert_close(merged[name], (a[name] + b[name]) / 2)


W = torch.ones(3, 2)
UNEQUAL = {
    "a name that one lacks": ({"w": W, "v": W}, {"w": W}, "v only in"),
    "a name that the other lacks": ({"w": W}, {"w": W, "v": W}, "v only in"),
    "a tied head that one stores": ({"embed": W}, {"embed": W, "lm_head.weight": W}, "ties two tensors"),
    "another shape": ({"w": W}, {"w": W.T}, "w [3, 2] against [2, 3]"),
    "integers for floats": ({"w": W}, {"w": W.int()}, "w floating in one and integer in the other"),
}


@pytest.mark.parametrize("case", UNEQUAL)
def test_models_that_do_not_go_together_are_refused_unread(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, says = UNEQUAL[case]
    a, b = bare(tmp_path / "a.safetensors", first), bare(tmp_path / "b.safetensors", second)
    monkeypatch.setattr("lfm.tensors.safetensors_file.StoredTensor.read_into", None)  # any reading would fail
    with pytest.raises(MismatchError) as error:
        merge(linear, tmp_path, {"models": [a, b]})
    assert says in str(error.value) and "a.safetensors" in str(error.value) and "b.safetensors" in str(error.value)


def test_many_differences_are_counted(tmp_path: Path) -> None:
    a = bare(tmp_path / "a.safetensors", {f"w{i}": W for i in range(9)})
    b = bare(tmp_path / "b.safetensors", {"w0": W})
    with pytest.raises(MismatchError, match="w1, w2, w3 and 5 more only in"):
        merge(linear, tmp_path, {"models": [a, b]})


def test_other_architectures_and_vocabularies_are_refused(tmp_path: Path) -> None:
    paths = [checkpoint(tmp_path / str(i), i) for i in range(5)]
    config = json.loads((paths[0] / "config.json").read_text())
    (paths[1] / "config.json").write_text(json.dumps(config | {"architectures": ["MistralForCausalLM"]}))
    (paths[2] / "config.json").write_text(json.dumps(config | {"vocab_size": 17}))
    for path, heads in ((paths[0], 2), (paths[4], 1)):
        told = json.loads((path / "config.json").read_text()) | {"num_attention_heads": heads}
        (path / "config.json").write_text(json.dumps(told))
    for path, token in ((paths[0], "a"), (paths[3], "b")):
        (path / "vocab.txt").write_text(token)
    for other, says in (
        (1, "MistralForCausalLM"),
        (2, "16 and 17 tokens"),
        (3, "not the same ones"),
        (4, "heads: 2 and 1"),
    ):
        with pytest.raises(MismatchError, match=says):
            merge(linear, tmp_path, {"models": [models.load(paths[0]), models.load(paths[other])]})


def test_one_vocabulary_saved_in_two_ways_goes_together(tmp_path: Path) -> None:
    given = [tiny.causal(tmp_path / str(seed), seed=seed) for seed in range(2)]
    path = given[1] / "tokenizer.json"
    told = json.loads(path.read_text())
    told["truncation"] = {"max_length": 8, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
    path.write_text(json.dumps(told, indent=7))
    assert models.load(given[0]).facts.vocabulary_digest == models.load(given[1]).facts.vocabulary_digest
    linear.agree(linear.Config(), Inputs({"models": tuple(models.load(path) for path in given)}))
    told["added_tokens"][0]["content"] = "<other>"
    path.write_text(json.dumps(told))
    with pytest.raises(MismatchError, match="not the same ones"):
        linear.agree(linear.Config(), Inputs({"models": tuple(models.load(path) for path in given)}))


def test_settings_that_make_no_sense(tmp_path: Path) -> None:
    a = bare(tmp_path / "a.safetensors", {"w": W})
    for weights, says in (
        ([1, 1, 1], "3 values for 2 models"),
        ([0, 0], "all weights are zero"),
        ([1, -1], "sum to zero"),
    ):
        with pytest.raises(ConfigError, match=says):
            merge(linear, tmp_path, {"models": [a, a]}, weights=weights)
    with pytest.raises(SlotError, match="needs 2 models"):
        merge(linear, tmp_path, {"models": [a]})


def test_integers_are_not_averaged(tmp_path: Path) -> None:
    a = bare(tmp_path / "a.safetensors", {"w": W, "ids": torch.tensor([1, 2])})
    b = bare(tmp_path / "b.safetensors", {"w": W, "ids": torch.tensor([1, 3])})
    with pytest.raises(MismatchError, match=r"'ids' differs between .*a\.safetensors and .*b\.safetensors"):
        merge(linear, tmp_path, {"models": [a, b]})


def test_a_weight_that_is_no_number_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    a = bare(tmp_path / "a.safetensors", {"u": W, "w": W})
    b = bare(tmp_path / "b.safetensors", {"u": W, "w": W * float("inf")})
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(CorruptError, match=r"b\.safetensors: 'w' holds a NaN or an infinity"):
        merge(linear, tmp_path, {"models": [a, b]}).save(out)
    assert list(out.iterdir()) == []
