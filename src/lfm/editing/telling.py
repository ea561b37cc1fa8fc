"""How the two parts of SERAC are trained: a second model that is told an edit, and a classifier that finds what an edit
is about."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from lfm.core.errors import MismatchError
from lfm.core.heavy import torch
from lfm.core.interfaces import Logits
from lfm.core.method import Run
from lfm.core.model import Model
from lfm.data import language
from lfm.editing import lessons, scope
from lfm.editing.form import IGNORED, SEQ2SEQ_LM, Reading, reading
from lfm.editing.scope import Routed, Scope
from lfm.editing.text import lost, told_of
from lfm.models import forward, structure
from lfm.models.language import spans
from lfm.train import Fit, fit

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lfm.core.interfaces import Batch
    from lfm.editing.lessons import Lesson
    from lfm.editing.setting import Setting


def trained(
    config: Fit,
    here: Setting,
    model: Model,
    drawn: Sequence[Lesson],
    run: Run,
    *,
    layer: int | None,
    width: int,
    rank: int,
) -> Scope:
    """A scope classifier and a second model, and no edit yet. layer, width: the classifier's; rank: the change's."""
    from lfm.editing.teller import Change, Map

    reads = structure.stacks(here.module)[0]
    if layer is not None and not -len(reads) <= layer < len(reads):
        raise MismatchError(f"no block {layer} reads the prompt", why=f"{len(reads)} do, counted from 0")
    block = (len(reads) // 2 if layer is None else layer) % len(reads)
    change = Change(here.module, rank, run.generator("change"))
    tell(config, here, model, change, drawn, run)
    learned = Map(
        structure.feed_forward(here.module, reads[block]).width,
        width,
        run.generator("map"),
    )
    tell_apart(config, here, learned, drawn, block, run)
    low, map = change.low_rank(here.module), learned.weight.detach().cpu().contiguous()
    return Scope(model.digest, block, (), torch.zeros(0, width), map, low)


def tell(config: Fit, here: Setting, model: Model, change: Any, drawn: Sequence[Lesson], run: Run) -> None:
    """Train the second model: told an edit, it answers by it, in the edit's words and in others."""
    task = language.answers(here.codec, model.facts)

    def collate(numbers: Sequence[int]) -> Batch:
        chosen = [drawn[i] for i in numbers]
        asked = [(lesson.edit, one) for lesson in chosen for one in (lesson.edit, lesson.again)]
        return task.collate(
            [msgspec.structs.replace(one, prompt=scope.statement(edit) + one.prompt) for edit, one in asked]
        )

    def loss(change: Any, batch: Batch) -> Tensor:
        with change.beside(here.module):
            return task.loss(forward(here.module, batch), batch)

    fit(change, range(len(drawn)), collate, loss, config, run, name="counterfactual")


def tell_apart(config: Fit, here: Setting, learned: nn.Module, drawn: Sequence[Lesson], block: int, run: Run) -> None:
    """Train the classifier: an edit's other wording is in its scope; other edits' wordings, and what it says nothing
    about, are not."""
    from lfm.editing.teller import told_apart

    texts = [[one.edit.prompt, one.again.prompt, *one.aside] for one in drawn]
    distinct = sorted({text for each in texts for text in each})
    numbers = {text: i for i, text in enumerate(distinct)}
    seen = run.step("means", lambda: scope.means(here.module, here.codec, block, distinct))
    prompts = {prompt: i for i, prompt in enumerate(sorted({one.edit.prompt for one in drawn}))}

    groups = lessons.grouped(drawn, config.batch_size, run)
    config = msgspec.structs.replace(config, batch_size=1)

    def collate(of: Sequence[int]) -> Batch:
        chosen = [i for number in of for i in groups[number]]
        each = [texts[i] for i in chosen]
        own = [prompts[drawn[i].edit.prompt] for i in chosen]
        asked = [(t[1], prompt) for t, prompt in zip(each, own, strict=True)] + [(a, -1) for t in each for a in t[2:]]
        asked = [(text, prompts.get(text, whose)) for text, whose in asked]
        return {
            "edits": seen[[numbers[t[0]] for t in each]],
            "asked": seen[[numbers[text] for text, _ in asked]],
            "same": torch.tensor(own)[:, None] == torch.tensor([whose for _, whose in asked])[None],
        }

    def loss(learned: nn.Module, batch: Batch) -> Tensor:
        return told_apart(scope.apart(learned(batch["edits"]), learned(batch["asked"])), batch["same"])

    fit(learned, range(len(groups)), collate, loss, config, run, name="scope")


def beyond(here: Setting, routed: Routed) -> tuple[float, float]:
    """(perplexity of the probe, routed; share of its texts that an edit is taken to be about)."""
    texts = [here.codec.tokenizer.decode(row, skip_special_tokens=True) for row in here.probe]
    about = routed.about(texts)
    outside = [row for row, edit in zip(here.probe, about, strict=True) if edit < 0]
    inside = [(text, edit) for text, edit in zip(texts, about, strict=True) if edit >= 0]
    total, count = lost(here.module, here.codec, outside, here.form)
    for text, edit in inside:
        read = _behind(here, scope.statement(routed.scope.edits[edit]), text)
        more, told = told_of(routed.second.ask(Logits).logits, read)
        total, count = total + more, count + told
    return math.exp(total / max(count, 1)), len(inside) / len(texts)


def _behind(here: Setting, told: str, text: str) -> Reading:
    """A text behind what is told before it, of which nothing is asked."""
    ((ids, first, _),) = spans(here.codec.tokenizer, [told], [text], [""])
    read = reading(here.form, here.codec.tokenizer, [ids])
    if here.form.task != SEQ2SEQ_LM:  # a decoder writes the second half, behind what is told
        read.labels[:, :first] = IGNORED
    return read
