"""One model chooses among what another thinks likely: as a choice of letters, by words, or by classes of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, final

import msgspec

from lfm.core.heavy import np
from lfm.core.interfaces import Classes, Text
from lfm.core.model import Model
from lfm.data.records import Label, Pair
from lfm.prompting.classifier import LEAST, classes, verbalizer
from lfm.prompting.reading import Reader
from lfm.prompting.template import Asked, filled

if TYPE_CHECKING:
    from numpy.typing import NDArray

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

Form = Literal["letters", "words"]
"""How one is asked: to name a choice's letter, or to say one of the label's words."""


class Way(msgspec.Struct, frozen=True, kw_only=True):
    """How a model is asked to choose, among how many; template and words as a prompt's."""

    top: int
    form: Form = "letters"
    template: str = ""
    words: Mapping[str, tuple[str, ...]] = {}


def reranked(told: NDArray[Any], shares: NDArray[Any]) -> NDArray[Any]:
    """(n, classes) log-probabilities in which the mass of each row's likeliest is shared as `shares` (n, top) has
    it. The likeliest of all is then the one with the largest share: 1/top of their mass is more than any other's."""
    made = told.copy()
    best = candidates(told, shares.shape[1])
    rows = np.arange(len(told))[:, None]
    mass = np.logaddexp.reduce(told[rows, best], axis=1, keepdims=True)
    made[rows, best] = mass + np.log(shares.clip(LEAST))
    return made


def candidates(told: NDArray[Any], top: int) -> NDArray[Any]:
    """(n, top) places of the likeliest classes, the likeliest first."""
    return np.argsort(-told, axis=1, kind="stable")[:, :top]


@final
class Chooser:
    """A large model that says which of a record's candidates it is."""

    def __init__(self, model: Model, way: Way) -> None:
        self._model, self._way = model, way
        self._reader = None if model.can(Classes) else Reader(model)

    def shares(self, records: Sequence[Label | Pair], told: NDArray[Any], labels: Sequence[str]) -> NDArray[np.float64]:
        """(n, top) probabilities of each record's candidates, which sum to 1; the small model's where it says none."""
        best = candidates(told, self._way.top)
        logp = self._asked(records, best, labels)
        shares = np.exp(logp - np.logaddexp.reduce(logp, axis=1, keepdims=True))
        # nothing was said of any: what the small model told stands
        silent = np.ptp(shares, axis=1) == 0
        own = np.take_along_axis(told, best, 1)
        own = np.exp(own - np.logaddexp.reduce(own, axis=1, keepdims=True))
        return np.where(silent[:, None], own, shares)

    def _asked(self, records: Sequence[Label | Pair], best: NDArray[Any], labels: Sequence[str]) -> NDArray[np.float64]:
        if self._reader is None:
            asked = self._model.ask(Classes)
            place = [asked.labels.index(label) for label in labels]
            return np.take_along_axis(asked.tell(records)[:, place], best, 1)
        groups = verbalizer(labels, self._way.words)
        rows = [[groups[c] for c in row] for row in best.tolist()]
        if self._way.form == "letters":
            prompts = [choice(self._way.template, r, row) for r, row in zip(records, rows, strict=True)]
            letters = [[letter] for letter in LETTERS[: best.shape[1]]]
            if self._reader.access is Text:  # text may name the choice in other ways
                said = [[(*letters[i], f"({LETTERS[i]})", *group) for i, group in enumerate(row)] for row in rows]
            else:
                said = [[tuple(one) for one in letters] for _ in rows]
        else:
            prompts, said = [filled(self._way.template, record) for record in records], rows
        logp = np.empty(best.shape)
        together: dict[tuple[tuple[str, ...], ...], list[int]] = {}
        for i, row in enumerate(said):
            together.setdefault(tuple(row), []).append(i)
        for groups_of, places in together.items():
            found = self._reader.words([prompts[i] for i in places], [word for group in groups_of for word in group])
            logp[places] = classes(found, [len(group) for group in groups_of]).logp
        return logp


def choice(template: str, record: Label | Pair, row: Sequence[Sequence[str]]) -> Asked:
    """A multiple choice, the likeliest first, after which the letter comes."""
    listed = "\n".join(f"({letter}) {group[0]}" for letter, group in zip(LETTERS, row))
    return Asked(f"{filled(template, record).prompt}\n{listed}\nThe answer is (")
