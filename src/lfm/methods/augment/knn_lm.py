"""Give a frozen language model a datastore of text: what followed in similar contexts is mixed into its next token.

    p(y | x) = λ p_kNN(y | x) + (1 − λ) p_LM(y | x),    p_kNN(y | x) ∝ Σ_{(kᵢ, vᵢ) ∈ N} [vᵢ = y] exp(−‖f(x) − kᵢ‖² / T)

Paper: kNN-LM, arXiv 1911.00172. f(x) is the input of the last feed-forward layer, N the k nearest of all (context, next
token) pairs of the text. With `cache`, the earlier positions of the text being read are neighbours too, with a weight
of their own: the continuous cache of 1612.04426, whose exp(θ h·h') is this kernel with θ = 2/T for keys of one norm.
What differs: T is in units of the keys' mean squared distance to their mean, since a small model's keys are of another
size than the paper's; search is exact; λ and T can be chosen on the last tenth of the text (`weight=null`).

Model: a causal language model. Text: any amount; a key of `width` fp16 numbers is kept for each token, so that the
datastore takes 2·width + 4 bytes a token, on disk and in memory. The result is a program over the model, whose weights
stay as they are. Errors: MismatchError for a model that is no causal language model; DataError for text of fewer than
two tokens, or too little to choose on; ModelError for keys that fp16 cannot hold.

    lfm run augment.knn_lm model=model text=text.jsonl --set k=64 --out with-text
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, final

import msgspec

import lfm.core
from lfm.core import (
    Codec,
    Cost,
    Data,
    DataSlot,
    Features,
    Inputs,
    Logits,
    Logprobs,
    Meta,
    Method,
    Model,
    Parts,
    Run,
    Sizes,
    Slot,
    Text,
)
from lfm.core.errors import ConfigError, DataError, MismatchError, ModelError
from lfm.core.heavy import torch
from lfm.core.interfaces import Batch
from lfm.models.codec import pad, pad_id
from lfm.models.language import CausalLogprobs, CausalText, batches
from lfm.models.program import program
from lfm.retrieval.index import nearest

if TYPE_CHECKING:
    from torch import Tensor

SITE = ("ffn_in", -1)
CONTEXT = 512
"""Tokens of a stretch of text where the model tells no context length."""

NEVER = -1e4
"""Log-probability of what no part of the mixture allows: zero in any precision, and yet a number."""

WEIGHTS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
TEMPERATURES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""What is tried where a setting is left open."""


class Config(lfm.core.Config, frozen=True):
    k: Annotated[int, Meta(ge=1, description="neighbours")] = 1024
    weight: Annotated[
        Annotated[float, Meta(ge=0, le=1)] | None,
        Meta(description="λ, of the neighbours; null: chosen on the last tenth of the text"),
    ] = 0.25
    temperature: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(description="T, in units of the keys' mean squared spread; null: chosen likewise"),
    ] = 0.05
    cache: Annotated[int, Meta(ge=0, description="earlier tokens of the same text that are neighbours too")] = 0
    cache_weight: Annotated[float, Meta(ge=0, le=1, description="the cache's weight, beside λ")] = 0.1


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    model = inputs.model("model")
    rows = stretches(model, [record.text for record in inputs.records("text")])
    kept = run.step("datastore", lambda: store(model, rows, run))
    spread = spread_of(kept["keys"])
    if config.weight is None or config.temperature is None:
        config = choose(config, model, rows, kept, spread, run)
    run.note(entries=len(kept["values"]), spread=spread, weight=config.weight, temperature=config.temperature)  # type: ignore[arg-type]
    return program("augment.knn_lm", config, Parts({"model": (model,)}, kept, {"spread": spread}), open)


