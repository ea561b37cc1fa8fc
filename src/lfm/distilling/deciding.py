"""What can be learned of a classifier that tells classes and nothing else: how far pictures are from its decisions.

    d(x, θ; c) = the least λ at which x + λ θ/‖θ‖ is of class c,   by halving;   min over θ by the signs of its changes

A picture is the more of a class the nearer that class's region is to it: 1/d is its soft label (ZSDB3KD, 2106.03310,
whose code, zwang84/zsdb3kd, takes directions towards pictures of the class, and Sign-OPT (1909.10773) from there).
Every function here asks a number of questions that is known before, so that a budget can be kept to the last one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from lfm.core.heavy import torch

if TYPE_CHECKING:
    from torch import Tensor

WIGGLE, STEP = 0.1, 0.2
"""Of a direction of length 1: how far it is moved to see whether a region comes nearer, and then to come nearer."""

Decide = Callable[["Tensor"], "Tensor"]
"""Pictures (n, …) → their classes (n,)."""


def noise(many: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """(many, *shape) in 0 … 1: each as light and as rough as is drawn for it.

    A teacher names more classes of it than of one kind of noise: of zoo:vit's digits 8 took 35 % of it, and 57 % of
    uniform noise.
    """
    flat, rough = torch.rand(2, many, *[1] * len(shape), generator=generator)
    light = flat * (torch.rand(many, *shape, generator=generator) + 0.2)
    return (light + rough * torch.randn(light.shape, generator=generator)).clamp(0, 1)


def along(
    decide: Decide, x: Tensor, toward: Tensor, within: Callable[[Tensor], Tensor], far: Tensor, halvings: int
) -> Tensor:
    """(n,) how far from x (n, …) along the unit directions `toward` the region begins; `halvings` · n questions.

    within: classes (n,) → whether each is in the region. far: (n,) distances that are in it; what is told is one that
    is in it too, no more than far / 2^halvings beyond one that is not, where the region is met once on the way.
    """
    low, high = torch.zeros_like(far), far.clone()
    for _ in range(halvings):
        middle = (low + high) / 2
        inside = within(decide(x + _by(middle, x) * toward))
        high, low = torch.where(inside, middle, high), torch.where(inside, low, middle)
    return high


def nearer(
    decide: Decide,
    x: Tensor,
    toward: Tensor,
    within: Callable[[Tensor], Tensor],
    far: Tensor,
    *,
    directions: int,
    halvings: int,
    wiggle: float,
    step: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Directions in which the region is no further than along `toward`, and how far; (directions + 1 + halvings) · n.

    One step of Sign-OPT: u is drawn, and tells by one question whether it is nearer along θ + wiggle · u than `far`;
    θ moves against the mean of those by which it is not, by `step`, and is measured where that brought it nearer.
    """
    slope = torch.zeros_like(toward)
    for _ in range(directions):
        u = _unit(torch.randn(x.shape, generator=generator).to(x))
        inside = within(decide(x + _by(far, x) * _unit(toward + wiggle * u)))
        slope += torch.where(_by(inside, x), -u, u) / directions
    tried = _unit(toward - step * _unit(slope))
    better = within(decide(x + _by(far, x) * tried))
    # measured for all, so that the number of questions is known; of the others the answer is not used
    found = along(decide, x, tried, within, far, halvings)
    return torch.where(_by(better, x), tried, toward), torch.where(better, found, far)


def rarest(own: Tensor, many: int) -> Tensor:
    """(many,) places of pictures of classes (n,), as many of each class as there are: first ones first."""
    hot = own[:, None] == own.unique()[None, :]
    rank = (hot.cumsum(0) * hot).sum(1)
    return rank.argsort(stable=True)[:many]


def away(
    decide: Decide, x: Tensor, own: Tensor, *, ways: int, halvings: int, length: float, generator: torch.Generator
) -> Tensor:
    """Pictures (n, C, H, W) in 0 … 1 moved by a length from the nearest decision found, where they keep their class.

    Of `ways` directions drawn; (ways · (1 + halvings) + 1) · n questions.
    """
    reach = torch.full((len(x),), math.sqrt(math.prod(x.shape[1:]))).to(x)
    nearest, way = torch.full_like(reach, math.inf), torch.zeros_like(x)
    for _ in range(ways):
        toward = _unit(torch.randn(x.shape, generator=generator).to(x))
        out = decide(x + _by(reach, x) * toward) != own
        found = along(decide, x, toward, lambda told: told != own, reach, halvings)
        closer = out & (found < nearest)
        nearest, way = torch.where(closer, found, nearest), torch.where(_by(closer, x), toward, way)
    further = (x - length * way).clamp(0, 1)
    return torch.where(_by(decide(further) == own, x), further, x)


def distances(
    decide: Decide, x: Tensor, own: Tensor, classes: int, *, halvings: int, refine: int, generator: torch.Generator
) -> Tensor:
    """(n, classes) how far pictures are from each other class, towards one of them that is of it; else infinite.

    refine: directions drawn to come nearer. (classes − 1) · n · (halvings, and refine + 1 + halvings) questions.
    """
    found = torch.full((len(x), classes), math.inf).to(x)
    place = torch.arange(len(x)).to(x.device)
    for shift in range(1, classes):
        aim = (own + shift) % classes
        known = (aim[:, None] == own[None, :]).any(1)
        toward, far = unit(torch.stack([_one_of(x, own, aim, i, generator) for i in range(len(x))]) - x)

        def within(told: Tensor, aim: Tensor = aim) -> Tensor:
            return told == aim

        way = along(decide, x, toward, within, far, halvings)
        if refine:
            settings = {"directions": refine, "halvings": halvings, "wiggle": WIGGLE, "step": STEP}
            _, way = nearer(decide, x, toward, within, way, generator=generator, **settings)
        found[place, aim] = torch.where(known, way.clamp(min=1e-6), found[place, aim])
    return found


def _one_of(x: Tensor, own: Tensor, aim: Tensor, place: int, generator: torch.Generator) -> Tensor:
    """One of the pictures of that class; another picture where there is none, whose answers are then not used."""
    found = (own == aim[place]).nonzero().flatten()
    choice = int(torch.randint(2**31, (), generator=generator))
    return x[found[choice % len(found)]] if len(found) else x[(place + 1) % len(x)]


def soft(distances: Tensor, own: Tensor) -> Tensor:
    """Logits (n, classes) of distances (n, classes): 1/d of other classes, and their sum of its own (2106.03310).

    What is infinitely far counts 0. distances: its own class's are not read.
    """
    others = (1 / distances).scatter(1, own[:, None], 0.0)
    return others.scatter(1, own[:, None], others.sum(1, keepdim=True))


def unit(direction: Tensor) -> tuple[Tensor, Tensor]:
    """Directions (n, …) of length 1, and their lengths (n,)."""
    length = direction.flatten(1).norm(dim=1)
    return direction / _by(length.clamp(min=1e-12), direction), length


def _unit(direction: Tensor) -> Tensor:
    return unit(direction)[0]


def _by(each: Tensor, like: Tensor) -> Tensor:
    return each.view(-1, *[1] * (like.ndim - 1))
