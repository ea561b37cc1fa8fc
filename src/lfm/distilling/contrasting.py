"""Pictures that a teacher can tell apart: a part of each is to be known for its own whole's (2105.08584).

    L_C = CE(local · wholeᵀ / τ, own),   views = normalised head(means of what the teacher's norms read)

The head is learned beside. Checked against zju-vipa/CMI.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from lfm.core import Run
from lfm.core.heavy import F, nn, torch
from lfm.distilling.generator import cropped, read_by
from lfm.distilling.pictures import jittered
from lfm.distilling.statistics import laid, norms
from lfm.train import seeded, state_of
from lfm.train.state import State

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.distilling.bank import Bank
    from lfm.distilling.datafree import Scene

VIEWS = "views"
"""In a bank's rows: what the norms read of a picture's part and of the whole (N, 2 · their channels)."""
WIDTH = 128
"""Of the space in which views are compared."""
OTHERS = 4096
"""Pictures of the bank, at most, that new ones are held against."""
PART = 0.25
"""Of a picture's area, the least that a part has."""


class Contrast(NamedTuple):
    """apart: (pictures, the bank) → L_C, and the pictures' views; after a pass of the whole through the teacher.

    optimizer, state: of the head.
    """

    apart: Callable[[Tensor, Bank], tuple[Tensor, Tensor]]
    optimizer: torch.optim.Optimizer
    state: State


def contrast(local: Tensor, whole: Tensor, temperature: float, new: int) -> Tensor:
    """L_C of parts (N, d) and wholes (N, d), both of length 1.

    The first `new` pictures, which are being made, and all others count as much: two means are added. No gradient goes
    through the wholes.
    """
    alike = local @ whole.detach().T / temperature
    each = F.cross_entropy(alike, torch.arange(len(alike), device=alike.device), reduction="none")
    return each[:new].mean() + each[new:].mean() if len(each) > new else each.mean()


@contextmanager
def contrasting(scene: Scene, lr: float, temperature: float, flip: bool, run: Run) -> Iterator[Contrast]:
    """A new head, beside the scene's teacher."""
    assert scene.module is not None
    layers = [scene.module.get_submodule(name) for name in norms(scene.module)]
    with read_by(layers) as read:

        def seen() -> Tensor:
            """Means (B, all channels) over all but the channels of what each layer read last."""
            every = [laid(layer, x) for layer, x in zip(layers, read, strict=True)]
            return torch.cat([x.reshape(len(x), -1, x.shape[-1]).mean(1) for x in every], 1)

        yield _contrast(scene, seen, lr, temperature, flip, run)


def _contrast(
    scene: Scene, seen: Callable[[], Tensor], lr: float, temperature: float, flip: bool, run: Run
) -> Contrast:

    place = scene.frame.low.device
    with torch.no_grad():
        scene.asked.tell(torch.zeros(1, *scene.frame.shape, device=place))
    channels = seen().shape[1]
    with seeded(run.seed_for("head")):
        head = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, WIDTH)).to(place)
    optimizer = torch.optim.Adam(head.parameters(), lr=lr)

    def apart(images: Tensor, bank: Bank) -> tuple[Tensor, Tensor]:
        whole = seen()
        scene.asked(jittered(cropped(images, PART), 0.0, flip))
        part = seen()
        views = torch.cat([part, whole], 1)
        old = [bank.rows[VIEWS][bank.chosen(OTHERS)]] if len(bank) else []
        parts, wholes = torch.cat([views, *old]).chunk(2, 1)
        return contrast(F.normalize(head(parts)), F.normalize(head(wholes)), temperature, len(images)), views.detach()

    return Contrast(apart, optimizer, state_of(head, "", optimizer))
