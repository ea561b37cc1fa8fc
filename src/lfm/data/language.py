"""Tasks of language models: running text, answers to prompts, and classes named in words.

A row is the ids that a model reads and the labels that it is scored on. Causal labels lie on the token they name (the
loss shifts them by one); a masked model's lie on its masks; an encoder-decoder's are the decoder's targets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from lfm.core.errors import DataError
from lfm.core.heavy import F, np, torch
from lfm.core.interfaces import Batch, Codec
from lfm.core.model import Facts
from lfm.data.chat import rendered
from lfm.data.records import Chat, Label, Pair, Record, Text
from lfm.data.task import Task
from lfm.data.wording import Wording, wording
from lfm.models.codec import pad, pad_id
from lfm.models.language import limit_of, shorten, spans, surplus

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100
MASKED_SHARE = 0.15


class Row(NamedTuple):
    """ids: what the model (the encoder) reads. labels: as long as ids, or as the decoder's target."""

    ids: list[int]
    labels: list[int]


def context_of(tokenizer: Any, facts: Facts) -> int:
    """The longest input in tokens that model and tokenizer both allow; 0 where neither says."""
    return limit_of(tokenizer, facts.context)


# ---------------------------------------------------------------------------------------------- tasks


def running_text(codec: Codec, facts: Facts) -> Task:
    """Every next token (causal), masked tokens (masked), or the second half given the first (encoder-decoder)."""

    def row(record: Record) -> Row:
        return _text_row(cast("Text", record).text, codec.tokenizer, facts)

    return _task("language-modelling", "perplexity", codec, facts, lambda records: [row(r) for r in records])


def answers(codec: Codec, facts: Facts) -> Task:
    """The answer alone is scored: the completion and its end token, a fact's object, an edit's new object."""

    def rows(records: Sequence[Record]) -> list[Row]:
        said = [wording(r) for r in records]
        ends = [getattr(r, "ends", facts.task == "seq2seq-lm") for r in records]
        return _answer_rows(said, codec.tokenizer, facts, ends=ends)

    return _task("answers", "exact_match", codec, facts, rows)


def conversations(codec: Codec, facts: Facts) -> Task:
    """The assistant's turns alone are scored, with the tokens that end them."""

    def rows(records: Sequence[Record]) -> list[Row]:
        return [_chat_row(cast("Chat", record), codec.tokenizer, facts) for record in records]

    return _task("conversations", "exact_match", codec, facts, rows)


def named_classes(records: Sequence[Record], codec: Codec, facts: Facts) -> Task:
    """The class's name as the answer; the classes are those of `records`, in alphabetical order.

    predict decodes greedily over the names alone: at each token where names part, the likeliest branch (causal,
    encoder-decoder); or the name likeliest in the blank (masked, whose names must be equally long in tokens).
    """
    names = sorted({cast("Label | Pair", r).label for r in records})
    tokenizer = codec.tokenizer
    asked = [Wording("a", " " + name) for name in names]
    ends = facts.task != "masked-lm"

    def named(said: Sequence[Wording]) -> list[Row]:
        return _answer_rows(said, tokenizer, facts, ends=[ends] * len(said))

    def rows(records: Sequence[Record]) -> list[Row]:
        return named([wording(r) for r in records])

    spelled = [tuple(t for t in r.labels if t != IGNORED) for r in named(asked)]
    if facts.task == "masked-lm" and len({len(s) for s in spelled}) > 1:
        lengths = ", ".join(f"{name} {len(s)}" for name, s in zip(names, spelled, strict=True))
        raise DataError(
            "a masked model compares class names of one length only",
            why=f"tokens each: {lengths}",
            fix="rename the classes so that each is as many tokens long, or use a classifier",
        )
    choose = _likeliest if facts.task == "masked-lm" else _descend

    def predict(logits: Tensor, batch: Batch) -> list[str]:
        return [names[choose(l, t, spelled)] for l, t in _by_row(logits, batch, facts)]

    task = _task("named-classes", "accuracy", codec, facts, rows)
    return Task(
        task.name,
        task.metric,
        task.collate,
        task.loss,
        task.scored,
        predict,
        lambda records: [cast("Label | Pair", r).label for r in records],
    )


