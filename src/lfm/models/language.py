"""Text and Logprobs made from any function that gives next-token logits: a checkpoint's, or a program's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, final

from lfm.core.errors import ConfigError, DataError
from lfm.core.heavy import torch
from lfm.core.interfaces import Batch, Codec, Ranked, Said, Score
from lfm.models.beginnings import Alike, alike
from lfm.models.codec import pad, pad_id

if TYPE_CHECKING:
    from torch import Tensor

LogitsFn = Callable[[Batch], "Tensor"]
"""{input_ids, attention_mask} (B, T) → logits (B, T, V)."""

UNKNOWN_LENGTH = 1_000_000
"""Tokenizers that know no limit say so with a huge one."""

BATCH_TOKENS = 4096
"""Tokens a forward pass, padding included: what fits a small machine and keeps a large one busy enough."""


def rows_of(tokenizer: Any, prompts: Sequence[str], max_tokens: int, context: int = 0) -> list[list[int]]:
    """The ids of prompts that a text is asked for. context: the longest input in tokens, 0 where it is not known.

    ConfigError for no tokens to make, or for one text where a list is meant; DataError for a text that is too long.
    """
    if isinstance(prompts, str):
        raise ConfigError("generate takes a list of prompts, not one text", fix="generate([prompt])")
    if max_tokens < 1:
        raise ConfigError(f"max_tokens is {max_tokens}", fix="ask for one token or more")
    rows = begun(tokenizer, prompts)
    longest = max(map(len, rows), default=0)
    if context and longest >= context:
        raise DataError(
            f"a prompt of {longest} tokens leaves no room to answer",
            why=f"the model reads {context} tokens at most",
            fix="shorten the prompt",
        )
    return rows


def begun(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """The prompts' ids. An empty one is the token that texts begin with or, where they begin with none, that ends them:
    what comes next is then a text of the model's own."""
    rows = [list(ids) for ids in tokenizer(list(prompts))["input_ids"]] if prompts else []
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return [row or ([] if first is None else [first]) for row in rows]


def limit_of(tokenizer: Any, context: int) -> int:
    """The longest input in tokens that model and tokenizer both allow; 0 where neither says. context: the model's."""
    known = [n for n in (context, int(tokenizer.model_max_length or 0)) if 0 < n < UNKNOWN_LENGTH]
    return min(known, default=0)


def shorten(ids: Sequence[int], first: int, tokenizer: Any, limit: int) -> tuple[list[int], int]:
    """The ids less what the limit asks of the prompt's beginning (not its opening token), and how many those were."""
    gone = surplus(ids, first, tokenizer, limit)
    return [*ids[: gone.start], *ids[gone.stop :]], len(gone)


def surplus(ids: Sequence[int], first: int, tokenizer: Any, limit: int) -> range:
    """The places of the ids that the limit asks to leave out, before the answer at `first`. DataError where it is too
    long by itself."""
    gone = max(0, len(ids) - limit) if limit else 0
    kept = 1 if ids and ids[0] in tokenizer.all_special_ids else 0
    if gone and gone > first - kept:
        raise DataError(
            f"an answer of {len(ids) - first} tokens does not fit the model's context of {limit}",
            fix="shorten the answer, or use a model with a longer context",
        )
    return range(kept, kept + gone)


def spans(tokenizer: Any, prompts: Sequence[str], continuations: Sequence[str], suffixes: Sequence[str]) -> list[Any]:
    """(ids, first, last) of each joined text: the continuation's tokens are ids[first:last].

    Joined text is tokenised once, so that merges across the boundary are those the model was trained on; a token that
    straddles the boundary belongs to the continuation.
    """
    joined = [p + c + s for p, c, s in zip(prompts, continuations, suffixes, strict=True)]
    encoded = tokenizer(joined, return_offsets_mapping=True)
    found = []
    for row, (prompt, continuation) in enumerate(zip(prompts, continuations, strict=True)):
        start, stop = len(prompt), len(prompt) + len(continuation)
        # A token of white space alone can have no width: some tokenizers trim the space off its offsets.
        inside = [
            place
            for place, (a, b) in enumerate(encoded["offset_mapping"][row])
            if b > start and (a < stop or a == b == stop)
        ]
        if not inside:
            raise DataError(f"no token of {continuation!r} is left after {prompt!r}", fix="give it text")
        found.append((list(encoded["input_ids"][row]), inside[0], inside[-1] + 1))
    return found


