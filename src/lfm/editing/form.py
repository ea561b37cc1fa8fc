"""How a model of each kind is asked and read: a causal one goes on, a masked one fills blanks, a decoder writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lfm.core.errors import DataError, MismatchError, ModelError
from lfm.core.heavy import torch
from lfm.models import structure
from lfm.models.codec import pad, pad_id

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lfm.core.interfaces import Batch
    from lfm.core.model import Model
    from lfm.data.records import Text

IGNORED = -100
EVERY = 7
"""Of a text's tokens one in so many is blanked for a masked model: the 15 % it was trained with."""
CAUSAL_LM, MASKED_LM, SEQ2SEQ_LM = "causal-lm", "masked-lm", "seq2seq-lm"
KINDS = {
    CAUSAL_LM: "causal language model",
    MASKED_LM: "masked language model",
    SEQ2SEQ_LM: "encoder-decoder",
}
READERS = (CAUSAL_LM, MASKED_LM)
"""Those that read a prompt and its answer in one stack."""


class Form(NamedTuple):
    """task: as Facts has it. start: the id that a decoder of an encoder-decoder begins with; 0 for the others."""

    task: str = CAUSAL_LM
    start: int = 0

    @property
    def causal(self) -> bool:
        return self.task == CAUSAL_LM

    @property
    def masked(self) -> bool:
        return self.task == MASKED_LM


CAUSAL = Form()


def form_of(model: Model, module: nn.Module) -> Form:
    """The form of a model, whose module this is."""
    if model.facts.task != SEQ2SEQ_LM:
        return Form(model.facts.task)
    return Form(SEQ2SEQ_LM, int(module.config.decoder_start_token_id))  # type: ignore[union-attr,arg-type]


class Reading(NamedTuple):
    """Texts as a model reads them. labels (B, T): tokens at the places whose logits tell them, −100 elsewhere.

    read (B, T): the tokens that a stack reads: an encoder's or the only stack's; written (B, T): a decoder's beside an
    encoder, None where there is none.
    """

    batch: Batch
    labels: Tensor
    read: Tensor
    written: Tensor | None = None

    def tokens(self, decoder: bool) -> Tensor:
        """Which places of a stack hold tokens."""
        if decoder:
            assert self.written is not None
            return self.written.bool()
        return self.read.bool()


def reading(form: Form, tokenizer: Any, rows: Sequence[Sequence[int]]) -> Reading:
    """Running text: every next token (causal), one in EVERY (masked), or the second half given the first."""
    if form.task == SEQ2SEQ_LM:
        return _halves(form, tokenizer, rows)
    batch = pad([list(row) for row in rows], pad_id(tokenizer))
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    if form.causal:
        labels = torch.full_like(ids, IGNORED)
        labels[:, :-1] = ids[:, 1:].masked_fill(~mask[:, 1:], IGNORED)
        return Reading(batch, labels, mask)
    ordinary = ~torch.isin(ids, torch.tensor(sorted(tokenizer.all_special_ids))) & mask
    blank = ordinary & (ordinary.cumsum(1) % EVERY == EVERY // 2)
    read = batch | {"input_ids": ids.masked_fill(blank, tokenizer.mask_token_id)}
    return Reading(read, ids.masked_fill(~blank, IGNORED), mask)


def _halves(form: Form, tokenizer: Any, rows: Sequence[Sequence[int]]) -> Reading:
    """What is special in the rows stays with the encoder's half: it opens and ends what is read."""
    special = set(tokenizer.all_special_ids)
    given, said = [], []
    for row in rows:
        plain = [token for token in row if token not in special]
        opening = [token for token in row[:1] if token in special]
        closing = [token for token in row[-1:] if token in special and len(row) > 1]
        middle = (len(plain) + 1) // 2
        given.append([*opening, *plain[:middle], *closing] or [form.start])
        said.append(plain[middle:])
    batch = pad(given, pad_id(tokenizer))
    labels = pad([row or [IGNORED] for row in said], IGNORED)
    begun = pad([[form.start, *row[:-1]] for row in said], pad_id(tokenizer))["input_ids"]
    return Reading(
        batch | {"decoder_input_ids": begun},
        labels["input_ids"],
        batch["attention_mask"].bool(),
        labels["attention_mask"].bool(),
    )


def targets(tokenizer: Any, answers: Sequence[str], start: int) -> list[tuple[list[int], list[int]]]:
    """Of each answer what a decoder reads before it says the first of its tokens, and these tokens."""
    special = set(tokenizer.all_special_ids)
    found = []
    for row in tokenizer(text_target=[answer.strip() for answer in answers])["input_ids"]:
        opening = next(i for i, token in enumerate(row) if token not in special)
        found.append(([start, *row[:opening]], list(row[opening:-1] if row[-1] in special else row[opening:])))
    return found


def in_decoder(module: nn.Module, block: int) -> bool:
    """Whether a block, numbered through, is of a decoder that reads what an encoder made of the prompt."""
    stacks = structure.stacks(module)
    return len(stacks) > 1 and block % sum(map(len, stacks)) >= len(stacks[0])


def own_stack(module: nn.Module, block: int) -> tuple[list[str], int]:
    """The blocks of the stack that a block, numbered through, is of, and its place there."""
    stacks = structure.stacks(module)
    place = block % sum(map(len, stacks))
    return (stacks[0], place) if place < len(stacks[0]) else (stacks[1], place - len(stacks[0]))


def at(module: nn.Module, kind: str, block: int) -> tuple[str, str]:
    """The site of a block, numbered through. ModelError where there is none."""
    return kind, structure.all_blocks(module)[numbered(module, block)]


def numbered(module: nn.Module, block: int) -> int:
    """A block's number from 0, where it was counted from the last on. ModelError where there is none."""
    count = len(structure.all_blocks(module))
    if not -count <= block < count:
        raise ModelError(f"no block {block}", why=f"the model has {count}, counted from 0")
    return block % count


def a_kind(task: str) -> str:
    """What a model that says no text of its own is called."""
    return "a masked model" if task == MASKED_LM else "an encoder-decoder"


def editable(
    id: str, model: Model, text: Sequence[Text], layers: Sequence[int] = (), tasks: Sequence[str] = tuple(KINDS)
) -> None:
    """What an editor asks of a model before its weights are read: that it is a language model of these tasks
    (MismatchError), that there is text where it says none of its own to measure on (DataError), and the blocks named
    (MismatchError)."""
    facts = model.facts
    if facts.task not in tasks:
        kinds = [KINDS[task] for task in tasks]
        told = " and ".join(f"{kind}s" for kind in kinds) if len(tasks) < len(KINDS) else "language models"
        raise MismatchError(
            f"{id} edits {told}; {model.ref} is not one",
            why=f"its task is {facts.task or 'not known'}",
            fix="give " + " or ".join(f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}" for kind in kinds),
        )
    if facts.task != CAUSAL_LM and not text:
        raise DataError(
            f"{id} needs text for {a_kind(facts.task)}",
            why="it says none of its own to measure on",
            fix="add text=FILE",
        )
    for layer in layers:
        if facts.layers and facts.task != SEQ2SEQ_LM and not -facts.layers <= layer < facts.layers:
            raise MismatchError(f"there is no block {layer}", why=f"the model has {facts.layers}, counted from 0")
