"""Soft prompts before many texts at once, through a module in this process, and nothing computed twice.

A causal model reads each prompt once; its keys and values then stand before all texts. Where that gives other answers
than reading both together (it is tried first), and in models that see both ways, prompts and texts are read together.
Logits are made at the place of the answer only, and of the tokens that are asked for only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol, final, runtime_checkable

from lfm.core.errors import AccessError, DataError
from lfm.core.heavy import F, nn, torch
from lfm.core.interfaces import Codec, Embeddings, Ranked
from lfm.models import structure
from lfm.models.language import ids_by_text, limit_of, ranked
from lfm.models.virtual import room

if TYPE_CHECKING:
    from torch import Tensor

TOKENS = 8192
"""Tokens a forward pass, padding included."""

WASTE = 1.15
"""How much longer than its shortest the longest text of a batch may be."""

ROUNDS, BEYOND = 5, 3.0
"""How often hidden states are clipped, to how many standard deviations, before theirs is taken."""


@runtime_checkable
class ManyPrompts(Embeddings, Protocol):
    """Embeddings that put many prompts before the same texts in one go."""

    def joined(self, prompt: Tensor, rows: Tensor) -> Tensor:
        """The text's rows with the prompt where prompts stand: first of all, or after what opens a masked text."""
        ...

    def spells(self, tokens: Sequence[str]) -> bool:
        """Whether each of the texts is one token's."""
        ...

    def told(self, prompts: Tensor, embeds: Sequence[Tensor], tokens: Sequence[str]) -> Tensor:
        """(prompts, texts, tokens) log-probabilities, up to a constant for each text, after prompts (c, t, d)."""
        ...


@final
class LocalEmbeddings:
    """A language model fed with input embeddings. A masked one answers at its mask, the last one of the rows."""

    def __init__(self, reader: Callable[[], Reader]) -> None:
        self._reader = reader

    def table(self) -> Tensor:
        return self._reader().table

    def embed(self, texts: Sequence[str], suffixes: Sequence[str] = ()) -> list[Tensor]:
        return self._reader().embed(texts, suffixes)

    def next_from(self, embeds: Sequence[Tensor], k: int, also: Sequence[str] = ()) -> list[Ranked]:
        return self._reader().ranked(embeds[0].new_zeros(1, 0, embeds[0].shape[1]), embeds, k, also) if embeds else []

    def joined(self, prompt: Tensor, rows: Tensor) -> Tensor:
        start = self._reader().opening
        return torch.cat([rows[:start], prompt, rows[start:]])

    def spells(self, tokens: Sequence[str]) -> bool:
        return self._reader().spells(tokens)

    def told(self, prompts: Tensor, embeds: Sequence[Tensor], tokens: Sequence[str]) -> Tensor:
        return self._reader().told(prompts[:, None], embeds, tokens)


@final
class LocalInjection:
    """A prompt at every block, by hooks."""

    def __init__(self, reader: Callable[[], Reader]) -> None:
        self._reader = reader

    def spread(self, prompt: Tensor, embeds: Sequence[Tensor]) -> tuple[float, ...]:
        return self._reader().spread(prompt, embeds)

    def told(self, prompts: Tensor, embeds: Sequence[Tensor], tokens: Sequence[str]) -> Tensor:
        return self._reader().told(prompts, embeds, tokens)

    def next_from(self, prompt: Tensor, embeds: Sequence[Tensor], k: int, also: Sequence[str] = ()) -> list[Ranked]:
        return self._reader().ranked(prompt, embeds, k, also) if embeds else []

    def prefix(self, prompt: Tensor) -> list[tuple[Tensor, Tensor]]:
        reader = self._reader()
        if not reader.causal:
            raise AccessError("only a causal model reads a prompt before its text, as keys and values")
        return [(k[0].float().cpu(), v[0].float().cpu()) for k, v in reader.prefix(prompt[None])]


