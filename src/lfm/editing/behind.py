"""What stands before a subject's last token is read once: no change that is made there reaches back to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from lfm.core.heavy import torch
from lfm.core.interfaces import Batch
from lfm.models.resume import asked_at, stopped

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lfm.editing.rows import Joined


class Behind(NamedTuple):
    """Rows (R) cut at their subject's last token: what a causal model keeps of what comes before, and the rest.

    keys, values: of each block (R, heads, P, width); seen (R, P) which of them are tokens. batch: the rest, whose mask
    (R, P + T) is of both; positions (R, T); start (R,): the place that was cut at.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    batch: Batch
    positions: Tensor
    start: Tensor

    def of(self, rows: Tensor) -> Behind:
        """Of these rows alone."""
        return Behind(
            tuple(key[rows] for key in self.keys),
            tuple(value[rows] for value in self.values),
            {name: each[rows] for name, each in self.batch.items()},
            self.positions[rows],
            self.start[rows],
        )


def cut(module: nn.Module, joined: Joined, upto: int | None = None) -> Behind | None:
    """The rows cut, and nothing after what is asked of them; None for a module that keeps nothing of what it has read,
    or keeps it otherwise. What the edits' rows of one context begin with alike is read once for all of them.

    upto: read by the blocks before this one alone, and nothing after the subject's last token.
    """
    ids, start = joined.batch["input_ids"], joined.subject
    context = torch.arange(len(start), device=ids.device) - joined.bare[joined.owner]
    alike = torch.stack(
        [_alike(ids[context == each], start[context == each]) for each in range(int(context.max()) + 1)]
    )
    first = torch.stack([(context == each).int().argmax() for each in range(len(alike))])
    kept: _Kept | None = _Kept((), (), torch.zeros(len(alike), 0, dtype=torch.long, device=ids.device))
    kept = _read(module, kept, ids[first], torch.zeros_like(alike), alike, upto)
    kept = kept and _read(module, kept.of(context), ids, alike[context], start, upto)
    if kept is None or not kept.keys:
        return None
    last = joined.last if upto is None else start
    reach = start[:, None] + torch.arange(int((last - start).max()) + 1, device=ids.device)
    after = torch.minimum(reach, last[:, None])  # padding is at no place of its own: a model may have no more
    batch = {
        "input_ids": ids.gather(1, after),
        "attention_mask": torch.cat([kept.seen, (reach <= last[:, None]).long()], 1),
    }
    return Behind(kept.keys, kept.values, batch, after, start)


def _alike(ids: Tensor, ends: Tensor) -> Tensor:
    """() how many tokens these rows begin with alike, before the first of their ends."""
    return (ids == ids[0]).all(0)[: int(ends.min())].long().cumprod(0).sum()


class _Kept(NamedTuple):
    """What a module has read of each row: as in Behind."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    seen: Tensor

    def of(self, rows: Tensor) -> _Kept:
        return _Kept(
            tuple(key[rows] for key in self.keys), tuple(value[rows] for value in self.values), self.seen[rows]
        )


def _read(module: nn.Module, kept: _Kept, ids: Tensor, begin: Tensor, end: Tensor, upto: int | None) -> _Kept | None:
    """Each row read on, from one place (R,) to another (R,), by the blocks before one."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    wide = int((end - begin).max())
    if not wide:
        return kept
    place = torch.arange(wide, device=ids.device) - (wide - end)[:, None]  # in the row
    there = place >= begin[:, None]  # the rest is padding
    seen = torch.cat([kept.seen, there.long()], 1)
    cache: Any = _cache(kept.keys, kept.values) if kept.keys or upto else None
    nothing = torch.zeros(1, dtype=torch.long, device=ids.device)
    with torch.no_grad(), asked_at(module, nothing, nothing), stopped(module, upto):
        try:
            out: Any = module(
                input_ids=ids.gather(1, place.clamp(min=0)),
                attention_mask=seen,
                position_ids=place.clamp(min=0),
                past_key_values=cache,
                use_cache=True,
            )
            cache = getattr(out, "past_key_values", None)
        except TypeError:  # it takes none of these
            return None
    if not isinstance(cache, DynamicCache) or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    layers: list[Any] = list(cache.layers)
    keys, values = zip(*((layer.keys.detach(), layer.values.detach()) for layer in layers), strict=True)
    return _Kept(keys, values, seen)


def _cache(keys: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> Any:
    """A fresh one: a module adds to it."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for number, (key, value) in enumerate(zip(keys, values, strict=True)):
        cache.update(key, value, number)
    return cache


@contextmanager
def continued(module: nn.Module, behind: Behind | None) -> Iterator[None]:
    """Within: the module reads its batch after what is kept. None: as it is."""
    if behind is None:
        yield
        return

    def with_cache(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        cache = _cache(behind.keys, behind.values)
        return args, kwargs | {"past_key_values": cache, "position_ids": behind.positions, "use_cache": True}

    handle = module.register_forward_pre_hook(with_cache, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
