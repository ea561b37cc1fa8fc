"""What every editor starts from: the module, text of two kinds, and prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from lfm.core.errors import EditError
from lfm.core.method import Run
from lfm.core.model import Codec, Gradients, Model
from lfm.data import task as tasks
from lfm.data.records import Text
from lfm.editing import kept
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
    of other texts, on which perplexity is. digest: the model's; where it is empty nothing is kept for another run."""

    module: nn.Module
    codec: Codec
    prefixes: tuple[str, ...]
    text: list[list[int]]
    probe: list[list[int]]
    digest: str = ""


def opened(model: Model, records: Sequence[Text], run: Run, *, prefixes: int, tokens: int | None = None) -> Setting:
    """The setting of an edit. tokens: for C; none: ten a dimension of the widest key.

    Without records the text is the model's own. A fifth of the texts, the last ones, is kept as the probe.
    """
    codec = model.ask(Codec)
    module = model.ask(Gradients).module().to(device()).requires_grad_(False)
    wanted = tokens or ENOUGH * max(structure.feed_forward(module, block).inner for block in structure.blocks(module))

    def own(name: str, length: int, *, count: int = 0, tokens: int = 0) -> list[str]:
        """Texts of the model's own, said once."""
        seed = run.seed_for(name)
        key = {"model": model.digest, "seed": seed, "amount": [length, count, tokens], **kept.arithmetic(module)}

        def said() -> list[str]:
            return sampled(module, codec, seed, length=length, count=count, tokens=tokens)

        return run.step(name, lambda: kept.known("said", key, said))

    before = own("prefixes", PREFIX, count=prefixes)
    if records:
        texts = [record.text for record in tasks.fit(records, codec, model.facts)]  # type: ignore[attr-defined]
    else:
        texts = own("text", SAMPLE, tokens=wanted + min(PROBE, wanted // 4))
    cut = max(1, round(0.8 * len(texts)))
    text = tokenised(codec, texts[:cut], wanted)
    probe = tokenised(codec, texts[cut:] or texts, PROBE)
    if not any(len(row) > 1 for row in probe) or not text:
        raise EditError(
            "there is no text to measure on",
            why="the model ends its own texts at once" if not records else "the texts given are empty",
            fix="give text=FILE with running text of the kind that the model reads",
        )
    return Setting(module, codec, ("", *(joined(text) for text in before)), text, probe, model.digest)


def joined(prefix: str) -> str:
    """A sampled text as a sentence before a prompt."""
    return prefix.strip().rstrip(".!?,;:") + ". "
