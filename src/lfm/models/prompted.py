"""A soft prompt before a model that takes input embeddings; and text and scores made from such access alone."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from lfm.core.errors import DataError
from lfm.core.heavy import peft, safetensors_torch, torch
from lfm.core.interfaces import Embeddings, Injection, Logprobs, Ranked, Said, Score, Text
from lfm.core.model import Model
from lfm.models.language import cut
from lfm.models.soft import ManyPrompts

if TYPE_CHECKING:
    from torch import Tensor

CANDIDATES = 1000
"""Next tokens asked for when text is scored or sampled; an endpoint may tell fewer."""

SPECIAL = re.compile(r"<[^<>\s]+>")
"""What special tokens look like as text. A text ends with the first one."""


def prompted(part: Model, prompt: Tensor, frame: str = "") -> Mapping[type, Callable[[], Any]]:
    """The interfaces of a model before whose every input the prompt (t, d) stands. frame: as of `fitted`."""
    return _spoken(part, PromptedEmbeddings(lambda: part.ask(Embeddings), prompt), len(prompt), frame)


def deep_prompted(part: Model, prompt: Tensor, frame: str = "") -> Mapping[type, Callable[[], Any]]:
    """The interfaces of a model with a prompt (blocks, t, d) at its blocks. frame: as of `fitted`."""
    deep = DeepEmbeddings(lambda: part.ask(Embeddings), lambda: part.ask(Injection), prompt)
    return _spoken(part, deep, prompt.shape[1], frame)


def _spoken(part: Model, embeddings: Embeddings, depth: int, frame: str) -> Mapping[type, Callable[[], Any]]:
    gives: dict[type, Callable[[], Any]] = {Embeddings: lambda: embeddings}

    def limit() -> int:
        return room(part, depth)

    if part.facts.task in ("masked-lm", "seq2seq-lm"):  # text does not grow where they answer
        return {Logprobs: lambda: AnswerLogprobs(embeddings, limit(), frame), **gives}
    return {
        Text: lambda: EmbeddingsText(embeddings),
        Logprobs: lambda: EmbeddingsLogprobs(embeddings, limit(), frame),
        **gives,
    }


def room(part: Model, depth: int) -> int:
    """The tokens that a text may have between a prompt of `depth` and an answer of one; 0 where no context is known."""
    return max(1, part.facts.context - depth - 1) if part.facts.context else 0


def fitted(
    embeddings: Embeddings, rows: Tensor, prompt: str, suffix: str = "", *, limit: int, frame: str = "", after: int = 0
) -> Tensor:
    """The rows (t, d) of an embedded text, of which what is longer than the limit (0: none) has lost its beginning.

    frame: a template's words, without a record's: they stay, as do what opens a text, the place of the answer, what
    comes behind it, and the last `after` rows. DataError where what stays is too long.
    """
    gone = len(rows) - limit if limit else 0
    if gone <= 0:
        return rows
    bare = embeddings.embed([frame], [suffix])[0] if suffix else embeddings.embed([frame])[0]
    if gone > len(rows) - max(len(bare), 1) - after:
        raise DataError(
            f"{prompt[:60]!r} is {len(rows)} tokens, of which {max(len(bare), 1) + after} cannot be left out",
            why=f"beside the prompt there is room for {limit}",
            fix="shorten it, the template, or the prompt: prompt_tokens",
        )
    kept = _common(bare, rows)
    return torch.cat([rows[:kept], rows[kept + gone :]])


def peft_format(part: Model, prompt: Tensor) -> Mapping[str, Callable[[Path], None]]:
    """A format by which peft reads the same prompt before the same model; none where that is no local causal model."""
    return {"peft": partial(_write_peft, part, prompt)} if _local_causal(part) else {}


def prefix_format(part: Model, prompt: Tensor) -> Mapping[str, Callable[[Path], None]]:
    """A format by which peft reads prompts at the blocks (blocks, t, d) as a prefix of keys and values."""
    return {"peft": partial(_write_prefix, part, prompt)} if _local_causal(part) else {}


def _local_causal(part: Model) -> bool:
    return part.kind == "checkpoint" and Path(part.ref).is_dir() and part.facts.task == "causal-lm"


def _write_prefix(part: Model, prompt: Tensor, out: Path) -> None:
    pairs = part.ask(Injection).prefix(prompt)
    heads, _, size = pairs[0][0].shape
    # A row for each token: of each block its key and then its value, head by head.
    rows = torch.stack([half.transpose(0, 1).flatten(1) for pair in pairs for half in pair], 1).flatten(1)
    settings: Any = peft.PrefixTuningConfig
    settings(
        task_type="CAUSAL_LM",
        base_model_name_or_path=part.ref,
        num_virtual_tokens=prompt.shape[1],
        token_dim=heads * size,
        num_transformer_submodules=1,
        num_layers=len(pairs),
        num_attention_heads=heads,
        inference_mode=True,
    ).save_pretrained(str(out))
    safetensors_torch.save_file({"prompt_embeddings": rows.contiguous()}, out / "adapter_model.safetensors")


def _write_peft(part: Model, prompt: Tensor, out: Path) -> None:
    settings: Any = peft.PromptTuningConfig
    settings(
        task_type="CAUSAL_LM",
        base_model_name_or_path=part.ref,
        num_virtual_tokens=len(prompt),
        token_dim=prompt.shape[1],
        num_transformer_submodules=1,
        num_layers=part.facts.layers,
        num_attention_heads=1,  # of use to prefix tuning only
        inference_mode=True,
    ).save_pretrained(str(out))
    safetensors_torch.save_file({"prompt_embeddings": prompt}, out / "adapter_model.safetensors")


@final
class PromptedEmbeddings:
    """The part's embeddings; what is asked after a sequence is asked after the prompt and that sequence."""

    def __init__(self, part: Callable[[], Embeddings], prompt: Tensor) -> None:
        self._open, self._prompt = part, prompt.detach().float()

    @cached_property
    def _part(self) -> Embeddings:
        return self._open()

    def table(self) -> Tensor:
        return self._part.table()

    def embed(self, texts: Sequence[str], suffixes: Sequence[str] = ()) -> list[Tensor]:
        return self._part.embed(texts, suffixes) if any(suffixes) else self._part.embed(texts)

    def next_from(self, embeds: Sequence[Tensor], k: int, also: Sequence[str] = ()) -> list[Ranked]:
        part = self._part
        if isinstance(part, ManyPrompts):
            return part.next_from([part.joined(self._prompt, rows) for rows in embeds], k, also)
        return part.next_from([torch.cat([self._prompt, rows]) for rows in embeds], k, also)


