"""What was tested is what was saved: the output is opened again and held against the one in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lfm import record
from lfm.core import finding
from lfm.core.errors import AccessError, VerifyError
from lfm.core.finding import Finding
from lfm.core.heavy import np, torch
from lfm.core.interfaces import Answers, Batch, Classes, Codec, LazyTensor, Logits, Logprobs, Text, Weights
from lfm.core.model import Model
from lfm.data.records import Label
from lfm.models import load
from lfm.models.answers import MANIFEST as ANSWERS
from lfm.record import Verified
from lfm.tensors import known
from lfm.tensors.lazy import is_coded
from lfm.tensors.match import equal
from lfm.tensors.parallel import each
from lfm.tensors.readback import Seen

if TYPE_CHECKING:
    from torch import Tensor

TOLERANCE = 1e-4
"""Largest difference that is not an error: the same numbers summed in another order, never another model."""

PROBES = ("The", "Once upon a time there was", "What is the answer?", "In the end, everyone went home and")
PROBE_VALUES = 64


def held_against(
    made: Model | Finding,
    directory: Path,
    load_saved: Any = load,
    *,
    seen: Seen | None = None,
    by_bits: bool = False,
) -> Verified:
    """Reload what was saved in a directory and compare it with what was made. VerifyError if they differ.

    seen: what was read back from the disk as it was written. by_bits: weights in memory too are compared bit for bit,
    for logits that are not numbers cannot be.
    """
    if isinstance(made, Finding):
        same = finding.read(directory).digest == made.digest
        result = Verified(quantity="finding", max_abs=0.0 if same else float("inf"), on="all of it")
    else:
        saved = load_saved(directory)
        result = bit_for_bit(made, saved, seen, any_weights=by_bits) or compare(made, saved)
    if not result.max_abs <= TOLERANCE:
        raise VerifyError(
            "what was saved is not what was made",
            why=f"max |Δ{result.quantity}| = {result.max_abs:.3g} on {result.on}",
            fix="nothing was published; please report this with the command that you ran",
        )
    return result


def bit_for_bit(made: Model, saved: Model, seen: Seen | None, *, any_weights: bool = False) -> Verified | None:
    """Whether streamed weights are those that were saved: more than equal logits, and no module of the model's size is
    opened for it. They were seen, or else are computed once more. None where weights differ, or are held in memory,
    unless any_weights.
    """
    if not made.can(Weights) or not saved.can(Weights):
        return None
    left, right = made.ask(Weights).tensors(), saved.ask(Weights).tensors()
    suits = any_weights or all(is_coded(tensor) for tensor in left.values())
    if not suits or left.keys() != right.keys():
        return None
    if seen and all(seen.holds(name, tensor) for name, tensor in right.items()):
        return Verified(quantity="weight", max_abs=0.0, on=f"{len(left)} tensors, every byte by XXH3-128")
    if not all(each(lambda n: equal(left[n], right[n]), left)):
        return None
    return Verified(quantity="weight", max_abs=0.0, on=f"{len(left)} tensors, every bit")


def compare(a: Model, b: Model) -> Verified:
    """The largest difference by the strongest means that both give: logits, classes, log-probabilities, all weights,
    or greedy text (how many differ)."""
    if a.facts.task and b.facts.task and a.facts.task != b.facts.task:
        raise AccessError(
            f"{a.ref} and {b.ref} answer different questions", why=f"one is {a.facts.task}, the other {b.facts.task}"
        )
    batch = probe(b) if b.can(Logits) and a.can(Logits) else None
    if batch is not None:
        x, y = a.ask(Logits).logits(batch), b.ask(Logits).logits(batch)
        kept = y.flatten()[:: max(1, y.numel() // PROBE_VALUES)][:PROBE_VALUES]
        what = "images" if "pixel_values" in batch else "texts" if "input_ids" in batch else "sounds"
        rows = len(next(iter(batch.values())))
        return Verified(
            quantity="logit", max_abs=distance(x, y), on=f"{rows} probe {what}", probe=tuple(map(float, kept))
        )
    if a.can(Classes) and b.can(Classes):
        return _compare_classes(a, b)
    if a.can(Answers) and b.can(Answers):
        return _compare_answers(a, b)
    if a.can(Logprobs) and b.can(Logprobs):
        return _compare_logprobs(a, b)
    if a.can(Weights) and b.can(Weights):
        left, right = a.ask(Weights).tensors(), b.ask(Weights).tensors()
        return Verified(quantity="weight", max_abs=weight_distance(left, right), on=f"{len(right)} tensors")
    if a.can(Text) and b.can(Text):
        said = zip(*(model.ask(Text).generate(PROBES, max_tokens=8) for model in (a, b)), strict=True)
        return Verified(quantity="text", max_abs=float(sum(x != y for x, y in said)), on=f"{len(PROBES)} probe texts")
    raise AccessError(
        f"{a.ref} and {b.ref} cannot be compared", why="they share neither logits, logprobs, weights nor text"
    )


def _compare_logprobs(a: Model, b: Model) -> Verified:
    words = [" the"] * len(PROBES)
    x, y = (model.ask(Logprobs).score(PROBES, words) for model in (a, b))
    apart = [abs(p.total - q.total) for p, q in zip(x, y, strict=True)]
    return Verified(
        quantity="logprob", max_abs=max(apart), on=f"{len(PROBES)} probe texts", probe=tuple(q.total for q in y)
    )


def _compare_answers(a: Model, b: Model) -> Verified:
    """All of what b holds is read, and its sums are taken on the way; a must hold as much, and tell the same first."""
    left, right = a.ask(Answers), b.ask(Answers)
    apart, first, count = 0.0, np.zeros(0), 0
    for number in range(len(right)):
        (ids, told), (own, others) = right.told([number]), left.told([number])
        count += len(told)
        shown = told[np.isfinite(told)]
        first = np.concatenate([first, shown[:PROBE_VALUES]])[:PROBE_VALUES]
        same = told.shape == others.shape and np.array_equal(ids, own) and np.array_equal(told, others)
        apart = apart if same else float("inf")
    apart = apart if len(left) == len(right) else float("inf")
    return Verified(quantity="logprob", max_abs=apart, on=f"all {count} places", probe=tuple(map(float, first)))


def _compare_classes(a: Model, b: Model) -> Verified:
    records = [Label(text=text, label="") for text in PROBES]
    x, y = (model.ask(Classes).tell(records) for model in (a, b))
    return Verified(
        quantity="class logprob",
        max_abs=float(np.abs(x - y).max()) if x.shape == y.shape else float("inf"),
        on=f"{len(PROBES)} probe texts",
        probe=tuple(map(float, y.flatten()[:PROBE_VALUES])),
    )


def probe(model: Model) -> Batch | None:
    """A fixed batch that the model can take; None where it has no codec to make one."""
    if not model.can(Codec):
        return None
    codec = model.ask(Codec)
    if model.facts.task == "image-classification":
        noise = np.random.default_rng(0).integers(0, 256, size=(4, 32, 32, 3), dtype=np.uint8)
        return codec.images(list(noise))
    if model.facts.task == "audio-classification":
        noise = np.random.default_rng(0).standard_normal((4, 16000)).astype(np.float32) / 8
        return codec.sounds([(samples, 16000) for samples in noise])
    batch = dict(codec.texts(PROBES, max_length=model.facts.context or None))
    if model.facts.task == "seq2seq-lm":
        batch["decoder_input_ids"] = batch["input_ids"][:, :4]
    return batch


def distance(x: Tensor, y: Tensor) -> float:
    """max |x − y|; infinite where the shapes differ or one is not a number."""
    if x.shape != y.shape:
        return float("inf")
    apart = (x.double() - y.double()).abs().max() if x.numel() else torch.zeros(())
    return float("inf") if bool(torch.isnan(apart)) else float(apart)


def weight_distance(left: Mapping[str, LazyTensor], right: Mapping[str, LazyTensor]) -> float:
    """max |Δ| over all tensors, one at a time; infinite where names or shapes differ."""
    if set(left) != set(right):
        return float("inf")
    return max((distance(left[name].read(), right[name].read()) for name in left), default=0.0)


def verify(directory: Path, load_saved: Any = load) -> Verified:
    """Hold a run directory against its own record: the digest, and the probe's values. VerifyError if they differ.

    Kept answers are held against what they tell of themselves where no record lies with them.
    """
    if (directory / ANSWERS).is_file() and not (directory / record.RUN).is_file():
        known.forget(directory)
        kept = load_saved(directory)
        assert kept.digest  # the files' sums are taken, and the answers' below
        return compare(kept, kept)
    run = record.read(directory)
    if run.output.kind == "finding":
        now = finding.read(directory).digest
        _same_digest(directory, now, run.output.digest)
        return Verified(quantity="finding", max_abs=0.0, on="all of it")
    known.forget(directory)
    model = load_saved(directory)
    _same_digest(directory, model.digest, run.output.digest)
    if run.verified.quantity == "weight":  # the digest is over their bytes
        return Verified(quantity="weight", max_abs=0.0, on=run.verified.on)
    again = compare(model, model)
    values: Sequence[float] = again.probe
    if run.verified.probe and len(values) == len(run.verified.probe):
        apart = max(abs(p - q) for p, q in zip(values, run.verified.probe, strict=True))
        if not apart <= TOLERANCE:
            raise VerifyError(
                f"{directory} answers otherwise than when it was made",
                why=f"max |Δ{again.quantity}| = {apart:.3g} on {again.on}; its bytes are the same",
                fix="compare the versions in run.json with `lfm doctor`",
            )
        return Verified(quantity=again.quantity, max_abs=apart, on=again.on, probe=tuple(values))
    return again


def _same_digest(directory: Path, now: str, then: str) -> None:
    if now != then:
        raise VerifyError(
            f"{directory} is not what its run made",
            why=f"its digest is {now[:12]}, recorded was {then[:12]}",
            fix="restore it from where it came, or run its command again (in run.json)",
        )
