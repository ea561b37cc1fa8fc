"""What edits did: text before and after side by side, what beside them moved most, and where the facts were looked up.

Text is greedy, from the bare prompt: nothing of an answer is given away. A masked model fills as many blanks as the
object has tokens. Probabilities, where the model tells any, are of the whole object after its prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import exp
from typing import TYPE_CHECKING, Any, NamedTuple

from lfm.core.errors import LfmError
from lfm.core.finding import Map
from lfm.core.heavy import torch
from lfm.core.interfaces import Codec, Gradients, Logits, Logprobs, Text
from lfm.core.model import Model
from lfm.data import facts as questions
from lfm.data.answers import begins_with, room
from lfm.data.records import Edit, Fact
from lfm.editing import tracing
from lfm.editing.cloze import batch_of, cloze, first_choice, is_masked
from lfm.editing.rows import place
from lfm.models import device, forward
from lfm.models.language import batches
from lfm.record import Answer, Edited, Told

if TYPE_CHECKING:
    import torch as torch_types

EDITS, EACH, OTHERS, MOVED = 6, 3, 128, 12
"""Edits told of, prompts of each kind of an edit, prompts beside them that are asked, and those of them told of."""

TOKENS = (12, 32)
"""The fewest and the most tokens of an answer."""

WORDS = 3
"""Words of an answer that are held against each other where no object says how many."""

TRACED, NOISES, NOISE = 2, 4, 3.0
"""Facts traced, noises of each, and their size over the embeddings' standard deviation."""

TRACING = 2e12
"""Arithmetic (flops) beyond which nothing is traced unasked: some seconds of a laptop."""

KINDS = ("hidden", "feed-forward")


class Question(NamedTuple):
    """What is put to both models. edit: whose prompt it is, counted among those told of; None beside them."""

    of: str
    prompt: str
    object: str
    suffix: str = "."
    edit: int | None = None


Heard = tuple[str, "float | None"]
"""What was said, and p(object)."""


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many, evenly."""
    return list(items) if len(items) <= most else [items[i * len(items) // most] for i in range(most)]


def asked(
    edits: Sequence[Edit | Fact], facts: Iterable[Fact] = (), *, masked: bool = False, undone: bool = False
) -> list[Question]:
    """What is put to the model before and after. facts: others that might have moved; undone: edits are taken back."""
    found: list[Question] = []
    for number, edit in enumerate(spread(edits, EDITS)):
        wanted = edit.new_object if isinstance(edit, Edit) and not undone else edit.object
        follows = edit.portability if isinstance(edit, Edit) else ()
        found.append(Question("edit", edit.prompt, wanted, edit.suffix, number))
        found += [Question("paraphrase", p, wanted, edit.suffix, number) for p in spread(edit.paraphrases, EACH)]
        found += [Question("portability", p, o, edit.suffix, number) for p, o in spread(follows, EACH)]
        found += [Question("neighbour", p, o, edit.suffix, number) for p, o in spread(edit.neighbours, EACH)]
        if edit.subject.strip() and not masked:
            found.append(Question("subject", edit.subject, "", "", number))
    own = {prompt for edit in edits for prompt in (edit.prompt, *edit.paraphrases)}
    near = [Question("neighbour", p, o, edit.suffix) for edit in edits for p, o in edit.neighbours]
    near = list({q.prompt: q for q in near if q.prompt not in own}.values())
    far = {f.prompt: Question("fact", f.prompt, f.object, f.suffix) for f in facts}
    rest = [q for prompt, q in far.items() if prompt not in own | {q.prompt for q in near}]
    near = spread(near, OTHERS if not rest else OTHERS // 2)
    return [*found, *near, *spread(rest, OTHERS - len(near))]


def heard(model: Model, put: Sequence[Question]) -> list[Heard]:
    """What the model says to each, and p(object) where it tells it."""
    masked = is_masked(model.facts)
    said = _filled(model, put) if masked else _said(model, put)
    told: list[float | None] = [None] * len(put)
    known = [i for i, q in enumerate(put) if q.object.strip()]
    if model.can(Logprobs) and known:
        each = [questions.Question(put[i].prompt, put[i].suffix, (put[i].object.strip(),)) for i in known]
        for i, (value,) in zip(known, questions.log_probabilities(model.ask(Logprobs), each), strict=True):
            told[i] = exp(value)
    return list(zip(said, told, strict=True))


def can_be_asked(model: Model) -> bool:
    return model.can(Logits, Codec) if is_masked(model.facts) else model.can(Text)


def _said(model: Model, put: Sequence[Question]) -> list[str]:
    """Each prompt once, however many ask it: text from one batch or another may differ in the last bit."""
    once = list(dict.fromkeys(q.prompt for q in put))
    tokens = min(max(TOKENS[0], room([q.object for q in put])), TOKENS[1])
    told = dict(zip(once, model.ask(Text).generate(once, max_tokens=tokens), strict=True))
    return [told[q.prompt].strip() for q in put]


def _filled(model: Model, put: Sequence[Question]) -> list[str]:
    logits, tokenizer = model.ask(Logits), model.ask(Codec).tokenizer
    said = [""] * len(put)
    put = [q if q.object.strip() else q._replace(object=tokenizer.mask_token) for q in put]  # one blank
    reads = [cloze(tokenizer, (q.prompt, q.object, q.suffix), masked=True) for q in put]
    for group in batches([len(read.ids) for read in reads]):
        told = logits.logits(batch_of(tokenizer, [reads[i] for i in group]))
        for row, i in enumerate(group):
            said[i] = tokenizer.decode(told[row, reads[i].places].argmax(-1).tolist()).strip()
    return said


def compared(
    edits: Sequence[Edit | Fact], put: Sequence[Question], before: Sequence[Heard], after: Sequence[Heard]
) -> Edited:
    """Both models' answers side by side; of those beside the edits the ones that moved most."""
    both = [
        Answer(of=q.of, prompt=q.prompt, object=q.object, before=b[0], after=a[0], p_before=b[1], p_after=a[1])
        for q, b, a in zip(put, before, after, strict=True)
    ]
    told = [
        Told(
            subject=edit.subject,
            object=edit.object,
            new_object=edit.new_object if isinstance(edit, Edit) else "",
            answers=tuple(answer for q, answer in zip(put, both) if q.edit == number),
        )
        for number, edit in enumerate(spread(edits, EDITS))
    ]
    beside = [answer for q, answer in zip(put, both) if q.edit is None]
    order = sorted(beside, key=lambda answer: (not otherwise(answer), -shift(answer)))
    return Edited(
        edits=len(edits),
        told=tuple(told),
        others=len(beside),
        changed=sum(map(otherwise, beside)),
        moved=tuple(a for a in order[:MOVED] if otherwise(a) or shift(a) > 0),
    )