@final
class DeepEmbeddings:
    """The part's embeddings; what is asked after a sequence is asked with the prompts at the blocks."""

    def __init__(self, part: Callable[[], Embeddings], into: Callable[[], Injection], prompt: Tensor) -> None:
        self._open, self._into, self._prompt = part, into, prompt.detach().float()

    @cached_property
    def _part(self) -> Embeddings:
        return self._open()

    def table(self) -> Tensor:
        return self._part.table()

    def embed(self, texts: Sequence[str], suffixes: Sequence[str] = ()) -> list[Tensor]:
        return self._part.embed(texts, suffixes)

    def next_from(self, embeds: Sequence[Tensor], k: int, also: Sequence[str] = ()) -> list[Ranked]:
        return self._into().next_from(self._prompt, embeds, k, also)


@final
class EmbeddingsText:
    """Text that grows by the text of the next token. Characters of several tokens (rare scripts, emoji) are lost."""

    def __init__(self, embeddings: Embeddings) -> None:
        self._embeddings = embeddings

    def generate(self, prompts: Sequence[str], **how: Any) -> list[str]:
        return [one.text for one in self.said(prompts, **how)]

    def said(
        self,
        prompts: Sequence[str],
        *,
        max_tokens: int = 64,
        temperature: float = 0.0,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> list[Said]:
        """As generate, with whether each went on when max_tokens were made."""
        said, going = [""] * len(prompts), list(range(len(prompts)))
        for place in range(max_tokens):
            rows = self._embeddings.embed([prompts[i] + said[i] for i in going])
            ranked = self._embeddings.next_from(rows, CANDIDATES if temperature > 0 else 1)
            for i, row in zip(list(going), ranked, strict=True):
                token = _choose(row, temperature, f"{seed}:{i}:{place}")
                whole = said[i] + token
                ended = SPECIAL.fullmatch(token.strip()) is not None
                said[i] = said[i] if ended else cut(whole, stop)
                if ended or said[i] != whole:
                    going.remove(i)
            if not going:
                break
        return [Said(text, i in going) for i, text in enumerate(said)]


def _choose(row: Ranked, temperature: float, key: str) -> str:
    if temperature <= 0:
        return row[0][0]
    random = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7]))
    weights = (torch.tensor([value for _, value in row], dtype=torch.float64) / temperature).softmax(0)
    return row[int(torch.multinomial(weights, 1, generator=random))][0]


