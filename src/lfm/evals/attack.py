"""Robust accuracy: what a classifier of texts still tells right when words are put for others to mislead it.

A greedy search in two stages, as TextFooler and TextBugger do it (arXiv 1907.11932, 1812.05271): words are ranked by
how far the true class's probability falls when each is left out; from the most telling on, the candidate that lowers
that probability most is put for each, until the answer is wrong or the budget is spent. Candidates are swaps within the
word, and words whose embeddings lie nearest in a model's own table. Whoever attacks needs no gradient, only answers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from lfm.core.errors import DataError
from lfm.core.heavy import np, torch
from lfm.core.interfaces import Codec, Gradients, Logits
from lfm.core.model import Model
from lfm.data import task as tasks
from lfm.data.records import Label, Pair
from lfm.evals.estimate import Metric, estimates, mean

if TYPE_CHECKING:
    from numpy.typing import NDArray

Attacked = Label | Pair
Tell = Callable[[Sequence[Attacked]], "NDArray[Any]"]
"""Records → (n, classes) log-probabilities."""
Candidates = Callable[[str], Sequence[str]]
"""A word → words to put for it."""

WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")
AT_ONCE = 64
NEAR = 0.5
"""Least cosine of two words' embeddings at which one is put for the other (TextFooler's for its own embeddings)."""


class Outcome(NamedTuple):
    """What became of one record. record: as it was misread, or as it was. changed: words; asked: answers it took."""

    record: Attacked
    before: bool  # right at first
    after: bool  # right to the end
    changed: int
    asked: int


def robust_accuracy(outcomes: Sequence[Outcome], *, seed: int = 0, bootstrap: int = 1000) -> dict[str, Metric]:
    """accuracy before the attack, robust_accuracy after it; changed: words a misled record; asked: answers a record."""
    misled = [o.before and not o.after for o in outcomes]
    return estimates(
        [
            mean("accuracy", [float(o.before) for o in outcomes]),
            mean("robust_accuracy", [float(o.after) for o in outcomes]),
            mean("changed", [o.changed if m else float("nan") for o, m in zip(outcomes, misled, strict=True)]),
            mean("asked", [float(o.asked) for o in outcomes]),
        ],
        seed=seed,
        bootstrap=bootstrap,
    )


def attack(
    records: Sequence[Attacked],
    tell: Tell,
    labels: Sequence[str],
    candidates: Candidates,
    *,
    share: float = 0.3,
    done: Callable[[int], None] = lambda more: None,
) -> list[Outcome]:
    """Try to mislead a classifier about each record by changing words of its text (a pair's first one).

    labels: the classes in the order of `tell`. share: of a text's words that may be changed, at least one. A word whose
    candidates all leave the true class as likely stays. done: called with how many records are through.
    """
    found = []
    for record in records:
        found.append(_attacked(record, tell, labels.index(record.label), candidates, share))
        done(1)
    return found


def _attacked(record: Attacked, tell: Tell, right: int, candidates: Candidates, share: float) -> Outcome:
    asked = 1
    now = tell([record])[0]
    if int(now.argmax()) != right:
        return Outcome(record, False, False, 0, asked)
    places = [match.span() for match in WORD.finditer(record.text)]
    without = [_with(record, [(place, "")]) for place in places]
    fallen = now[right] - tell(without)[:, right] if places else np.zeros(0)
    asked += len(without)
    changes: list[tuple[tuple[int, int], str]] = []
    best = now[right]
    for i in np.argsort(-fallen, kind="stable"):
        if len(changes) >= max(1, int(share * len(places))):
            break
        start, end = places[i]
        tried = [_with(record, [*changes, (places[i], word)]) for word in candidates(record.text[start:end])]
        if not tried:
            continue
        told = tell(tried)
        asked += len(tried)
        wrong = told.argmax(-1) != right
        pick = int(np.where(wrong, told[:, right] - 1e9, told[:, right]).argmin())  # a misleading one before any other
        if wrong[pick]:
            return Outcome(tried[pick], True, False, len(changes) + 1, asked)
        if told[pick, right] < best:
            best = told[pick, right]
            word = candidates(record.text[start:end])[pick]
            changes.append((places[i], word))
    return Outcome(_with(record, changes), True, True, len(changes), asked)


def _with(record: Attacked, changes: Sequence[tuple[tuple[int, int], str]]) -> Attacked:
    """The record with other words at these places of its text."""
    text = record.text
    for (start, end), word in sorted(changes, reverse=True):
        text = text[:start] + word + text[end:]
    return msgspec.structs.replace(record, text=text)


def teller(model: Model, records: Sequence[Attacked]) -> tuple[Tell, tuple[str, ...]]:
    """How a text classifier answers, and its classes. DataError for a model that is none."""
    facts = model.facts
    if facts.task != "text-classification":
        raise DataError(
            f"{model.ref} is no text classifier", why=f"its task is {facts.task or 'unknown'}", fix="tune.mvp makes one"
        )
    task, logits = tasks.task_for(records, model.ask(Codec), facts), model.ask(Logits)

    def tell(asked: Sequence[Attacked]) -> NDArray[Any]:
        parts = [asked[i : i + AT_ONCE] for i in range(0, len(asked), AT_ONCE)]
        told = [logits.logits(task.collate(part)).log_softmax(-1).double().cpu().numpy() for part in parts]
        return np.concatenate(told)

    return tell, facts.labels


# ---------------------------------------------------------------------------------------------- candidates


def swaps(word: str) -> list[str]:
    """The word with two neighbouring letters within it changed places, and with one of them left out."""
    inner = range(1, len(word) - 2)
    turned = [word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in inner]
    short = [word[:i] + word[i + 1 :] for i in range(1, len(word) - 1)] if len(word) > 3 else []
    return [other for other in dict.fromkeys([*turned, *short]) if other != word]


def neighbours(model: Model, words: Sequence[str], k: int = 8) -> Mapping[str, tuple[str, ...]]:
    """Each word's k nearest whole words by the cosine of the model's input embeddings, nearest first, none below NEAR.

    Only words of one token have any; inflections of the same word (one beginning the other) are left out.
    """
    tokenizer = model.ask(Codec).tokenizer
    module: Any = model.ask(Gradients).module()
    table = module.get_input_embeddings().weight.detach().float()
    whole = _whole_words(tokenizer)
    ids = torch.tensor([i for i, _ in whole])
    rows = torch.nn.functional.normalize(table[ids] - table[ids].mean(0), dim=-1)
    place = {word: at for at, (_, word) in enumerate(whole)}
    found: dict[str, tuple[str, ...]] = {}
    for word in dict.fromkeys(w.lower() for w in words):
        if word not in place:
            continue
        near = (rows @ rows[place[word]]).topk(min(k + 8, len(whole)))
        others = [whole[i][1] for v, i in zip(near.values.tolist(), near.indices.tolist(), strict=True) if v >= NEAR]
        found[word] = tuple(o for o in others if not o.startswith(word) and not word.startswith(o))[:k]
    return found


def _whole_words(tokenizer: Any) -> list[tuple[int, str]]:
    """(id, word) of the tokens that are lower-case words by themselves, by their text within a sentence."""
    found: dict[str, int] = {}
    for token, id in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        word = token.lstrip("Ġ▁")
        marked = token != word
        if word.isalpha() and word.islower() and len(word) > 2 and (marked or not _marks(tokenizer)):
            found.setdefault(word, id)
    return [(id, word) for word, id in found.items()]


def _marks(tokenizer: Any) -> bool:
    """Whether tokens say by a mark that a space comes before them."""
    return any(token[:1] in "Ġ▁" and len(token) > 1 for token in tokenizer.get_vocab())


def both(near: Mapping[str, Sequence[str]]) -> Candidates:
    """Swaps within the word, and its neighbours."""
    return lambda word: [*swaps(word), *near.get(word.lower(), ())]
