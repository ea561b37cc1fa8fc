"""Causal tracing: the subject's embeddings are disturbed, states of the undisturbed run are put back, and p(object) is
read off (2202.05262, section 2).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from lfm.core.heavy import torch
from lfm.editing.cloze import Cloze, log_probability
from lfm.models import forward, structure
from lfm.models.language import BATCH_TOKENS

if TYPE_CHECKING:
    from torch import Tensor, nn

STATES = {"hidden": "hidden", "feed-forward": "ffn_out", "attention": "attention_out"}
"""What may be put back, by the site that gives it: a block's output, or what one of its two halves adds."""

PARTS = (
    "before the subject",
    "subject, first token",
    "subject, middle tokens",
    "subject, last token",
    "next token",
    "further tokens",
    "where it is said",
    "after that",
)
"""Parts of a prompt, in order. Where it is said: a causal prompt's last token, a masked one's blanks."""

State = tuple[str, int]
"""(module's name, token)."""


class Trace(NamedTuple):
    """p(object) of one fact as it is and, for S noises, disturbed (S,); effects (kinds, blocks, tokens, S), fp64."""

    clean: float
    disturbed: Tensor
    effects: Tensor


class Undisturbed(NamedTuple):
    """One fact read as it is: the outputs (T, width) of the modules asked for, by name, and p(object)."""

    outputs: Mapping[str, Tensor]
    probability: float


def module_of(module: nn.Module, kind: str, block: int) -> str:
    """The module whose output is a kind of state (a key of STATES) of a block."""
    return structure.site(module, (STATES[kind], block))[0]


def embedding_spread(module: Any, reads: Sequence[Cloze]) -> float:
    """The standard deviation of all numbers in the embeddings of all subjects' tokens."""
    table = module.get_input_embeddings().weight.detach()
    ids = [token for read in reads for token in read.ids[read.subject.start : read.subject.stop]]
    return float(table[torch.tensor(ids, device=table.device)].double().std(correction=0))


def noises(module: Any, read: Cloze, size: float, count: int, generator: torch.Generator) -> Tensor:
    """(count, n, d) for the embeddings of the subject's n tokens. size: the standard deviation."""
    width = int(module.get_input_embeddings().weight.shape[1])
    return size * torch.randn((count, len(read.subject), width), generator=generator)


def trace(
    module: nn.Module, read: Cloze, noise: Tensor, wide: int | None = None, kinds: Sequence[str] = tuple(STATES)
) -> Trace:
    """What putting each state of each kind back does, at every token. wide: blocks whose feed-forward or attention is
    put back together; none: a fifth of them."""
    blocks = len(structure.blocks(module))
    names = {kind: [module_of(module, kind, block) for block in range(blocks)] for kind in kinds}
    clean = undisturbed(module, read, [name for of_kind in names.values() for name in of_kind])
    low = disturbed(module, read, noise, clean, [()] * len(noise))
    wide = wide or max(1, round(blocks / 5))
    effects = []
    for kind, of_kind in names.items():
        for block in range(blocks):
            put = [of_kind[b] for b in window(block, 1 if kind == "hidden" else wide, blocks)]
            effects.append(_at_each_token(module, read, noise, clean, put) - low)
    shape = (len(names), blocks, len(read.ids), len(noise))
    return Trace(clean.probability, low, torch.stack(effects).reshape(shape))


def _at_each_token(module: Any, read: Cloze, noise: Tensor, clean: Undisturbed, put: Sequence[str]) -> Tensor:
    """(tokens, S) p(object) with the named modules' outputs at one token put back."""
    count, tokens = len(noise), range(len(read.ids))
    states: list[list[State]] = [[(name, token) for name in put] for token in tokens for _ in range(count)]
    told = disturbed(module, read, noise.repeat(len(tokens), 1, 1), clean, states)
    return told.reshape(len(tokens), count)


def undisturbed(module: nn.Module, read: Cloze, names: Sequence[str]) -> Undisturbed:
    outputs: dict[str, Tensor] = {}

    def keep(name: str, out: Tensor) -> Tensor:
        outputs[name] = out[0].detach().clone()
        return out

    with _changing(module, {name: lambda out, name=name: keep(name, out) for name in names}), torch.no_grad():
        logits = forward(module, {"input_ids": torch.tensor([read.ids])})
    return Undisturbed(outputs, float(log_probability(logits, read).exp()[0]))