@final
class Reader:
    """An opened module, its vocabulary, and where answers stand in what it reads."""

    def __init__(self, module: Any, codec: Codec, task: str) -> None:
        self.module, self.tokenizer = module, codec.tokenizer
        embedder = module.get_input_embeddings()
        with torch.no_grad():
            rows = torch.arange(embedder.weight.shape[0], device=embedder.weight.device)
            self.table: Tensor = embedder(rows).detach().float().cpu()  # some scale their rows as they are read
        self.causal, self.decodes = task == "causal-lm", task == "seq2seq-lm"
        self.mask = int(self.tokenizer.mask_token_id) if task == "masked-lm" else None
        self.opening = 0
        if self.mask is not None:
            self.opening = list(self.tokenizer(self.tokenizer.mask_token)["input_ids"]).index(self.mask)
        self.whole = room(module) > 0  # a prompt of peft's own stands before all that is read
        self._shares: dict[bool, bool] = {}

    def embed(self, texts: Sequence[str], suffixes: Sequence[str]) -> list[Tensor]:
        if self.mask is not None:
            mask, endings = self.tokenizer.mask_token, list(suffixes) or [""] * len(texts)
            texts = [f"{text.rstrip()} {mask}{end}".lstrip() for text, end in zip(texts, endings, strict=True)]
        return [self.table[torch.tensor(ids, dtype=torch.long)] for ids in self.tokenizer(list(texts))["input_ids"]]

    def spells(self, tokens: Sequence[str]) -> bool:
        return all(self._ids(token) for token in tokens)

    def _ids(self, token: str) -> list[int]:
        known = ids_by_text(self.tokenizer, len(self.table))
        return known.get(token) or known.get(token.strip()) or []

    def told(self, prompts: Tensor, embeds: Sequence[Tensor], tokens: Sequence[str]) -> Tensor:
        each = [self._ids(token) for token in tokens]
        logits = self.logits(prompts, embeds, [i for ids in each for i in ids])
        return torch.stack([part.amax(-1) for part in logits.split([len(ids) for ids in each], -1)], -1)

    def ranked(self, prompt: Tensor, embeds: Sequence[Tensor], k: int, also: Sequence[str]) -> list[Ranked]:
        known = ids_by_text(self.tokenizer, len(self.table))
        own = {text.strip(): text for text in also if text not in known}  # a token whose text has no space of its own
        read = [text if text in known else text.strip() for text in also]
        rows = self.logits(prompt[None], embeds, None)[0]
        found = [ranked(self.tokenizer, row, k, read) for row in rows]
        return [tuple((own.get(text, text), value) for text, value in row) for row in found]

    def logits(self, prompts: Tensor, embeds: Sequence[Tensor], ids: list[int] | None) -> Tensor:
        """(prompts, texts, ids or the vocabulary) after prompts (c, 1 or blocks, t, d); fp32, on the CPU."""
        embeds = [rows.float() for rows in embeds]
        self._fits(max(map(len, embeds)), prompts.shape[2])
        begun = self.prefix(prompts) if prompts.shape[2] and self._may_share(prompts, embeds) else None
        width = len(self.table) if ids is None else len(ids)
        out: Tensor | None = None
        for group in _alike([len(rows) for rows in embeds]):
            longest = max(len(embeds[i]) for i in group) + (0 if begun else prompts.shape[2])
            most = max(1, TOKENS // (longest * len(group)))
            for start in range(0, len(prompts), most):
                some = slice(start, start + most)
                held = [(k[some], v[some]) for k, v in begun] if begun else None
                told = self._answers(prompts[some], [embeds[i] for i in group], ids, held)
                if out is None:
                    out = torch.empty(len(prompts), len(embeds), told.shape[-1] if ids is None else width)
                out[some, group] = told.float().cpu()
        assert out is not None
        return out

    def _fits(self, longest: int, depth: int) -> None:
        """DataError where the longest text and the prompt are more than the model reads."""
        context = limit_of(self.tokenizer, getattr(self.module.config, "max_position_embeddings", None) or 0)
        if context and longest + depth > context:
            raise DataError(
                f"a text of {longest} tokens is too long" + (f" after a prompt of {depth}" if depth else ""),
                why=f"the model reads {context} tokens at most",
                fix="shorten the text, or the prompt: prompt_tokens",
            )

    def _may_share(self, prompts: Tensor, embeds: Sequence[Tensor]) -> bool:
        """Whether a prompt read by itself says what it says read with a text: tried once, on the shortest."""
        deep = prompts.shape[1] > 1
        if not self.causal or self.whole:
            return False
        if deep not in self._shares:
            one, text = prompts[:1], [min(embeds, key=len)]
            try:
                both = self._answers(one, text, None, self.prefix(one))
                plain = self._answers(one, text, None, None)
                self._shares[deep] = bool((both - plain).abs().max() <= 1e-3 * plain.abs().max())
            except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
                self._shares[deep] = False  # its cache is of another kind than keys and values a token
        return self._shares[deep]

    def prefix(self, prompts: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Each block's keys and values (c, heads, t, size) of prompts read by themselves."""
        inner = _base(self.module)
        most = max(1, TOKENS // max(prompts.shape[2], 1))
        found: list[list[tuple[Tensor, Tensor]]] = []
        for some in prompts.split(most):
            first = some[:, 0].to(self.module.device, self.module.dtype)
            seen = torch.ones(first.shape[:2], dtype=torch.long, device=first.device)
            with torch.inference_mode(), self._injected(some, 1, 0):
                cache = inner(inputs_embeds=first, attention_mask=seen, use_cache=True).past_key_values
            found.append([(layer.keys, layer.values) for layer in cache.layers])
        return [(torch.cat([k for k, _ in each]), torch.cat([v for _, v in each])) for each in zip(*found, strict=True)]

    def _answers(self, prompts: Tensor, embeds: Sequence[Tensor], ids: list[int] | None, begun: Any) -> Tensor:
        """(c, n, V) of one batch. begun: the prompts as keys and values; else they are read with the texts."""
        from transformers.cache_utils import DynamicCache

        count, n = len(prompts), len(embeds)
        start, depth = self.opening, prompts.shape[2]
        gap = embeds[0].new_zeros(0 if begun else depth, embeds[0].shape[1])
        texts = [torch.cat([rows[:start], gap, rows[start:]]) for rows in embeds]
        batch = nn.utils.rnn.pad_sequence(texts, batch_first=True)
        seen = torch.zeros(batch.shape[:2], dtype=torch.long)
        for row, text in zip(seen, texts, strict=True):
            row[: len(text)] = 1
        places = torch.tensor([self._place(text, len(text)) for text in texts])
        batch = batch.expand(count, *batch.shape).clone()
        given: dict[str, Any] = {}
        if begun:
            cache = DynamicCache()
            for layer, (k, v) in enumerate(begun):
                cache.update(k.repeat_interleave(n, 0), v.repeat_interleave(n, 0), layer)
            given["past_key_values"] = cache
            seen = torch.cat([seen.new_ones(n, depth), seen], 1)
        else:
            batch[:, :, start : start + depth] = prompts[:, :1]
        where, kind = self.module.device, self.module.dtype
        if self.decodes:
            opening = self.module.config.decoder_start_token_id
            given["decoder_input_ids"] = torch.full((count * n, 1), opening, device=where)
        else:
            given["use_cache"] = bool(begun)
        rows, places = torch.arange(count * n), places.repeat(count)
        with torch.inference_mode(), ExitStack() as held:
            if not begun:
                held.enter_context(self._injected(prompts, n, start))
            if not self.whole:
                held.enter_context(_answering(self.module, rows, places, ids))
            logits = self.module(
                inputs_embeds=batch.flatten(0, 1).to(where, kind),
                attention_mask=seen.repeat(count, 1).to(where),
                **given,
            ).logits
        if logits.shape[1] != 1:
            logits = logits[rows, places.to(logits.device)][:, None]
        logits = logits[:, 0]
        if ids is not None and logits.shape[-1] != len(ids):
            logits = logits[:, ids]
        return logits.reshape(count, n, -1)

    def _place(self, rows: Tensor, length: int) -> int:
        """Where the answer stands."""
        if self.decodes:
            return 0
        if self.mask is None:
            return length - 1
        at = (rows == self.table[self.mask]).all(-1).nonzero()[:, 0]
        if not len(at):
            raise DataError("the rows of a text hold no mask", fix="make them by `embed`, which puts one in")
        return int(at[-1])

    @contextmanager
    def _injected(self, prompts: Tensor, n: int, start: int) -> Iterator[None]:
        """Within: each block but the first reads what it reads plus its prompt; n texts a prompt, in turn."""
        count, blocks, depth, _ = prompts.shape

        def adds(prompt: Tensor) -> Callable[..., Any]:
            def add(_: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
                hidden = args[0] if args else given["hidden_states"]
                more = hidden.reshape(count, n, *hidden.shape[1:]).clone()
                more[:, :, start : start + depth] += prompt[:, None].to(hidden)
                more = more.reshape(hidden.shape)
                return ((more, *args[1:]), given) if args else (args, {**given, "hidden_states": more})

            return add

        with ExitStack() as held:
            for place, name in enumerate(self.blocks[1:blocks], 1):
                block = self.module.get_submodule(name)
                held.callback(block.register_forward_pre_hook(adds(prompts[:, place]), with_kwargs=True).remove)
            yield

    @property
    def blocks(self) -> list[str]:
        """Those that the text passes: an encoder's, where there is one."""
        return structure.stacks(self.module)[0]

    def spread(self, prompt: Tensor, embeds: Sequence[Tensor]) -> tuple[float, ...]:
        seen: list[list[Tensor]] = [[] for _ in self.blocks[1:]]
        lengths: list[int] = []

        def watch(into: list[Tensor]) -> Callable[..., None]:
            def keep(_: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
                hidden = args[0] if args else given["hidden_states"]
                into.extend(row[:length].float().cpu() for row, length in zip(hidden, lengths, strict=True))

            return keep

        with ExitStack() as held:
            for name, into in zip(self.blocks[1:], seen, strict=True):
                block = self.module.get_submodule(name)
                held.callback(block.register_forward_pre_hook(watch(into), with_kwargs=True).remove)
            for group in _alike([len(rows) for rows in embeds]):
                lengths[:] = [len(embeds[i]) + len(prompt) for i in group]
                self._answers(prompt[None, None], [embeds[i].float() for i in group], [0], None)
        return tuple(_clipped(torch.cat(rows)) for rows in seen)


def _clipped(hidden: Tensor) -> float:
    """The standard deviation of what is left of outliers that are clipped again and again (as BBTv2's code does)."""
    for _ in range(ROUNDS):
        mean, std = hidden.mean(), hidden.std(correction=0)
        hidden = hidden.clamp(mean - BEYOND * std, mean + BEYOND * std)
    return float(hidden.std(correction=0))


def _alike(lengths: Sequence[int]) -> list[list[int]]:
    """Places in batches of nearly one length, the longest first."""
    made: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        longest = lengths[made[-1][0]] if made else 0
        if made and longest <= WASTE * lengths[i] and (len(made[-1]) + 1) * longest <= TOKENS:
            made[-1].append(i)
        else:
            made.append([i])
    return made


def _base(module: Any) -> Any:
    inner = module.get_base_model() if hasattr(module, "get_base_model") else module
    return getattr(inner, "base_model", inner)


@contextmanager
def _answering(module: Any, rows: Tensor, places: Tensor, ids: list[int] | None) -> Iterator[None]:
    """Within: what follows the blocks reads the places of the answers alone, and makes logits of these ids alone."""
    inner = module.get_base_model() if hasattr(module, "get_base_model") else module
    base, head = _base(module), inner.get_output_embeddings()
    with ExitStack() as held:
        if base is not inner:

            def only(_: Any, __: Any, out: Any) -> Any:
                hidden = out.last_hidden_state
                if hidden.shape[1] != 1:
                    out.last_hidden_state = hidden[rows.to(hidden.device), places.to(hidden.device)][:, None]
                return out

            held.callback(base.register_forward_hook(only).remove)
        if ids is not None and type(head) is nn.Linear and "forward" not in vars(head):
            weight, bias = head.weight[ids], None if head.bias is None else head.bias[ids]
            head.forward = lambda hidden: F.linear(hidden, weight, bias)  # type: ignore[method-assign]
            held.callback(lambda: delattr(head, "forward"))
        yield
