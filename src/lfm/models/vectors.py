"""Texts as vectors: a model's last hidden states in the mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, final

from lfm.core.heavy import F, np, torch
from lfm.core.interfaces import Codec, Features
from lfm.models.codec import pad, pad_id
from lfm.models.language import batches

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


def pooled(codec: Codec, features: Features, texts: Sequence[str], *, context: int = 0) -> Tensor:
    """(n, width) unit vectors, fp32. context: tokens at most, after which a text loses its end; 0: no end is lost."""
    tokenizer = codec.tokenizer
    limit: dict[str, Any] = {"truncation": True, "max_length": context} if context else {}
    ids = tokenizer(list(texts), **limit)["input_ids"]
    found: dict[int, Tensor] = {}
    for group in batches([len(row) for row in ids]):
        (seen,) = features.features(pad([ids[i] for i in group], pad_id(tokenizer)), [("hidden", -1)])
        found.update((i, seen[place, : len(ids[i])].mean(0).cpu()) for place, i in enumerate(group))
    return F.normalize(torch.stack([found[i] for i in range(len(ids))]).float(), dim=1)


@final
class LocalVectors:
    """A model in this process."""

    def __init__(self, codec: Callable[[], Codec], features: Features, context: Callable[[], int]) -> None:
        self._codec, self._features, self._context = codec, features, context

    def vectors(self, texts: Sequence[str]) -> NDArray[np.float32]:
        if not len(texts):
            return np.empty((0, 0), dtype=np.float32)
        return pooled(self._codec(), self._features, texts, context=self._context()).numpy()
