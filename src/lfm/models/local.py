"""The interfaces that a module in this process gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any, final

from lfm.core.heavy import torch
from lfm.core.interfaces import Batch, Codec, Embeddings, Features, Injection, Logits, Logprobs, Said, Text, Vectors
from lfm.models import structure, virtual
from lfm.models.beginnings import reading_on
from lfm.models.codec import pad, pad_id
from lfm.models.device import device, forward
from lfm.models.headless import Headless, headless
from lfm.models.language import (
    BATCH_TOKENS,
    CausalLogprobs,
    MaskedLogprobs,
    Seq2SeqLogprobs,
    batches,
    continuation,
    cut,
    rows_of,
)
from lfm.models.quiet import quiet
from lfm.models.soft import LocalEmbeddings, LocalInjection, Reader
from lfm.models.vectors import LocalVectors

if TYPE_CHECKING:
    from torch import Tensor, nn


@final
class LocalLogits:
    """A forward pass without gradients."""

    def __init__(self, module: Callable[[], nn.Module]) -> None:
        self._module = module

    def logits(self, batch: Batch) -> Tensor:
        with torch.no_grad():  # not inference mode: a distiller's loss may take these logits
            return forward(self._module(), batch)

    def behind(self, batch: Batch) -> Callable[[Batch], Headless] | None:
        """A language model's last hidden states and head in place of logits, found out on a batch; None where they are
        not all that its logits are made of."""
        body = headless(self._module(), batch)
        if body is None:
            return None

        def states(batch: Batch) -> Headless:
            with torch.no_grad():
                return body(self._module(), batch)

        return states


@final
class LocalFeatures:
    """Activations by forward hooks."""

    def __init__(self, module: Callable[[], nn.Module]) -> None:
        self._module = module

    def features(self, batch: Batch, sites: Sequence[tuple[str, int]]) -> list[Tensor]:
        module = self._module()
        with torch.no_grad(), structure.watch(module, list(sites)) as seen:
            forward(module, batch)
        return [tensor.float() for tensor in seen]


@final
class LocalText:
    """Text by transformers' own generation, with its cache of keys and values."""

    def __init__(self, module: Callable[[], nn.Module], codec: Codec) -> None:
        self._module, self._codec = module, codec

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
        module: Any = self._module()
        tokenizer = self._codec.tokenizer
        encoder_decoder = bool(module.config.is_encoder_decoder)
        context = 0 if encoder_decoder else getattr(module.config, "max_position_embeddings", None) or 0
        context = context and context - virtual.room(module)
        rows = rows_of(tokenizer, prompts, max_tokens, context)
        texts = [Said("")] * len(rows)
        for group in batches([len(row) + max_tokens for row in rows]):
            # Rows of one length together: padding on the left would change positions in models that count them from 0.
            for length in sorted({len(rows[i]) for i in group}):
                same = [i for i in group if len(rows[i]) == length]
                room = min(max_tokens, context - length) if context else max_tokens
                made = self._generate(module, [rows[i] for i in same], room, temperature, _own(seed, same[0]))
                for i, (row, ended) in zip(same, made, strict=True):
                    if encoder_decoder:
                        whole = tokenizer.decode(row, skip_special_tokens=True)
                    else:
                        whole = continuation(tokenizer, row, length)
                    text = cut(whole, stop)
                    texts[i] = Said(text, not ended and text == whole)
        return texts

    def _generate(
        self, module: Any, rows: list[list[int]], new: int, temperature: float, seed: int
    ) -> list[tuple[list[int], bool]]:
        """Each row with what comes after it, and whether the model ended it."""
        tokenizer = self._codec.tokenizer
        if not module.config.is_encoder_decoder and len(rows[0]) > 1 and rows[0][-1] == tokenizer.eos_token_id:
            rows = [row[:-1] for row in rows]
        batch = {k: v.to(module.device) for k, v in pad(rows, pad_id(tokenizer)).items()}
        how: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            how = {"do_sample": True, "temperature": temperature, "top_k": 0}
        # peft tells each time that it counts positions itself
        hushed = quiet() if virtual.room(module) else nullcontext()
        with torch.inference_mode(), torch.random.fork_rng(), hushed:
            torch.manual_seed(seed)
            out = module.generate(
                **batch,
                max_new_tokens=new,
                pad_token_id=pad_id(tokenizer),
                eos_token_id=tokenizer.eos_token_id,
                **how,
            )
        return [_until(row, tokenizer.eos_token_id, len(rows[0])) for row in out.tolist()]


def _own(seed: int, first: int) -> int:
    """The seed of a batch by its first prompt's place: two batches of one request must not say the same."""
    return (seed + first * 0x9E3779B97F4A7C15) % 2**63


def _until(row: list[int], end: int | None, start: int) -> tuple[list[int], bool]:
    if end is None or end not in row[start:]:
        return row, False
    return row[: row.index(end, start)], True


def interfaces(
    task: str, module: Callable[[], nn.Module], codec: Callable[[], Codec] | None
) -> Mapping[type, Callable[[], Any]]:
    """What a module of this task gives besides its weights and gradients; each opens the module when first asked."""

    @cache
    def shared() -> Any:
        opened = module().to(device()).eval()
        for parameter in opened.parameters():
            parameter.requires_grad_(False)
        return opened

    logits = LocalLogits(shared)
    gives: dict[type, Callable[[], Any]] = {}
    if task != "encoder":
        gives[Logits] = lambda: logits
    gives[Features] = lambda: LocalFeatures(shared)
    if codec is None:
        return gives

    @cache
    def reader() -> Reader:
        return Reader(shared(), codec(), task)

    def context() -> int:
        config = shared().config
        return max(0, (getattr(config, "max_position_embeddings", None) or 0) - virtual.room(shared()))

    if task in ("causal-lm", "masked-lm", "text-classification", "encoder"):
        gives[Vectors] = lambda: LocalVectors(codec, LocalFeatures(shared), context)
    if task in ("causal-lm", "masked-lm", "seq2seq-lm"):
        gives[Embeddings] = lambda: LocalEmbeddings(reader)
        gives[Injection] = lambda: LocalInjection(reader)
    if task == "causal-lm":
        gives[Text] = lambda: LocalText(shared, codec())
        gives[Logprobs] = lambda: CausalLogprobs(
            logits.logits, codec(), shares=True, reads_on=reading_on(shared), context=context
        )
    elif task == "masked-lm":
        gives[Logprobs] = lambda: MaskedLogprobs(logits.logits, codec(), context=context)
    elif task == "seq2seq-lm":
        gives[Text] = lambda: LocalText(shared, codec())
        gives[Logprobs] = lambda: Seq2SeqLogprobs(
            logits.logits, codec(), shared().config.decoder_start_token_id, context=context
        )
    return gives


__all__ = ["BATCH_TOKENS", "interfaces"]
