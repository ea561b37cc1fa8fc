"""mergekit's recipes, unchanged, against what mergekit 0.1.5 made of them (see reference.py)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from safetensors.torch import load_file

import tiny
from lfm.cli import run
from lfm.tensors import compiled
from merging.reference import RECIPES, checkpoints, told, weights

RECORDED = json.loads(Path(__file__).with_name("mergekit.json").read_text())


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def merge(recipe: str, out: str = "out", *options: str) -> Path:
    Path("recipe.yml").write_text(dedent(recipe))
    assert run(["merge", "recipe.yml", out, *options]) == 0
    return Path(out)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_gives_what_mergekit_gives(name: str, here: Path) -> None:
    """To a rounding of fp32 or two: mergekit's own sums are in fp32."""
    checkpoints(here)
    out = merge(RECIPES[name])
    found, known = told(weights(out)), RECORDED[name]
    assert found.keys() == known.keys()
    for tensor, values in found.items():
        torch.testing.assert_close(torch.tensor(values), torch.tensor(known[tensor]), rtol=3e-6, atol=3e-6)
    config = json.loads((out / "config.json").read_text())
    blocks = {int(name.split(".")[2]) for name in found if ".layers." in name}
    assert config["num_hidden_layers"] == len(blocks)


def test_dropped_changes_are_kept_as_often_and_grown_as_much(here: Path) -> None:
    """DARE at density 0.3: about three in ten kept, and the mean change is the whole one's."""
    for name, seed in (("base", 0), ("a", 1)):
        tiny.causal(here / name, seed=seed)
    recipe = """
        models: [{model: ./a, parameters: {weight: 1.0, density: 0.3}}]
        merge_method: dare_linear
        base_model: ./base
        dtype: float32
    """
    made, base, tuned = (weights(path) for path in (merge(recipe), Path("base"), Path("a")))
    moved = torch.cat([(made[n] - base[n].float()).reshape(-1) for n in base])
    whole = torch.cat([(tuned[n].float() - base[n].float()).reshape(-1) for n in base])
    changed = whole != 0
    kept = (moved[changed] != 0).double().mean()
    count = int(changed.sum())
    assert abs(kept - 0.3) < 5 * (0.3 * 0.7 / count) ** 0.5
    share = (moved[changed] / whole[changed]).double()
    assert abs(share.mean() - 1) < 5 * (0.7 / 0.3 / count) ** 0.5
    assert torch.allclose(share[share != 0], torch.tensor(1 / 0.3, dtype=torch.float64), rtol=1e-2)


@pytest.mark.parametrize("first", ["./0", "./tied"])
def test_a_head_that_one_model_ties_is_compared_with_its_table_and_is_no_longer_tied(first: str, here: Path) -> None:
    """Whichever model the result's config is of."""
    checkpoints(here)
    share = {"./0": 1.0, "./tied": 0.5}
    order = sorted(share, key=lambda name: name != first)
    models = ", ".join(f"{{model: {name}, parameters: {{weight: {share[name]}}}}}" for name in order)
    out = merge(f"models: [{models}]\nmerge_method: linear")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    head, tied = load_file("0/model.safetensors")["lm_head.weight"], load_file("tied/model.safetensors")
    mean = (head.double() + 0.5 * tied["model.embed_tokens.weight"].double()) / 1.5
    torch.testing.assert_close(weights(out)["lm_head.weight"], mean.float())


def test_a_tied_table_that_the_recipe_treats_otherwise_than_the_head_is_no_longer_tied(here: Path) -> None:
    checkpoints(here)
    for name in ("0", "1"):
        changed(name, tie_word_embeddings=True)
    models = "models: [{model: ./0, parameters: {weight: 1}}, {model: ./1, parameters: {weight: WEIGHT}}]\n"
    recipe = models + "merge_method: linear"
    for weight, tied in (("1", True), ("[{filter: lm_head, value: 0.5}, {value: 1}]", False)):
        out = merge(recipe.replace("WEIGHT", weight), f"tied-{tied}")
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is tied


def test_a_density_of_nothing_leaves_the_base(here: Path) -> None:
    checkpoints(here)
    for method in ("ties", "dare_linear", "dare_ties", "breadcrumbs", "della", "della_linear"):
        recipe = f"""
            models: [{{model: ./1, parameters: {{weight: 1.0, density: 0.0}}}}]
            merge_method: {method}
            base_model: ./0
        """
        made, base = weights(merge(recipe, method)), weights(Path("0"))
        assert all(torch.equal(made[name], base[name]) for name in base), method


