"""What is lost on records that are to be forgotten, and on those that are to stay."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lfm.core.errors import DataError, EditError
from lfm.core.heavy import F, torch
from lfm.core.interfaces import Batch, Codec
from lfm.core.method import Run
from lfm.core.model import Facts, Model
from lfm.data import task as tasks
from lfm.data.records import Completion, Fact, Image
from lfm.data.task import Task
from lfm.data.wording import wording
from lfm.editing.text import answered
from lfm.models import forward, structure
from lfm.train.examine import examiner

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lfm.data.records import Record

IGNORED = -100
ASKED = 256
"""Records of a set that are asked for greedy text."""
FORGET, RETAIN = "forget ", "retain "
"""How a batch of both kinds names its tensors."""


def parted(records: Sequence[Record], run: Run) -> tuple[Sequence[Record], Sequence[Record]]:
    """Four fifths to train on and a fifth to watch, drawn by the run's seed; of fewer than five all for both."""
    if len(records) < 5:
        return records, records
    order = torch.randperm(len(records), generator=run.generator("watched")).tolist()
    watched = set(order[: len(records) // 5])
    return [r for i, r in enumerate(records) if i not in watched], [r for i, r in enumerate(records) if i in watched]


def asked(records: Sequence[Record]) -> dict[str, list[tuple[str, str]]]:
    """Prompts and answers to ask for in greedy text: as they are (said), and by facts' paraphrases."""
    kept = [record for record in records[:ASKED] if isinstance(record, Completion | Fact)]
    found = {"said": [(w.prompt, w.answer.strip()) for w in map(wording, kept)]}
    others = [(prompt, r.object) for r in kept if isinstance(r, Fact) for prompt in r.paraphrases]
    found["paraphrases_said"] = others[:ASKED]
    return {name: pairs for name, pairs in found.items() if pairs}


def joined(forget: Batch, retain: Batch) -> Batch:
    """Two batches in one."""
    both = {FORGET + name: tensor for name, tensor in forget.items()}
    return both | {RETAIN + name: tensor for name, tensor in retain.items()}


def collator(codec: Codec, facts: Facts, forget: Sequence[Record], retain: Sequence[Record]) -> Callable[..., Batch]:
    """Numbers → a batch of both kinds; the shorter set begins again."""
    lost, kept = (tasks.task_for(records, codec, facts) for records in (forget, retain))

    def collate(numbers: Sequence[int]) -> Batch:
        both = [records[i % len(records)] for records in (forget, retain) for i in numbers]
        return joined(lost.collate(both[: len(numbers)]), kept.collate(both[len(numbers) :]))

    return collate


def agree(forget: Sequence[Record], retain: Sequence[Record]) -> None:
    """DataError for records that are in both sets. Images in memory cannot be compared, and are not."""
    if any(isinstance(record, Image) for records in (forget, retain) for record in records[:1]):
        return
    if both := set(forget) & set(retain):
        raise DataError(f"{len(both)} records are both to be forgotten and to stay, {next(iter(both))!r} for one")


def measurer(module: nn.Module, model: Model, sets: Mapping[str, Sequence[Record]]) -> Callable[[], dict[str, float]]:
    """What the module says of each set now: perplexity, accuracy, and shares said in greedy text where it goes on."""
    exams = {role: examiner(records, model) for role, records in sets.items()}

    def measure() -> dict[str, float]:
        found = {}
        for role, records in sets.items():
            score = exams[role](lambda batch: forward(module, batch))
            found |= {f"{role}_perplexity": math.exp(min(score.loss, 700.0)), f"{role}_accuracy": score.accuracy}
            for how, pairs in asked(records).items() if model.facts.task == "causal-lm" else ():
                told = answered(module.eval(), model.ask(Codec), pairs)
                found[f"{role}_{how}"] = sum(told) / len(told)
        return found

    return measure


def still(measured: Mapping[str, float]) -> float:
    """Share of the forget set that is said: in greedy text, where that is asked for."""
    return measured.get("forget_said", measured["forget_accuracy"])


def by_rounds(
    trained: Mapping[str, Tensor],
    train: Callable[[int], object],
    measure: Callable[[], dict[str, float]],
    rounds: int,
    run: Run,
    *,
    enough: float,
    collapse: float,
    fix: str,
) -> None:
    """Train round by round, until at most `enough` is said; one after which the retain perplexity is more than
    `collapse` times what it was is taken back, and the last. Notes and curves say what was measured.

    EditError where nothing is to be forgotten, or the first round is taken back.
    """
    first = now = run.step("before", measure)
    if still(first) <= enough:
        raise EditError(
            f"there is nothing to forget: {still(first):.0%} of the forget set is said",
            why=f"with {enough:.0%} the training would end",
            fix="give records as the model says them, or a smaller `enough`",
        )
    done, ended = 0, "all steps were made"
    for number in run.track(range(rounds), "rounds"):
        good = {name: p.detach().clone() for name, p in trained.items()}
        train(number)
        then = run.step(f"after round {number}", measure)
        run.curve("retain perplexity", then["retain_perplexity"])
        run.curve("forget set still said", still(then))
        if not then["retain_perplexity"] <= collapse * first["retain_perplexity"]:
            with torch.no_grad():
                for name, p in trained.items():
                    p.copy_(good[name])
            was, now_is = (f"{told['retain_perplexity']:.3g}" for told in (first, then))
            took = f"took the perplexity of what is to stay from {was} to {now_is}"
            if not number:
                why = f"the first round {took} (collapse {collapse:g})"
                raise EditError("nothing can be forgotten this way", why=why, fix=fix)
            ended = f"round {number} {took} and was taken back"
            break
        now, done = then, number + 1
        if still(now) <= enough:
            ended = "enough was forgotten"
            break
    run.note(rounds=done, ended=ended, **{f"{name}_before": value for name, value in first.items()})
    run.note(**{f"{name}_after": value for name, value in now.items()})


def part(batch: Batch, which: str) -> Batch:
    """One of the two."""
    return {name.removeprefix(which): tensor for name, tensor in batch.items() if name.startswith(which)}


def told(task: Task, logits: Tensor, batch: Batch, *, shifted: bool) -> tuple[Tensor, Tensor]:
    """(B,) log-probability of all that is asked of each record, and (B,) of how many tokens (or classes) that is.

    shifted: a causal model's labels, of which nothing predicts the first.
    """
    scored, labels = task.scored(logits, batch)
    said = scored.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    asked = batch["labels"].to(said.device)
    if asked.ndim == 1:
        return said, torch.ones_like(said)
    counts = ((asked[:, 1:] if shifted else asked) != IGNORED).sum(1)
    rows = torch.repeat_interleave(torch.arange(len(counts), device=said.device), counts)
    return said.new_zeros(len(counts)).index_add(0, rows, said), counts.to(said)


def ascent(said: Tensor, counts: Tensor) -> Tensor:
    """Mean log-probability of a token: what gradient ascent on the loss minimises (2401.06121)."""
    return said.sum() / counts.sum().clamp(min=1)


def npo(said: Tensor, before: Tensor, beta: float) -> Tensor:
    """−(2/β) mean log σ(−β log π/π₀) of records' log-probabilities now and before (2404.05868, equation 3).

    Its gradient is that of mean log π, each record weighed by 2πᵝ/(πᵝ + π₀ᵝ): ascent's as β → 0 and at the beginning.
    """
    return 2 / beta * F.softplus(beta * (said - before)).mean()


def target(width: int, norm: float, random: torch.Generator) -> Tensor:
    """(width,) where RMU steers to: a direction drawn evenly from [0, 1) in each coordinate, of this length."""
    drawn = torch.rand(width, generator=random)
    return drawn * (norm / drawn.norm())


def apart(hidden: Tensor, other: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over records of the mean over tokens of mean squared differences; hidden (B, T, d), mask (B, T)."""
    each = (hidden - other).square().mean(-1)
    if mask is None or mask.shape != each.shape:
        return each.mean()
    share = mask.to(each)
    return ((each * share).sum(1) / share.sum(1).clamp(min=1)).mean()


class _Seen(Exception):
    """What is after a block need not be run."""


def hidden(module: nn.Module, batch: Batch, block: int) -> Tensor:
    """(B, T, d) what a block puts out; the blocks after it are not run."""
    name, _ = structure.site(module, ("hidden", block))
    seen: list[Tensor] = []

    def stop(_: Any, __: Any, out: Any) -> None:
        seen.append(out[0] if isinstance(out, tuple) else out)
        raise _Seen

    handle = module.get_submodule(name).register_forward_hook(stop)
    try:
        forward(module, batch)
    except _Seen:
        pass
    finally:
        handle.remove()
    return seen[0].float()


def length(module: nn.Module, task: Task, records: Sequence[Record], block: int, size: int) -> tuple[float, int]:
    """Mean ‖h‖ over the records' tokens, and the width, of what a block puts out."""
    total, count, width = 0.0, 0.0, 0
    for start in range(0, len(records), size):
        batch = task.collate(records[start : start + size])
        with torch.no_grad():
            found = hidden(module, batch, block)
        width, each = found.shape[-1], found.norm(dim=-1).double().cpu()
        mask = batch.get("attention_mask")
        share = torch.ones_like(each) if mask is None or mask.shape != each.shape else mask.to(each)
        total, count = total + float((each * share).sum()), count + float(share.sum())
    return total / max(count, 1.0), width
