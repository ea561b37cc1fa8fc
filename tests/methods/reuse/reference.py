"""How mergekit.json was obtained: mergekit's own command on three small checkpoints, in fp32.

In a virtual environment of its own (`pip install mergekit==0.1.5 torch==2.13.0`, with transformers 5.23.0):

    python tests/methods/reuse/reference.py > tests/methods/reuse/mergekit.json
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WIDTH, VOCABULARY = 8, 16
SHAPES = {
    "model.embed_tokens.weight": (VOCABULARY, WIDTH),
    "model.layers.0.input_layernorm.weight": (WIDTH,),
    "model.layers.0.mlp.down_proj.weight": (WIDTH, WIDTH),
    "model.layers.0.mlp.gate_proj.weight": (WIDTH, WIDTH),
    "model.layers.0.mlp.up_proj.weight": (WIDTH, WIDTH),
    "model.layers.0.post_attention_layernorm.weight": (WIDTH,),
    "model.layers.0.self_attn.k_proj.weight": (WIDTH, WIDTH),
    "model.layers.0.self_attn.o_proj.weight": (WIDTH, WIDTH),
    "model.layers.0.self_attn.q_proj.weight": (WIDTH, WIDTH),
    "model.layers.0.self_attn.v_proj.weight": (WIDTH, WIDTH),
    "model.norm.weight": (WIDTH,),
    "lm_head.weight": (VOCABULARY, WIDTH),
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
KEPT = ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight")

CASES: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear", "weights": [3.0, 1.0]},
    "linear, not normalised": {"method": "linear", "weights": [0.5, 0.25], "normalize": False},
    "ties": {"method": "ties", "weights": [1.0, 1.0], "density": 0.2, "scale": 1.0},
    "ties, weighted": {"method": "ties", "weights": [1.0, 0.5], "density": 0.6, "scale": 0.7},
}


def of(method: str, models: tuple[int, ...], settings: dict[str, Any], *, base: int | None = 0, **told: Any) -> Any:
    """A case of a method: our settings, and what mergekit is told: `each` a model, the rest for all."""
    each = told.pop("each", {})
    return {"method": method, "models": models, "base": base, "settings": settings, "each": each, "told": told}


CASES |= {
    "task_arithmetic": of(
        "task_arithmetic",
        (1, 2),
        {"weights": [0.7, -0.3], "scale": 0.8},
        each={"weight": [0.7, -0.3]},
        **{"lambda": 0.8},
    ),
    "task_arithmetic, normalised": of(
        "task_arithmetic",
        (1, 2),
        {"weights": [3, 1], "scale": 1, "normalize": True},
        each={"weight": [3.0, 1.0]},
        normalize=True,
    ),
    "slerp": of("slerp", (1, 2), {"t": 0.3}, base=1, t=0.3),
    "nearswap": of("nearswap", (1,), {"t": 0.1}, t=0.1),
    "model_stock": of("model_stock", (1, 2), {}),
    "model_stock, by rows": of("model_stock", (1, 2), {"of": "row"}, filter_wise=True),
    "nuslerp": of("nuslerp", (1, 2), {"weights": [1, 3]}, base=None, each={"weight": [1.0, 3.0]}),
    "nuslerp, from a base": of("nuslerp", (1, 2), {"weights": [1, 3]}, each={"weight": [1.0, 3.0]}),
    "nuslerp, by rows": of(
        "nuslerp",
        (1, 2),
        {"weights": [1, 3], "of": "row"},
        base=None,
        each={"weight": [1.0, 3.0]},
        nuslerp_flatten=False,
    ),
    "multislerp": of("multislerp", (0, 1, 2), {"weights": [1, 2, 1]}, base=None, each={"weight": [1.0, 2.0, 1.0]}),
    "multislerp, from a base": of("multislerp", (1, 2), {"weights": [1, 2]}, each={"weight": [1.0, 2.0]}),
    "karcher": of("karcher", (0, 1, 2), {}, base=None),
    "breadcrumbs": of(
        "breadcrumbs",
        (1, 2),
        {"weights": [1, 0.5], "density": [0.6], "gamma": [0.1]},
        each={"weight": [1.0, 0.5], "density": [0.6, 0.6], "gamma": [0.1, 0.1]},
    ),
    "breadcrumbs_ties": of(
        "breadcrumbs_ties",
        (1, 2),
        {"weights": [1, 0.5], "density": [0.6], "gamma": [0.1], "normalize": True},
        each={"weight": [1.0, 0.5], "density": [0.6, 0.6], "gamma": [0.1, 0.1]},
        normalize=True,
    ),
    "sce": of("sce", (1, 2), {}),
    "sce, half": of("sce", (1, 2), {"density": 0.5}, select_topk=0.5),
    "arcee_fusion": of("arcee_fusion", (1,), {}),
    "ram": of("ram", (1, 2), {"epsilon": 0.3}, epsilon=0.3),
    "ramplus_tl": of("ramplus_tl", (1, 2), {"epsilon": 0.3, "r": 0.5, "alpha": 0.8}, epsilon=0.3, r=0.5, alpha=0.8),
    "passthrough": of("passthrough", (1,), {"scale": 0.5}, base=None, each={"scale": [0.5]}),
}
"""Each method's case: our settings beside the parameters that mergekit is given."""