@final
class EmbeddingsLogprobs:
    """Scores of text, the text of each token found by embedding ever longer beginnings.

    A token that is not among those the model tells gets the least log-probability told: an upper bound of its own.
    Suffixes are ignored: nothing is conditioned on them. limit, frame: as of `fitted`.
    """

    def __init__(self, embeddings: Embeddings, limit: int = 0, frame: str = "") -> None:
        self._embeddings, self._limit, self._frame = embeddings, limit, frame

    def score(self, prompts: Sequence[str], continuations: Sequence[str], suffixes: Sequence[str] = ()) -> list[Score]:
        pairs = list(zip(prompts, continuations, strict=True))
        split = [pieces(self._embeddings, prompt, continuation) for prompt, continuation in pairs]
        asked = [
            self._fitted(rows[:place], prompt, place - found[0][0])
            for (rows, found), prompt in zip(split, prompts, strict=True)
            for place, _ in found
        ]
        texts = sorted({text for _, found in split for _, text in found})
        if len(texts) > CANDIDATES:
            raise DataError(f"{len(texts)} different tokens to score at once", fix=f"score at most {CANDIDATES}")
        ranked = iter(self._embeddings.next_from(asked, 1, texts))
        scores = []
        for _, found in split:
            values = [logprobs(next(ranked), [text])[0] for _, text in found]
            scores.append(Score(tuple(text for _, text in found), tuple(values)))
        return scores

    def top(self, prompts: Sequence[str], k: int, suffixes: Sequence[str] = ()) -> list[Ranked]:
        rows = self._embeddings.embed(prompts)
        asked = [self._fitted(one, prompt) for one, prompt in zip(rows, prompts, strict=True)]
        return self._embeddings.next_from(asked, k)

    def _fitted(self, rows: Tensor, prompt: str, after: int = 0) -> Tensor:
        return fitted(self._embeddings, rows, prompt, limit=self._limit, frame=self._frame, after=after)


@final
class AnswerLogprobs:
    """Scores of answers of one token: at a masked model's mask, or first of what a decoder says. limit, frame: as of
    `fitted`."""

    def __init__(self, embeddings: Embeddings, limit: int = 0, frame: str = "") -> None:
        self._embeddings, self._limit, self._frame = embeddings, limit, frame

    def score(self, prompts: Sequence[str], continuations: Sequence[str], suffixes: Sequence[str] = ()) -> list[Score]:
        found = []
        for prompt, continuation in zip(prompts, continuations, strict=True):
            _, split = pieces(self._embeddings, prompt, continuation)
            if len(split) > 1:
                raise DataError(f"{continuation!r} is {len(split)} tokens", why="such a prompt is asked for one")
            found.append(split[0][1])
        ranked = self._embeddings.next_from(self._rows(prompts, suffixes), 1, sorted(set(found)))
        return [Score((text,), tuple(logprobs(row, [text]))) for row, text in zip(ranked, found, strict=True)]

    def top(self, prompts: Sequence[str], k: int, suffixes: Sequence[str] = ()) -> list[Ranked]:
        return self._embeddings.next_from(self._rows(prompts, suffixes), k)

    def _rows(self, prompts: Sequence[str], suffixes: Sequence[str]) -> list[Tensor]:
        rows, endings = self._embeddings.embed(prompts, suffixes), list(suffixes) or [""] * len(prompts)
        return [
            fitted(self._embeddings, one, prompt, ending, limit=self._limit, frame=self._frame)
            for one, prompt, ending in zip(rows, prompts, endings, strict=True)
        ]


def logprobs(ranked: Ranked, tokens: Sequence[str]) -> list[float]:
    """The tokens' log-probabilities; the least one told, for a token that is not told."""
    known = dict(reversed(ranked))  # of tokens with one text, the more probable
    return [known.get(token, ranked[-1][1]) for token in tokens]


def pieces(embeddings: Embeddings, prompt: str, continuation: str) -> tuple[Tensor, list[tuple[int, str]]]:
    """(embeddings of the joined text, its continuation's tokens as (place, text)), from embeddings alone.

    A token is known by what a longer beginning of the text adds to the embeddings of a shorter one. DataError where
    nothing is added.
    """
    beginnings = [prompt + continuation[:end] for end in range(len(continuation) + 1)]
    bare, *longer = embeddings.embed(beginnings)
    if not longer:
        raise DataError("an empty continuation has no score", fix="give a continuation with text")
    whole = longer[-1]
    shared = [_common(rows, whole) for rows in longer]
    first, start = _common(bare, whole), 0
    closing = 0  # tokens that close every text
    if first < len(bare):
        closing = min(_common(rows.flip(0), whole.flip(0)) for rows in (bare, *longer[:-1]))
    found: list[tuple[int, str]] = []
    for place in range(first, len(whole) - closing):
        # A token ends where the longest beginning ends whose tokens are those of the whole up to this place.
        full = [i + 1 for i, rows in enumerate(longer) if len(rows) - closing == place + 1 <= shared[i]]
        last = place + 1 == len(whole) - closing
        end = len(continuation) if last else max((e for e in full if e > start), default=start)
        found.append((place, continuation[start:end]))
        start = end
    if not found:
        raise DataError(f"no token of {continuation!r} is left after {prompt!r}")
    return whole, found


def _common(a: Tensor, b: Tensor) -> int:
    """How many rows at the beginning are equal."""
    least = min(len(a), len(b))
    same = (a[:least] == b[:least]).all(-1)
    return least if bool(same.all()) else int((~same).nonzero()[0, 0])
