"""Tables with a row for each token, brought to one vocabulary: rows are moved, and found for tokens a model lacks.

Source: mergekit's tokenizer merge (0.1.5, docs: tokenizer configuration). A token that a model lacks gets there, in
this order: what the recipe says of it; the only other model's row; the base's; the mean over the models that have it;
zeros. Rows that belong to no token (padding, unused numbers) are the mean of all others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple, final

from lfm.core.errors import ConfigError, MismatchError
from lfm.core.heavy import np, torch
from lfm.fusing import kernel
from lfm.fusing.rows import values
from lfm.merging.recipe import FromModel, Token, Zero
from lfm.tensors.lazy import CHUNK, Coded, coded
from lfm.tensors.safetensors_file import DTYPES, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.interfaces import LazyTensor

ABSENT, UNUSED = -1, -2
"""In place of a row's number: no row of this model goes into it; it belongs to no token."""


class Vocabulary(NamedTuple):
    """The result's tokens and their numbers, each model's own, and what the recipe says of some."""

    tokens: Mapping[str, int]
    of: Mapping[str, Mapping[str, int]]
    told: Mapping[str, Token]
    rows: int
    base: str


def aligned(vocabulary: Vocabulary, tables: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Each model's table with the rows of the result's vocabulary. MismatchError where rows are of different shapes."""
    models = list(tables)
    widths = {tuple(t.shape[1:]) for t in tables.values()}
    if len(widths) > 1:
        raise MismatchError(f"tables of tokens have rows of shapes {', '.join(map(str, sorted(widths)))}")
    stored = tuple(coded(tables[m], kernel.CODES) for m in models)
    takes = takes_of(vocabulary, {m: t.shape[0] for m, t in tables.items()})
    return {m: Aligned(stored, takes[m], _code(stored, takes[m])) for m in models}


def takes_of(vocabulary: Vocabulary, lengths: Mapping[str, int]) -> dict[str, Any]:
    """By model, (models, rows): the row of each model's table whose mean a row of this model's new table is."""
    models = list(lengths)
    own = np.full((len(models), vocabulary.rows), ABSENT, dtype=np.int64)
    used = np.zeros(vocabulary.rows, dtype=bool)
    for token, number in vocabulary.tokens.items():
        used[number] = True
        for i, model in enumerate(models):
            row = vocabulary.of[model].get(token, ABSENT)
            own[i, number] = row if row < lengths[model] else ABSENT
    rest = own.copy()  # the mean over those that have it
    have = own >= 0
    if vocabulary.base in models:
        at = models.index(vocabulary.base)
        rest[:, have[at]] = ABSENT
        rest[at, have[at]] = own[at, have[at]]
    forced = np.zeros(vocabulary.rows, dtype=bool)
    for token, told in vocabulary.told.items():
        number = vocabulary.tokens[token]
        forced[number] = told.force
        if told.source is not None:
            rest[:, number] = ABSENT
            if not isinstance(told.source, Zero):
                model = told.source.model if isinstance(told.source, FromModel) else told.source
                if model not in models:
                    raise MismatchError(f"{model}, which the recipe takes {token!r} from, lacks a table of tokens")
                rest[models.index(model), number] = _row(token, told, model, vocabulary, lengths[model])
    found = {}
    for i, model in enumerate(models):
        take = np.full_like(own, ABSENT)
        mine = have[i] & ~forced
        take[i, mine] = own[i, mine]
        take[:, ~mine] = rest[:, ~mine]
        take[:, ~used] = UNUSED
        found[model] = take
    return found


def _row(token: str, told: Token, model: str, vocabulary: Vocabulary, length: int) -> int:
    source = told.source
    if isinstance(source, FromModel) and source.token_id is not None:
        row = source.token_id
    else:
        name = source.token if isinstance(source, FromModel) else token
        if name is None:
            raise ConfigError(f"the recipe's source of {token!r} names neither token nor token_id")
        if name not in vocabulary.of[model]:
            raise MismatchError(f"{model} has no token {name!r}, from which the recipe makes {token!r}")
        row = vocabulary.of[model][name]
    if not 0 <= row < length:
        raise MismatchError(f"{model} has {length} rows of tokens, the recipe asks for number {row} for {token!r}")
    return row


def _code(tables: Sequence[Coded], take: Any) -> str:
    """A format that holds every row as it is: the tables' own, unless rows are means or the tables differ."""
    codes = {table.code for table in tables}
    plain = ((take >= 0).sum(axis=0) <= 1).all() and not (take == UNUSED).any()
    return codes.pop() if plain and len(codes) == 1 else "F64" if "F64" in codes else "F32"


@final
@dataclass(frozen=True)
class Aligned:
    """A table whose rows are rows of other tables, their means, or zeros: a LazyTensor, computed as it is read."""

    tables: tuple[Coded, ...]
    take: Any
    code: str
    _kept: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.take.shape[1], *self.tables[0].shape[1:])

    @property
    def file(self) -> object:
        return getattr(self.tables[0], "file", "a table of tokens")

    @property
    def dtype(self) -> torch.dtype:
        return torch_dtype(self.code)

    @property
    def width(self) -> int:
        return prod(self.shape[1:])

    def read(self) -> Tensor:
        item = DTYPES[self.code][1]
        raw = torch.empty(prod(self.shape) * item, dtype=torch.uint8)
        self.read_into(raw.numpy().data)
        return raw.view(self.dtype).reshape(self.shape)

    def read_into(self, buffer: memoryview, offset: int = 0) -> None:
        item, width = DTYPES[self.code][1], self.width
        if not len(buffer) or not width:
            return
        start, stop = offset // item, (offset + len(buffer)) // item
        first, last = start // width, -(-stop // width)
        rows = self._rows(first, last)
        flat = rows.reshape(-1)[(start - first * width) * item : (stop - first * width) * item]
        buffer[:] = flat.data

    def _rows(self, first: int, last: int) -> Any:
        """Bytes (rows, width · item) of these rows."""
        item, width = DTYPES[self.code][1], self.width
        out = np.zeros((last - first, width * item), dtype=np.uint8)
        many = (self.take[:, first:last] >= 0).sum(axis=0)
        for t, table in enumerate(self.tables):
            for begin, end, row in _runs(self.take[t, first:last], many == 1):
                out[begin:end] = _bytes(table, row, end - begin, width, self.code)
        for at in np.flatnonzero(many > 1):
            wanted = [(t, int(r)) for t, r in enumerate(self.take[:, first + at]) if r >= 0]
            mean = sum(_rows_of(self.tables[t], r, 1, width) for t, r in wanted) / len(wanted)
            out[at] = _encoded(mean, self.code)
        unused = self.take[0, first:last] == UNUSED
        if unused.any():
            out[unused] = _encoded(self._mean(), self.code)
        return out

    def _mean(self) -> Any:
        """The mean of the rows that are tokens', fp64."""
        if "mean" not in self._kept:
            used = np.flatnonzero(self.take[0] != UNUSED)
            tokens = Aligned(self.tables, np.where(self.take == UNUSED, ABSENT, self.take), self.code)
            total, block = np.zeros(self.width), max(1, CHUNK // max(1, self.width))
            for begin in range(0, self.shape[0], block):
                end = min(begin + block, self.shape[0])
                total += _rows_of(tokens, begin, end - begin, self.width)[
                    used[(used >= begin) & (used < end)] - begin
                ].sum(axis=0)
            self._kept["mean"] = total / max(1, len(used))
        return self._kept["mean"]


def _runs(rows: Any, wanted: Any) -> list[tuple[int, int, int]]:
    """(begin, end, first row) of stretches in which wanted rows follow each other."""
    at = np.flatnonzero(wanted & (rows >= 0))
    if not len(at):
        return []
    breaks = np.flatnonzero((np.diff(at) != 1) | (np.diff(rows[at]) != 1)) + 1
    return [(int(run[0]), int(run[-1]) + 1, int(rows[run[0]])) for run in np.split(at, breaks)]


def _bytes(table: Coded, row: int, count: int, width: int, code: str) -> Any:
    if table.code != code:
        return _encoded(_rows_of(table, row, count, width), code)
    item = DTYPES[code][1]
    raw = np.empty((count, width * item), dtype=np.uint8)
    table.read_into(raw.reshape(-1).data, row * width * item)
    return raw


def _rows_of(table: Coded, row: int, count: int, width: int) -> Any:
    """fp64 (count, width)"""
    return values(table, row * width, (row + count) * width).reshape(count, width)


def _encoded(rows: Any, code: str) -> Any:
    """Bytes of fp64 values in a format as wide as what they came from."""
    rows = np.atleast_2d(rows)
    assert code in ("F32", "F64"), code
    return np.ascontiguousarray(rows.astype({"F32": np.float32, "F64": np.float64}[code])).view(np.uint8)
