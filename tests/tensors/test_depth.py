"""lfm.tensors.depth: blocks by the numbers in tensors' names."""

from __future__ import annotations

import pytest
import torch

from lfm.core.errors import MismatchError
from lfm.tensors.depth import Depth, blocks, depths, groups, moved


def test_the_first_number_tells_the_block_and_what_has_none_is_outside() -> None:
    names = ["embed.weight", "norm.weight", *(f"h.{i}.mlp.experts.{e}.weight" for i in range(3) for e in range(5))]
    found = depths({name: torch.zeros(2, 2) for name in names})
    assert found.keys() == set(names[2:])
    assert found["h.2.mlp.experts.0.weight"] == Depth(2, 3, "h.2")
    assert {name: depth.fraction for name, depth in found.items() if ".experts.4." in name} == {
        "h.0.mlp.experts.4.weight": 0.0,
        "h.1.mlp.experts.4.weight": 0.5,
        "h.2.mlp.experts.4.weight": 1.0,
    }


def test_each_stack_is_counted_by_itself_and_a_head_of_single_layers_is_none() -> None:
    tensors = {f"encoder.block.{i}.layer.{j}.w": torch.zeros(10, 3) for i in range(12) for j in range(2)}
    tensors |= {f"decoder.block.{i}.{part}": torch.zeros(1, 2) for i in range(4) for part in ("a", "b")}
    tensors |= {f"head.{i}.weight": torch.zeros(9, 9) for i in (0, 2)}
    tensors |= {f"head.{i}.bias": torch.zeros(9) for i in (0, 2)}
    found = depths(tensors)
    assert found["encoder.block.11.layer.0.w"] == Depth(11, 12, "encoder.block.11")
    assert found["decoder.block.1.a"].fraction == 1 / 3, "however small it is"
    assert not any(name.startswith("head") for name in found)


def test_numbers_may_have_gaps_and_ten_comes_after_nine() -> None:
    found = depths({f"{i}.weight": torch.zeros(1) for i in (0, 2, 10, 9)})
    assert {name: depth.block for name, depth in found.items()} == {
        "0.weight": 0,
        "2.weight": 1,
        "9.weight": 2,
        "10.weight": 3,
    }
    assert depths({"only.3.w": torch.zeros(1), "w": torch.zeros(1)})["only.3.w"].fraction == 1.0
    assert depths({"w": torch.zeros(1), "conv2.w": torch.zeros(1)}) == {}


def test_groups_are_of_equally_many_blocks_and_one_of_what_is_outside() -> None:
    tensors = {name: torch.zeros(2) for name in ("emb", *(f"h.{i}.w" for i in range(5)))}
    part, count = groups(tensors, 2)
    assert count == 3
    assert [part(name) for name in tensors] == [2, 0, 0, 0, 1, 1]
    assert groups({"h.0.w": torch.zeros(1), "h.1.w": torch.zeros(1)}, 2)[1] == 2


def test_a_block_takes_anothers_place_within_its_stack() -> None:
    def of(dec: str, enc: str) -> dict[str, torch.Tensor]:
        """Two stacks of three blocks with two matrices each; a letter a block says what is in it."""
        made = {"emb": torch.tensor([[0]]), "norm": torch.tensor([1])}
        for stack, letters in (("dec", dec), ("enc", enc)):
            for i, letter in enumerate(letters):
                made |= {f"{stack}.{i}.{k}": torch.tensor([[ord(letter), place]]) for place, k in enumerate("kv")}
        return made

    before = of("abc", "xyz")
    assert blocks(before) == ["dec.0", "dec.1", "dec.2", "enc.0", "enc.1", "enc.2"]
    for moves, after in (
        ([0] * 6, of("abc", "xyz")),
        ([1, -1, 0, 0, 5, -5], of("bac", "xzx")),
    ):
        found = moved(before, moves)
        assert found.keys() == after.keys()
        assert all(torch.equal(found[name], after[name]) for name in after)


def test_blocks_that_are_not_alike_have_no_order() -> None:
    with pytest.raises(MismatchError, match=r"h\.1 is not like h\.0"):
        blocks({"h.0.w": torch.zeros(2), "h.1.w": torch.zeros(3)})
