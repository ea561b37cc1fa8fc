"""lfm.tensors.depth: blocks by the numbers in tensors' names."""

from __future__ import annotations

import torch

from lfm.tensors.depth import Depth, depths


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


def test_each_stack_is_counted_by_itself_and_a_small_list_is_none() -> None:
    tensors = {f"encoder.block.{i}.layer.{j}.w": torch.zeros(10) for i in range(12) for j in range(2)}
    tensors |= {f"decoder.block.{i}.w": torch.zeros(20) for i in range(4)}
    tensors |= {f"head.{i}.w": torch.zeros(3) for i in (0, 2)}
    found = depths(tensors)
    assert found["encoder.block.11.layer.0.w"] == Depth(11, 12, "encoder.block.11")
    assert found["decoder.block.1.w"].fraction == 1 / 3
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
