"""A fact as tokens: what a causal or a masked model reads, where it says the object, which tokens are the subject."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from lfm.core.errors import MismatchError
from lfm.core.heavy import torch
from lfm.core.interfaces import Batch, Codec
from lfm.core.model import Facts
from lfm.data.wording import spaced
from lfm.editing.form import Form
from lfm.editing.rows import place
from lfm.editing.text import answered
from lfm.models import forward
from lfm.models.codec import pad, pad_id
from lfm.models.language import batches, spans

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lfm.core.model import Model
    from lfm.editing.setting import Setting

Asked = tuple[str, str, str]
"""(prompt, answer, suffix)."""


class Cloze(NamedTuple):
    """ids: what is read. places: where the object's tokens are read off, in order; object: those tokens.

    subject: the places of the subject's tokens, empty where none was asked for.
    """

    ids: list[int]
    places: list[int]
    object: list[int]
    subject: range


def is_masked(facts: Facts) -> bool:
    return facts.task == "masked-lm"


def cloze(tokenizer: Any, asked: Asked, *, masked: bool, subject: str = "") -> Cloze:
    """The fact as a masked model reads it (a blank a token of the object, then the suffix), or as a causal one does.

    A causal model reads the object but for its last token, each of its tokens after the right ones before it.
    """
    (read,) = clozes(tokenizer, [asked], masked=masked)
    prompt, answer, suffix = asked
    text = prompt + spaced(prompt, answer) + (suffix if masked else "")
    return read._replace(subject=_tokens_of(tokenizer, prompt, text, subject))


def clozes(tokenizer: Any, asked: Sequence[Asked], *, masked: bool) -> list[Cloze]:
    """The same of many facts, whose subjects are not looked for."""
    answers = [spaced(prompt, answer) for prompt, answer, _ in asked]
    suffixes = [suffix if masked else "" for _, _, suffix in asked]
    made = []
    for ids, first, last in spans(tokenizer, [prompt for prompt, _, _ in asked], answers, suffixes):
        said = ids[first:last]
        if masked:
            read, places = [*ids[:first], *[tokenizer.mask_token_id] * len(said), *ids[last:]], range(first, last)
        else:
            read, places = ids[: last - 1], range(first - 1, last - 1)
        made.append(Cloze(read, list(places), said, range(0)))
    return made


def _tokens_of(tokenizer: Any, prompt: str, text: str, subject: str) -> range:
    if not subject:
        return range(0)
    start = place(prompt, subject)
    end = start + len(subject)
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    inside = [i for i, (a, b) in enumerate(offsets) if b > start and a < end and b > a]
    return range(inside[0], inside[-1] + 1)


def log_probability(logits: Tensor, read: Cloze) -> Tensor:
    """(B,) fp64 log-probability of the whole object in rows (B, T, V) that all read the same fact."""
    wanted = torch.tensor(read.object, device=logits.device)
    told = logits[:, read.places].double().log_softmax(-1)
    return told.gather(2, wanted.expand(len(told), -1)[..., None])[..., 0].sum(1)


def first_choice(logits: Tensor, read: Cloze) -> bool:
    """Whether each of the object's tokens is the likeliest in its place, by the logits (T, V) of its row."""
    return logits[read.places].argmax(-1).tolist() == read.object


def batch_of(tokenizer: Any, reads: Sequence[Cloze]) -> Batch:
    return pad([read.ids for read in reads], pad_id(tokenizer))


def output_embedding(here: Setting, asked: Asked) -> Tensor:
    """(width,) fp64: what makes the answer's first token likely."""
    read = cloze(here.codec.tokenizer, asked, masked=here.form.masked)
    module: Any = here.module
    table = (module.get_output_embeddings() or module.get_input_embeddings()).weight
    return table[read.object[0]].detach().cpu().double()


def said(module: nn.Module, codec: Codec, asked: Sequence[Asked], form: Form) -> list[bool]:
    """Whether greedy text from each bare prompt begins with the answer; whether a masked model fills it in."""
    if not form.masked:
        return answered(module, codec, [(prompt, answer) for prompt, answer, _ in asked])
    with torch.no_grad():
        return filled(partial(forward, module), codec, asked)


def filled(logits: Callable[[Batch], Tensor], codec: Codec, asked: Sequence[Asked]) -> list[bool]:
    """Whether a masked model, by its logits, fills in each answer, all its blanks at once."""
    reads = clozes(codec.tokenizer, asked, masked=True) if asked else []
    told = [False] * len(reads)
    for group in batches([len(read.ids) for read in reads]):
        found = logits(batch_of(codec.tokenizer, [reads[i] for i in group]))
        for row, i in enumerate(group):
            told[i] = first_choice(found[row], reads[i])
    return told


def readable(id: str, model: Model) -> None:
    """MismatchError unless the model is a causal or a masked language model."""
    if model.facts.task not in ("causal-lm", "masked-lm"):
        raise MismatchError(
            f"{id} reads facts as a causal or a masked language model does; {model.ref} is neither",
            why=f"its task is {model.facts.task or 'not known'}",
        )
