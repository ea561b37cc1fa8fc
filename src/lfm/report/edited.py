"""What a run's edits did, as the page shows it: text before and after, side by side."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lfm.core.finding import Map
from lfm.record import Answer, Edited, RunRecord
from lfm.report import plots, words

LABELS = {
    "edit": "asked",
    "paraphrase": "said otherwise",
    "portability": "what follows",
    "neighbour": "beside it",
    "subject": "the subject",
    "fact": "another fact",
}

VALUES = "p(new object) with "
"""How the curves begin that tell how likely an editor's own values made the new objects."""


class Line(NamedTuple):
    """One prompt: what was said before and after, and p(object). kind: same, new (as it should be now), or lost."""

    label: str
    prompt: str
    object: str
    before: str
    after: str
    kind: str
    p_before: str
    p_after: str


class Card(NamedTuple):
    """One edit. left_out: it failed, and what is said after is said without it."""

    subject: str
    object: str
    new_object: str
    lines: list[Line]
    left_out: bool


class Picture(NamedTuple):
    """A trace: its title and its SVG."""

    title: str
    svg: str


class Shown(NamedTuple):
    """What the template is given. beside: a sentence about what else moved; values: one about the editor's own."""

    cards: list[Card]
    more: int
    beside: str
    moved: list[Line]
    traces: list[Picture]
    values: str


def shown(run: RunRecord) -> Shown | None:
    """The edits of a run; None where there were none."""
    edited = run.edited
    if edited is None:
        return None
    because, known, cards = str(run.notes.get("skipped_because", "")), set[str](), list[Card]()
    for told in edited.told:
        answers = [answer for answer in told.answers if answer.of != "subject" or answer.prompt not in known]
        known |= {answer.prompt for answer in answers if answer.of == "subject"}
        left_out = any(
            re.search(f"{re.escape(repr(a.prompt))} [^;]*{re.escape(repr(told.new_object))}", because)
            for a in told.answers
            if a.of == "edit"
        )
        cards.append(Card(told.subject, told.object, told.new_object, [line(a) for a in answers], left_out))
    return Shown(
        cards,
        edited.edits - len(cards),
        beside(edited),
        [line(answer) for answer in edited.moved],
        [_picture(chart) for chart in edited.traces],
        values(run.curves),
    )


def line(answer: Answer) -> Line:
    """One answer. What is right now and was not is new; what was right and is not, or is simply otherwise, is lost."""
    from lfm.data.answers import begins_with  # most pages tell of no edits

    then, now = (begins_with(said, answer.object) for said in (answer.before, answer.after))
    kind = "same" if answer.before == answer.after else "new" if now else "lost" if then else "other"
    return Line(
        LABELS.get(answer.of, answer.of),
        answer.prompt,
        answer.object,
        answer.before,
        answer.after,
        kind,
        *("" if p is None else words.share(p) for p in (answer.p_before, answer.p_after)),
    )


def beside(edited: Edited) -> str:
    """How many prompts beside the edits were asked, and how many are answered otherwise now."""
    if not edited.others:
        return ""
    several = edited.others > 1
    asked = f"Of {words.number(edited.others)} other prompts" if several else "The other prompt that was asked"
    if not several:
        return f"{asked} is answered {'otherwise' if edited.changed else 'as before'}."
    if not edited.changed:
        return f"{asked} none is answered otherwise now."
    return f"{asked} {words.number(edited.changed)} {'is' if edited.changed == 1 else 'are'} answered otherwise now."


def values(curves: Mapping[str, Sequence[float]]) -> str:
    """How likely the editor's own values made the new objects, by its curve of them."""
    for name, reached in curves.items():
        if name.startswith(VALUES) and reached:
            low, high = words.share(min(reached)), words.share(max(reached))
            told = low if low == high else f"{low} to {high}"
            return f"p(new object) with {name.removeprefix(VALUES)}: {told}."
    return ""


def _picture(chart: Map) -> Picture:
    svg = plots.heat(chart.values, chart.rows, chart.columns, name=chart.name, x_label=chart.x_label, unit=chart.unit)
    return Picture(chart.name, svg)
