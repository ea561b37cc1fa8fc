"""What a teacher is like inside: its maps over places, laid beside a batch, and how far a student's are from them.

A map is (B, N, C): N places (tokens, patches, pixels of a feature map, frames) of C channels. mask (B, N) bool tells
which places count; None: all. All losses are scalars, means over the rows of a batch.
Sources: FitNets 1412.6550, attention transfer 1612.03928, feature affinity and its fast form 2302.10899.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lfm.core import Features, Gradients, Model, Run
from lfm.core.errors import MismatchError, ModelError
from lfm.core.heavy import F, torch
from lfm.data.language import IGNORED
from lfm.distilling.lesson import LIMIT, Lesson
from lfm.models import structure

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lfm.core.interfaces import Batch

INSIDE = "teacher.inside."
"""What the names of a batch's maps of the teacher begin with; their number follows."""

# ---------------------------------------------------------------------------------------------- where


def depths(places: int, levels: int) -> list[int]:
    """Which levels end each of so many equal parts of the depth, from 0; the last is always there."""
    return [math.ceil((i + 1) * levels / places) - 1 for i in range(places)]


def paired(student: nn.Module, teacher: Model, places: int) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Sites of a student and of its teacher at the same shares of their depth. places 0: all of the student's levels.

    ModelError where there are fewer levels than places, or where it is not known how many the teacher has.
    """
    own = len(structure.levels(student))
    theirs = teacher.facts.layers
    if teacher.can(Gradients):
        theirs = len(structure.levels(teacher.ask(Gradients).skeleton()))
    if not theirs:
        raise ModelError(
            f"it is not known how many blocks {teacher.ref} has",
            why="its facts do not count them, and it gives no gradients, whose module would tell",
        )
    places = places or min(own, theirs)
    if places > min(own, theirs):
        raise ModelError(
            f"there are no {places} places to compare",
            why=f"the student has {own} blocks or stages, the teacher {theirs}",
            fix=f"places={min(own, theirs)}",
        )
    return [("level", i) for i in depths(places, own)], [("level", i) for i in depths(places, theirs)]


def agree(teacher: Model, student: Model) -> None:
    """That both see the same places of a text: one vocabulary. MismatchError."""
    t, s = teacher.facts, student.facts
    if t.vocabulary_digest and s.vocabulary_digest and t.vocabulary_digest != s.vocabulary_digest:
        raise MismatchError(
            "teacher and student cut texts differently",
            why=f"{teacher.ref} and {student.ref} have different vocabularies, so that their places are not the same",
            fix="distill.response learns from answers alone",
        )


# ---------------------------------------------------------------------------------------------- maps


def mapped(value: Tensor, rows: int) -> Tensor:
    """(B, N, C) of what a block put out: (B, T, C), (B · T, C), or a map (B, C, H, W), rows of pixels in turn."""
    if value.ndim == 4:
        return value.flatten(2).transpose(1, 2)
    return structure.in_rows(value, rows)


def matched(student: Tensor, teacher: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Both over the same places: of images and sounds the finer map is averaged down to the coarser.

    kind: the task. A square number of places and one or two more (class tokens) loses these. MismatchError where the
    places of texts differ, or those of images are no square.
    """
    if student.shape[1] == teacher.shape[1]:
        return student, teacher
    if kind.startswith("audio"):
        n = min(student.shape[1], teacher.shape[1])
        return tuple(F.adaptive_avg_pool1d(x.transpose(1, 2), n).transpose(1, 2) for x in (student, teacher))  # type: ignore[return-value]
    if not kind.startswith("image"):
        raise MismatchError(
            f"the student sees {student.shape[1]} places where its teacher sees {teacher.shape[1]}",
            why="texts are compared token by token",
        )
    grids = [_grid(x) for x in (student, teacher)]
    side = min(grid.shape[-1] for grid in grids)
    return tuple(F.adaptive_avg_pool2d(grid, side).flatten(2).transpose(1, 2) for grid in grids)  # type: ignore[return-value]


def patches(places: int) -> int:
    """How many of an image's places are patches: a square; one or two before them are class tokens. MismatchError."""
    square = math.isqrt(places) ** 2
    if places - square > 2:
        raise MismatchError(f"{places} places are no square", why="images are compared patch by patch, in a square")
    return square


def _grid(x: Tensor) -> Tensor:
    side = math.isqrt(patches(x.shape[1]))
    return x[:, -side * side :].transpose(1, 2).unflatten(2, (side, side))


