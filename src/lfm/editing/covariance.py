"""How keys lie in running text: C = E[k kᵀ], uncentred, in fp64; of no more text than it takes, and once a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lfm.core.errors import EditError
from lfm.core.heavy import torch
from lfm.core.interfaces import Codec
from lfm.core.method import Run
from lfm.editing import kept
from lfm.editing.form import CAUSAL, Form, at, in_decoder, reading
from lfm.editing.solve import through
from lfm.models.language import batches
from lfm.models.resume import activations

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lfm.editing.setting import Setting

ENOUGH = 10
"""Tokens for each dimension of the key: 2506.04226 finds that 2 to 10 give what a hundred times more do."""

TOLERANCE = 0.2
"""Text is enough where twice as much lowers the damage of an update by less than this share of it. What is left to gain
is about as much again as one more doubling would: excess falls as in/(tokens − in)."""
DOUBLINGS = 3
"""Times that the text is doubled: an eighth of it is read first."""
TRIED = 32
"""Keys, of other text, by which that is told."""


class Moment(NamedTuple):
    """C (in, in) in fp64; the tokens it is of; the excess that about half of them had over it (0: unknown)."""

    matrix: Tensor
    tokens: int
    excess: float


def moments(here: Setting, blocks: Sequence[int], run: Run, ridge: float) -> dict[int, Moment]:
    """C of each block's projection, over as much of the setting's text as it takes: from disk, or all that are missing
    in one pass.

    The module must be as the setting's model is, up to these blocks' keys.
    """
    key = {
        "model": here.digest,
        "text": kept.ids_digest(here.text, here.probe),
        "ridge": ridge,
        **kept.arithmetic(here.module),
    }
    found: dict[int, Moment] = {}
    for block in blocks:
        if here.digest and (read := kept.recalled("covariance", {**key, "block": block})):
            told, tensors = read
            found[block] = Moment(tensors["moment"], told["tokens"], told["excess"])
    missing = [block for block in blocks if block not in found]
    for block, moment in _measured(here, missing, run, ridge).items() if missing else ():
        found[block] = moment
        if here.digest:
            told = {"tokens": moment.tokens, "excess": moment.excess}
            kept.keep("covariance", {**key, "block": block}, told, {"moment": moment.matrix})
    return {block: found[block] for block in blocks}


def notes(found: Iterable[tuple[int, float]]) -> dict[str, float]:
    """Of the (tokens, excess) of the blocks that are edited, what a run notes: the most text, and the worst."""
    tokens, excesses = zip(*found, strict=True)
    return {"covariance_tokens": max(tokens), "covariance_excess": max(excesses)}


def _measured(here: Setting, blocks: Sequence[int], run: Run, ridge: float) -> dict[int, Moment]:
    """Each block's, of the text up to the doubling at which its solve has converged."""
    tried = _keys(here, blocks)
    totals: dict[int, Any] = dict.fromkeys(blocks, 0)
    before: dict[int, Tensor] = {}
    done: dict[int, Moment] = {}
    count = 0
    parts = doublings(here.text)
    for place, rows in enumerate(parts):
        live = [block for block in blocks if block not in done]
        more = sum(map(len, rows))
        count += more
        for block, moment in second_moments(here.module, here.codec, live, rows, run, here.form).items():
            totals[block] = totals[block] + moment * more
            now = totals[block] / count
            with_ridge = loaded(now, max(ridge, 1e-9))
            best = torch.linalg.solve(with_ridge, tried[block])
            gone = excess(before[block], best, with_ridge, tried[block]) if block in before else 0.0
            before[block] = best
            if place == len(parts) - 1 or (place and gone <= TOLERANCE):
                done[block] = Moment(now, count, gone)
    return done


def excess(rough: Tensor, best: Tensor, moment: Tensor, keys: Tensor) -> float:
    """Mean over keys (in, n) of how much more an update along `rough` moves the outputs of other keys, squared and over
    text, than one along best = C⁻¹k does, at the same change of k's: (uᵀCu)(kᵀC⁻¹k)/(uᵀk)² − 1, tan² of their angle in
    the metric C."""
    moved = (rough * (moment @ rough)).sum(0) / (rough * keys).sum(0) ** 2
    return float((moved * (keys * best).sum(0) - 1).clamp(min=0).mean())


