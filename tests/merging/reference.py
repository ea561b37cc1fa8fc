"""How mergekit.json was obtained: mergekit's own command on small checkpoints, in fp32, by the recipes below.

In a virtual environment of its own (`pip install mergekit==0.1.5 torch==2.13.0`, with transformers 5.23.0), from the
tests directory:

    PYTHONPATH=. python merging/reference.py > merging/mergekit.json

Names of recipes as arguments make those anew, and keep the others.

Of each tensor its first four numbers, its last one, and the mean of all are kept.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WIDTH, VOCABULARY, LAYERS = 8, 16, 4
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
BLOCK = {
    "input_layernorm.weight": (WIDTH,),
    "mlp.down_proj.weight": (WIDTH, 12),
    "mlp.gate_proj.weight": (12, WIDTH),
    "mlp.up_proj.weight": (12, WIDTH),
    "post_attention_layernorm.weight": (WIDTH,),
    "self_attn.k_proj.weight": (WIDTH // 2, WIDTH),
    "self_attn.o_proj.weight": (WIDTH, WIDTH),
    "self_attn.q_proj.weight": (WIDTH, WIDTH),
    "self_attn.v_proj.weight": (WIDTH // 2, WIDTH),
}

RECIPES: dict[str, str] = {
    "gradients and filters": """
        slices:
          - sources:
              - {model: ./0, layer_range: [0, 4]}
              - {model: ./1, layer_range: [0, 4]}
        merge_method: slerp
        base_model: ./0
        parameters:
          t:
            - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
            - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
            - value: 0.5
        dtype: float32
    """,
    "slerp, the base second": """
        models: [{model: ./1}, {model: ./0}]
        merge_method: slerp
        base_model: ./0
        parameters: {t: 0.3}
        dtype: float32
    """,
    "linear over layers": """
        models:
          - {model: ./1, parameters: {weight: 0.3}}
          - {model: ./2, parameters: {weight: [0, 1.0, 0.2]}}
        merge_method: linear
        dtype: float32
    """,
    "ties, grown": """
        models:
          - model: ./0
          - {model: ./1, parameters: {weight: 0.5, density: 0.5}}
          - {model: ./2, parameters: {weight: [0.1, 0.9], density: [1.0, 0.3]}}
        merge_method: ties
        base_model: ./0
        parameters: {rescale: true, lambda: 0.7, int8_mask: true}
        dtype: float32
    """,
    "breadcrumbs, grown": """
        models:
          - {model: ./1, parameters: {weight: 0.5, density: 0.5, gamma: 0.1}}
          - {model: ./2, parameters: {weight: 0.8, density: 0.7}}
        merge_method: breadcrumbs
        base_model: ./0
        parameters: {rescale: true}
        dtype: float32
    """,
    "breadcrumbs_ties": """
        models:
          - {model: ./1, parameters: {weight: 0.5, density: 0.5}}
          - {model: ./2, parameters: {weight: 0.8, density: 0.7}}
        merge_method: breadcrumbs_ties
        base_model: ./0
        parameters: {normalize: true}
        dtype: float32
    """,
    "task_arithmetic, nothing of one": """
        models:
          - {model: ./1, parameters: {weight: 0.5}}
          - {model: ./2, parameters: {weight: [0.0, 1.0]}}
        merge_method: task_arithmetic
        base_model: ./0
        parameters: {normalize: 1}
        dtype: float32
    """,
    "nuslerp by columns": """
        models:
          - {model: ./1, parameters: {weight: 0.5}}
          - {model: ./2, parameters: {weight: 1.5}}
        merge_method: nuslerp
        parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}
        dtype: float32
    """,
    "nuslerp by columns, from a base": """
        models:
          - {model: ./1, parameters: {weight: 0.5}}
          - {model: ./2, parameters: {weight: 1.5}}
        merge_method: nuslerp
        base_model: ./0
        parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}
        dtype: float32
    """,
    "multislerp": """
        models:
          - {model: ./1, parameters: {weight: 0.5}}
          - {model: ./2, parameters: {weight: 1.5}}
        merge_method: multislerp
        base_model: ./0
        dtype: float32
    """,
    "karcher": """
        models: [{model: ./0}, {model: ./1}, {model: ./2}]
        merge_method: karcher
        parameters: {max_iter: 20, tol: 1e-6}
        dtype: float32
    """,
    "model_stock": """
        models: [{model: ./1}, {model: ./2}]
        merge_method: model_stock
        base_model: ./0
        parameters: {filter_wise: true}
        dtype: float32
    """,
    "nearswap": """
        models: [{model: ./1}]
        merge_method: nearswap
        base_model: ./0
        parameters: {t: [0.001, 0.2]}
        dtype: float32
    """,
    "arcee_fusion": """
        models: [{model: ./1}]
        merge_method: arcee_fusion
        base_model: ./0
        dtype: float32
    """,
    "sce": """
        models: [{model: ./1}, {model: ./2}]
        merge_method: sce
        base_model: ./0
        parameters: {select_topk: 0.4}
        dtype: float32
    """,
    "ram": """
        models: [{model: ./1}, {model: ./2}]
        merge_method: ram
        base_model: ./0
        parameters: {epsilon: 0.2}
        dtype: float32
    """,
    "ramplus_tl": """
        models: [{model: ./1}, {model: ./2}]
        merge_method: ramplus_tl
        base_model: ./0
        parameters: {epsilon: 0.2, r: 0.3, alpha: 0.4}
        dtype: float32
    """,
    "layers of two models": """
        slices:
          - sources: [{model: ./1, layer_range: [0, 3]}]
          - sources: [{model: ./2, layer_range: [1, 4]}]
        merge_method: passthrough
        dtype: bfloat16
    """,
    "layers of one, some made nothing": """
        slices:
          - sources:
              - model: ./1
                layer_range: [0, 3]
                parameters:
                  scale:
                    - {filter: o_proj, value: 0.0}
                    - {filter: down_proj, value: [0.5, 1.0]}
                    - value: 1.0
          - sources: [{model: ./1, layer_range: [1, 4]}]
        merge_method: passthrough
        dtype: float32
    """,
    "slices that are merged": """
        slices:
          - sources:
              - {model: ./0, layer_range: [0, 2]}
              - {model: ./1, layer_range: [1, 3], parameters: {weight: [0.2, 0.9], density: 0.5}}
              - {model: ./2, layer_range: [2, 4], parameters: {weight: 0.4}}
          - sources:
              - {model: ./0, layer_range: [1, 4]}
              - {model: ./2, layer_range: [0, 3], parameters: {weight: 0.4}}
        merge_method: ties
        base_model: ./0
        parameters: {density: 0.8}
        dtype: float32
        out_dtype: float16
    """,
    "a module": """
        modules:
          default:
            slices:
              - sources: [{model: ./1, layer_range: [0, 4]}]
              - sources: [{model: ./2, layer_range: [1, 3]}]
            parameters: {scale: 0.5}
        merge_method: passthrough
        dtype: float32
    """,
    "the last slice says otherwise": """
        slices:
          - sources: [{model: ./0, layer_range: [0, 2]}, {model: ./1, layer_range: [0, 2]}]
          - sources: [{model: ./0, layer_range: [2, 4]}, {model: ./1, layer_range: [2, 4]}]
            parameters: {t: 1.0}
        merge_method: slerp
        base_model: ./0
        parameters: {t: [0, 1]}
        dtype: float32
    """,
    "a slice of the base alone": """
        slices:
          - sources: [{model: ./0, layer_range: [0, 1]}, {model: ./1, layer_range: [0, 1], parameters: {weight: 0.7}}]
          - sources: [{model: ./0, layer_range: [1, 3]}]
          - sources: [{model: ./0, layer_range: [3, 4]}, {model: ./1, layer_range: [3, 4], parameters: {weight: 1.3}}]
        merge_method: task_arithmetic
        base_model: ./0
        dtype: float32
    """,
    "slerp beyond its ends": """
        models: [{model: ./0}, {model: ./1}]
        merge_method: slerp
        base_model: ./0
        parameters: {t: [-0.2, 1.3]}
        dtype: float32
    """,
    "one of them tied": """
        models:
          - {model: ./0, parameters: {weight: 1.0}}
          - {model: ./tied, parameters: {weight: 0.5}}
        merge_method: linear
        dtype: float32
    """,
}
"""YAML as users write it; ./0 to ./2 are checkpoints of four blocks, ./tied is one without a head of its own."""


def numbers(shape: tuple[int, ...], state: int) -> tuple[torch.Tensor, int]:
    """fp32 in [−½, ½) from a linear congruence: the same with any library at any version."""
    found = []
    for _ in range(torch.Size(shape).numel()):
        state = (1664525 * state + 1013904223) % 2**32
        found.append(state / 2**32 - 0.5)
    return torch.tensor(found, dtype=torch.float64).float().reshape(shape), state


def checkpoint(path: Path, seed: int, *, tied: bool = False) -> Path:
    """A Llama checkpoint of four blocks."""
    path.mkdir(parents=True)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in BLOCK.items()}
    shapes |= {"model.norm.weight": (WIDTH,)} | ({} if tied else {"lm_head.weight": (VOCABULARY, WIDTH)})
    state, tensors = 12345 + 7919 * seed, {}
    for name, shape in shapes.items():
        tensors[name], state = numbers(shape, state)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(CONFIG | {"tie_word_embeddings": tied}))
    return path


def checkpoints(here: Path) -> None:
    for seed in range(3):
        checkpoint(here / str(seed), seed)
    checkpoint(here / "tied", 3, tied=True)


def told(tensors: Mapping[str, torch.Tensor]) -> dict[str, list[float]]:
    """What is kept of a merge."""
    flat = {name: tensor.double().reshape(-1) for name, tensor in tensors.items()}
    return {name: [*t[:4].tolist(), float(t[-1]), float(t.mean())] for name, t in sorted(flat.items())}


def weights(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for shard in directory.glob("*.safetensors"):
        found |= load_file(shard)
    return found


if __name__ == "__main__":
    known = Path(__file__).with_name("mergekit.json")
    recorded = json.loads(known.read_text()) if sys.argv[1:] else {}
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)
        checkpoints(Path())
        for name in sys.argv[1:] or RECIPES:
            Path("recipe.yml").write_text(RECIPES[name])
            tool = Path(sys.executable).with_name("mergekit-yaml")
            done = subprocess.run([str(tool), "recipe.yml", name, "--quiet"], capture_output=True, check=False)
            recorded[name] = told(weights(Path(name)))
            assert recorded[name], done.stderr.decode()[-2000:]
    json.dump(recorded, sys.stdout)