def stretches(model: Model, texts: Sequence[str]) -> list[tuple[list[int], int]]:
    """(token ids, first position that counts): the texts cut at the model's context, half of each cut shared.

    So every token but a text's first is stored once, and with at least half a context before it where there is one.
    """
    limit = model.facts.context or CONTEXT
    rows: list[tuple[list[int], int]] = []
    for ids in model.ask(Codec).tokenizer(list(texts), verbose=False)["input_ids"]:
        starts = range(0, max(1, len(ids) - limit // 2), limit // 2)
        rows += [(ids[at : at + limit], limit - limit // 2 - 1 if at else 0) for at in starts]
    rows = [(ids, first) for ids, first in rows if len(ids) > first + 1]
    if not rows:
        raise DataError("the text has fewer than two tokens", fix="give text for the model to learn from")
    return rows


def store(model: Model, rows: Sequence[tuple[list[int], int]], run: Run) -> dict[str, Tensor]:
    """keys (N, width) fp16 and values (N,) int32: each position's feature, and the token that follows it."""
    features, fill = model.ask(Features), pad_id(model.ask(Codec).tokenizer)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for group in run.track(batches([len(ids) for ids, _ in rows]), "reading the text"):
        (seen,) = features.features(pad([rows[i][0] for i in group], fill), [SITE])
        for place, i in enumerate(group):
            ids, first = rows[i]
            keys = seen[place, first : len(ids) - 1].to("cpu", torch.float16)
            found[i] = keys, torch.tensor(ids[first + 1 :], dtype=torch.int32)
    keys, values = (torch.cat(parts) for parts in zip(*(found[i] for i in range(len(rows))), strict=True))
    if not keys.isfinite().all():
        raise ModelError("the model's keys leave the range of fp16", why=f"some of block {SITE[1]}'s inputs pass 65504")
    return {"keys": keys, "values": values}


def spread_of(keys: Tensor) -> float:
    """Mean squared distance of keys to their mean, fp32 and never 0; a part at a time."""
    mean = sum(part.double().sum(0) for part in keys.split(1 << 16)) / len(keys)
    return max(float(sum((part.double() - mean).square().sum() for part in keys.split(1 << 16)) / len(keys)), 1e-12)


def choose(
    config: Config,
    model: Model,
    rows: Sequence[tuple[list[int], int]],
    kept: Mapping[str, Tensor],
    spread: float,
    run: Run,
) -> Config:
    """The weight and temperature, of those left open, under which the last tenth of the text is likeliest.

    Its neighbours are sought among the rest. Text that repeats itself calls for more weight than new text does.
    """
    held = max(1, len(rows) // 10)
    if len(rows) <= held:
        raise DataError(
            "there is too little text to choose on", fix="give several texts, or set weight and temperature"
        )
    cut = sum(len(ids) - 1 - first for ids, first in rows[:-held])

    def measure() -> list[float]:
        distances, found = nearest(kept["keys"][cut:], kept["keys"][:cut], config.k)
        right = kept["values"][found] == kept["values"][cut:, None]
        own = torch.cat([_own(model, ids, first) for ids, first in rows[-held:]])
        best = (float("inf"), 0.0, 0.0)
        for temperature in TEMPERATURES if config.temperature is None else (config.temperature,):
            near = ((-distances / (temperature * spread)).softmax(1) * right).sum(1)
            for weight in WEIGHTS if config.weight is None else (config.weight,):
                loss = -(weight * near + (1 - weight) * own.exp()).clamp(min=1e-30).log().mean().item()
                best = min(best, (loss, weight, temperature))
        return list(best)

    loss, weight, temperature = run.step("choice", measure)
    run.note(chosen_at_nll=loss)
    return msgspec.structs.replace(config, weight=weight, temperature=temperature)


def _own(model: Model, ids: list[int], first: int) -> Tensor:
    """(t,) the model's log-probability of each stored token of a stretch."""
    logits = model.ask(Logits).logits(pad([ids], 0))[0, first:-1].cpu()
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[first + 1 :])[:, None])[:, 0]


@final
class Mixed:
    """Logits whose softmax is the mixture, fp32: the model's own where no weight is elsewhere, else log p."""

    def __init__(self, config: Config, parts: Parts) -> None:
        self._config, self._parts = config, parts
        assert config.weight is not None and config.temperature is not None
        self._weight, self._scale = config.weight, config.temperature * float(parts.state["spread"])
        self._aside = config.cache_weight if config.cache else 0.0

    def logits(self, batch: Batch, *, last: bool = False) -> Tensor:
        """(B, T, V). last: mixed at each row's last position only, which is all that generation reads."""
        logits = self._parts.model("model").ask(Logits).logits(batch)
        if not self._weight and not self._aside:
            return logits
        (seen,) = self._parts.model("model").ask(Features).features(batch, [SITE])
        ids = batch["input_ids"].cpu()
        mask = (batch["attention_mask"] if "attention_mask" in batch else torch.ones_like(ids)).bool().cpu()
        wanted = mask & (mask.flip(1).cumsum(1).flip(1) == 1) if last else mask
        keys, own = seen.cpu().float(), logits.cpu()[wanted].log_softmax(-1)
        parts = [(own, torch.full((len(own),), 1 - self._weight - self._aside))]
        if self._weight:
            parts.append((self._stored(keys[wanted], own.shape[1]), torch.full((len(own),), self._weight)))
        if self._aside:
            earlier, some = self._earlier(keys, ids, wanted, own.shape[1])
            parts.append((earlier, self._aside * some))
            parts[0] = (own, parts[0][1] + self._aside * ~some)  # nothing precedes a text's first token
        mixed = torch.logsumexp(torch.stack([told + share.log()[:, None] for told, share in parts]), 0)
        out = logits.log_softmax(-1)
        out[wanted.to(out.device)] = mixed.clamp(min=NEVER).to(out.device)
        return out

    def _stored(self, keys: Tensor, vocabulary: int) -> Tensor:
        """(n, V) log p_kNN."""
        distances, found = nearest(keys, self._parts.tensors["keys"], self._config.k)
        values = self._parts.tensors["values"][found].long()
        near = torch.zeros(len(keys), vocabulary)
        return near.scatter_add_(1, values, (-distances / self._scale).softmax(1)).log()

    def _earlier(self, keys: Tensor, ids: Tensor, wanted: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
        """(n, V) log-probabilities of what followed the last `cache` earlier positions of the row; (n,) if any did."""
        told: list[Tensor] = []
        for row, at in wanted.nonzero().tolist():
            start = max(0, at - self._config.cache)
            near = torch.zeros(vocabulary)
            distances = (keys[row, start:at] - keys[row, at]).square().sum(1)
            told.append(near.scatter_add_(0, ids[row, start + 1 : at + 1], (-distances / self._scale).softmax(0)))
        return torch.stack(told).log(), wanted.nonzero()[:, 1] > 0


def open(config: Config, parts: Parts) -> Mapping[type, Callable[[], Any]]:
    """The interfaces of the program."""
    mixed, model = Mixed(config, parts), parts.model("model")
    return {
        Logits: lambda: mixed,
        Codec: lambda: model.ask(Codec),
        Logprobs: lambda: CausalLogprobs(mixed.logits, model.ask(Codec), context=lambda: model.facts.context),
        Text: lambda: CausalText(partial(mixed.logits, last=True), model.ask(Codec)),
    }


def agree(config: Config, inputs: Inputs) -> None:
    if config.cache and (config.weight or 0) + config.cache_weight > 1:
        raise ConfigError("weight and cache_weight sum to more than 1", fix="they are shares beside the model's own")
    if config.cache and config.weight is None:
        raise ConfigError("a weight is chosen without the cache", fix="set weight, or cache=0")
    model = inputs.model("model")
    if model.facts.task != "causal-lm":
        raise MismatchError(
            f"augment.knn_lm needs a causal language model; {model.ref} is {model.facts.task or 'none'}"
        )


def cost(config: Config, sizes: Sizes) -> Cost:
    facts, tokens = sizes.model("model"), sizes.data["text"].tokens
    size = tokens * (2 * facts.width + 4)
    return Cost(
        flops=2.0 * facts.parameters * tokens,
        steps=1 + tokens // 4096,
        memory=4 * facts.parameters + 3 * size,
        disk=size,
    )


METHOD = Method(
    paper="arXiv:1911.00172",
    config=Config,
    models={"model": Slot((Features, Logits, Codec), help="the causal language model, which stays as it is")},
    data={"text": DataSlot(Data.UNLABELED, ("text",), help="what the datastore is made of")},
    run=run,
    cost=cost,
    agree=agree,
    open=open,
)