def doublings(rows: Sequence[Sequence[int]]) -> list[list[Sequence[int]]]:
    """The rows cut so that each part holds about as many tokens as all before it; none empty."""
    total = sum(map(len, rows))
    parts: list[list[Sequence[int]]] = [[] for _ in range(DOUBLINGS + 1)]
    seen = 0
    for row in rows:
        place = next(i for i in range(DOUBLINGS + 1) if seen * 2 ** (DOUBLINGS - i) < total)
        parts[place].append(row)
        seen += len(row)
    return [part for part in parts if part]


def _keys(here: Setting, blocks: Sequence[int]) -> dict[int, Tensor]:
    """(in, n) fp64: each block's keys at tokens of the probe, evenly spread."""
    read = reading(here.form, here.codec.tokenizer, here.probe[:TRIED])
    seen = activations(here.module, read.batch, [at(here.module, "ffn_key", block) for block in blocks])
    found = {}
    for block, keys in zip(blocks, seen, strict=True):
        kept_keys = keys.cpu()[read.tokens(in_decoder(here.module, block))].double()
        found[block] = kept_keys[:: max(1, len(kept_keys) // TRIED)][:TRIED].T.contiguous()
    return found


def second_moment(module: nn.Module, codec: Codec, block: int, ids: Sequence[Sequence[int]], run: Run) -> Tensor:
    """C (in, in) fp64 on the CPU, of the keys of a block's projection at every token of the rows."""
    return second_moments(module, codec, [block], ids, run)[block]


def second_moments(
    module: nn.Module,
    codec: Codec,
    blocks: Sequence[int],
    ids: Sequence[Sequence[int]],
    run: Run,
    form: Form = CAUSAL,
) -> dict[int, Tensor]:
    """C (in, in) of each block's projection, as `second_moment` tells it: all in one pass over the rows."""
    totals: list[Any] = [0] * len(blocks)
    counts = [0] * len(blocks)
    groups = batches([len(row) for row in ids])
    which = f"block{'s' if len(blocks) > 1 else ''} {', '.join(map(str, blocks))}"
    for group in run.track(groups, f"covariance of keys, {which}"):
        read = reading(form, codec.tokenizer, [ids[i] for i in group])
        seen = activations(module, read.batch, [at(module, "ffn_key", block) for block in blocks])
        for place, keys in enumerate(seen):
            keys = keys[read.tokens(in_decoder(module, blocks[place])).to(keys.device)]
            counts[place] += len(keys)
            keys = keys.cpu().double() if keys.device.type == "mps" else keys.double()
            totals[place] = totals[place] + keys.T @ keys
    return {block: total.cpu() / max(count, 1) for block, total, count in zip(blocks, totals, counts, strict=True)}


def loaded(moment: Tensor, ridge: float) -> Tensor:
    """C + ridge·tr(C)/d·I: what can be solved with, however little text C was measured on."""
    return moment + ridge * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)


def factored(moment: Tensor) -> Tensor:
    """L of C = LLᵀ. EditError where C is singular: with little text and no ridge."""
    lower, failed = torch.linalg.cholesky_ex(moment)
    if failed:
        raise EditError(
            "keys of other text do not span all directions",
            why=f"their covariance, {len(moment)} wide, is singular",
            fix="a larger ridge, or more text or tokens",
        )
    return lower


def rank_one(change: Tensor, key: Tensor, lower: Tensor, divisor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(b, a) with b aᵀ k = change, the update of least ‖b aᵀ C^½‖: a = u/(uᵀk), u = C⁻¹k. All fp64, vectors.

    lower: L of C = LLᵀ, factored once for all edits of a block. divisor: a key in the place of the k that divides.
    """
    u = through(lower, key[:, None])[:, 0]
    return change, u / (u @ (key if divisor is None else divisor))
