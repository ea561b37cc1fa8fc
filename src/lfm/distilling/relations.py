"""How the records of a batch lie to one another in a model, and how far a student's relations are from its teacher's.

Rows (B, C) are one vector a record; the two models' may be of different widths. All losses are scalars.
Sources: relational distillation 1904.05068, similarity-preserving 1907.09682; the means and small constants as in both
papers' released code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lfm.core.heavy import F, torch

if TYPE_CHECKING:
    from torch import Tensor

SMALL = 1e-12
"""Squared distances are no smaller: the root of zero has no gradient."""


def distances(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber (δ = 1) between the distances of all pairs of rows, each model's over their mean; mean of B² pairs.

    Nothing changes where one model's rows are moved, turned or scaled as a whole. Fewer than 2 rows: 0.
    """
    if len(student) < 2:
        return student.sum() * 0
    return F.smooth_l1_loss(_apart(student.float()), _apart(teacher.float()))


def _apart(x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        squares = x.square().sum(1)
        between = (squares[:, None] + squares[None] - 2 * x @ x.T).clamp(min=SMALL).sqrt()
    between = between * (1 - torch.eye(len(x), device=x.device))
    return between / (between.sum() / (len(x) * (len(x) - 1)))


def angles(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber between the cosines of the angles that all triples of rows form; mean of B³. Fewer than 3 rows: 0."""
    if len(student) < 3:
        return student.sum() * 0
    return F.smooth_l1_loss(_angles(student.float()), _angles(teacher.float()))


def _angles(x: Tensor) -> Tensor:
    sides = F.normalize(x[None] - x[:, None], dim=2)
    with torch.autocast(x.device.type, enabled=False):
        return sides @ sides.transpose(1, 2)


def similarities(student: Tensor, teacher: Tensor) -> Tensor:
    """1/B² ‖G_s − G_t‖²_F of the rows' products with one another, each row of G over its length (1907.09682)."""
    return (_similar(student.float()) - _similar(teacher.float())).square().mean()


def _similar(x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return F.normalize(x @ x.T, dim=1)
