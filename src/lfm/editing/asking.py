"""Edits as they are asked, many at once: what is read, where the new objects are told, and where an edit is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lfm.core.heavy import torch
from lfm.data.wording import wording
from lfm.editing.cloze import clozes
from lfm.editing.form import CAUSAL, IGNORED, SEQ2SEQ_LM, Form, at, in_decoder, targets
from lfm.editing.rows import last_token, place
from lfm.models.codec import pad, pad_id
from lfm.models.language import batches
from lfm.models.resume import activations

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.interfaces import Batch
    from lfm.data.records import Edit
    from lfm.editing.setting import Setting


class Asked(NamedTuple):
    """n edits, (n, T) but for what the batch holds beside. labels: the new objects' tokens at the places whose logits
    tell them, −100 elsewhere.

    Of the stack in which edits are kept (an encoder's places are not those of the labels): real, places that hold
    tokens; leads, those that the object is told at, or, in an encoder, the subject's last; kept, those that an edit
    is kept at: each blank, the subject's last token in an encoder, else the first that leads, for it reaches the later.
    """

    batch: Batch
    labels: Tensor
    real: Tensor
    leads: Tensor
    kept: Tensor

    def rows(self, places: Tensor) -> Asked:
        return Asked({k: v[places] for k, v in self.batch.items()}, *(held[places] for held in self[1:]))

    @property
    def lengths(self) -> Tensor:
        """(n,) tokens of the new objects."""
        return (self.labels != IGNORED).sum(1)

    @property
    def spots(self) -> tuple[Tensor, Tensor]:
        """(row, place) of each place that an edit is kept at, row by row."""
        row, place = self.kept.nonzero(as_tuple=True)
        return row, place


def asked(tokenizer: Any, edits: Sequence[Edit], form: Form = CAUSAL, *, decoder: bool = False) -> Asked:
    """Each edit's prompt and new object, as a model of that form is asked. decoder: that edits are kept in it."""
    if form.task == SEQ2SEQ_LM:
        return _written(tokenizer, edits, form, decoder)
    reads = clozes(tokenizer, [(edit.prompt, edit.new_object, edit.suffix) for edit in edits], masked=not form.causal)
    batch = pad([read.ids for read in reads], pad_id(tokenizer))
    labels = torch.full_like(batch["input_ids"], IGNORED)
    for row, read in zip(labels, reads, strict=True):
        for at_place, token in zip(read.places, read.object, strict=True):
            if at_place >= 0:  # what nothing is read before is not told
                row[at_place] = token
    leads = labels != IGNORED
    return Asked(batch, labels, batch["attention_mask"].bool(), leads, _first(leads) if form.causal else leads)


def _written(tokenizer: Any, edits: Sequence[Edit], form: Form, decoder: bool) -> Asked:
    worded = [wording(edit) for edit in edits]
    batch = pad([list(row) for row in tokenizer([each.prompt for each in worded])["input_ids"]], pad_id(tokenizer))
    told = targets(tokenizer, [each.answer for each in worded], form.start)
    begun = [[*before, *said[:-1]] for before, said in told]
    written = pad(begun, pad_id(tokenizer))
    labels = pad([[IGNORED] * (len(before) - 1) + said for before, said in told], IGNORED)["input_ids"]
    batch |= {"decoder_input_ids": written["input_ids"]}
    if decoder:
        leads = labels != IGNORED
        return Asked(batch, labels, written["attention_mask"].bool(), leads, _first(leads))
    real = batch["attention_mask"].bool()
    named = torch.zeros_like(real)
    for row, edit in zip(named, edits, strict=True):
        row[last_token(tokenizer, edit.prompt, place(edit.prompt, edit.subject) + len(edit.subject))] = True
    return Asked(batch, labels, real, named, named)


def _first(leads: Tensor) -> Tensor:
    return leads & (leads.cumsum(1) == 1)


def of(here: Setting, block: int, edits: Sequence[Edit]) -> Asked:
    """The edits as they are asked where a block, numbered through, is to keep them."""
    return asked(here.codec.tokenizer, edits, here.form, decoder=in_decoder(here.module, block))


def read_at(here: Setting, kind: str, block: int, edits: Sequence[Edit]) -> list[Tensor]:
    """(spots, width) fp32 on the CPU of each edit: what a block's site holds where the edit is kept. A causal model
    reads bare prompts, another as many blanks as the new object has tokens."""
    site, found = at(here.module, kind, block), {}
    for group in batches([len(edit.prompt) for edit in edits]):
        some = [edits[i] for i in group]
        batch, kept = _prompts(here, some) if here.form.causal else _places(of(here, block, some))
        (seen,) = activations(here.module, batch, [site])
        parts = seen.cpu()[kept].float().split(kept.sum(1).tolist())
        found |= dict(zip(group, parts, strict=True))
    return [found[i] for i in range(len(edits))]


def _places(asked: Asked) -> tuple[Batch, Tensor]:
    return asked.batch, asked.kept


def _prompts(here: Setting, edits: Sequence[Edit]) -> tuple[Batch, Tensor]:
    """The bare prompts, with what is begun after them left open, and the last place of each."""
    tokenizer = here.codec.tokenizer
    end = tokenizer.eos_token_id
    ids = [list(row) for row in tokenizer([edit.prompt for edit in edits])["input_ids"]]
    batch = pad([row[:-1] if len(row) > 1 and row[-1] == end else row for row in ids], pad_id(tokenizer))
    real = batch["attention_mask"].bool()
    return batch, real & (real.cumsum(1) == real.sum(1, keepdim=True))


def answer_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """(n,) log-probability of all of a row's labelled tokens, by the logits of their places."""
    labels = labels.to(logits.device)
    at = (labels != IGNORED).nonzero(as_tuple=True)
    told = logits[at].log_softmax(-1).gather(1, labels[at][:, None])[:, 0]
    return told.new_zeros(labels.shape).index_put(at, told).sum(1)
