"""Adapters made with plain peft, and what plain peft says of them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from lfm.core import Logits, Model
from lfm.models.quiet import quiet

IDS = torch.arange(5, 25).reshape(2, 10)


def adapter_over(
    base: Path,
    out: Path,
    *,
    seed: int = 1,
    dtype: torch.dtype = torch.float32,
    embeddings: bool | str = False,
    **settings: Any,
) -> Path:
    """An adapter of random factors, biases and whole modules, saved by peft. embeddings: save_embedding_layers."""
    default = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False}
    with quiet(), warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        made: Any = peft.get_peft_model(opened(base), peft.LoraConfig(**(default | settings)))
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        made.to(dtype).save_pretrained(out, save_embedding_layers=embeddings)  # type: ignore[arg-type]
    return out


def adapted(base: Path, adapter: Path) -> Any:
    with quiet():
        return peft.PeftModel.from_pretrained(opened(base), adapter).eval()


def peft_logits(base: Path, adapter: Path) -> torch.Tensor:
    """What plain peft says, the adapter beside the base."""
    with torch.no_grad():
        return adapted(base, adapter)(IDS).logits


def logits_of(model: Model) -> torch.Tensor:
    return model.ask(Logits).logits({"input_ids": IDS})


def gpt2(path: Path) -> Path:
    """Linear layers stored (in, out), with biases, and a head tied to the embeddings."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2
        )
        transformers.GPT2LMHeadModel(config).save_pretrained(path)
    return path


def opened(base: Path) -> Any:
    name = transformers.AutoConfig.from_pretrained(base).architectures[0]
    return getattr(transformers, name).from_pretrained(base, dtype=torch.float32)
