"""Text for rows that each ask for their own length, heat, seed and end: one batch of them at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

from lfm.core.heavy import torch, transformers
from lfm.core.interfaces import Codec, Said
from lfm.models.codec import pad, pad_id
from lfm.models.device import taken
from lfm.models.language import batches, continuation, cut, rows_of

if TYPE_CHECKING:
    from torch import Tensor, nn


class Asked(NamedTuple):
    """One row: its prompt's ids, its adapter's name, and how it is answered. heat 0: greedy."""

    ids: list[int]
    adapter: str | None
    most: int
    heat: float
    stop: tuple[str, ...]
    seed: int


def asked(
    module: nn.Module,
    codec: Codec,
    prompts: Sequence[str],
    adapters: Sequence[str | None],
    most: int,
    heat: float,
    stop: Sequence[str],
    seed: int,
) -> list[Asked]:
    """The prompts as rows; their errors (none, too long) are the caller's own and not its batch's."""
    config: Any = module.config
    context = 0 if config.is_encoder_decoder else getattr(config, "max_position_embeddings", None) or 0
    rows = rows_of(codec.tokenizer, prompts, most, context)
    end = codec.tokenizer.eos_token_id
    if not config.is_encoder_decoder:
        rows = [row[:-1] if len(row) > 1 and row[-1] == end else row for row in rows]
    return [
        Asked(row, name, min(most, context - len(row)) if context else most, heat, tuple(stop), seed + place)
        for place, (row, name) in enumerate(zip(rows, adapters, strict=True))
    ]


def answered(
    module: Any,
    codec: Codec,
    rows: Sequence[Asked],
    taking: Callable[[Sequence[str | None]], AbstractContextManager[object]],
) -> list[Said]:
    """Each row's answer, and whether its room for new tokens ended it. taking: rows' adapters, in force inside it."""
    texts = [Said("")] * len(rows)
    # shorter prompts are padded in front where the module is told each token's position
    told = "position_ids" in (taken(type(module)) or ()) or module.config.is_encoder_decoder
    for group in batches([len(row.ids) + row.most for row in rows]):
        for length in {0} if told else {len(rows[i].ids) for i in group}:
            some = [i for i in group if told or len(rows[i].ids) == length]
            with taking([rows[i].adapter for i in some]):
                for i, text in zip(some, _batch(module, codec, [rows[i] for i in some]), strict=True):
                    texts[i] = text
    return texts


def _batch(module: Any, codec: Codec, rows: list[Asked]) -> list[Said]:
    from lfm.models.mixed.modules import growing

    tokenizer, fill = codec.tokenizer, pad_id(codec.tokenizer)
    whole = bool(module.config.is_encoder_decoder)
    given = pad([row.ids for row in rows], fill)
    if not whole:  # right-padded so far: turned to the end of the row
        given = {name: _turned(tensor, [len(row.ids) for row in rows]) for name, tensor in given.items()}
    start = 1 if whole else given["input_ids"].shape[1]
    draws = [torch.Generator().manual_seed(row.seed % 2**63) for row in rows]

    def choose(_: Tensor, scores: Tensor) -> Tensor:
        for place, row in enumerate(rows):
            if row.heat > 0:
                chances = (scores[place].float() / row.heat).softmax(-1).cpu()
                token = int(torch.multinomial(chances, 1, generator=draws[place]))
                scores[place] = -torch.inf
                scores[place, token] = 0.0
        return scores

    def done(ids: Tensor, _: Tensor, **__: Any) -> Tensor:
        made = ids.shape[1] - start
        over = [made >= row.most or _stopped(tokenizer, ids[i, start:], row.stop) for i, row in enumerate(rows)]
        return torch.tensor(over, device=ids.device)

    out = module.generate(
        **{name: tensor.to(module.device) for name, tensor in given.items()},
        past_key_values=growing(module),
        max_new_tokens=max(row.most for row in rows),
        do_sample=False,
        num_beams=1,
        pad_token_id=fill,
        eos_token_id=tokenizer.eos_token_id,
        logits_processor=transformers.LogitsProcessorList([choose]),  # type: ignore[list-item]
        stopping_criteria=transformers.StoppingCriteriaList([done]),  # type: ignore[list-item]
    )
    texts = []
    for row, ids in zip(rows, out[:, start:].tolist(), strict=True):
        made = ids[: row.most]
        ended = tokenizer.eos_token_id in made
        if ended:
            made = made[: made.index(tokenizer.eos_token_id)]
        if whole:
            text = tokenizer.decode(made, skip_special_tokens=True)
        else:
            text = continuation(tokenizer, [*row.ids, *made], len(row.ids))
        shown = cut(text, row.stop)
        texts.append(Said(shown, not ended and shown == text))
    return texts


def _stopped(tokenizer: Any, ids: Tensor, stop: Sequence[str]) -> bool:
    return bool(stop) and any(end in tokenizer.decode(ids.tolist()) for end in stop)


def _turned(padded: Tensor, lengths: Sequence[int]) -> Tensor:
    """Rows padded behind → padded in front."""
    return torch.stack([row.roll(len(row) - length) for row, length in zip(padded, lengths, strict=True)])
