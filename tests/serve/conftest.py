"""A model whose answers are easy to read."""

from __future__ import annotations

import re

import pytest
import torch

import tiny
from lfm.core import Codec, Model, Weights
from lfm.models import load
from lfm.models.language import piece


@pytest.fixture(scope="session")
def wordy(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A random model that says words and nothing else: no specials, no parts of characters."""
    wild = load(tiny.causal(tmp_path_factory.mktemp("model") / "wild"))
    tokenizer, head = wild.ask(Codec).tokenizer, wild.ask(Weights).tensors()["lm_head.weight"].read()
    words = [re.fullmatch(r" [A-Za-z]+", piece(tokenizer, i)) is not None for i in range(len(head))]
    return wild.ask(Weights).replace({"lm_head.weight": head * torch.tensor(words)[:, None]})
