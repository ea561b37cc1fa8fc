"""Points of the embeddings' space as texts: of the nearest of the words that may be said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lfm.core import Codec, Embeddings, Model
from lfm.core.errors import ConfigError
from lfm.core.heavy import torch
from lfm.models.language import piece

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

SAMPLE = 512
"""Embeddings whose mean distance is taken."""
LETTERS = 3
"""Of a token, from which on it must not lie within what is banned, or that within it."""


class Tokens(NamedTuple):
    """texts: what may be said; vectors (n, d): their embeddings; mean, std: of the table; apart: their distance."""

    texts: tuple[str, ...]
    vectors: Tensor
    mean: float
    std: float
    apart: float

    @property
    def width(self) -> int:
        return self.vectors.shape[1]

    def nearest(self, points: NDArray[Any]) -> list[str]:
        """Points (n, t·d), in standard deviations around the mean, as the texts of their t nearest tokens."""
        x = torch.from_numpy(points).float().reshape(-1, self.width) * self.std + self.mean
        rows = torch.cdist(x, self.vectors).argmin(1).reshape(len(points), -1).tolist()
        return [" ".join(self.texts[i] for i in row) for row in rows]


def plain_words(model: Model, banned: Sequence[str]) -> Tokens:
    """Plain words of a model's vocabulary that share no letters in a row with what is banned. ConfigError for none."""
    table, tokenizer = model.ask(Embeddings).table().float(), model.ask(Codec).tokenizer
    size = min(len(table), len(tokenizer))
    whole = any(piece(tokenizer, i)[:1] == " " for i in range(size))
    texts: dict[str, int] = {}
    for i in range(size):
        text = piece(tokenizer, i)
        word = text.strip()
        if word.isalpha() and (not whole or text[:1] == " ") and not any(near(word, other) for other in banned):
            texts.setdefault(word, i)
    if not texts:
        raise ConfigError("no token is left to attack with", why="all are parts of words, or of the target")
    vectors = table[list(texts.values())]
    some = vectors[torch.linspace(0, len(vectors) - 1, min(SAMPLE, len(vectors))).long()]
    apart = float(torch.pdist(some).mean()) if len(some) > 1 else 1.0
    return Tokens(tuple(texts), vectors, float(table.mean()), float(table.std()), apart)


def near(word: str, other: str) -> bool:
    """Whether one lies within the other, case aside: "sadly" and "sad"."""
    word, other = word.casefold(), other.casefold()
    return other in word or (len(word) >= LETTERS and word in other)
