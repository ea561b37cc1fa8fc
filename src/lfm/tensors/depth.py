"""How deep each tensor lies, by the number that its name holds: blocks are numbered from the input on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from lfm.tensors.lazy import size

if TYPE_CHECKING:
    from lfm.core.model import LazyTensor

NUMBER = re.compile(r"(?:^|(?<=\.))\d+(?=\.|$)")
SHARE = 10
"""A numbered list with less than one SHAREth of the largest one's weights is no stack: a head of two layers, say."""


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
    encoder's, a decoder's) is counted by itself, in the order of its numbers, whatever they are.
    """
    found = {name: match for name in tensors if (match := NUMBER.search(name))}
    stacks: dict[str, set[int]] = {}
    weight: dict[str, int] = {}
    for name, match in found.items():
        stack = name[: match.start()]
        stacks.setdefault(stack, set()).add(int(match[0]))
        weight[stack] = weight.get(stack, 0) + size(tensors[name])
    largest = max(weight.values(), default=0)
    order = {
        stack: {number: place for place, number in enumerate(sorted(numbers))}
        for stack, numbers in stacks.items()
        if weight[stack] * SHARE >= largest
    }
    return {
        name: Depth(order[stack][int(match[0])], len(order[stack]), name[: match.end()])
        for name, match in found.items()
        if (stack := name[: match.start()]) in order
    }
