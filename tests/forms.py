"""Tiny masked models and encoder-decoders that several editors' tests edit, and the edits: objects of one token and of
two."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import tiny
from lfm.core import Codec
from lfm.data import language
from lfm.data.records import Edit, Fact, Text
from lfm.models import forward, load

EDITS = tuple(
    Edit(
        subject=subject,
        relation="has",
        object=object,
        new_object=new,
        prompt=f"In the town {subject} has a",
        suffix=" now.",
        neighbours=(("In the town Rome has a", "happy birds"), ("In the town Berlin has a", "good cats")),
    )
    for subject, object, new in (("Ada", "good cats", "happy birds"), ("Paris", "dog", "good cats"))
)
TEXT = tuple(Text(text=line) for line in tiny.CORPUS * 3)


def saved(path: Path, module: Callable[[], Any], tokenizer: Any) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def modern(path: Path) -> Path:
    """A masked model that adds what its layers write as it is, every other block looking nearby only."""
    codec = tiny.word_piece()
    special = {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3, "pad_token_id": 0}
    shape: Any = transformers.ModernBertConfig
    config = shape(
        vocab_size=len(codec),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        initializer_range=0.2,
        initializer_cutoff_factor=10.0,
        **special,
    )
    return saved(path, lambda: transformers.ModernBertForMaskedLM(config), codec)


def bart(path: Path) -> Path:
    """An encoder-decoder with more blocks that read than blocks that write, whose texts open with a token."""
    codec = tiny.word_piece()
    shape = transformers.BartConfig(
        vocab_size=len(codec),
        d_model=32,
        encoder_layers=3,
        decoder_layers=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        max_position_embeddings=128,
        init_std=0.2,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        decoder_start_token_id=3,
    )
    codec.model_input_names = ["input_ids", "attention_mask"]

    def made() -> Any:
        module: Any = transformers.BartForConditionalGeneration(shape)
        module.generation_config.forced_bos_token_id = 2
        return module

    return saved(path, made, codec)


MODELS = {"bert": tiny.masked, "modern": modern, "t5": tiny.seq2seq, "bart": bart}


KNOWN = dict(zip(("Ada", "Paris", "Rome", "Berlin", "France", "Italy"), ("good cats", "dog", "happy birds") * 2))
"""What the models are taught: who has what."""


def has(subject: str, object: str) -> Fact:
    return Fact(subject=subject, relation="has", object=object, prompt=f"In the town {subject} has a", suffix=" now.")


def taught(path: Path, auto: Any) -> Path:
    """A few steps of Adam make a random model tell who has what, by whoever is named."""
    module, model = auto.from_pretrained(path), load(path)
    facts = [has(*each) for each in KNOWN.items()]
    task = language.answers(model.ask(Codec), model.facts)
    adam = torch.optim.Adam(module.parameters(), lr=3e-3)
    given = task.collate(facts)
    for _ in range(80):
        adam.zero_grad()
        task.loss(forward(module, given), given).backward()
        adam.step()
    module.save_pretrained(path)
    return path


def all_taught(root: Path) -> dict[str, Path]:
    autos: Any = (transformers.AutoModelForMaskedLM, transformers.AutoModelForSeq2SeqLM)
    return {name: taught(make(root / name), autos[name in ("t5", "bart")]) for name, make in MODELS.items()}
