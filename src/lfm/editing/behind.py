"""What stands before a subject's last token is read once: no change that is made there reaches back to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from lfm.core.heavy import torch
from lfm.core.model import Batch

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


def cut(module: nn.Module, joined: Joined) -> Behind | None:
    """The rows cut; None for a module that keeps nothing of what it has read, or keeps it otherwise."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    ids, mask, start = joined.batch["input_ids"], joined.batch["attention_mask"], joined.subject
    wide, ends = int(start.max()), mask.sum(1)
    rest = int((ends - start).max())
    if not wide:
        return None
    place = torch.arange(wide, device=ids.device) - (wide - start)[:, None]  # in the row; below 0: padding
    seen = (place >= 0).long()
    after = start[:, None] + torch.arange(rest, device=ids.device)
    there = (after < ends[:, None]).long()
    with torch.no_grad():
        try:
            out: Any = module(
                input_ids=ids.gather(1, place.clamp(min=0)),
                attention_mask=seen,
                position_ids=place.clamp(min=0),
                use_cache=True,
            )
        except TypeError:  # it takes none of these
            return None
    kept = getattr(out, "past_key_values", None)
    if not isinstance(kept, DynamicCache) or any(type(layer) is not DynamicLayer for layer in kept.layers):
        return None
    batch = {
        "input_ids": ids.gather(1, after.clamp(max=ids.shape[1] - 1)),
        "attention_mask": torch.cat([seen, there], 1),
    }
    layers: list[Any] = list(kept.layers)
    keys, values = zip(*((layer.keys.detach(), layer.values.detach()) for layer in layers), strict=True)
    return Behind(keys, values, batch, after, start)


@contextmanager
def continued(module: nn.Module, behind: Behind | None) -> Iterator[None]:
    """Within: the module reads its batch after what is kept. None: as it is."""
    if behind is None:
        yield
        return
    from transformers import DynamicCache

    def with_cache(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        cache = DynamicCache()  # a fresh one each time: the module adds to it
        for number, (key, value) in enumerate(zip(behind.keys, behind.values, strict=True)):
            cache.update(key, value, number)
        return args, kwargs | {"past_key_values": cache, "position_ids": behind.positions, "use_cache": True}

    handle = module.register_forward_pre_hook(with_cache, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
