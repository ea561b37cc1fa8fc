"""How deep each tensor lies, by the number that its name holds: blocks are numbered from the input on."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from lfm.core.errors import MismatchError
from lfm.tensors.lazy import size

if TYPE_CHECKING:
    from lfm.core.interfaces import LazyTensor

NUMBER = re.compile(r"(?:^|(?<=\.))\d+(?=\.|$)")


class Depth(NamedTuple):
    """A tensor's block: its place in its stack from 0, and how many blocks the stack has. name: the block's own."""

    block: int
    blocks: int
    name: str

    @property
    def fraction(self) -> float:
        """From 0, the first block, to 1, the last one; of a single block 1."""
        return self.block / (self.blocks - 1) if self.blocks > 1 else 1.0


def depths(tensors: Mapping[str, LazyTensor]) -> dict[str, Depth]:
    """The depth of every tensor that lies in a block; those outside (embeddings, last norm, head) are left out.

    The first number in a name tells the block, so that experts or stages' inner blocks do not. Each stack (an
    encoder's, a decoder's) is counted by itself, in the order of its numbers, whatever they are. A list of single
    layers beside it, as in a head, is none.
    """
    found = {name: match for name in tensors if (match := NUMBER.search(name))}
    stacks: dict[str, dict[int, int]] = {}  # of each block how many matrices it has
    weight: dict[str, int] = {}
    for name, match in found.items():
        stack, number = name[: match.start()], int(match[0])
        inside = stacks.setdefault(stack, {})
        inside[number] = inside.get(number, 0) + (len(tensors[name].shape) > 1)
        weight[stack] = weight.get(stack, 0) + size(tensors[name])
    largest = max(weight, key=lambda stack: weight[stack], default="")
    order = {
        stack: {number: place for place, number in enumerate(sorted(matrices))}
        for stack, matrices in stacks.items()
        if stack == largest or max(matrices.values()) > 1
    }
    return {
        name: Depth(order[stack][int(match[0])], len(order[stack]), name[: match.end()])
        for name, match in found.items()
        if (stack := name[: match.start()]) in order
    }


def groups(tensors: Mapping[str, LazyTensor], count: int) -> tuple[Callable[[str], int], int]:
    """Each tensor's group by name, and how many there are: `count` of equally many blocks, then what is outside any."""
    found = {name: depth.block * count // depth.blocks for name, depth in depths(tensors).items()}
    outside = any(name not in found for name in tensors)
    return lambda name: found.get(name, count), count + outside


def blocks(tensors: Mapping[str, LazyTensor]) -> list[str]:
    """The blocks' names, a stack's from its input on, stacks by name. MismatchError where one's are not all alike."""
    inside: dict[tuple[str, int], dict[str, tuple[int, ...]]] = {}
    named: dict[tuple[str, int], str] = {}
    for name, depth in depths(tensors).items():
        place = (_stack(depth.name), depth.block)
        named[place] = depth.name
        inside.setdefault(place, {})[name[len(depth.name) :]] = tuple(tensors[name].shape)
    for (stack, block), shapes in inside.items():
        if shapes != inside[stack, 0]:
            raise MismatchError(
                f"{named[stack, block]} is not like {named[stack, 0]}",
                why="a block can take another one's place where their tensors have the same names and shapes",
            )
    return [named[place] for place in sorted(named)]


def moved(tensors: Mapping[str, LazyTensor], moves: Sequence[int]) -> dict[str, LazyTensor]:
    """In each block's place the one so many further on (back, below 0), ends being ends. moves: in that order."""
    names = blocks(tensors)
    assert len(moves) == len(names), f"{len(moves)} moves of {len(names)} blocks"
    stacks: dict[str, list[str]] = {}
    for name in names:
        stacks.setdefault(_stack(name), []).append(name)
    source = {}
    for name, move in zip(names, moves):
        stack = stacks[_stack(name)]
        source[name] = stack[min(max(stack.index(name) + move, 0), len(stack) - 1)]
    inside = depths(tensors)
    return {
        name: tensors[source[inside[name].name] + name[len(inside[name].name) :]] if name in inside else tensor
        for name, tensor in tensors.items()
    }


def _stack(block: str) -> str:
    return block.rpartition(".")[0]
