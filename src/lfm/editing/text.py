"""Text for an editor: what the model itself says, and whether it says what it should."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from lfm.core.heavy import torch
from lfm.core.interfaces import Codec
from lfm.data.answers import opens_with
from lfm.editing.form import CAUSAL, IGNORED, Form, Reading, reading
from lfm.models import forward
from lfm.models.language import BATCH_TOKENS, batches
from lfm.models.local import LocalText

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lfm.core.interfaces import Batch

TURNS = 1000
"""Batches sampled at most: a model may end its texts at once."""


def opening(tokenizer: Any) -> str:
    """The shortest prompt that gives a model something to go on from."""
    if tokenizer("")["input_ids"]:
        return ""
    return tokenizer.bos_token or tokenizer.eos_token or "The"


def sampled(
    module: nn.Module, codec: Codec, seed: int, *, length: int, count: int = 0, tokens: int = 0, after: str = ""
) -> list[str]:
    """What the model says (after a text) in up to `length` tokens at temperature 1, none empty: `count` texts, or
    `tokens` in all."""
    speaker = LocalText(lambda: module, codec)
    group = max(1, min(BATCH_TOKENS // (length + 1), count or -(-tokens // length)))
    found: list[str] = []
    said = 0
    for turn in range(TURNS):
        if (count and len(found) >= count) or (tokens and said >= tokens) or not (count or tokens):
            break
        texts = speaker.generate(
            [after or opening(codec.tokenizer)] * group, max_tokens=length, temperature=1.0, seed=(seed + turn) % 2**63
        )
        texts = [text for text in texts if text.strip()]
        found += texts
        said += sum(map(len, codec.tokenizer(texts)["input_ids"])) if texts else 0
    return found[:count] if count else found


def tokenised(codec: Codec, texts: Sequence[str], tokens: int) -> list[list[int]]:
    """The texts' ids, the first of them, up to that many tokens in all."""
    kept: list[list[int]] = []
    left = tokens
    for row in codec.tokenizer(list(texts))["input_ids"] if texts else ():
        if left <= 0:
            break
        kept.append(list(row[:left]))
        left -= len(kept[-1])
    return [row for row in kept if row]


def perplexity(module: nn.Module, codec: Codec, ids: Sequence[Sequence[int]], form: Form = CAUSAL) -> float:
    """exp of the mean NLL of what a model of this form tells of the rows (a causal one: every token but each row's
    first); fp64 sums. 1.0 where there is none."""
    total, count = lost(module, codec, ids, form)
    return float(torch.tensor(total / max(count, 1), dtype=torch.float64).exp())


def lost(module: nn.Module, codec: Codec, ids: Sequence[Sequence[int]], form: Form = CAUSAL) -> tuple[float, int]:
    """(NLL of these rows, summed; of how many tokens)."""
    total, count = 0.0, 0
    for group in batches([len(row) for row in ids]):
        more, told = told_of(partial(forward, module), reading(form, codec.tokenizer, [ids[i] for i in group]))
        total, count = total + more, count + told
    return total, count


def told_of(logits: Callable[[Batch], Tensor], read: Reading) -> tuple[float, int]:
    """(−log p of a reading's labels, summed in fp64; how many there are)."""
    with torch.no_grad():
        found = logits(read.batch).log_softmax(-1)
    labels = read.labels.to(found.device)
    told = found.gather(2, labels.clamp(min=0)[..., None])[..., 0]
    return -told[labels != IGNORED].double().sum().item(), int((labels != IGNORED).sum())


def answered(module: nn.Module, codec: Codec, asked: Sequence[tuple[str, str]]) -> list[bool]:
    """Whether greedy text from each (prompt, answer)'s bare prompt opens with the answer.

    Nothing is given away. What follows it is not judged: a model may run on, and edits are not to blame for that.
    """
    if not asked:
        return []
    prompts, answers = zip(*asked, strict=True)
    ids = codec.tokenizer([" " + answer.strip() for answer in answers], add_special_tokens=False)["input_ids"]
    said = LocalText(lambda: module, codec).generate(prompts, max_tokens=max(map(len, ids)) + 2)
    return [opens_with(text, answer) for text, answer in zip(said, answers, strict=True)]