def _task(name: str, metric: str, codec: Codec, facts: Facts, rows: Callable[[Sequence[Record]], list[Row]]) -> Task:
    def collate(records: Sequence[Record]) -> Batch:
        made = rows(records)
        batch = pad([r.ids for r in made], pad_id(codec.tokenizer))
        labels = pad([r.labels for r in made], IGNORED)["input_ids"]
        if facts.task == "causal-lm":
            labels[:, 0] = IGNORED  # nothing predicts it
        return {**batch, "labels": labels}

    def scored(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        logits, labels = _aligned(logits, batch, facts)
        keep = labels != IGNORED
        return logits[keep].float(), labels[keep]

    def loss(logits: Tensor, batch: Batch) -> Tensor:
        kept, labels = scored(logits, batch)
        return F.cross_entropy(kept, labels) if len(labels) else logits.float().sum() * 0.0

    def predict(logits: Tensor, batch: Batch) -> list[str]:
        return [_said(codec.tokenizer, l.argmax(-1).tolist()) for l, _ in _by_row(logits, batch, facts)]

    def truth(records: Sequence[Record]) -> list[str]:
        first = 1 if facts.task == "causal-lm" else 0  # nothing predicts a causal model's first token
        return [_said(codec.tokenizer, [t for t in r.labels[first:] if t != IGNORED]) for r in rows(records)]

    return Task(f"{name}/{facts.task}", metric, collate, loss, scored, predict, truth)


def _aligned(logits: Tensor, batch: Batch, facts: Facts) -> tuple[Tensor, Tensor]:
    """Logits and labels (B, T) such that the logits at a place predict the label at that place."""
    labels = batch["labels"].to(logits.device)
    return (logits[:, :-1], labels[:, 1:]) if facts.task == "causal-lm" else (logits, labels)


def _by_row(logits: Tensor, batch: Batch, facts: Facts) -> list[tuple[Tensor, Tensor]]:
    logits, labels = _aligned(logits, batch, facts)
    return [(l[t != IGNORED], t[t != IGNORED]) for l, t in zip(logits, labels, strict=True)]


def _said(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=True).strip()


# ---------------------------------------------------------------------------------------------- rows


def halves(text: str) -> tuple[str, str]:
    """What an encoder reads of a text and what its decoder writes: its halves, parted at the space after the middle."""
    middle = text.find(" ", len(text) // 2)
    middle = len(text) // 2 if middle < 0 else middle
    return text[:middle], text[middle:].strip()


def _text_row(text: str, tokenizer: Any, facts: Facts) -> Row:
    limit = context_of(tokenizer, facts)
    if facts.task == "seq2seq-lm":
        first, second = halves(text)
        source, target = tokenizer(first)["input_ids"], tokenizer(text_target=second)["input_ids"]
        return Row(list(source[: limit or None]), list(target[: limit or None]))
    cut: dict[str, Any] = {"truncation": True, "max_length": limit} if limit else {}
    encoded = tokenizer(text, return_special_tokens_mask=True, **cut)
    ids = list(encoded["input_ids"])
    if facts.task == "causal-lm":
        return Row(ids, ids)
    open_places = [i for i, special in enumerate(encoded["special_tokens_mask"]) if not special]
    return _masked_row(ids, open_places, text, tokenizer)


def _masked_row(ids: list[int], open_places: list[int], text: str, tokenizer: Any) -> Row:
    """15 % of the tokens to be told; of these 80 % are masked, 10 % changed, 10 % kept (BERT, arXiv 1810.04805, 3.1).

    The choice is keyed by the text: the same text is always masked in the same way.
    """
    key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    random = np.random.Generator(np.random.Philox(key))
    count = max(1, round(MASKED_SHARE * len(open_places))) if open_places else 0
    labels = [IGNORED] * len(ids)
    read = list(ids)
    for place in random.permutation(open_places)[:count].tolist():
        labels[place] = ids[place]
        kind = random.random()
        if kind < 0.8:
            read[place] = tokenizer.mask_token_id
        elif kind < 0.9:
            read[place] = int(random.integers(len(tokenizer)))
    return Row(read, labels)


def _answer_rows(said: Sequence[Wording], tokenizer: Any, facts: Facts, *, ends: Sequence[bool]) -> list[Row]:
    """ends: whether the model also learns to stop after each answer."""
    limit = context_of(tokenizer, facts)
    if facts.task == "seq2seq-lm":
        sources = tokenizer([w.prompt for w in said])["input_ids"]
        targets = map(list, tokenizer(text_target=[w.answer.strip() for w in said])["input_ids"])
        targets = [t if end or t[-1:] != [tokenizer.eos_token_id] else t[:-1] for t, end in zip(targets, ends)]
        return [Row(shorten(s, len(s), tokenizer, limit)[0], t) for s, t in zip(sources, targets, strict=True)]
    masked = facts.task == "masked-lm"
    suffixes = [w.suffix if masked else "" for w in said]
    found = spans(tokenizer, [w.prompt for w in said], [w.answer for w in said], suffixes)
    return [
        (_blank_row if masked else _continued_row)(list(ids), first, last, tokenizer, limit, end)
        for (ids, first, last), end in zip(found, ends, strict=True)
    ]


def _continued_row(ids: list[int], first: int, last: int, tokenizer: Any, limit: int, ends: bool) -> Row:
    ids = ids[:last]
    if ends and tokenizer.eos_token_id is not None:
        ids, last = [*ids, tokenizer.eos_token_id], last + 1
    ids, gone = shorten(ids, first, tokenizer, limit)
    return Row(ids, [IGNORED] * (first - gone) + ids[first - gone :])


def _chat_row(record: Chat, tokenizer: Any, facts: Facts) -> Row:
    """The template writes special tokens itself. Too long a conversation loses its beginning, never its last turn."""
    text, said = rendered(record, tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = list(encoded["input_ids"])
    labels = [IGNORED] * len(ids)
    last = 0
    for start, stop in said:
        inside = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if b > start and a < stop]
        last = inside[0] if inside else len(ids)
        for place in inside:
            labels[place] = ids[place]
    gone = surplus(ids, last, tokenizer, context_of(tokenizer, facts))
    return Row(ids[: gone.start] + ids[gone.stop :], labels[: gone.start] + labels[gone.stop :])


def _blank_row(ids: list[int], first: int, last: int, tokenizer: Any, limit: int, ends: bool) -> Row:
    ids, gone = shorten(ids, first, tokenizer, limit)
    first, last = first - gone, last - gone
    labels = [IGNORED] * len(ids)
    labels[first:last] = ids[first:last]
    return Row([*ids[:first], *[tokenizer.mask_token_id] * (last - first), *ids[last:]], labels)


def split(record: Record, codec: Codec, facts: Facts) -> list[Record]:
    """A text in pieces that fit the model's context, cut between tokens; any other record as it is."""
    if not isinstance(record, Text) or facts.task not in ("causal-lm", "masked-lm", "seq2seq-lm"):
        return [record]
    limit = context_of(codec.tokenizer, facts)
    room = limit - codec.tokenizer.num_special_tokens_to_add()
    if not limit or room < 1:
        return [record]
    offsets = codec.tokenizer(record.text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    if len(offsets) <= room:
        return [record]
    # A piece's own tokens can differ from the whole's at its edges, by a few at most: leave them room.
    step = max(1, room - 4)
    starts = [offsets[i][0] for i in range(0, len(offsets), step)]
    pieces = [record.text[a:b] for a, b in zip([0, *starts[1:]], [*starts[1:], len(record.text)], strict=True)]
    return [Text(group=record.group, text=piece) for piece in pieces if piece.strip()]


# ---------------------------------------------------------------------------------------------- named classes


def _descend(logits: Tensor, truth: Tensor, names: Sequence[tuple[int, ...]]) -> int:
    """The name that greedy decoding over the names alone reaches; logits (t, V) are those along the true name.

    Once a branch leaves the true name the logits say no more: its first name stands for it, and all of them are wrong.
    """
    left = list(range(len(names)))
    for place, right in enumerate(truth.tolist()):
        branches = sorted({names[i][place] for i in left if place < len(names[i])})
        if not branches:
            break
        best = branches[int(logits[place, branches].argmax())]
        left = [i for i in left if place < len(names[i]) and names[i][place] == best]
        if best != right:
            break
    return left[0]


def _likeliest(logits: Tensor, truth: Tensor, names: Sequence[tuple[int, ...]]) -> int:
    """The name with the highest log-probability in the blank; logits (t, V), names of t tokens each."""
    told = logits.float().log_softmax(-1)
    places = torch.arange(len(told), device=told.device)
    return max(range(len(names)), key=lambda i: float(told[places, list(names[i])].sum()))
