"""A frozen model whose input a weave turns into other embeddings: prompts placed among the tokens, chosen by input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, final

from lfm.core.heavy import nn, torch
from lfm.core.interfaces import Codec, Features, Gradients
from lfm.core.model import Model
from lfm.models import local
from lfm.models.device import forward as answered

if TYPE_CHECKING:
    from torch import Tensor

LEADING, BEFORE, TEXT, AFTER, CLOSING, GONE = range(6)
"""Where a place of a woven row goes, in this order; what is gone comes last, as padding."""


class Read(NamedTuple):
    """What a weave is given: token ids, which are no padding, and their embeddings; (B, T), (B, T), (B, T, d)."""

    ids: Tensor
    mask: Tensor
    embeds: Tensor


class Woven(NamedTuple):
    """What it makes: embeddings (B, S, d), which are no padding (B, S), where each input token went (B, T)."""

    embeds: Tensor
    mask: Tensor
    places: Tensor


def laid(rows: Tensor, read: Read, ranks: Tensor) -> Woven:
    """Prompt rows (B, t, d) and the input's, in the order of their ranks (B, t + T): LEADING … GONE; as they come where
    these are equal."""
    order = ranks.argsort(dim=1, stable=True)
    whole = torch.cat([rows, read.embeds], 1)
    kept = torch.cat([torch.ones_like(ranks[:, : rows.shape[1]]), read.mask.to(ranks.dtype)], 1) * (ranks != GONE)
    embeds = whole.gather(1, order[..., None].expand(-1, -1, whole.shape[-1]))
    return Woven(embeds, kept.gather(1, order), order.argsort(dim=1)[:, rows.shape[1] :])


def text_ranks(read: Read, leading: frozenset[int], closing: frozenset[int]) -> Tensor:
    """(B, T): LEADING for special tokens that open a row, TEXT, CLOSING for one that ends it, GONE for padding."""
    ranks = torch.where(read.mask.bool(), TEXT, GONE)
    last = read.mask.long().sum(1, keepdim=True) - 1
    ends = read.ids.gather(1, last.clamp(min=0))
    if closing:
        ended = torch.isin(ends, torch.tensor(sorted(closing), device=ends.device))
        ranks = ranks.scatter(1, last.clamp(min=0), torch.where(ended & (last > 0), CLOSING, TEXT))
    if leading:
        opens = torch.isin(read.ids, torch.tensor(sorted(leading), device=ends.device)).long().cumprod(1).bool()
        ranks = torch.where(opens & (ranks == TEXT), LEADING, ranks)
    return ranks


@final
class Weaving(nn.Module):
    """The base, fed with what the weave makes of its input; its answers are those at the input's own tokens.

    weave: a module, Read → Woven. The base's parameters are frozen.
    """

    def __init__(self, base: nn.Module, weave: nn.Module) -> None:
        super().__init__()
        self.base, self.weave = base.requires_grad_(False), weave

    @property
    def config(self) -> Any:
        return self.base.config

    @property
    def prompt_tokens(self) -> int:
        """How much longer a row may become."""
        return int(getattr(self.weave, "tokens", 0))

    @property
    def device(self) -> Any:
        return next(self.base.parameters()).device

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor | None:
        base: Any = self.base
        return base.prepare_decoder_input_ids_from_labels(labels=labels) if self.config.is_encoder_decoder else None

    def input(self, input_ids: Tensor, attention_mask: Tensor | None) -> Read:
        """What the weave is given."""
        base: Any = self.base
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        where = next(self.base.parameters()).device
        ids, mask = input_ids.to(where), mask.to(where)
        return Read(ids, mask, base.get_input_embeddings()(ids))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, decoder_input_ids: Tensor | None = None
    ) -> Tensor:
        woven = self.weave(self.input(input_ids, attention_mask))
        given = {"inputs_embeds": woven.embeds, "attention_mask": woven.mask}
        if decoder_input_ids is not None:
            given["decoder_input_ids"] = decoder_input_ids
        logits = answered(self.base, given)
        if logits.ndim == 2 or self.config.is_encoder_decoder:
            return logits
        return logits.gather(1, woven.places[..., None].expand(-1, -1, logits.shape[-1]))

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **how: Any) -> Tensor:
        """Row by row, as prompts may differ in length; a decoder's with its input before what it says."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        base: Any = self.base
        said = []
        for row in range(len(input_ids)):
            woven = self.weave(self.input(input_ids[row : row + 1], mask[row : row + 1]))
            real = woven.mask[0].bool()
            out = base.generate(inputs_embeds=woven.embeds[:, real], attention_mask=woven.mask[:, real], **how)[0]
            said.append(out if self.config.is_encoder_decoder else torch.cat([input_ids[row], out]))
        return nn.utils.rnn.pad_sequence(said, batch_first=True, padding_value=int(how.get("pad_token_id") or 0))


def interfaces(base: Model, weave: Callable[[Any], nn.Module]) -> dict[type, Callable[[], Any]]:
    """What the base gives when its input is woven. weave: the base's module → the weave."""
    codec = partial(base.ask, Codec)

    def opened() -> nn.Module:
        module = base.ask(Gradients).module()
        return Weaving(module, weave(module)).eval()

    made: Mapping[type, Callable[[], Any]] = local.interfaces(base.facts.task, opened, codec)
    return {kind: opener for kind, opener in made.items() if kind is not Features} | {Codec: codec}