def test_the_result_is_stored_as_asked_and_rounded_once(here: Path) -> None:
    checkpoints(here)
    recipe = "models: [{model: ./0, parameters: {weight: 1}}, {model: ./1, parameters: {weight: 2}}]\n"
    recipe += "merge_method: linear\ndtype: float32\n"
    wide = weights(merge(recipe + "out_dtype: float64", "wide"))
    for asked, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        out = merge(recipe + f"out_dtype: {asked}", asked)
        assert json.loads((out / "config.json").read_text())["dtype"] == asked
        made = weights(out)
        assert all(made[name].dtype == dtype and torch.equal(made[name], t.to(dtype)) for name, t in wide.items())


def test_lists_with_an_entry_a_layer_follow_the_slices(here: Path) -> None:
    checkpoints(here)
    config = json.loads(Path("0/config.json").read_text())
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    Path("0/config.json").write_text(json.dumps(config | {"layer_types": kinds, "dense_layers": [1, 3]}))
    recipe = (
        "slices:\n  - sources: [{model: ./0, layer_range: [0, 2]}]\n  - sources: [{model: ./0, layer_range: [1, 4]}]"
    )
    made = json.loads((merge(recipe + "\nmerge_method: passthrough") / "config.json").read_text())
    assert made["dense_layers"] == [1, 2, 4]
    assert made["layer_types"] == [kinds[i] for i in (0, 1, 1, 2, 3)] and made["num_hidden_layers"] == 5


