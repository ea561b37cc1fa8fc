"""Distances to decisions: those of linear classifiers in closed form, with as many questions as is said."""

from __future__ import annotations

import math

import pytest
import torch

from lfm.distilling import deciding


class Linear:
    """argmax of W x + b, which counts the questions."""

    def __init__(self, seed: int = 0, classes: int = 4, size: int = 6) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.w = torch.randn(classes, size, generator=draw, dtype=torch.float64)
        self.b = torch.randn(classes, generator=draw, dtype=torch.float64)
        self.asked = 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.asked += len(x)
        return (x.flatten(1) @ self.w.T + self.b).argmax(-1)


def inputs(count: int, *shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_noise_is_as_light_and_as_rough_as_is_drawn_for_each_picture() -> None:
    """flat · (u + .2) + rough · n, between black and white: light by flat's .7 on average, unalike among pictures."""
    made = deciding.noise(2000, (3, 8, 8), torch.Generator().manual_seed(0))
    again = deciding.noise(2000, (3, 8, 8), torch.Generator().manual_seed(0))
    assert torch.equal(made, again) and made.min() == 0 and made.max() == 1
    flat, rough = torch.rand(2, 2000, 1, 1, 1, generator=torch.Generator().manual_seed(0)).flatten(1)
    smooth = rough < 0.02
    assert smooth.sum() > 10
    light = made[smooth].flatten(1).mean(1)
    torch.testing.assert_close(light, 0.7 * flat[smooth], atol=0.05, rtol=0)


def test_along_a_direction_it_is_where_two_lines_cross() -> None:
    """Of two classes: λ = (m · x + c) / −(m · θ), with m the difference of their weights."""
    decide = Linear(classes=2)
    x, theta = inputs(20, 6), deciding.unit(inputs(20, 6, seed=2))[0]
    own = decide(x)
    m, c = decide.w[1] - decide.w[0], decide.b[1] - decide.b[0]
    crossing = -(x @ m + c) / (theta @ m)
    met = (crossing > 0) & (crossing < 64)
    assert met.sum() > 5
    x, theta, own, crossing = x[met], theta[met], own[met], crossing[met]
    decide.asked = 0
    found = deciding.along(decide, x, theta, lambda told: told != own, torch.full_like(crossing, 64.0), 30)
    assert torch.allclose(found, crossing, atol=64 / 2**30)
    assert (found >= crossing).all()  # what is told lies beyond
    assert decide.asked == 30 * len(x)


def test_the_signs_of_changes_lead_towards_the_plane() -> None:
    """The least distance to a plane is |m · x + c| / ‖m‖; steps come near it and never fall below."""
    decide = Linear(classes=2)
    x = inputs(10, 6)
    own = decide(x)
    m, c = decide.w[1] - decide.w[0], decide.b[1] - decide.b[0]
    least = (x @ m + c).abs() / m.norm()
    side = torch.sign(x @ m + c)[:, None]
    toward = deciding.unit(-side * m + 2 * m.norm() * deciding.unit(inputs(10, 6, seed=3))[0])[0]
    slope = -(side[:, 0] * (toward @ m))
    toward = torch.where(slope[:, None] > 0.1, toward, -side * deciding.unit(m[None])[0])
    far = torch.full_like(least, 512.0)
    first = deciding.along(decide, x, toward, lambda told: told != own, far, 40)
    draw, way, distance = torch.Generator().manual_seed(0), toward, first
    decide.asked = 0
    for _ in range(25):
        way, distance = deciding.nearer(
            decide, x, way, lambda told: told != own, distance,
            directions=20, halvings=30, wiggle=0.01, step=0.1, generator=draw,
        )  # fmt: skip
    assert decide.asked == 25 * (20 + 1 + 30) * len(x)
    assert (distance >= least - 1e-9).all() and (distance <= first + 1e-9).all()
    assert (first / least).max() > 1.5, "all began near, or this shows nothing"
    assert ((distance / least) < 1.05).all(), distance / least


def test_pictures_move_away_from_decisions_and_keep_their_class() -> None:
    decide = Linear(classes=2, size=12)
    decide.b = -decide.w.sum(1) / 2  # the plane passes through grey
    x = torch.rand(30, 3, 2, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    own = decide(x)
    m, c = decide.w[1] - decide.w[0], decide.b[1] - decide.b[0]
    decide.asked = 0
    moved = deciding.away(decide, x, own, ways=6, halvings=10, length=0.1, generator=torch.Generator().manual_seed(5))
    assert decide.asked == (6 * 11 + 1) * 30
    assert torch.equal(decide(moved), own) and moved.min() >= 0 and moved.max() <= 1
    before, after = ((p.flatten(1) @ m + c).abs().mean() for p in (x, moved))
    assert after > before + 0.02 * m.norm()


def test_it_is_the_nearest_way_out_of_those_drawn_that_pictures_move_away_from() -> None:
    """Along θ a plane is met at −(m · x + c) / (m · θ): the least of those above 0 and within a picture's diagonal."""
    decide = Linear(classes=2, size=12)
    m = decide.w[1] - decide.w[0]
    decide.b = torch.stack([-0.6 * m.norm() - decide.w[1].sum() / 2, -decide.w[0].sum() / 2])
    c = decide.b[1] - decide.b[0]
    x = torch.rand(30, 3, 2, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    draw = torch.Generator().manual_seed(5)
    ways = [deciding.unit(torch.randn(x.shape, generator=draw).to(x))[0] for _ in range(3)]
    met = torch.stack([-(x.flatten(1) @ m + c) / (way.flatten(1) @ m) for way in ways])
    met[(met <= 0) | (met > math.sqrt(12))] = math.inf
    nearest = met.min(0)
    moved = deciding.away(
        decide, x, decide(x), ways=3, halvings=30, length=0.1, generator=torch.Generator().manual_seed(5)
    )
    for i in range(30):
        expected = x[i]
        if nearest.values[i].isfinite():
            further = (x[i] - 0.1 * ways[int(nearest.indices[i])][i]).clamp(0, 1)
            expected = further if decide(further[None]) == decide(x[i : i + 1]) else x[i]
        assert torch.allclose(moved[i], expected, atol=1e-12), i
    known = met.isfinite().sum(0)
    assert (known == 0).any() and (known > 1).any(), "or one way is as good as another"
    assert (nearest.values[known > 0] > math.sqrt(12) / 4).any(), "or a shorter reach would do"


def test_refined_distances_are_no_longer_and_cost_as_many_questions_as_is_said() -> None:
    decide = Linear(classes=2, size=12)
    x = inputs(24, 3, 2, 2)
    own = decide(x)
    found = {}
    for refine, each in ((0, 12), (8, 12 + 8 + 1 + 12)):
        decide.asked = 0
        draw = torch.Generator().manual_seed(0)
        found[refine] = deciding.distances(decide, x, own, 2, halvings=12, refine=refine, generator=draw)
        assert decide.asked == each * 24
    plain, refined = (found[refine][torch.arange(24), 1 - own] for refine in (0, 8))
    assert (refined <= plain).all() and (refined < 0.99 * plain).any()


def test_distances_are_to_where_each_class_begins() -> None:
    decide = Linear(classes=3, size=12)
    x = inputs(24, 3, 2, 2)
    own = decide(x)
    assert len(own.unique()) == 3
    decide.asked = 0
    settings = {"halvings": 30, "refine": 0}
    found = deciding.distances(decide, x, own, 4, generator=torch.Generator().manual_seed(0), **settings)
    assert decide.asked == 3 * 30 * 24
    assert found[:, 3].isinf().all(), "of a class that no picture is of, nothing is known"
    for i in range(24):
        for c in range(3):
            if c == own[i]:
                assert math.isinf(found[i, c])
                continue
            # a class begins no nearer than the plane between it and the picture's own
            m = decide.w[c] - decide.w[own[i]]
            least = -float(x[i].flatten() @ m + decide.b[c] - decide.b[own[i]]) / float(m.norm())
            assert least - 1e-6 <= found[i, c] <= max(float((x[i] - other).norm()) for other in x[own == c])


def test_soft_labels_are_those_written_out() -> None:
    distances = torch.tensor([[math.inf, 2.0, 4.0], [0.5, math.inf, math.inf]])
    told = deciding.soft(distances, torch.tensor([0, 1]))
    assert torch.allclose(told, torch.tensor([[0.75, 0.5, 0.25], [2.0, 2.0, 0.0]]))


def test_the_rarest_come_first() -> None:
    own = torch.tensor([0, 0, 0, 2, 0, 1, 2])
    assert sorted(deciding.rarest(own, 3).tolist()) == [0, 3, 5]
    assert sorted(deciding.rarest(own, 5).tolist()) == [0, 1, 3, 5, 6]
    assert deciding.rarest(own, 9).numel() == 7


def test_a_direction_has_length_one() -> None:
    way, length = deciding.unit(torch.full((1, 1, 3, 3), 2.0))
    assert length.item() == pytest.approx(6) and way.flatten().norm().item() == pytest.approx(1)
