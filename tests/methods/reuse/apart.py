"""Pairs of models for methods that permute: copies with their units in another order, and networks of two seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tiny
from lfm import models
from lfm.core import Gradients, Logits, Model
from lfm.data import records as data
from lfm.data.shares import batches
from lfm.methods.reuse import linear
from lfm.models import symmetry as sym
from lfm.models.mixing import load_into, parameters_of
from lfm.models.norms import measured_anew
from lfm.runs.run import LocalRun
from lfm.train import seeded
from lfm.train.examine import Score, examiner
from lfm.zoo import vision
from methods.reuse import eight

TEXTS = [data.Text(text=line) for line in tiny.CORPUS]
SHOWN = {
    "causal": TEXTS,
    "masked": TEXTS,
    "gpt2": TEXTS,
    "classifier": [data.Label(text=line, label="") for line in tiny.CORPUS],
    "seq2seq": [data.Completion(prompt=line, completion=line) for line in tiny.CORPUS],
    "vit": list(vision.images("noise", "train")[:16]),
    "resnet": list(vision.images("noise", "train")[:64]),  # fewer leave units alike that see one pixel
}


def model(name: str, here: Path, seed: int = 0) -> Model:
    path = here / f"{name}-{seed}"
    if name == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        shape = GPT2Config(
            vocab_size=400, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2
        )
        tiny._write(path, seed, lambda: GPT2LMHeadModel(shape), tiny.byte_bpe())
    elif name == "resnet":
        vision.save(resnet(seed), path)
    else:
        getattr(tiny, name)(path, seed=seed)
    return models.load(path)


def resnet(seed: int, width: int = 16) -> nn.Module:
    """A residual network with batch norms for the zoo's digits: two stages of two blocks."""
    from transformers import ResNetConfig, ResNetForImageClassification

    names = {i: str(i) for i in range(10)}
    shape = ResNetConfig(
        embedding_size=width,
        hidden_sizes=[width, 2 * width],
        depths=[2, 2],
        layer_type="basic",
        id2label=names,
        label2id={name: i for i, name in names.items()},
    )
    with seeded(seed):
        return ResNetForImageClassification(shape)


def permuted(given: Model, records: Sequence[Any], seed: int = 0) -> Model:
    """The model with its units in a random order: the same function."""
    module = given.ask(Gradients).module()
    found = sym.symmetry(module, batches(given, records, 4)[0])
    moves = sym.drawn(found, torch.Generator().manual_seed(seed))
    return given.ask(Gradients).rewrap(load_into(module, sym.permuted(parameters_of(module), moves)))


def trained(kind: str, seed: int, here: Path, classes: str = "0123456789", steps: int = 200) -> Model:
    """A network of this seed, trained on the digits of these classes: a ViT, or the residual network."""
    module = vision.build(seed) if kind == "vit" else resnet(seed)
    shown = [record for record in vision.shifted() if record.label in classes]
    making: Any = LocalRun(seed, here / f"work-{kind}-{seed}")
    making.work.mkdir(parents=True, exist_ok=True)
    vision.train(module, shown, making, kind, steps=steps, lr=2e-3, weight_decay=0.05)
    vision.save(module, here / f"{kind}-{seed}")
    return models.load(here / f"{kind}-{seed}")


def mean(pair: Sequence[Model], work: Path) -> Model:
    """Their mean, batch norms measured anew on the zoo's training digits."""
    made, _ = eight.fuse(linear, work, {"models": pair})
    shown = batches(pair[0], vision.images("identity", "train")[:256], 32)
    return made.ask(Gradients).rewrap(measured_anew(made.ask(Gradients).module(), shown))


def score(given: Model, reader: Model) -> Score:
    """On the 360 test digits."""
    return examiner(vision.images("identity", "test"), reader)(given.ask(Logits).logits)
