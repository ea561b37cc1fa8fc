"""Streams tensors through kernels: chunk by chunk, on every core, in memory that does not grow with them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn, final

from lfm.core.errors import CorruptError
from lfm.core.heavy import np, torch
from lfm.fusing import kernel
from lfm.tensors.lazy import CHUNK, Coded, coded, size, spans
from lfm.tensors.parallel import each
from lfm.tensors.refusal import MEND, nonfinite_refused
from lfm.tensors.safetensors_file import DTYPES, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.interfaces import LazyTensor

Given = Callable[[str], Mapping[str, Any]]
"""Tensor's name → parameters of the formula: a number, a sequence with one a model, or an array with a row a group."""


@final
@dataclass(frozen=True)
class Rule:
    """A formula with its parameters by tensor: join of what first makes of each model's element (see kernel.Formula).

    width: elements that share parameters and sums, by tensor; where it is None they are the whole tensor.
    """

    join: Callable[..., float]
    first: Callable[..., float] | None = None
    given: Given = lambda name: {}
    width: Callable[[str], int] | None = None
    seed: int = 0
    apart: bool = False  # what is counted is made of each model alone


def fuse(
    rule: Rule,
    names: Iterable[str],
    sources: Sequence[Mapping[str, LazyTensor]],
    *,
    base: Mapping[str, LazyTensor] | None = None,
    like: Mapping[str, LazyTensor] | None = None,
) -> dict[str, LazyTensor]:
    """The rule's result for each name, lazily, stored as `like` (or else the base, or the first source) is.

    Shapes are equal over base and sources. CorruptError when read, if an input or the result is not finite, unless
    lfm.tensors.refusal lets that through.
    """
    like = like or base or sources[0]
    return {name: Fused(task_of(rule, name, sources, base), coded(like[name], kernel.CODES).code) for name in names}


def stored(tensor: LazyTensor, code: str) -> LazyTensor:
    """A merged tensor, rounded to another format than it would have been; one that was not merged stays as it is."""
    return replace(tensor, code=code) if isinstance(tensor, Fused) else tensor


def sums(
    rule: Rule,
    names: Iterable[str],
    sources: Sequence[Mapping[str, LazyTensor]],
    which: Sequence[tuple[int, ...]] = ((),),
    *,
    base: Mapping[str, LazyTensor] | None = None,
    workers: int | None = None,
) -> dict[str, Any]:
    """By name, fp64 (groups, len(which)): join(*which[j], …) added up over each group. The same for any chunks."""
    run = kernel.sum_kernel(_formula(rule, len(which[0])), len(sources), tuple(which))
    tasks = {name: task_of(rule, name, sources, base, len(which[0])) for name in names}
    totals = {name: np.zeros((task.groups, len(which))) for name, task in tasks.items()}
    early: dict[str, dict[int, Any]] = {name: {} for name in tasks}
    due = dict.fromkeys(tasks, 0)

    def part(piece: tuple[str, int, int]) -> tuple[str, int, int, Any]:
        name, start, stop = piece
        task = tasks[name]
        out = np.zeros((task.group(stop - 1) - task.group(start) + 1, len(which)))
        task.run(run, out, -1, start, stop)
        return name, start, stop, out

    for name, start, stop, out in each(part, _pieces(tasks), workers):
        early[name][start] = (stop, out)
        while due[name] in early[name]:  # in the order of the elements, so that rounding never differs
            at = due[name]
            due[name], found = early[name].pop(at)
            first = tasks[name].group(at)
            totals[name][first : first + len(found)] += found
    return totals


def _pieces(tasks: Mapping[str, Task]) -> Iterable[tuple[str, int, int]]:
    return ((name, start, stop) for name, task in tasks.items() for start, stop in spans(task.size))


