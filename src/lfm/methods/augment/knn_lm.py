"""Give a frozen language model a datastore of text: what followed in similar contexts is mixed into its next token.

    p(y | x) = λ p_kNN(y | x) + (1 − λ) p_LM(y | x),    p_kNN(y | x) ∝ Σ_{(kᵢ, vᵢ) ∈ N} [vᵢ = y] exp(−‖f(x) − kᵢ‖² / T)

Paper: kNN-LM, arXiv 1911.00172. f(x) is the input of the last feed-forward layer, N the k nearest of all (context, next
token) pairs of the text. Different from the paper: distances are divided by their scale in the datastore (the mean
squared distance of keys to their mean), times `temperature`, since a small model's keys are of another size than the
paper's; search is exact. Keys are stored in fp16, computed with in fp32.

Model: a causal language model. Text: any amount; a key of `width` fp16 numbers is kept for each token, so that the
datastore takes 2 · width bytes a token. The result is a program over the model, whose weights stay as they are. Errors:
MismatchError for a model that is no causal language model; DataError for text of fewer than two tokens.

    lfm run augment.knn_lm model=model text=text.jsonl --set k=64 --out with-text
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, final

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
from lfm.core.errors import DataError, MismatchError
from lfm.core.heavy import torch
from lfm.core.model import Batch
from lfm.models.codec import pad, pad_id
from lfm.models.language import CausalLogprobs, CausalText, batches
from lfm.models.program import program
from lfm.retrieval.index import nearest

if TYPE_CHECKING:
    from torch import Tensor

SITE = ("ffn_in", -1)
CONTEXT = 512
"""Tokens of a stretch of text where the model tells no context length."""


class Config(lfm.core.Config, frozen=True):
    k: Annotated[int, Meta(ge=1, description="neighbours")] = 1024
    weight: Annotated[float, Meta(ge=0, le=1, description="λ, of the neighbours against the model")] = 0.25
    temperature: Annotated[float, Meta(gt=0, description="T, in units of the keys' mean squared spread")] = 0.05


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    model = inputs.model("model")
    rows = stretches(model, [record.text for record in inputs.records("text")])
    kept = run.step("datastore", lambda: store(model, rows, run))
    spread = (kept["keys"].float() - kept["keys"].float().mean(0)).square().sum(1).mean().item()
    run.note(entries=len(kept["values"]), spread=spread)
    parts = Parts({"model": (model,)}, kept, {"spread": spread})
    return program("augment.knn_lm", config, parts, open)


def stretches(model: Model, texts: Sequence[str]) -> list[tuple[list[int], int]]:
    """(token ids, first position that counts): the texts cut at the model's context, half of each cut shared.

    So every token but a text's first is stored once, and with at least half a context before it where there is one.
    """
    limit = model.facts.context or CONTEXT
    rows: list[tuple[list[int], int]] = []
    for ids in model.ask(Codec).tokenizer(list(texts))["input_ids"]:
        starts = range(0, max(1, len(ids) - limit // 2), limit // 2)
        rows += [(ids[at : at + limit], limit - limit // 2 - 1 if at else 0) for at in starts]
    rows = [(ids, first) for ids, first in rows if len(ids) > first + 1]
    if not rows:
        raise DataError("the text has fewer than two tokens", fix="give text for the model to learn from")
    return rows


def store(model: Model, rows: Sequence[tuple[list[int], int]], run: Run) -> dict[str, Tensor]:
    """keys (N, width) fp16 and values (N,): each position's feature, and the token that follows it."""
    features, fill = model.ask(Features), pad_id(model.ask(Codec).tokenizer)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for group in run.track(batches([len(ids) for ids, _ in rows]), "reading the text"):
        (seen,) = features.features(pad([rows[i][0] for i in group], fill), [SITE])
        for place, i in enumerate(group):
            ids, first = rows[i]
            keys = seen[place, first : len(ids) - 1].to("cpu", torch.float16)
            found[i] = keys, torch.tensor(ids[first + 1 :], dtype=torch.long)
    keys, values = zip(*(found[i] for i in range(len(rows))), strict=True)
    return {"keys": torch.cat(keys), "values": torch.cat(values)}


@final
class Mixed:
    """Logits whose softmax is the mixture: log p, fp32."""

    def __init__(self, config: Config, parts: Parts) -> None:
        self._config, self._parts = config, parts

    def logits(self, batch: Batch) -> Tensor:
        config, model, kept = self._config, self._parts.model("model"), self._parts.tensors
        logits = model.ask(Logits).logits(batch).log_softmax(-1)
        if config.weight == 0:
            return logits
        (seen,) = model.ask(Features).features(batch, [SITE])
        mask = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones(seen.shape[:2]).bool()
        distances, found = nearest(seen[mask.to(seen.device)].cpu(), kept["keys"], config.k)
        scale = config.temperature * max(float(self._parts.state["spread"]), 1e-12)
        near = torch.zeros(len(found), logits.shape[-1])
        near.scatter_add_(1, kept["values"][found], (-distances / scale).softmax(-1))
        own = logits[mask.to(logits.device)].cpu()
        mixed = torch.logaddexp(
            own + torch.tensor(1 - config.weight).log(), near.log() + torch.tensor(config.weight).log()
        )
        out = logits.clone()
        out[mask.to(logits.device)] = mixed.to(logits.device)
        return out


def open(config: Config, parts: Parts) -> Mapping[type, Callable[[], Any]]:
    """The interfaces of the program."""
    mixed, model = Mixed(config, parts), parts.model("model")
    return {
        Logits: lambda: mixed,
        Codec: lambda: model.ask(Codec),
        Logprobs: lambda: CausalLogprobs(mixed.logits, model.ask(Codec)),
        Text: lambda: CausalText(mixed.logits, model.ask(Codec)),
    }


def agree(config: Config, inputs: Inputs) -> None:
    model = inputs.model("model")
    if model.facts.task != "causal-lm":
        raise MismatchError(
            f"augment.knn_lm needs a causal language model; {model.ref} is {model.facts.task or 'none'}"
        )


def cost(config: Config, sizes: Sizes) -> Cost:
    facts, tokens = sizes.model("model"), sizes.data["text"].tokens
    size = tokens * (2 * facts.width + 8)
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
