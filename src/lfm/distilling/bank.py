"""The pictures that a student learns from while there is no data: the last so many that were made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, final

from lfm.core.heavy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.interfaces import Batch


@final
class Bank:
    """Rows by name, pixel_values first; the oldest give way. A room for as many as one batch holds but the newest."""

    def __init__(self, room: int, device: torch.device) -> None:
        self.room, self.device, self.made = room, device, 0
        self.rows: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return min(self.made, self.room)

    def add(self, batch: Batch) -> None:
        """Put in rows (n, …); of more than there is room for, the last ones. All batches have the same names."""
        new = {name: tensor.detach()[-self.room :].to(self.device) for name, tensor in batch.items()}
        for name, tensor in new.items():
            if name not in self.rows:
                assert not self.made, f"{name} is new in a bank that already has rows without it"
                self.rows[name] = tensor.new_zeros((self.room, *tensor.shape[1:]))
        many = len(next(iter(new.values())))
        places = (torch.arange(many, device=self.device) + self.made) % self.room
        for name, kept in self.rows.items():
            kept[places] = new[name]
        self.made += many

    def draw(self, many: int, even: str = "") -> Batch:
        """So many rows, as `chosen`."""
        places = self.chosen(many, even)
        return {name: kept[places] for name, kept in self.rows.items()}

    def chosen(self, many: int, even: str = "") -> Tensor:
        """Places of so many rows, each once at most, drawn from torch's own generator, which the loop seeds by step.

        even: the name of whole numbers (n,), such as classes, each of which is to be drawn as often; none: any row is.
        """
        if even:
            _, which, counts = self.rows[even][: len(self)].cpu().unique(return_inverse=True, return_counts=True)
            places = torch.multinomial(1 / counts[which].double(), min(many, len(self)))
        else:
            places = torch.randperm(len(self))[:many]
        return places.to(self.device)

    def aids(self) -> dict[str, Tensor]:
        """All there is, for a checkpoint."""
        rows = {f"row/{name}": kept[: len(self)].clone() for name, kept in self.rows.items()}
        return {"made": torch.tensor(self.made), **rows}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `aids` gave."""
        for key, tensor in tensors.items():
            if key == "made":
                self.made = int(tensor)
            else:
                kept = tensor.new_zeros((self.room, *tensor.shape[1:]))
                kept[: len(tensor)] = tensor
                self.rows[key.removeprefix("row/")] = kept.to(self.device)
