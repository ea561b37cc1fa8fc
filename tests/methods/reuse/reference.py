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
    models = [
        {"model": str(work / str(i + 1)), "parameters": {"weight": weight, "density": case.get("density", 1.0)}}
        for i, weight in enumerate(case["weights"])
    ]
    recipe: dict[str, Any] = {"merge_method": case["method"], "dtype": "float32", "models": models, "parameters": {}}
    if case["method"] == "ties":
        recipe |= {"base_model": str(work / "0")}
        recipe["parameters"]["lambda"] = case["scale"]
    recipe["parameters"]["normalize"] = case.get("normalize", True)
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
