"""What the affinity of all pairs of positions costs beside its estimate by random directions, as positions grow.

Both losses with their gradients, in turn in one run: multiplications counted exactly, CPU seconds the least of the
rounds, bytes the most that tensors held at once. The last line is the power of the positions that each grows with from
the second-last size to the last (1: as they do, 2: as their square), and how far the estimate strays from the exact.

OMP_NUM_THREADS=1 python benchmarks/affinity.py
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from lfm.distilling import inside


class Taken(NamedTuple):
    operations: float
    kept: float  # bytes that wait for the backward pass
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--positions", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "affinity": inside.affinity,
        "ffa": lambda s, t: inside.fast_affinity(s, t, given.draws),
    }
    print("positions   million operations        kept, MB            CPU ms")
    print("            affinity     ffa     affinity     ffa     affinity     ffa    times less time")
    found: list[dict[str, Taken]] = []
    student = teacher = torch.empty(0)
    for n in given.positions:
        student, teacher = torch.randn(2, 1, n, given.channels, generator=torch.Generator().manual_seed(0))
        row = {name: counted(loss, student, teacher) for name, loss in losses.items()}
        for _ in range(given.rounds):  # one after the other, so that both meet the same machine
            for name, loss in losses.items():
                row[name] = row[name]._replace(seconds=min(row[name].seconds, timed(loss, student, teacher)))
        a, f = row["affinity"], row["ffa"]
        print(
            f"{n:9d} {a.operations / 1e6:11.1f} {f.operations / 1e6:7.1f} {a.kept / 1e6:12.2f} {f.kept / 1e6:7.2f}"
            f" {1e3 * a.seconds:12.2f} {1e3 * f.seconds:7.2f} {a.seconds / f.seconds:18.1f}"
        )
        found.append(row)
    step = math.log(given.positions[-1] / given.positions[-2])
    for name in losses:
        powers = [math.log(y / x) / step for x, y in zip(found[-2][name], found[-1][name])]
        print(
            f"{name} grows with the power {powers[0]:.2f} in operations, {powers[1]:.2f} kept, {powers[2]:.2f} in time"
        )
    exact = float(inside.affinity(student, teacher))
    torch.manual_seed(0)
    drawn = torch.stack([inside.fast_affinity(student, teacher, given.draws) for _ in range(100)]) / exact
    print(f"ffa / affinity over 100 draws: mean {drawn.mean():.3f}, standard deviation {drawn.std():.3f}")


def counted(loss: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor) -> Taken:
    s = student.clone().requires_grad_(True)
    held: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter, saved_tensors_hooks(keep, lambda x: x):
        loss(s, teacher).backward()
    return Taken(counter.get_total_flops(), sum(held.values()), math.inf)


def timed(loss: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor) -> float:
    s = student.clone().requires_grad_(True)
    began = time.process_time()
    loss(s, teacher).backward()
    return time.process_time() - began


if __name__ == "__main__":
    main()
