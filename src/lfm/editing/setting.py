"""What every editor starts from: the module, text of two kinds, and prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from lfm.core.errors import EditError
from lfm.core.method import Run
from lfm.core.model import Codec, Gradients, Model
from lfm.data import task as tasks
from lfm.data.records import Text
from lfm.editing.covariance import ENOUGH
from lfm.editing.text import sampled, tokenised
from lfm.models import device, structure

if TYPE_CHECKING:
    from torch import nn

SAMPLE = 64
"""Tokens of a text that the model is left to say."""
PREFIX = 10
"""Tokens of a prefix (the reference takes 5 and 10)."""
PROBE = 2048
"""Tokens on which perplexity is watched."""


class Setting(NamedTuple):
    """prefixes: what is put before a prompt, the first of them nothing. text: ids on which C is measured; probe: ids
    of other texts, on which perplexity is."""

    module: nn.Module
    codec: Codec
    prefixes: tuple[str, ...]
    text: list[list[int]]
    probe: list[list[int]]


def opened(model: Model, records: Sequence[Text], run: Run, *, prefixes: int, tokens: int | None = None) -> Setting:
    """The setting of an edit. tokens: for C; none: ten a dimension of the widest key.

    Without records the text is the model's own. A fifth of the texts, the last ones, is kept as the probe.
    """
    codec = model.ask(Codec)
    module = model.ask(Gradients).module().to(device()).requires_grad_(False)
    wanted = tokens or ENOUGH * max(structure.feed_forward(module, block).inner for block in structure.blocks(module))
    before = run.step(
        "prefixes", lambda: sampled(module, codec, run.seed_for("prefixes"), length=PREFIX, count=prefixes)
    )
    if records:
        texts = [record.text for record in tasks.fit(records, codec, model.facts)]  # type: ignore[attr-defined]
    else:
        seed, all = run.seed_for("text"), wanted + min(PROBE, wanted // 4)
        texts = run.step("text", lambda: sampled(module, codec, seed, length=SAMPLE, tokens=all))
    cut = max(1, round(0.8 * len(texts)))
    text = tokenised(codec, texts[:cut], wanted)
    probe = tokenised(codec, texts[cut:] or texts, PROBE)
    if not any(len(row) > 1 for row in probe) or not text:
        raise EditError(
            "there is no text to measure on",
            why="the model ends its own texts at once" if not records else "the texts given are empty",
            fix="give text=FILE with running text of the kind that the model reads",
        )
    return Setting(module, codec, ("", *(joined(text) for text in before)), text, probe)


def joined(prefix: str) -> str:
    """A sampled text as a sentence before a prompt."""
    return prefix.strip().rstrip(".!?,;:") + ". "