def otherwise(answer: Answer) -> bool:
    """Whether the answer is another: in as many words as its object has."""
    if answer.object and begins_with(answer.before, answer.object):
        return not begins_with(answer.after, answer.object)
    count = len(answer.object.split()) or WORDS
    return answer.before.split()[:count] != answer.after.split()[:count]


def shift(answer: Answer) -> float:
    """|Δp(object)|; 0 where it is not known."""
    if answer.p_before is None or answer.p_after is None:
        return 0.0
    return abs(answer.p_after - answer.p_before)


def traceable(model: Model, edits: Sequence[Edit | Fact]) -> bool:
    """Whether the model's facts can be traced in a moment, by arithmetic alone."""
    known = model.facts
    if known.task not in ("causal-lm", "masked-lm") or not model.can(Gradients, Codec) or not known.layers:
        return False
    words = max(len(edit.prompt.split()) + len(edit.object.split()) for edit in spread(edits, TRACED))
    tokens = 2 * words + 2
    return 2.0 * known.parameters * TRACED * len(KINDS) * known.layers * NOISES * tokens**2 <= TRACING


def traces(model: Model, edits: Sequence[Edit | Fact], generator: torch_types.Generator) -> list[Map]:
    """Where the first facts that the model says are looked up: the effect on p(object) of putting each state back once
    the subject is disturbed (lfm.editing.tracing), by token and block."""
    codec, masked = model.ask(Codec), is_masked(model.facts)
    module: Any = model.ask(Gradients).module().to(device()).requires_grad_(False)
    found: list[Map] = []
    for edit in edits[: 4 * TRACED]:
        if len(found) == TRACED * len(KINDS):
            break
        if not edit.object.strip() or place(edit.prompt, edit.subject) < 0:
            continue
        try:
            read = cloze(codec.tokenizer, (edit.prompt, edit.object, edit.suffix), masked=masked, subject=edit.subject)
        except LfmError:
            continue
        with torch.no_grad():
            if not first_choice(forward(module, {"input_ids": torch.tensor([read.ids])})[0], read):
                continue
        size = NOISE * tracing.embedding_spread(module, [read])
        noise = tracing.noises(module, read, size, NOISES, generator)
        told = tracing.trace(module, read, noise, kinds=KINDS)
        rows = tuple(
            codec.tokenizer.decode([token]) + (" *" if i in read.subject else "") for i, token in enumerate(read.ids)
        )
        for kind, effects in zip(KINDS, told.effects.mean(-1), strict=True):
            found.append(
                Map(
                    name=f"{edit.prompt} … {edit.object}: {kind}",
                    rows=rows,
                    columns=tuple(str(block) for block in range(effects.shape[0])),
                    values=tuple(tuple(row) for row in effects.T.tolist()),
                    x_label="block",
                )
            )
    return found
