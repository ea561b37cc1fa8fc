"""What a model tells of words that may come next, or fill a blank, by the most telling access that it gives.

Log-probabilities of given text tell a word exactly. The k most probable next tokens tell a word exactly where it is
among them; elsewhere they bound it: no token that is not told is likelier than the last that is, nor than all that is
left, 1 − Σ told. Text alone tells the word that it begins with, as greedy decoding has it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar, final

from lfm.core.errors import AccessError
from lfm.core.heavy import np
from lfm.core.interfaces import Logprobs, Ranked, Text, Top, name_of, names_of
from lfm.core.model import Model
from lfm.data.answers import begins_with, room
from lfm.data.wording import spaced
from lfm.prompting.template import Asked as Asked

if TYPE_CHECKING:
    from numpy.typing import NDArray

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)

ACCESS: tuple[type, ...] = (Text, Top, Logprobs)
"""What a model can be read by, the least telling first; what a slot's any_of names."""

TOLD = 20
"""Next tokens asked for where that is all that is told: few endpoints tell more."""

WIDE = 1000
"""Next tokens asked for where a model tells as many as one likes."""

NEVER = float("-inf")


class Told(NamedTuple):
    """Bounds of the words' natural-log probabilities, (n, words) each: equal where the model tells them."""

    low: NDArray[np.float64]
    high: NDArray[np.float64]

    @property
    def share(self) -> NDArray[np.float64]:
        """(n, words) probabilities: the middle of what is possible."""
        return (np.exp(self.low) + np.exp(self.high)) / 2


class Next(NamedTuple):
    """Next tokens, best first, as they are looked up: by text, and by text less the spaces around it (the likelier).

    left: the most that the natural-log probability of a token can be that is not told.
    """

    ranked: Ranked
    exact: dict[str, float]
    bare: dict[str, float]
    left: float


@final
class Reader:
    """A model as it is asked: nothing twice."""

    def __init__(self, model: Model) -> None:
        found = next((kind for kind in reversed(ACCESS) if model.can(kind)), None)
        if found is None:
            raise AccessError(
                f"{model.ref} tells nothing of words",
                why=f"it gives {', '.join(names_of(model.gives)) or 'nothing'}",
                fix=f"one of {', '.join(map(name_of, ACCESS))} will do",
            )
        self.model, self.access = model, found
        self._known: dict[Hashable, object] = {}
        self._next: dict[Asked, Next] = {}

    @property
    def fills(self) -> bool:
        """Whether it reads what follows the answer."""
        return self.model.facts.task == "masked-lm"

    @property
    def wide(self) -> int:
        """The next tokens that are worth asking for at a place, where any word may matter."""
        return TOLD if self.access is Top else WIDE

    def words(self, asked: Sequence[Asked], words: Sequence[str], *, whole: bool = False) -> Told:
        """What it tells of each word at each place, (n, words).

        whole: each word is known to be one token; then all that is told of a place is one question, whatever the words.
        """
        if self.access is Text:
            return self._heard(asked, words)
        if self.access is Logprobs and not whole:
            return self._scored(asked, words)
        return self._looked_up(asked, words, found if whole else bounds)

    def best(self, asked: Sequence[Asked], k: int) -> list[Ranked]:
        """The k most probable next tokens at each place. AccessError where the model tells text alone."""
        kind = Logprobs if self.access is Logprobs else Top
        model: Top = self.model.ask(kind)
        return self._once(
            [(one, k) for one in asked],
            lambda new: model.top([one.prompt for one, _ in new], k, [one.suffix for one, _ in new]),
        )

    def say(self, prompts: Sequence[str], *, max_tokens: int, stop: Sequence[str] = ()) -> list[str]:
        """Greedy text after each prompt."""
        return self._once(
            [(prompt, max_tokens, tuple(stop)) for prompt in prompts],
            lambda new: self.model.ask(Text).generate([p for p, *_ in new], max_tokens=max_tokens, stop=stop),
        )

    def _scored(self, asked: Sequence[Asked], words: Sequence[str]) -> Told:
        keys = [(one.prompt, spaced(one.prompt, word), one.suffix) for one in asked for word in words]
        found = self._once(
            keys,
            lambda new: [
                score.total
                for score in self.model.ask(Logprobs).score(
                    [p for p, _, _ in new], [w for _, w, _ in new], [s for *_, s in new]
                )
            ],
        )
        values = np.array(found, dtype=np.float64).reshape(len(asked), len(words))
        return Told(values, values)

    def _looked_up(
        self, asked: Sequence[Asked], words: Sequence[str], bound: Callable[[Next, str], tuple[float, float]]
    ) -> Told:
        new = [one for one in dict.fromkeys(asked) if one not in self._next]
        self._next.update(zip(new, map(looked_up, self.best(new, self.wide)), strict=True))
        pairs = [[bound(self._next[one], spaced(one.prompt, word)) for word in words] for one in asked]
        both = np.array(pairs, dtype=np.float64).reshape(len(asked), len(words), 2)
        return Told(both[..., 0], both[..., 1])

    def _heard(self, asked: Sequence[Asked], words: Sequence[str]) -> Told:
        said = self.say([one.prompt for one in asked], max_tokens=max(4, room(words)))
        values = np.full((len(asked), len(words)), NEVER)
        for row, text in enumerate(said):
            heard = [i for i, word in enumerate(words) if begins_with(text, word)]
            if heard:
                values[row, max(heard, key=lambda i: len(words[i]))] = 0.0
        return Told(values, values)

    def _once(self, keys: Sequence[K], answer: Callable[[list[K]], Sequence[T]]) -> list[T]:
        """The keys' answers, of which only those are asked for that are not known."""
        new = [key for key in dict.fromkeys(keys) if key not in self._known]
        if new:
            self._known.update(zip(new, answer(new), strict=True))
        return [self._known[key] for key in keys]  # type: ignore[misc]


def bounds(told: Next, word: str) -> tuple[float, float]:
    """(low, high) natural-log probability of a word, of one token or several.

    A told token that the word begins with, but is not, bounds it too: what follows is not known.
    """
    low, high = found(told, word)
    begun = [v for text, v in told.ranked if text.strip() and word.strip().startswith(text.strip())]
    return (low, high) if low == high != NEVER else (low, float(np.logaddexp.reduce([high, *begun])))


def looked_up(told: Ranked) -> Next:
    """Next tokens, best first, as words are looked up in them."""
    exact, bare = {}, {}
    for text, value in told:
        exact.setdefault(text, value)
        bare.setdefault(text.strip(), value)
    total = float(np.exp([value for _, value in told]).sum())
    left = (min(float(np.log(1.0 - total)), told[-1][1]) if total < 1.0 else NEVER) if told else 0.0
    return Next(told, exact, bare, left)


def found(told: Next, word: str) -> tuple[float, float]:
    """(low, high) natural-log probability of a word that is one token."""
    value = told.exact.get(word, told.bare.get(word.strip()))
    return (NEVER, told.left) if value is None else (value, value)
