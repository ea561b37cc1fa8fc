"""Keys and values: what a block's last projection reads and writes, and how it is changed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

from lfm.core.heavy import torch
from lfm.core.interfaces import LowRank
from lfm.editing.behind import continued, cut
from lfm.editing.form import at
from lfm.editing.rows import Rows, brief, groups, together, unlike
from lfm.models import structure
from lfm.models.resume import activations, agrees

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lfm.editing.behind import Behind
    from lfm.editing.rows import Joined

MANY = 8
"""Edits from which on it pays to see whether their rows can be cut."""


def projection(module: nn.Module, block: int) -> tuple[str, Any]:
    """(name, layer) of the projection that ends a block's feed-forward layer."""
    name = structure.site(module, at(module, "ffn_out", block))[0]
    return name, module.get_submodule(name)


def weight(layer: Any) -> Tensor:
    """A copy of the projection's weight as (out, in) fp64 on the CPU, however it is stored."""
    stored = layer.weight.detach().cpu().double()
    return stored.T.contiguous() if structure.transposed(layer) else stored


def put(layer: Any, base: Tensor, changes: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> None:
    """Set the projection to base + Σ b aᵀ, rounded as it will be stored, so that what is measured is what is saved."""
    keep(layer, base if not changes else base + product(changes), dtype)


def keep(layer: Any, total: Tensor, dtype: torch.dtype) -> None:
    """Set the projection to a weight (out, in), rounded as it will be stored."""
    total = total.to(dtype).float()
    with torch.no_grad():
        layer.weight.copy_(total.T if structure.transposed(layer) else total)


def box(weight: Tensor, reach: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The lowest and highest numbers of the dtype within reach of each weight, in fp32."""
    exact = weight.double()
    low, high = (exact - reach).to(dtype), (exact + reach).to(dtype)
    low = torch.where(low.double() < exact - reach, torch.nextafter(low, torch.full_like(low, math.inf)), low)
    high = torch.where(high.double() > exact + reach, torch.nextafter(high, torch.full_like(high, -math.inf)), high)
    return low.to(weight), high.to(weight)


def product(changes: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Σ b aᵀ (out, in) in fp64 of (b, a) as stored."""
    b, a = (torch.stack(vectors).double() for vectors in zip(*changes, strict=True))
    return b.T @ a


def of_least_rank(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """b (out, n) a (n, in) as factors of no greater rank than their product can have."""
    if b.shape[1] > min(b.shape[0], a.shape[1]):
        whole = (b.double() @ a.double()).float()
        small = torch.eye(min(whole.shape))
        b, a = (small, whole) if whole.shape[0] <= whole.shape[1] else (whole, small)
    return b.contiguous(), a.contiguous()


def at_subject(module: nn.Module, block: int, rows: Rows) -> tuple[Tensor, Tensor]:
    """(n, in) keys and (n, out) values at the subject's last token of each context; fp64 on the CPU."""
    seen = activations(module, rows.batch, [at(module, site, block) for site in ("ffn_key", "ffn_out")])
    places = torch.arange(rows.contexts), rows.subject[:-1]
    return seen[0].cpu()[places].double(), seen[1].cpu()[places].double()


def of_all(module: nn.Module, block: int, site: tuple[str, int], reads: Sequence[Rows]) -> tuple[Tensor, Tensor]:
    """(n, in) key of each edit at a block, and (n, width) what it has at a site behind the bare prompt; both at the
    subject's last token, fp64 on the CPU."""
    keys, values = _at(module, [("ffn_key", block), site], reads)
    return torch.stack([*map(mean, keys)]), torch.stack([each[0] for each in values])


def at_blocks(module: nn.Module, blocks: Sequence[int], reads: Sequence[Rows]) -> dict[int, Tensor]:
    """(n, in) key of each edit at each block, as `of_all` has them."""
    seen = _at(module, [("ffn_key", block) for block in blocks], reads)
    return {block: torch.stack([*map(mean, keys)]) for block, keys in zip(blocks, seen, strict=True)}


def _at(module: nn.Module, sites: list[tuple[str, int]], reads: Sequence[Rows]) -> list[list[Tensor]]:
    """Of each site, of each edit, (contexts, width) at the subject's last token."""
    home = next(module.parameters()).device
    where = [at(module, *site) for site in sites]
    upto = 1 + max(block for _, block in sites)
    found: list[dict[int, Tensor]] = [{} for _ in sites]
    parted = len(reads) >= MANY and _agree(module, where, upto, together([*map(brief, unlike(reads))], home))
    for group in groups(reads, parted=parted):
        joined = together([reads[i] for i in group], home)
        seen = _there(module, where, joined, cut(module, joined, upto) if parted else None)
        spans = list(zip(group, joined.bare.tolist(), joined.essence.tolist(), strict=True))
        for each, values in zip(found, seen, strict=True):
            each.update({number: values[first:last].cpu().double() for number, first, last in spans})
    return [[each[i] for i in range(len(reads))] for each in found]


def _there(module: nn.Module, where: Any, joined: Joined, behind: Behind | None) -> list[Tensor]:
    """Of each site (R, width) at the subjects' last tokens."""
    place = torch.zeros_like(joined.subject) if behind else joined.subject
    with continued(module, behind):
        seen = activations(module, behind.batch if behind else joined.batch, where)
    return [values.to(place.device)[torch.arange(len(place), device=place.device), place] for values in seen]


def _agree(module: nn.Module, where: Any, upto: int, joined: Joined) -> bool:
    """Whether rows that are cut give what whole ones do."""
    behind = cut(module, joined, upto) if joined.causal else None
    if behind is None:
        return False
    return all(map(agrees, _there(module, where, joined, None), _there(module, where, joined, behind)))


def mean(keys: Tensor) -> Tensor:
    """(in,) of the (n, in) keys in n contexts: half the bare prompt's, half the mean of the others', as MEMIT's code
    takes it and as the search for a value weighs them."""
    return (keys[0] + keys[1:].mean(0)) / 2 if len(keys) > 1 else keys[0]


Changes = dict[int, "tuple[Tensor, Tensor]"]
"""Block → (b (out, n), a (n, in)): b a is added to its projection."""


def of_rows(module: nn.Module, rows: Sequence[Sequence[int]], b: Tensor) -> Changes:
    """What adds b (n, out) to what n neurons, each (block, place), write."""
    made: Changes = {}
    names = structure.blocks(module)
    for block in sorted({block for block, _ in rows}):
        mine = [i for i, (other, _) in enumerate(rows) if other == block]
        a = torch.zeros(len(mine), structure.feed_forward(module, names[block]).inner)
        a[range(len(mine)), [rows[i][1] for i in mine]] = 1
        made[block] = b[mine].T.contiguous(), a
    return made


@final
class Projections:
    """The projections of some blocks, and what was added to them. The module holds the sum, rounded as it will be
    stored, so that what is measured is what is saved."""

    def __init__(self, module: nn.Module, blocks: Sequence[int], dtypes: Mapping[str, torch.dtype]) -> None:
        """dtypes: by the weight's name, what it is stored as; fp32 where it is not named."""
        self.blocks = tuple(blocks)
        self.names = {block: projection(module, block)[0] for block in self.blocks}
        self.added: dict[int, list[tuple[Tensor, Tensor]]] = {block: [] for block in self.blocks}
        self._layers = {block: projection(module, block)[1] for block in self.blocks}
        self._bases = {block: weight(layer) for block, layer in self._layers.items()}
        self._dtypes = {block: dtypes.get(f"{name}.weight", torch.float32) for block, name in self.names.items()}

    def show(self, changes: Changes) -> None:
        """What was kept, and these changes, of the blocks named in them; of the others what was kept."""
        for block in self.blocks:
            total = self._bases[block]
            if block in changes:
                b, a = changes[block]
                total = total + b.double() @ a.double()
            keep(self._layers[block], total, self._dtypes[block])

    def keep(self, changes: Changes) -> None:
        """Add changes for good."""
        for block, (b, a) in changes.items():
            self.added[block].append((b, a))
            self._bases[block] += b.double() @ a.double()
        self.show({})

    def low_rank(self) -> dict[str, LowRank]:
        """All that was added, by the projection's name; of no greater rank than the weight can have."""
        made = {}
        for block, changes in self.added.items():
            if not changes:
                continue
            b, a = of_least_rank(torch.cat([b for b, _ in changes], 1), torch.cat([a for _, a in changes]))
            made[self.names[block]] = LowRank(b, a, structure.transposed(self._layers[block]))
        return made
