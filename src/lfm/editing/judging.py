"""How the two readers of natural-language patches are trained: a gate, and an interpreter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lfm.core.errors import EditError
from lfm.core.heavy import F, torch
from lfm.core.interfaces import Batch, Codec, Gradients
from lfm.core.method import Run
from lfm.core.model import Model
from lfm.data import heads
from lfm.data.language import context_of
from lfm.data.records import Label
from lfm.editing import conditions, patching
from lfm.editing.patching import Patched, Patches
from lfm.models import device, forward
from lfm.models.codec import pad, pad_id
from lfm.train import Fit, fit

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lfm.editing.conditions import Lesson

MANY, FEW, ROWS = 4096, 256, 32
"""Lessons at most, lessons held out, and texts read at a time."""


def trained(
    model: Model,
    known: Sequence[Label],
    held: Sequence[Label],
    run: Run,
    *,
    width: int,
    rank: int,
    gate: Fit,
    interpreter: Fit,
    accept: float,
) -> Patches:
    """A gate and, unless it has no steps, an interpreter, and no patch yet. EditError for a gate that cannot tell."""
    from lfm.editing.matching import Gate
    from lfm.editing.teller import Change

    module = model.ask(Gradients).module().to(device()).requires_grad_(False)
    lessons = conditions.drawn(known, min(MANY, gate.steps * gate.batch_size), run, "lessons")
    asked = conditions.drawn(held, FEW, run, "asked")
    opens = Gate(module.get_input_embeddings().weight.shape[1], width, run.generator("gate"))  # type: ignore[operator]
    collate = _asking(model)

    def wrong(opens: nn.Module, batch: Batch) -> Tensor:
        odds = patching.odds(opens, module, batch)
        return F.binary_cross_entropy_with_logits(odds, batch["holds"].to(odds))

    fit(opens, lessons, collate, wrong, gate, run, name="gate")
    share = _right(opens, module, [collate(asked[i : i + ROWS]) for i in range(0, FEW, ROWS)])
    run.note(gate_right=share)
    if share < accept:
        raise EditError(
            f"the gate tells {share:.2f} of conditions on held-out texts right, by chance it were 0.50",
            why=f"accept is {accept:g}",
            fix="more labelled texts (train), more steps, or a lower accept",
        )
    state = {name: tensor.detach().cpu() for name, tensor in opens.state_dict().items()}
    if not interpreter.steps:
        return Patches(model.digest, (), state, {})
    change = Change(module, rank, run.generator("change"))
    readings, others = ([one for one in each if one.consequence] for each in (lessons, asked))
    run.note(interpreter_agrees=interpret(model, module, change, readings, others, interpreter, run))
    return Patches(model.digest, (), state, change.low_rank(module))


def _right(gate: nn.Module, module: nn.Module, batches: Sequence[Batch]) -> float:
    with torch.no_grad():
        each = [(patching.odds(gate, module, b) > 0).cpu() == b["holds"] for b in batches]
    return float(torch.cat(each).float().mean())


def interpret(
    model: Model,
    module: nn.Module,
    change: Any,
    lessons: Sequence[Lesson],
    asked: Sequence[Lesson],
    config: Fit,
    run: Run,
) -> float:
    """Train the change: told a consequence after a text, it says what the model says of the text with that consequence
    in its place. Those that change the class are practised as often as the others, for most sentences do not. Returns
    the share of what is asked on which the two agree."""
    tokenizer = model.ask(Codec).tokenizer
    limit = context_of(tokenizer, model.facts)

    every = [*lessons, *asked]

    def said() -> Tensor:
        texts = [text for lesson in every for text in (lesson.instead, lesson.text)]
        with torch.no_grad():
            each = [forward(module, _texts(model, texts[i : i + ROWS])) for i in range(0, len(texts), ROWS)]
        return torch.cat(each).softmax(-1).cpu()

    target, plain = run.step("said", said).unflatten(0, (-1, 2)).unbind(1)
    moved = (target.argmax(-1) != plain.argmax(-1))[: len(lessons)]
    numbers = [i for i, once in enumerate(moved.tolist()) if not once]
    again = [i for i, once in enumerate(moved.tolist()) if once]
    numbers += again * max(1, len(numbers) // max(1, len(again)))

    def collate(numbers: Sequence[int]) -> Batch:
        batch = _texts(model, [every[i].text for i in numbers])
        read = patching.told(batch, [every[i].consequence for i in numbers], tokenizer, limit)
        return {**read, "target": target[list(numbers)]}

    def loss(change: Any, batch: Batch) -> Tensor:
        with change.beside(module):
            logits = forward(module, batch)
        return F.cross_entropy(logits, batch["target"].to(logits))

    fit(change, numbers, collate, loss, config, run, name="interpreter")
    agree = 0
    for i in range(len(lessons), len(every), ROWS):
        batch = collate(range(i, min(i + ROWS, len(every))))
        with torch.no_grad(), change.beside(module):
            agree += int((forward(module, batch).argmax(-1).cpu() == batch["target"].argmax(-1)).sum())
    return agree / max(1, len(asked))


def accuracy(model: Model, logits: Callable[[Batch], Tensor], records: Sequence[Label]) -> float:
    """Share of the texts whose class the logits say."""
    task = heads.texts(model.ask(Codec), model.facts)
    truth, said = task.truth(records), []
    for i in range(0, len(records), ROWS):
        batch = task.collate(records[i : i + ROWS])
        said += task.predict(logits(batch), batch)
    return sum(a == b for a, b in zip(said, truth, strict=True)) / len(truth)


def met(model: Model, patched: Patched, records: Sequence[Label]) -> float:
    """Share of the texts that a patch acts on."""
    task = heads.texts(model.ask(Codec), model.facts)
    batches = (task.collate(records[i : i + ROWS]) for i in range(0, len(records), ROWS))
    return sum(int(patched.acts(batch).sum()) for batch in batches) / len(records)


def _texts(model: Model, texts: Sequence[str]) -> Batch:
    """Texts as a classifier reads them."""
    some = (*model.facts.labels, "0")[0]
    task = heads.texts(model.ask(Codec), model.facts)
    batch = task.collate([Label(text=text, label=some) for text in texts])
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def _asking(model: Model) -> Callable[[Sequence[Lesson]], Batch]:
    """Lessons as texts, conditions, and whether they hold."""
    tokenizer = model.ask(Codec).tokenizer
    limit = context_of(tokenizer, model.facts)

    def collate(lessons: Sequence[Lesson]) -> Batch:
        words = pad([patching.asked(tokenizer, lesson.condition, limit) for lesson in lessons], pad_id(tokenizer))
        return {
            **_texts(model, [lesson.text for lesson in lessons]),
            "asked": words["input_ids"],
            "asks": words["attention_mask"],
            "holds": torch.tensor([lesson.applies for lesson in lessons]),
        }

    return collate