def counted(batch: Batch, places: int, task: str) -> Tensor | None:
    """(B, N) which places are no padding, where the batch tells; of an encoder-decoder, those of its answer.

    Of sounds the mask is over samples, and a place stands for as many of them as any other.
    """
    name = "labels" if task == "seq2seq-lm" else "attention_mask"
    mask = batch.get(name)
    if mask is None or mask.ndim != 2:
        return None
    if task.startswith("audio") and mask.shape[1] > places:
        real = (mask.sum(1) * places // mask.shape[1]).clamp(min=1)
        return torch.arange(places, device=mask.device) < real[:, None]
    if mask.shape[1] != places:
        return None
    return mask != (IGNORED if name == "labels" else 0)


def shown(
    lesson: Lesson,
    teacher: Model,
    sites: Sequence[tuple[str, int]],
    collate: Callable[[Sequence[int]], Batch],
    run: Run,
) -> Callable[[Sequence[int]], Batch]:
    """Numbers → `collate`'s batch with the teacher's maps at the sites beside it (`maps` takes them out again).

    Of images the teacher is asked once a record, and its maps are kept, up to 256 MB; of others at each step.
    """
    ask = teacher.ask(Features).features

    def asked(chosen: Sequence[int]) -> list[Tensor]:
        batch = lesson.theirs(chosen)
        # cloned: what is inferred takes no part in a gradient
        return [mapped(value, len(chosen)).cpu().clone() for value in ask(batch, sites)]

    def beside(chosen: Sequence[int], values: Sequence[Tensor]) -> Batch:
        return {**collate(chosen), **{f"{INSIDE}{i}": value for i, value in enumerate(values)}}

    first = asked(lesson.numbers[:1])
    whole = sum(value.nbytes for value in first) * len(lesson.numbers)
    if whole > LIMIT or not teacher.facts.task.startswith("image"):
        return lambda chosen: beside(chosen, asked(chosen))
    parts = [lesson.numbers[i : i + 64] for i in range(0, len(lesson.numbers), 64)]
    kept = run.once(
        "inside", lambda: [torch.cat(each) for each in zip(*[asked(part) for part in run.track(parts, "inside")])]
    )
    return lambda chosen: beside(chosen, [value[list(chosen)] for value in kept])


def maps(batch: Batch) -> list[Tensor]:
    """The teacher's maps in a batch, in the order of their sites."""
    return [batch[f"{INSIDE}{i}"] for i in range(sum(name.startswith(INSIDE) for name in batch))]


# ---------------------------------------------------------------------------------------------- losses


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    return values.mean() if mask is None else (values * mask).sum() / mask.sum().clamp(min=1)


def hint(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """‖s − t‖² / ‖t‖², both of one width (FitNets; there without the denominator, which makes it free of scale)."""
    student, teacher = student.float(), teacher.float()
    apart = (student - teacher).square().mean(-1)
    return _mean(apart, mask) / _mean(teacher.square().mean(-1), mask).clamp(min=1e-12)


def attention(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """‖q_s/‖q_s‖ − q_t/‖q_t‖‖² of q = Σ_c x_c² over the places (1612.03928, F²_sum); between 0 and 2."""
    told = [_attended(x.float(), mask) for x in (student, teacher)]
    return (told[0] - told[1]).square().sum(-1).mean()


def _attended(x: Tensor, mask: Tensor | None) -> Tensor:
    q = x.square().mean(-1)
    return F.normalize(q if mask is None else q * mask, dim=-1)


def affinity(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """1/N² ‖ŜᵀŜ − T̂ᵀT̂‖²_F, the cosines between all pairs of places (2302.10899, FA). O(N² C)."""
    with torch.autocast(student.device.type, enabled=False):
        s, t = _unit(student, mask), _unit(teacher, mask)
        apart = s @ s.transpose(1, 2) - t @ t.transpose(1, 2)
    return (apart.square().sum((1, 2)) / _many(student, mask) ** 2).mean()


def fast_affinity(student: Tensor, teacher: Tensor, draws: int, mask: Tensor | None = None) -> Tensor:
    """1/(k N²) ‖(ŜᵀŜ − T̂ᵀT̂) Z‖²_F, Z (N, k) standard normal, drawn from torch's generator (2302.10899, FFA).

    Its mean over Z is `affinity`, since E ZZᵀ = k I. ŜᵀŜ is never made: Ŝᵀ(ŜZ) is O(N C k).
    """
    z = torch.randn(student.shape[1], draws).to(student.device)
    with torch.autocast(student.device.type, enabled=False):
        s, t = _unit(student, mask), _unit(teacher, mask)
        apart = s @ (s.transpose(1, 2) @ z) - t @ (t.transpose(1, 2) @ z)
    return (apart.square().sum((1, 2)) / (draws * _many(student, mask) ** 2)).mean()


def _unit(x: Tensor, mask: Tensor | None) -> Tensor:
    x = F.normalize(x.float(), dim=-1)
    return x if mask is None else x * mask[..., None]


def _many(x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.full((len(x),), float(x.shape[1]), device=x.device)
    return mask.sum(1).clamp(min=1).float()


def pooled(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, C) the mean over the places that count, fp32."""
    x = x.float()
    return x.mean(1) if mask is None else (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
