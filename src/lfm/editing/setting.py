"""What every editor starts from: the module, text of two kinds, and prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from lfm.core.errors import EditError
from lfm.core.heavy import torch
from lfm.core.interfaces import Codec, Gradients
from lfm.core.method import Run
from lfm.core.model import Model
from lfm.data import task as tasks
from lfm.data.records import Text
from lfm.editing import kept, rows
from lfm.editing.cloze import said
from lfm.editing.covariance import ENOUGH
from lfm.editing.form import CAUSAL, SEQ2SEQ_LM, Form, form_of, in_decoder
from lfm.editing.text import perplexity, sampled, tokenised
from lfm.models import device, structure

if TYPE_CHECKING:
    from torch import nn

    from lfm.data.records import Edit
    from lfm.editing.cloze import Asked
    from lfm.editing.rows import Rows

SAMPLE = 64
"""Tokens of a text that the model is left to say."""
PREFIX = 10
"""Tokens of a prefix (the reference takes 5 and 10)."""
SAID = 2048
"""Tokens that a model says to itself where no text is given and no C is measured; a fifth is the probe."""
PROBE = 2048
"""Tokens on which perplexity is watched."""


class Setting(NamedTuple):
    """prefixes: what is put before a prompt, the first of them nothing. text: ids on which C is measured; probe: ids
    of other texts, on which perplexity is. digest: the model's; where it is empty nothing is kept for another run.
    form: how the model is asked. token: where an edit is made, "subject" or "object" (where that is told)."""

    module: nn.Module
    codec: Codec
    prefixes: tuple[str, ...]
    text: list[list[int]]
    probe: list[list[int]]
    digest: str = ""
    form: Form = CAUSAL
    token: str = "subject"

    def read(self, edit: Edit, block: int) -> Rows:
        """The edit as it is asked, with the place where a block would change it."""
        decoder = in_decoder(self.module, block)
        read = rows.rows(self.codec.tokenizer, edit, self.prefixes, self.form, decoder=decoder)
        told = self.token == "object" and self.form.task != SEQ2SEQ_LM  # an encoder tells nothing, a decoder is there
        return rows.where_told(read) if told else read

    def says(self, asked: Sequence[Asked]) -> list[bool]:
        """Whether greedy text from each bare prompt begins with the answer; whether a masked model fills it in."""
        return said(self.module, self.codec, asked, self.form)

    def perplexity(self, ids: Sequence[Sequence[int]] | None = None) -> float:
        """On these rows; none: on the probe."""
        return perplexity(self.module, self.codec, self.probe if ids is None else ids, self.form)


def opened(
    model: Model,
    records: Sequence[Text],
    run: Run,
    *,
    prefixes: int,
    tokens: int | None = None,
    token: str = "subject",
) -> Setting:
    """The setting of an edit. tokens: for C; none: ten a dimension of the widest key.

    Without records the text is the model's own. A fifth of the texts, the last ones, is kept as the probe. Prefixes are
    the model's own too; those of a model that does not go on by itself, as a causal one does, are beginnings of texts.
    """
    codec = model.ask(Codec)
    module = model.ask(Gradients).module().to(device()).requires_grad_(False)
    stack = structure.all_blocks(module)
    wanted = tokens or ENOUGH * max(structure.feed_forward(module, block).inner for block in stack)

    def own(name: str, length: int, *, count: int = 0, tokens: int = 0) -> list[str]:
        """Texts of the model's own, said once."""
        seed = run.seed_for(name)
        key = {"model": model.digest, "seed": seed, "amount": [length, count, tokens], **kept.arithmetic(module)}

        def said() -> list[str]:
            return sampled(module, codec, seed, length=length, count=count, tokens=tokens)

        return run.step(name, lambda: kept.known("said", key, said))

    form = form_of(model, module)
    before = own("prefixes", PREFIX, count=prefixes) if form.causal else []
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
    if not form.causal:
        order = torch.randperm(len(text), generator=run.generator("prefixes")).tolist()[:prefixes]
        before = codec.tokenizer.batch_decode([text[i][: PREFIX + 1] for i in order], skip_special_tokens=True)
    before = [prefix for prefix in before if prefix.strip()]
    return Setting(module, codec, ("", *(joined(text) for text in before)), text, probe, model.digest, form, token)


def joined(prefix: str) -> str:
    """A sampled text as a sentence before a prompt."""
    return prefix.strip().rstrip(".!?,;:") + ". "
