"""The training loop against a bare one: the same steps, CPU seconds of each, and their ratio.

Both train one random Llama-shaped model on the same batches with fused AdamW and clipping. The bare loop is what one
would write by hand: no checkpoints, no progress, no seeds, no watch for what is not finite. Repeats alternate; medians.

    python benchmarks/train_loop.py [--width 64] [--steps 100] [--repeats 7] [--kind mlp|llama]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from lfm.runs.run import LocalRun
from lfm.train import Fit, fit


def llama(width: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
        )
    )


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def collate(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"x": torch.stack(list(rows))}


def loss(module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    x = batch["x"]
    if x.is_floating_point():
        return F.cross_entropy(module(x), x[:, 0].long() % 10)
    logits = module(input_ids=x, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())


def bare(module: nn.Module, rows: list[torch.Tensor], steps: int, size: int) -> list[float]:
    module.train()
    decayed = [p for p in module.parameters() if p.ndim > 1]
    others = [p for p in module.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    parameters = list(module.parameters())
    losses = []
    per_epoch = len(rows) // size
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(rows)).tolist()
        first = step % per_epoch * size
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (steps - step) / steps
        optimizer.zero_grad(set_to_none=True)
        value = loss(module, collate([rows[i] for i in order[first : first + size]]))
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(value.item())
    return losses


def ours(module: nn.Module, rows: list[torch.Tensor], steps: int, size: int) -> None:
    with tempfile.TemporaryDirectory() as work:
        fit(module, rows, collate, loss, Fit(steps=steps, batch_size=size, warmup=0), LocalRun(0, Path(work)))


def seconds(train: Callable[..., object], make: Callable[[], nn.Module], *arguments: object) -> float:
    module = make()
    began = time.process_time()
    train(module, *arguments)
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--kind", choices=("llama", "mlp"), default="llama")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    random = torch.Generator().manual_seed(0)
    if asked.kind == "llama":
        rows = list(torch.randint(0, 512, (512, 32), generator=random))
    else:
        rows = list(torch.rand(512, 64, generator=random))
    make = {"llama": llama, "mlp": mlp}[asked.kind]
    both: dict[str, list[float]] = {"bare": [], "fit": []}
    for repeat in range(asked.repeats + 1):
        for name, train in (("bare", bare), ("fit", ours)):
            took = seconds(train, lambda: make(asked.width), rows, asked.steps, asked.size)
            if repeat:  # the first warms caches
                both[name].append(took)
    median = {name: statistics.median(times) for name, times in both.items()}
    for name, times in both.items():
        spread = f"{min(times):.3f}–{max(times):.3f}"
        print(f"{name:5} {1e3 * median[name] / asked.steps:8.3f} ms a step ({spread} s over {asked.repeats} repeats)")
    print(f"fit / bare = {median['fit'] / median['bare']:.3f}")


if __name__ == "__main__":
    main()