def checkpoint(path: Path, seed: int) -> Path:
    """A one-block Llama checkpoint, its numbers from a linear congruence: the same with any library at any version."""
    path.mkdir(parents=True)
    state, tensors = 12345 + 7919 * seed, {}
    for name, shape in SHAPES.items():
        numbers = []
        for _ in range(torch.Size(shape).numel()):
            state = (1664525 * state + 1013904223) % 2**32
            numbers.append(state / 2**32 - 0.5)
        tensors[name] = torch.tensor(numbers, dtype=torch.float64).float().reshape(shape)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def by_mergekit(work: Path, case: dict[str, Any]) -> dict[str, list[float]]:
    """The merge's tensors, flat."""
    recipe: dict[str, Any]
    if "told" in case:
        models = [
            {"model": str(work / str(i)), "parameters": {key: values[place] for key, values in case["each"].items()}}
            for place, i in enumerate(case["models"])
        ]
        if case["method"] == "slerp":
            models[0].pop("parameters")
        recipe = {"merge_method": case["method"], "models": models, "parameters": case["told"]}
        recipe |= {} if case["base"] is None else {"base_model": str(work / str(case["base"]))}
    else:
        models = [
            {"model": str(work / str(i + 1)), "parameters": {"weight": weight, "density": case.get("density", 1.0)}}
            for i, weight in enumerate(case["weights"])
        ]
        recipe = {"merge_method": case["method"], "models": models, "parameters": {}}
        if case["method"] == "ties":
            recipe |= {"base_model": str(work / "0")}
            recipe["parameters"]["lambda"] = case["scale"]
        recipe["parameters"]["normalize"] = case.get("normalize", True)
    recipe |= {"dtype": "float32"}
    (work / "recipe.yml").write_text(json.dumps(recipe))  # JSON is YAML
    out = work / "out"
    tool = Path(sys.executable).with_name("mergekit-yaml")
    subprocess.run([str(tool), str(work / "recipe.yml"), str(out), "--quiet"], check=True, stdout=sys.stderr)
    merged = load_file(out / "model.safetensors") if (out / "model.safetensors").exists() else {}
    for shard in out.glob("model-*.safetensors"):
        merged |= load_file(shard)
    subprocess.run(["rm", "-r", str(out)], check=True)
    return {name: merged[name].reshape(-1).tolist() for name in KEPT}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        for seed in range(3):
            checkpoint(Path(directory, str(seed)), seed)
        json.dump({name: by_mergekit(Path(directory), case) for name, case in CASES.items()}, sys.stdout)