def batches(lengths: Sequence[int]) -> list[list[int]]:
    """Indices in batches of at most BATCH_TOKENS tokens, long rows together; the order depends on lengths alone."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    made: list[list[int]] = []
    for index in order:
        if made and (len(made[-1]) + 1) * lengths[made[-1][0]] <= BATCH_TOKENS:
            made[-1].append(index)
        else:
            made.append([index])
    return made


def longest(rows: Sequence[Sequence[int]]) -> tuple[list[Sequence[int]], list[int]]:
    """(rows of which none begins another, for each given row the place of the one that it is, or begins)."""
    kept: list[Sequence[int]] = []
    found = [0] * len(rows)
    for i in sorted(range(len(rows)), key=lambda i: list(rows[i]), reverse=True):
        # all that lies between a row and what it begins begins with it too: the last one that was kept is enough
        if not kept or list(kept[-1][: len(rows[i])]) != list(rows[i]):
            kept.append(rows[i])
        found[i] = len(kept) - 1
    return kept, found


@final
class CausalText:
    """Greedy or sampled text from next-token logits, recomputing the whole prefix (programs have no cache)."""

    def __init__(self, logits: LogitsFn, codec: Codec) -> None:
        self._logits, self._codec = logits, codec

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
        """As generate, with whether each went on when its room for new tokens was at an end."""
        tokenizer = self._codec.tokenizer
        rows = rows_of(tokenizer, prompts, max_tokens)
        _drop_final_eos(tokenizer, rows)
        starts = [len(row) for row in rows]
        going = set(range(len(rows)))
        random = torch.Generator().manual_seed(seed)
        for _ in range(max_tokens):
            if not going:
                break
            for group in batches([len(rows[i]) if i in going else 0 for i in range(len(rows))]):
                live = [i for i in group if i in going]
                if not live:
                    continue
                batch = pad([rows[i] for i in live], pad_id(tokenizer))
                logits = self._logits(batch)
                for place, i in enumerate(live):
                    token = _choose(logits[place, len(rows[i]) - 1], temperature, random)
                    if token == tokenizer.eos_token_id:
                        going.discard(i)
                        continue
                    rows[i].append(token)
                    if stop and any(s in tokenizer.decode(rows[i][starts[i] :]) for s in stop):
                        going.discard(i)
        texts = [cut(continuation(tokenizer, row, start), stop) for row, start in zip(rows, starts, strict=True)]
        return [Said(text, i in going) for i, text in enumerate(texts)]


def _choose(logits: Tensor, temperature: float, random: torch.Generator) -> int:
    if temperature <= 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits.float() / temperature).softmax(-1).cpu(), 1, generator=random))


def _drop_final_eos(tokenizer: Any, rows: list[list[int]]) -> None:
    """A tokenizer that closes every text with its end token would otherwise ask the model to go on after the end."""
    for row in rows:
        if len(row) > 1 and tokenizer.eos_token_id is not None and row[-1] == tokenizer.eos_token_id:
            row.pop()


def continuation(tokenizer: Any, row: Sequence[int], start: int) -> str:
    """What was added after `start`, as text: decoded with the prompt, so that a leading space is kept."""
    before = tokenizer.decode(row[:start], skip_special_tokens=True)
    whole = tokenizer.decode(row, skip_special_tokens=True)
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(row[start:], skip_special_tokens=True)


def cut(text: str, stop: Sequence[str]) -> str:
    """The text up to the first stop string, without it."""
    ends = [place for s in stop if s and (place := text.find(s)) >= 0]
    return text[: min(ends)] if ends else text


@final
class CausalLogprobs:
    """Log-probabilities of continuations under next-token logits. Suffixes are ignored.

    shares: what precedes a token decides its logits, and nothing else does, so that rows which begin another are read
    with it: of many single-token words after a prompt, once. Programs may look at all that they are given. reads_on:
    what reads on from what rows begin with alike (lfm.models.beginnings). context: the model's, in tokens (0: not
    known): of what is longer, the prompt's beginning is left out.
    """

    def __init__(
        self,
        logits: LogitsFn,
        codec: Codec,
        *,
        shares: bool = False,
        reads_on: Callable[[Sequence[int], Sequence[int]], LogitsFn | None] = lambda ids, following: None,
        context: Callable[[], int] = lambda: 0,
    ) -> None:
        self._logits, self._codec, self._shares, self._context = logits, codec, shares, context
        self._reads_on = reads_on

    def score(self, prompts: Sequence[str], continuations: Sequence[str], suffixes: Sequence[str] = ()) -> list[Score]:
        tokenizer = self._codec.tokenizer
        rows = spans(tokenizer, prompts, continuations, [""] * len(prompts))
        limit = limit_of(tokenizer, self._context())
        opening = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        for i, (ids, first, last) in enumerate(rows):
            if first == 0:  # nothing precedes the continuation: condition on the token that opens a text
                if opening is None:
                    raise DataError("an empty prompt cannot be scored", why="the tokenizer has no opening token")
                ids, first, last = [opening, *ids], 1, last + 1
            ids, gone = shorten(ids, first, tokenizer, limit)
            rows[i] = (ids, first - gone, last - gone)
        read = [ids[: last - 1] if self._shares else ids for ids, _, last in rows]
        kept, places = longest(read) if self._shares else (read, list(range(len(read))))
        spoken: dict[int, list[int]] = {}
        for i, place in enumerate(places):
            spoken.setdefault(place, []).append(i)
        values: list[list[float]] = [[]] * len(rows)
        firsts = [min(rows[i][1] for i in spoken[k]) - 1 for k in range(len(kept))]
        for group, begin, logits in self._read(kept, firsts):
            for row, k in enumerate(group):
                told: dict[tuple[int, int], Tensor] = {}
                for i in spoken[k]:
                    ids, first, last = rows[i]
                    if (first, last) not in told:
                        told[first, last] = logits[row, first - 1 - begin : last - 1 - begin].float().log_softmax(-1)
                    wanted = torch.tensor(ids[first:last], device=logits.device)
                    values[i] = told[first, last].gather(1, wanted[:, None])[:, 0].tolist()
        return [
            Score(tuple(tokenizer.convert_ids_to_tokens(ids[first:last])), tuple(each))
            for (ids, first, last), each in zip(rows, values, strict=True)
        ]

    def top(self, prompts: Sequence[str], k: int, suffixes: Sequence[str] = ()) -> list[Ranked]:
        tokenizer = self._codec.tokenizer
        rows = begun(tokenizer, prompts)
        _drop_final_eos(tokenizer, rows)
        limit = limit_of(tokenizer, self._context())
        rows = [shorten(ids, len(ids), tokenizer, limit)[0] for ids in rows]
        found: list[Ranked] = [()] * len(rows)
        for group, begin, logits in self._read(rows, [len(row) - 1 for row in rows]):
            for place, i in enumerate(group):
                found[i] = ranked(tokenizer, logits[place, len(rows[i]) - 1 - begin], k)
        return found

    def _read(self, rows: Sequence[Sequence[int]], asked: Sequence[int]) -> Iterator[tuple[Sequence[int], int, Tensor]]:
        """(rows' places, where their logits begin, those): each row once. asked: its first place that is asked for."""
        fill = pad_id(self._codec.tokenizer)
        apart: list[int] = []
        for length, places in alike(rows, asked) if self._shares else [Alike(0, list(range(len(rows))))]:
            read = self._reads_on(rows[places[0]][:length], rows[places[0]][length:]) if length else None
            if read is None:
                apart += places
                continue
            for group in batches([len(rows[i]) - length for i in places]):
                some = [places[i] for i in group]
                yield some, length, read(pad([rows[i][length:] for i in some], fill))
        for group in batches([len(rows[i]) for i in apart]):
            some = [apart[i] for i in group]
            yield some, 0, self._logits(pad([rows[i] for i in some], fill))


def ranked(tokenizer: Any, logits: Tensor, k: int, also: Sequence[str] = ()) -> Ranked:
    """The k best (token text, log-probability) of one position's logits (V,), and then those of `also` by rank."""
    probabilities = logits.float().log_softmax(-1)
    values, ids = probabilities.topk(min(k, logits.shape[-1]))
    best = [(piece(tokenizer, i), v) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
    known = {text for text, _ in best}
    spelled = ids_by_text(tokenizer, len(logits)) if also else {}
    asked = [text for text in dict.fromkeys(also) if text not in known and text in spelled]
    rest = [(text, max(probabilities[spelled[text]].tolist())) for text in asked]
    return (*best, *sorted(rest, key=lambda pair: -pair[1]))


@lru_cache(maxsize=4)
def ids_by_text(tokenizer: Any, vocabulary: int) -> dict[str, list[int]]:
    """Token text → its ids: one, but for parts of characters, which all read the same."""
    found: dict[str, list[int]] = {}
    for i in range(min(vocabulary, len(tokenizer))):
        found.setdefault(piece(tokenizer, i), []).append(i)
    return found


@lru_cache(maxsize=2**18)
def piece(tokenizer: Any, token: int) -> str:
    """A token's text as it continues other text: with the space it brings, which decoding it alone may strip."""
    text = tokenizer.decode([token])
    return f" {text}" if text[:1] != " " and tokenizer.convert_ids_to_tokens(token).startswith("▁") else text


@final
class MaskedLogprobs:
    """Log-probabilities of what fills the gap between prompt and suffix.

    An object of n tokens fills n masks at once; its score is the sum over them (the multi-token form of LAMA). context:
    as of CausalLogprobs.
    """

    def __init__(self, logits: LogitsFn, codec: Codec, *, context: Callable[[], int] = lambda: 0) -> None:
        self._logits, self._codec, self._context = logits, codec, context

    def score(self, prompts: Sequence[str], continuations: Sequence[str], suffixes: Sequence[str] = ()) -> list[Score]:
        tokenizer = self._codec.tokenizer
        rows = spans(tokenizer, prompts, continuations, list(suffixes) or [""] * len(prompts))
        limit = limit_of(tokenizer, self._context())
        for i, (ids, first, last) in enumerate(rows):
            ids, gone = shorten(ids, first, tokenizer, limit)
            rows[i] = (ids, first - gone, last - gone)
        masked = [(*ids[:first], *[tokenizer.mask_token_id] * (last - first), *ids[last:]) for ids, first, last in rows]
        spoken: dict[tuple[int, ...], list[int]] = {}  # words of one length leave the same text around the same gap
        for i, ids in enumerate(masked):
            spoken.setdefault(ids, []).append(i)
        kept = list(spoken)
        values: list[list[float]] = [[]] * len(rows)
        for group in batches([len(ids) for ids in kept]):
            logits = self._logits(pad([list(kept[k]) for k in group], pad_id(tokenizer)))
            for row, k in enumerate(group):
                told: dict[tuple[int, int], Tensor] = {}
                for i in spoken[kept[k]]:
                    ids, first, last = rows[i]
                    if (first, last) not in told:
                        told[first, last] = logits[row, first:last].float().log_softmax(-1)
                    wanted = torch.tensor(ids[first:last], device=logits.device)
                    values[i] = told[first, last].gather(1, wanted[:, None])[:, 0].tolist()
        return [
            Score(tuple(tokenizer.convert_ids_to_tokens(ids[first:last])), tuple(each))
            for (ids, first, last), each in zip(rows, values, strict=True)
        ]

    def top(self, prompts: Sequence[str], k: int, suffixes: Sequence[str] = ()) -> list[Ranked]:
        tokenizer = self._codec.tokenizer
        endings = list(suffixes) or [""] * len(prompts)
        joined = [f"{p.rstrip()} {tokenizer.mask_token}{s}" for p, s in zip(prompts, endings, strict=True)]
        limit, mask = limit_of(tokenizer, self._context()), tokenizer.mask_token_id
        rows = [shorten(ids, list(ids).index(mask), tokenizer, limit)[0] for ids in tokenizer(joined)["input_ids"]]
        found: list[Ranked] = [()] * len(rows)
        for group in batches([len(row) for row in rows]):
            logits = self._logits(pad([rows[i] for i in group], pad_id(tokenizer)))
            for place, i in enumerate(group):
                found[i] = ranked(tokenizer, logits[place, rows[i].index(mask)], k)
        return found


@final
class Seq2SeqLogprobs:
    """Log-probabilities of what a decoder writes after an encoder has read the prompt. context: of CausalLogprobs."""

    def __init__(self, logits: LogitsFn, codec: Codec, start: int, *, context: Callable[[], int] = lambda: 0) -> None:
        self._logits, self._codec, self._start, self._context = logits, codec, start, context

    def _sources(self, prompts: Sequence[str]) -> list[list[int]]:
        tokenizer = self._codec.tokenizer
        limit = limit_of(tokenizer, self._context())
        return [shorten(ids, len(ids), tokenizer, limit)[0] for ids in tokenizer(list(prompts))["input_ids"]]

    def score(self, prompts: Sequence[str], continuations: Sequence[str], suffixes: Sequence[str] = ()) -> list[Score]:
        tokenizer = self._codec.tokenizer
        sources = self._sources(prompts)
        targets = tokenizer([c.strip() for c in continuations], add_special_tokens=False)["input_ids"]
        scores: list[Score | None] = [None] * len(sources)
        for group in batches([len(s) + len(t) for s, t in zip(sources, targets, strict=True)]):
            logits = self._decode([sources[i] for i in group], [[self._start, *targets[i]] for i in group])
            for place, i in enumerate(group):
                wanted = torch.tensor(targets[i], device=logits.device)
                probabilities = logits[place, : len(targets[i])].float().log_softmax(-1)
                values = probabilities.gather(1, wanted[:, None])[:, 0].tolist()
                scores[i] = Score(tuple(tokenizer.convert_ids_to_tokens(targets[i])), tuple(values))
        return [score for score in scores if score is not None]

    def top(self, prompts: Sequence[str], k: int, suffixes: Sequence[str] = ()) -> list[Ranked]:
        sources = self._sources(prompts)
        logits = self._decode(sources, [[self._start]] * len(sources))
        return [ranked(self._codec.tokenizer, row[0], k) for row in logits]

    def _decode(self, sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> Tensor:
        fill = pad_id(self._codec.tokenizer)
        return self._logits({**pad(sources, fill), "decoder_input_ids": pad(targets, fill)["input_ids"]})
