"""How several models' numbers become one, and what is known of each model's before: the formulas that rules share.

All are compiled (lfm.fusing.kernel); x is a tuple with one number a model.
"""

from __future__ import annotations

from lfm.fusing.kernel import Each


def change(base: float, x: float) -> float:
    """How far a model has moved from the base."""
    return x - base


def multiplied(x: float, grow: float) -> float:
    """A change that is known already, grown."""
    return grow * x


def dropped(base: float, x: float, density: float, grow: float, random: float) -> float:
    """A change that is kept with probability `density`, and then multiplied by `grow`."""
    return grow * (x - base) if random < density else 0.0


def weighted(x: Each, weight: Each) -> float:
    """Σ wᵢ xᵢ"""
    total = weight[0] * x[0]  # not from 0.0: −0.0 stays what it is
    for i in range(1, len(x)):
        total += weight[i] * x[i]
    return total


def added(base: float, x: Each, weight: Each, scale: float) -> float:
    """base + scale Σ wᵢ xᵢ, where x are changes."""
    return moved(base, scale * weighted(x, weight))


def agreed(base: float, x: Each, weight: Each, scale: float, divide: float, cancelled: float) -> float:
    """base + scale times the sum of those wᵢ xᵢ whose sign is that of Σ wᵢ xᵢ, by the sum of their wᵢ if `divide` is 1.

    cancelled: the sign that is taken where the sum is exactly 0; with 0 the base stays.
    """
    elected = weighted(x, weight)
    if elected == 0.0:
        elected = cancelled
    total, mass = 0.0, 0.0
    for i in range(len(x)):
        part = weight[i] * x[i]
        same = part * elected > 0.0
        total += part if same else 0.0
        mass += weight[i] if same else 0.0
    if divide == 1.0 and mass != 0.0:
        total /= mass
    return moved(base, scale * total)


def moved(base: float, by: float) -> float:
    """base + by; a change of nothing leaves the base's own bits."""
    return base if by == 0.0 else base + by


def product(a: int, b: int, x: Each) -> float:
    """What inner products add up."""
    return x[a] * x[b]


def magnitude(x: Each) -> float:
    """|x| of one model: what thresholds are on, and what l₁ norms add up."""
    return abs(x[0])