def disturbed(
    module: Any, read: Cloze, noise: Tensor, clean: Undisturbed, put_back: Sequence[Sequence[State]]
) -> Tensor:
    """(R,) fp64 p(object) in R readings: noise (R, n, d) is added to the embeddings of the subject's n tokens, and then
    each reading gets those of its states back that `put_back` names, as they are undisturbed.
    """
    size = max(1, BATCH_TOKENS // len(read.ids))
    starts = range(0, len(noise), size)
    return torch.cat([_read(module, read, noise[i : i + size], clean, put_back[i : i + size]) for i in starts])


def _read(module: Any, read: Cloze, noise: Tensor, clean: Undisturbed, put_back: Sequence[Sequence[State]]) -> Tensor:
    where: dict[str, tuple[list[int], list[int]]] = {}
    for row, states in enumerate(put_back):
        for name, token in states:
            rows, tokens = where.setdefault(name, ([], []))
            rows.append(row)
            tokens.append(token)

    def disturb(out: Tensor) -> Tensor:
        out = out.clone()
        out[:, read.subject.start : read.subject.stop] += noise.to(out)
        return out

    def restore(name: str, out: Tensor) -> Tensor:
        rows, tokens = where[name]
        out = out.clone()
        out[rows, tokens] = clean.outputs[name][tokens].to(out)
        return out

    changes: dict[str, Any] = {name: lambda out, name=name: restore(name, out) for name in where}
    table = module.get_input_embeddings()
    embeddings = next(name for name, child in module.named_modules() if child is table)
    with _changing(module, {embeddings: disturb, **changes}), torch.no_grad():
        logits = forward(module, {"input_ids": torch.tensor([read.ids] * len(noise))})
    return log_probability(logits, read).exp().cpu()


@contextmanager
def _changing(module: nn.Module, changes: Mapping[str, Any]) -> Iterator[None]:
    """Within: each named module's output (the first of several) is what its function makes of it."""

    def hook(change: Any) -> Any:
        def changed(_: Any, __: Any, out: Any) -> Any:
            return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

        return changed

    handles = [module.get_submodule(name).register_forward_hook(hook(change)) for name, change in changes.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def part_of(read: Cloze, token: int) -> str:
    """Which part of the prompt a token is."""
    subject = read.subject
    if token in subject:
        return PARTS[3] if token == subject[-1] else PARTS[1] if token == subject[0] else PARTS[2]
    if token in read.places:
        return PARTS[6]
    if token < subject.start:
        return PARTS[0]
    return PARTS[7] if token > read.places[-1] else PARTS[4] if token == subject.stop else PARTS[5]


def by_part(read: Cloze, effects: Tensor) -> Tensor:
    """(S, kinds, parts, blocks) of (kinds, blocks, tokens, S): the mean over a part's tokens, NaN where it has none."""
    parts = [part_of(read, token) for token in range(len(read.ids))]
    means = []
    for part in PARTS:
        tokens = [i for i, p in enumerate(parts) if p == part]
        means.append(effects[:, :, tokens].mean(2) if tokens else torch.full_like(effects[:, :, 0], torch.nan))
    return torch.stack(means).permute(3, 1, 0, 2)


def window(block: int, width: int, blocks: int) -> range:
    """`width` blocks around one, fewer at the ends."""
    first = block - (width - 1) // 2
    return range(max(0, first), min(blocks, first + width))


def intervals(effects: Tensor, draws: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, 2.5 %, 97.5 %) over facts and noises of effects (F, S, …), NaN where a fact has no such cell.

    Each draw takes F facts with replacement, and for each of them S of its noises: what both leave to chance.
    """
    facts, noises, *cells = effects.shape
    flat = effects.double().reshape(facts * noises, -1)
    held = ~flat.isnan()
    values = flat.nan_to_num()
    chosen = torch.randint(facts, (draws, facts), generator=generator)
    heard = torch.randint(noises, (draws, facts, noises), generator=generator)
    places = (chosen[..., None] * noises + heard).reshape(draws, -1)
    weights = torch.zeros(draws, facts * noises, dtype=torch.double).scatter_add_(
        1, places, torch.ones_like(places, dtype=torch.double)
    )
    means = (weights @ values) / (weights @ held.double())
    low, high = means.nanquantile(torch.tensor([0.025, 0.975], dtype=torch.double), dim=0)
    mean = values.sum(0) / held.sum(0)
    return mean.reshape(cells), low.reshape(cells), high.reshape(cells)
