"""What many texts begin with alike, such as an instruction or demonstrations, is read once and kept for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from lfm.core.heavy import torch
from lfm.core.interfaces import Batch
from lfm.models import virtual
from lfm.models.device import forward, taken

if TYPE_CHECKING:
    from torch import Tensor

    LogitsFn = Callable[[Batch], Tensor]

WORTH = 256
"""Tokens that must be spared before rows are read apart from the others, which takes passes of its own."""
SHARE = 0.25
"""Of the rows' tokens, the least to be spared."""
NEAR = 1e-3
"""How far logits may be off before a model is taken not to go on from what it has read."""


class Alike(NamedTuple):
    """Rows, by place, and how many tokens all of them begin with: 0 where it is not worth while."""

    length: int
    places: list[int]


def alike(rows: Sequence[Sequence[int]], most: Sequence[int]) -> list[Alike]:
    """The rows in sets that begin alike. most: of each row, how many tokens may be read before it.

    In the order of their tokens, rows are one set or are parted where neighbours share least, whichever spares more.
    """
    order = sorted(range(len(rows)), key=lambda i: (tuple(rows[i]), i))
    shared = [_common(rows[a], rows[b]) for a, b in pairwise(order)]

    def parted(first: int, last: int) -> tuple[int, list[Alike]]:
        """(tokens spared, sets) of order[first:last]."""
        places = order[first:last]
        if len(places) == 1:
            return 0, [Alike(0, places)]
        least = min(shared[first : last - 1])
        length = min(least, *(most[i] for i in places))
        whole = _spared(Alike(length, places), rows)
        cuts = [first, *(at + 1 for at in range(first, last - 1) if shared[at] == least), last]
        each = [parted(a, b) for a, b in pairwise(cuts)]
        if whole and whole >= sum(spared for spared, _ in each):
            return whole, [Alike(length, places)]
        return sum(spared for spared, _ in each), [one for _, sets in each for one in sets]

    sets = parted(0, len(rows))[1] if len(rows) else []
    rest = [i for one in sets if not one.length for i in one.places]
    return [one for one in sets if one.length] + ([Alike(0, sorted(rest))] if rest else [])


def _spared(one: Alike, rows: Sequence[Sequence[int]]) -> int:
    """Tokens that are not read again; 0 where it is not worth while."""
    spared = one.length * (len(one.places) - 1)
    return spared if spared >= max(WORTH, SHARE * sum(len(rows[i]) for i in one.places)) else 0


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((place for place, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def reading_on(module: Callable[[], Any]) -> Callable[[Sequence[int], Sequence[int]], LogitsFn | None]:
    """(ids, what follows them in one text) → what gives the logits of right-padded rows after those ids; None for a
    module that does not keep what it reads, or keeps it otherwise. Whether it does is tried once, on that text."""
    known: list[bool] = []

    def begun(ids: Sequence[int], following: Sequence[int]) -> LogitsFn | None:
        opened = module()
        if known == [False] or virtual.room(opened):
            return None
        made = _begun(opened, ids)
        if not known:
            known.append(made is not None and _same(opened, ids, following, made))
        return made if known[0] else None

    return begun


def _begun(module: Any, ids: Sequence[int]) -> LogitsFn | None:
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    takes = taken(type(module)) or frozenset()
    if "past_key_values" not in takes:
        return None
    where = next(module.parameters()).device
    last: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
    with torch.no_grad():
        out = module(input_ids=torch.tensor([list(ids)], device=where), use_cache=True, **last)
    kept = getattr(out, "past_key_values", None)
    if not isinstance(kept, DynamicCache) or any(type(layer) is not DynamicLayer for layer in kept.layers):
        return None
    layers: list[Any] = list(kept.layers)

    def logits(batch: Batch) -> Tensor:
        rows = batch["input_ids"].to(where)
        cache = DynamicCache()
        for number, layer in enumerate(layers):
            cache.update(*(x.expand(len(rows), *x.shape[1:]) for x in (layer.keys, layer.values)), number)
        before = torch.ones(len(rows), len(ids), dtype=torch.long, device=where)
        mask = torch.cat([before, batch["attention_mask"].to(where)], 1)
        with torch.no_grad():
            return module(input_ids=rows, attention_mask=mask, past_key_values=cache, use_cache=True).logits.float()

    return logits


def _same(module: Any, ids: Sequence[int], following: Sequence[int], made: LogitsFn) -> bool:
    """Whether a text read on says what the whole of it says, in a row with padding too."""
    rest = torch.tensor([list(following), list(following)])
    mask = torch.ones_like(rest)
    if rest.shape[1] > 1:
        mask[1, -1] = 0
    whole = torch.cat([torch.tensor([list(ids)] * 2), rest], 1)
    seen = torch.cat([torch.ones(2, len(ids), dtype=torch.long), mask], 1)
    with torch.no_grad():
        expected = forward(module, {"input_ids": whole, "attention_mask": seen})[:, len(ids) :].log_softmax(-1)
    found = made({"input_ids": rest, "attention_mask": mask}).log_softmax(-1)
    real = mask.bool()
    return bool((found[real.to(found.device)] - expected[real.to(expected.device)]).abs().max() < NEAR)