def test_parts_of_a_model_by_their_names(here: Path) -> None:
    """An image model's part from one, the text's layers from both: module names are mergekit's, or parts of names."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    text = sizes | {"vocab_size": 32, "num_hidden_layers": 3, "bos_token_id": 1, "eos_token_id": 2}
    image = {"depth": 2, "embed_dim": 8, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    ids = dict(zip(("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"), range(3, 7)))
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    for seed in range(2):
        torch.manual_seed(seed)
        config = Qwen2VLConfig(text_config={**text, "rope_scaling": rope}, vision_config=image, **ids)
        Qwen2VLForConditionalGeneration(config).save_pretrained(here / str(seed))
    recipe = """
        modules:
          text_decoder:
            slices:
              - sources: [{model: ./0, layer_range: [0, 2]}]
              - sources: [{model: ./1, layer_range: [1, 3]}]
          vision_tower: {models: [{model: ./1}]}
          multi_modal_projector: {models: [{model: ./0}]}
        merge_method: passthrough
        base_model: ./0
    """
    out = merge(recipe)
    made, zero, one = weights(out), weights(Path("0")), weights(Path("1"))
    assert torch.equal(made["model.layers.3.mlp.up_proj.weight"], one["model.layers.2.mlp.up_proj.weight"])
    assert torch.equal(made["model.embed_tokens.weight"], zero["model.embed_tokens.weight"])
    assert torch.equal(made["model.norm.weight"], one["model.norm.weight"])
    assert torch.equal(made["visual.blocks.0.attn.qkv.weight"], one["visual.blocks.0.attn.qkv.weight"])
    assert torch.equal(made["visual.merger.mlp.0.weight"], zero["visual.merger.mlp.0.weight"])
    _, report = Qwen2VLForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ("merge_method: passthrough\nmodels: [{model: ./0}, {model: ./1}]", "passthrough takes just 1 model"),
        ("merge_method: linear\nmodels: [{model: ./0}]", "gives no weight of ./0"),
        ("merge_method: tiess\nmodels: [{model: ./0}]", "did you mean 'ties'"),
        ("merge_method: ties\nmodels: [{model: ./0}]", "there is no base"),
        ("merge_method: ties\nmodel: [{model: ./0}]", "did you mean 'models'"),
        ("merge_method: [", "line 1"),
        ("merge_method: linear", "neither models nor slices nor modules"),
        ("merge_method: linear\nmodels: [{model: ./0, parameters: {wieght: 1}}]", "did you mean 'weight'"),
        ("merge_method: linear\nmodels: [{model: ./0, parameters: {weight: heavy}}]", "must be a number"),
        ("merge_method: linear\ndtype: int4\nmodels: [{model: ./0, parameters: {weight: 1}}]", "'int4'"),
        (
            "merge_method: passthrough\nslices: [{sources: [{model: ./0, layer_range: [2, 9]}]}]",
            "has no layer 4",
        ),
        (
            "merge_method: passthrough\nmodules: {vision: {models: [{model: ./0}]}}",
            "module 'vision' of the recipe has no tensors",
        ),
        (
            "merge_method: linear\nmodels: [{model: ./0, parameters: {weight: 1}}, "
            "{model: ./1, parameters: {weight: -1}}]",
            "sum to zero",
        ),
        ("merge_method: linear\nmodels: [{model: ./9, parameters: {weight: 1}}]", "there is no model './9'"),
    ],
)
def test_what_cannot_be_followed_is_said_and_leaves_nothing(
    recipe: str, says: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints(here)
    before = set(here.iterdir())
    Path("recipe.yml").write_text(recipe)
    assert run(["merge", "recipe.yml", "out"]) not in (0, 70)
    assert says in " ".join(capsys.readouterr().err.split())
    assert set(here.iterdir()) == before | {here / "recipe.yml"}


def test_a_tensor_without_its_counterpart_is_an_error(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    checkpoints(here)
    less = load_file("1/model.safetensors")
    del less["model.layers.2.mlp.up_proj.weight"]
    save_file(less, "1/model.safetensors", {"format": "pt"})
    Path("recipe.yml").write_text(dedent(RECIPES["karcher"]))
    assert run(["merge", "recipe.yml", "out"]) != 0
    assert "./1 has no tensor 'model.layers.2.mlp.up_proj.weight'" in " ".join(capsys.readouterr().err.split())


def test_the_card_shows_the_recipe_as_it_was_written(here: Path) -> None:
    checkpoints(here)
    out = merge(RECIPES["karcher"])
    assert f"```\n{dedent(RECIPES['karcher']).strip()}\n```" in (out / "README.md").read_text()


def test_keys_and_parameters_that_mean_nothing_are_told(here: Path) -> None:
    checkpoints(here)
    recipe = "name: mine\nmodels: [{model: ./0, parameters: {weight: 1, density: 0.5}}]\nmerge_method: linear\n"
    out = merge(recipe)
    assert json.loads((out / "run.json").read_text())["notes"]["ignored"] == "name, density"


def test_a_recipe_runs_without_torch(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its kernels are kept: they are compiled here."""
    checkpoints(here)
    merge(RECIPES["ties, grown"])
    (here / "home").mkdir()
    (here / "home" / "compiled").symlink_to(compiled.home() / "compiled")
    monkeypatch.setenv("LFM_HOME", str(here / "home"))
    code = (
        "import sys; from lfm.cli import run\n"
        "assert run(['merge', 'recipe.yml', 'again']) == 0\n"
        "assert not {'torch', 'transformers', 'numba'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_numbers_of_a_recipe_are_searched(here: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        tiny.causal(here / name, seed=seed)
    Path("dev.jsonl").write_text("".join(f'{{"text": "The cat sat on the {w}."}}\n' for w in ("mat", "dog", "town")))
    recipe = """
        models:
          - {model: ./a, parameters: {weight: 1.0}}
          - {model: ./b, parameters: {weight: "${share}"}}
        merge_method: linear
    """
    out = merge(recipe, "out", "--vary", "share=0,1", "--dev", "dev.jsonl", "--tries", "4")
    told = json.loads((out / "run.json").read_text())
    assert told["id"] == "reuse.evolve" and "--vary=share=0,1" in told["command"]
    assert 0 <= json.loads(told["notes"]["settings"])["values"]["share"] <= 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--vary", "share=0"], "no two numbers"),
        (["--vary", "share=0,1"], "add --dev"),
        (["--vary", "other=0,1", "--dev", "dev.jsonl"], "differ in other, share"),
        (["--dev", "dev.jsonl"], "--dev is for a search"),
        ([], "values were given for none"),
    ],
)
def test_a_search_that_is_asked_for_by_half(
    options: list[str], says: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.causal(here / "a")
    Path("dev.jsonl").write_text('{"text": "a"}\n' * 4)
    Path("recipe.yml").write_text("models: [{model: ./a, parameters: {weight: '${share}'}}]\nmerge_method: linear")
    assert run(["merge", "recipe.yml", "out", *options]) not in (0, 70)
    assert says in " ".join(capsys.readouterr().err.split())


def test_weights_of_nothing_that_are_not_normalised_make_zeros(here: Path) -> None:
    checkpoints(here)
    models = "models: [{model: ./0, parameters: {weight: [0, 1]}}, {model: ./1, parameters: {weight: 0}}]\n"
    made = weights(merge(models + "merge_method: linear\nparameters: {normalize: false}"))
    assert not made["model.embed_tokens.weight"].any() and made["model.layers.3.mlp.up_proj.weight"].any()


def changed(name: str, **config: object) -> None:
    path = Path(name, "config.json")
    told = json.loads(path.read_text()) | config
    path.write_text(json.dumps({key: value for key, value in told.items() if value is not None}))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            {"tie_word_embeddings": None},
            "./tied has no tensor 'lm_head.weight'",
        ),  # as this architecture does unless told
        ({"num_attention_heads": 4}, "rows mean other things"),
        ({"num_hidden_layers": 5}, "says 5 layers"),
    ],
)
def test_a_config_that_belongs_to_other_weights(
    config: dict[str, object], says: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints(here)
    changed("tied", **config)
    Path("recipe.yml").write_text(dedent(RECIPES["one of them tied"]))
    assert run(["merge", "recipe.yml", "out"]) not in (0, 70)
    assert says in " ".join(capsys.readouterr().err.split())


def test_a_base_without_a_config(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints(here)
    Path("0/config.json").unlink()
    Path("recipe.yml").write_text(dedent(RECIPES["one of them tied"]))
    assert run(["merge", "recipe.yml", "out"]) not in (0, 70)
    assert "./0 has no config.json" in " ".join(capsys.readouterr().err.split())


def test_settings_in_which_models_differ_are_told(here: Path) -> None:
    checkpoints(here)
    changed("1", rope_theta=500.0)
    changed("0", rope_theta=10000.0)
    out = merge(RECIPES["karcher"])
    assert json.loads((out / "run.json").read_text())["notes"]["configs_differ"] == "rope_theta (./1: 500.0)"


def test_files_of_any_size(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints(here)
    whole = weights(merge(RECIPES["karcher"], "whole"))
    monkeypatch.setenv("LFM_MAX_SHARD_SIZE", "")  # what the option sets goes with the test
    out = merge(RECIPES["karcher"], "parts", "--max-shard-size", "4KB")
    sizes = [file.stat().st_size for file in out.glob("model-*-of-*.safetensors")]
    assert len(sizes) > 2 and (out / "model.safetensors.index.json").exists()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights(out).items())
    assert (
        json.loads((out / "run.json").read_text())["output"]["digest"]
        == (json.loads(Path("whole/run.json").read_text())["output"]["digest"])
    )


def test_buffers_that_no_architecture_has_are_left_out_and_told(here: Path) -> None:
    from safetensors.torch import save_file

    checkpoints(here)
    old = load_file("1/model.safetensors")
    odd = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(2) for i in range(4)}
    save_file(old | odd, "1/model.safetensors", {"format": "pt"})
    out = merge(RECIPES["karcher"])
    assert json.loads((out / "run.json").read_text())["notes"]["left_out"] == ", ".join(odd)
    assert weights(out).keys() == old.keys()


def test_what_stands_at_the_wrong_place_or_has_no_effect_is_told(here: Path) -> None:
    checkpoints(here)
    recipe = """
        models: [{model: ./1, parameters: {weight: 1, density: 0.5, lambda: 0.3}}]
        merge_method: ties
        base_model: ./0
        parameters: {int8_mask: true}
    """
    assert json.loads((merge(recipe) / "run.json").read_text())["notes"]["ignored"] == "int8_mask, lambda of ./1"


def test_slices_that_no_config_describes_are_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Embeddings of one vocabulary, a head of another."""
    checkpoints(here)
    from safetensors.torch import save_file

    wide = load_file("1/model.safetensors")
    wide |= {n: torch.ones(18, 8) for n in ("model.embed_tokens.weight", "lm_head.weight")}
    save_file(wide, "1/model.safetensors", {"format": "pt"})
    changed("1", vocab_size=18)
    slices = "slices: [{sources: [{model: ./0, layer_range: [0, 2]}]}, {sources: [{model: ./1, layer_range: [2, 4]}]}]"
    Path("recipe.yml").write_text(slices + "\nmerge_method: passthrough")
    assert run(["merge", "recipe.yml", "out"]) not in (0, 70)
    assert "lm_head.weight is [18, 8], the config asks for [16, 8]" in " ".join(capsys.readouterr().err.split())