@final
@dataclass(frozen=True)
class Fused:
    """A merged tensor: a LazyTensor that is computed as it is read, in part or whole."""

    task: Task
    code: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.task.shape

    @property
    def dtype(self) -> torch.dtype:
        return torch_dtype(self.code)

    @property
    def nbytes(self) -> int:
        return self.task.size * DTYPES[self.code][1]

    def read(self) -> Tensor:
        return self.read_flat(0, self.task.size).reshape(self.shape)

    def read_flat(self, start: int, stop: int) -> Tensor:
        item = DTYPES[self.code][1]
        raw = torch.empty((stop - start) * item, dtype=torch.uint8)
        self.read_into(raw.numpy().data, start * item)
        return raw.view(self.dtype)

    def read_into(self, buffer: memoryview, offset: int = 0) -> None:
        """Fill a buffer with the result's bytes from `offset`, whole elements of them."""
        item = DTYPES[self.code][1]
        assert not offset % item and not len(buffer) % item
        task, first = self.task, offset // item
        run = kernel.map_kernel(task.formula, task.models)
        out = np.frombuffer(buffer, dtype=np.uint8)
        for start, stop in spans(len(buffer) // item):
            flags = task.run(run, out[start * item : stop * item], kernel.CODES[self.code], first + start, first + stop)
            if flags[0] and task.strict:
                raise CorruptError(
                    f"{task.name!r} leaves the range of {DTYPES[self.code][0]} when merged",
                    why="its inputs are finite",
                    fix="use smaller weights, or in a recipe a wider out_dtype",
                )


@final
@dataclass(frozen=True)
class Task:
    """One tensor of every input, and what the formula is given for it."""

    name: str
    rule: Rule
    inputs: tuple[Coded, ...]  # the base first, where there is one
    models: int
    shape: tuple[int, ...]
    width: int
    formula: kernel.Formula
    strict: bool  # refuses what is not finite
    _packed: list[Any] = field(default_factory=list, compare=False, repr=False)

    @property
    def size(self) -> int:
        return size(self.inputs[0])

    @property
    def groups(self) -> int:
        return -(-self.size // self.width)

    def group(self, element: int) -> int:
        return element // self.width

    def run(self, call: Callable[..., None], out: Any, code: int, start: int, stop: int) -> Any:
        """Reads elements start to stop of every input and calls the kernel: its flags. Strict, it refuses a NaN."""
        if stop == start:
            return (0,)
        params, keys, flags = self._arguments(start)
        codes = np.array([code, *(kernel.CODES[i.code] for i in self.inputs)], dtype=np.int64)
        raw, stride, scratch = room = _room(len(self.inputs), self.models)
        for place, tensor in enumerate(self.inputs):
            item = DTYPES[tensor.code][1]
            tensor.read_into(raw[place * stride : place * stride + (stop - start) * item].data, start * item)
        call(
            raw.ctypes.data,
            stride,
            out.ctypes.data,
            codes.ctypes.data,
            params.ctypes.data,
            keys.ctypes.data,
            scratch.ctypes.data,
            flags.ctypes.data,
            self.width,
            start,
            stop - start,
        )
        _rooms.append(room)
        for place, tensor in enumerate(self.inputs):
            if flags[1 + place] and self.strict:
                _refuse(self.name, tensor, place)
        return flags

    def _arguments(self, start: int) -> tuple[Any, Any, Any]:
        if not self._packed:
            told, given = self.formula.parameters, self.rule.given(self.name)
            columns = {name: np.asarray(given[name], dtype=np.float64) for name in told}
            many = any(column.ndim == 1 + each_ for column, each_ in zip(columns.values(), told.values()))
            params = np.zeros((self.groups if many else 1, max(1, self.formula.columns(self.models))))
            at = 0
            for name, each_ in told.items():
                column, wide = columns[name], self.models if each_ else 1
                assert column.shape in ((), (wide,), (self.groups,), (self.groups, wide)), (name, column.shape)
                params[:, at : at + wide] = column if column.ndim == 2 or each_ else column.reshape(-1, 1)
                at += wide
            keys = [key_of(self.rule.seed, i, self.name) if self.formula.random else 0 for i in range(self.models)]
            self._packed.append((params, np.array(keys or [0], dtype=np.uint64)))
        params, keys = self._packed[0]
        first = self.group(start)
        if len(params) == 1 < self.groups:
            params = np.repeat(params, min(self.groups - first, CHUNK // self.width + 2), axis=0)
            first = 0
        return params[first:], keys, np.zeros(len(self.inputs) + 1, dtype=np.int64)


def task_of(
    rule: Rule,
    name: str,
    sources: Sequence[Mapping[str, LazyTensor]],
    base: Mapping[str, LazyTensor] | None,
    leading: int = 0,
) -> Task:
    formula = _formula(rule, leading)
    assert formula.has_base <= (base is not None), rule.join
    inputs = tuple(
        coded(source[name], kernel.CODES) for source in ([base] if formula.has_base and base else []) + [*sources]
    )
    shape = tuple(inputs[0].shape)
    assert all(tuple(tensor.shape) == shape for tensor in inputs), name
    width = max(1, rule.width(name) if rule.width else size(inputs[0]))
    return Task(name, rule, inputs, len(sources), shape, width, formula, nonfinite_refused())


@cache
def _formula_of(join: Any, first: Any, leading: int, apart: bool) -> kernel.Formula:
    return kernel.Formula(join, first, leading, apart)


def _formula(rule: Rule, leading: int) -> kernel.Formula:
    return _formula_of(rule.join, rule.first, leading, rule.apart)


_rooms: list[tuple[Any, int, Any]] = []
"""Buffers that nobody uses now. Fresh ones cost the kernel's zeroing, page by page, as much as the arithmetic does."""


def _room(inputs: int, models: int) -> tuple[Any, int, Any]:
    """Buffers for one call: the inputs' bytes, how far apart they lie, and the kernel's rows."""
    stride = CHUNK * 8
    try:
        raw, _, scratch = _rooms.pop()
        if len(raw) >= inputs * stride and len(scratch) >= (models + 2) * kernel.BLOCK:
            return raw, stride, scratch
    except IndexError:
        pass
    return np.empty(inputs * stride, dtype=np.uint8), stride, np.empty((models + 2) * kernel.BLOCK)


def key_of(seed: int, model: int, name: str) -> int:
    """What a model's random numbers for a tensor begin from."""
    return int.from_bytes(hashlib.sha256(f"{seed}\x1f{model}\x1f{name}".encode()).digest()[:8], "little")


def _refuse(name: str, tensor: Coded, place: int) -> NoReturn:
    where = getattr(tensor, "file", f"input {place + 1}")
    raise CorruptError(f"{where}: {name!r} holds a NaN or an infinity", fix=MEND)
