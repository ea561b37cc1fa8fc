"""What models were asked, wherever they lie: questions and their tokens charged to a meter, and none asked twice."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple, final

import msgspec

from lfm.core.heavy import np, torch
from lfm.core.interfaces import INTERFACES, Codec, Ranked, Said, Score
from lfm.core.method import Inputs
from lfm.core.model import Model
from lfm.models.api.cache import Cache, digest_of
from lfm.models.api.capabilities import MARGIN, bound
from lfm.models.budget import Meter

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

ASKED: tuple[type, ...] = tuple(
    kind
    for name, kind in INTERFACES.items()
    if name in ("text", "top", "logprobs", "vectors", "embeddings", "injection")
)
"""The interfaces of questions and answers, such as endpoints give: these are counted."""

LENGTH = "_lfm_tokens_of"
"""Where one who counts leaves for the next how many tokens texts have: the next may not see the tokenizer."""

CHARGED = "charged"
"""What an endpoint's interfaces tell: the tokens that they were charged so far, by the server's own count where it has
one. A question that was answered before took none."""

RANKED = list[tuple[str, float]]


@final
@dataclass
class Tally:
    """Who counts. kept: where answers lie; without it, what is asked again counts again. counts: until that is ended.

    A question's tokens are those of its text and of its answer by the model's tokenizer; where it has none, its bytes,
    which tokens never exceed, and once it is answered what the endpoint was charged. BudgetError, and nothing asked,
    where the meter's budget does not allow a call.
    """

    meter: Meter
    kept: Cache | None = None
    counts: bool = True

    def over(self, model: Model, whole: Model | None = None) -> Model:
        """The same model, whose questions are counted. whole: it with all that it gives, a tokenizer perhaps."""
        tokens = Tokens(whole or model)

        def opener(kind: type) -> Callable[[], Any]:
            if kind not in ASKED:
                return lambda: model.ask(kind)
            return lambda: self._counted(model.ask(kind), tokens, model)

        gives = {kind: opener(kind) for kind in model.gives}
        return replace(model, gives=gives, identify=lambda: model.digest, look=lambda: model.facts, _opened={})

    def inputs(self, given: Inputs, whole: Inputs) -> Inputs:
        """The inputs, of which the models here are counted; endpoints are charged for what they are asked anyway."""
        models = {
            role: tuple(
                self.over(model, all_of_it) if all_of_it.kind != "api" and any(map(model.can, ASKED)) else model
                for model, all_of_it in zip(models, whole.all(role), strict=True)
            )
            for role, models in given.models.items()
        }
        return Inputs(models, given.data)

    def _counted(self, opened: Any, tokens: Tokens, model: Model) -> Any:
        """The opened interface, asking through here; whatever else it can is its own."""
        made, length = copy.copy(opened), getattr(opened, LENGTH, tokens.of)
        object.__setattr__(made, LENGTH, length)
        for name, asking in ASKING.items():
            if callable(own := getattr(opened, name, None)):
                charged = getattr(opened, CHARGED, None)
                object.__setattr__(made, name, partial(asking, Call(self, name, own, length, model, charged)))
        return made


class Question(NamedTuple):
    """What is asked, in plain values; the most tokens that it takes; how many questions it is."""

    asked: Any
    tokens: int
    times: int = 1


@final
@dataclass(frozen=True)
class Call:
    """One way to ask one model. own: how it answers; tokens: how many it makes of texts; charged: see CHARGED."""

    tally: Tally
    name: str
    own: Callable[..., Any]
    tokens: Callable[[Sequence[str]], list[int]]
    model: Model
    charged: Callable[[], int] | None = None

    def answered(
        self,
        questions: Sequence[Question],
        ask: Callable[[list[int]], list[Any]],
        kind: Any,
        unused: Callable[[list[Any]], int] = lambda _: 0,
    ) -> list[Any]:
        """Each question's answer. ask: the answers of some places; unused: tokens not taken after all."""
        if not self.tally.counts:
            return ask(list(range(len(questions))))
        meter, cache = self.tally.meter, self.tally.kept
        keys, known = [str(i) for i in range(len(questions))], {}
        if cache is not None:
            keys = [digest_of([self.model.digest, self.name, question.asked]) for question in questions]
            held = cache.get(list(dict.fromkeys(keys)))
            known = {key: msgspec.msgpack.decode(raw, type=kind) for key, raw in held.items()}
        first: dict[str, int] = {}
        for place, key in enumerate(keys):
            if key not in known:
                first.setdefault(key, place)
        if first:
            new = list(first.values())
            charge = (sum(questions[i].times for i in new), sum(questions[i].tokens for i in new))
            meter.reserve(*charge)
            before = self.charged() if self.charged else 0
            try:
                answers = ask(new)
            except Exception:
                meter.give_back(*charge)
                raise
            most = charge[1]
            meter.give_back(0, max(0, most - (self.charged() - before)) if self.charged else unused(answers))
            made = dict(zip(first, answers, strict=True))
            if cache is not None:
                cache.put({key: msgspec.msgpack.encode(answer) for key, answer in made.items()})
            known |= made
        return [known[key] for key in keys]


@final
class Tokens:
    """How many tokens a model makes of texts, or at most."""

    def __init__(self, model: Model) -> None:
        self._model = model

    @cached_property
    def _tokenizer(self) -> Any:
        return self._model.ask(Codec).tokenizer if self._model.can(Codec) else None

    def of(self, texts: Sequence[str]) -> list[int]:
        if self._tokenizer is None:
            return [bound(text) + MARGIN for text in texts]
        return [len(ids) for ids in self._tokenizer(list(texts))["input_ids"]] if texts else []


def generate(call: Call, prompts: Sequence[str], **how: Any) -> list[str]:
    """Text.generate."""
    return _spoken(call, prompts, str, lambda one: one, **how)


def said(call: Call, prompts: Sequence[str], **how: Any) -> list[Said]:
    """Text's said, where it has one."""
    return _spoken(call, prompts, Said, lambda one: one.text, **how)


def _spoken(
    call: Call,
    prompts: Sequence[str],
    kind: type[Any],
    text: Callable[[Any], str],
    *,
    max_tokens: int = 64,
    temperature: float = 0.0,
    stop: Sequence[str] = (),
    seed: int = 0,
) -> list[Any]:
    """What is drawn depends on the whole call, so such a call is one question of many prompts."""
    prompts, read = list(prompts), call.tokens(prompts)
    how: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "stop": tuple(stop), "seed": seed}
    if temperature > 0:
        most = sum(read) + max_tokens * len(prompts)
        whole = Question([prompts, *how.values()], most, len(prompts))
        return call.answered([whole], lambda _: [call.own(prompts, **how)], list[kind])[0] if prompts else []
    questions = [Question([p, max_tokens, how["stop"]], n + max_tokens) for p, n in zip(prompts, read, strict=True)]
    return call.answered(
        questions,
        lambda places: call.own([prompts[i] for i in places], **how),
        kind,
        unused=lambda made: sum(max(0, max_tokens - n) for n in call.tokens([text(one) for one in made])),
    )


def score(
    call: Call, prompts: Sequence[str], continuations: Sequence[str], suffixes: Sequence[str] = ()
) -> list[Score]:
    """Logprobs.score."""
    asked = list(zip(prompts, continuations, list(suffixes) or [""] * len(prompts), strict=True))
    lengths = call.tokens(["".join(one) for one in asked])

    def ask(places: list[int]) -> list[Score]:
        some = [asked[i] for i in places]
        return call.own([p for p, _, _ in some], [c for _, c, _ in some], [s for *_, s in some])

    return call.answered([Question(one, n) for one, n in zip(asked, lengths, strict=True)], ask, Score)


def top(call: Call, prompts: Sequence[str], k: int, suffixes: Sequence[str] = ()) -> list[Ranked]:
    """Top.top."""
    asked = list(zip(prompts, list(suffixes) or [""] * len(prompts), strict=True))
    lengths = call.tokens(["".join(one) for one in asked])

    def ask(places: list[int]) -> list[Ranked]:
        return call.own([asked[i][0] for i in places], k, [asked[i][1] for i in places])

    return call.answered([Question((*one, k), n + 1) for one, n in zip(asked, lengths, strict=True)], ask, RANKED)


def next_from(call: Call, *given: Any, **named: Any) -> list[Ranked]:
    """Embeddings' and Injection's next_from: one question for each row of embeddings, kept as one call."""
    embeds = next(one for one in given if isinstance(one, list | tuple))
    ahead = sum(len(one[-1] if one.dim() > 2 else one) for one in given if isinstance(one, torch.Tensor))
    most = sum(len(rows) + ahead + 1 for rows in embeds)
    whole = Question([digest(given), digest(tuple(named.items()))], most, len(embeds))
    return call.answered([whole], lambda _: [call.own(*given, **named)], list[RANKED])[0] if embeds else []


def told(call: Call, prompts: Tensor, embeds: Sequence[Tensor], tokens: Sequence[str]) -> Tensor:
    """ManyPrompts' and Injection's told: a question for each prompt and text, kept as one call."""
    many, length = len(prompts), prompts.shape[-2]
    most = many * sum(len(rows) + length + 1 for rows in embeds)
    whole = Question([digest((prompts, *embeds)), list(tokens)], most, many * len(embeds))
    shape = (many, len(embeds), len(tokens))

    def ask(_: list[int]) -> list[list[float]]:
        return [call.own(prompts, embeds, tokens).double().flatten().tolist()]

    if not call.tally.counts or not many * len(embeds):
        return call.own(prompts, embeds, tokens)
    return torch.tensor(call.answered([whole], ask, list[float])[0], dtype=torch.float64).reshape(shape)


def vectors(call: Call, texts: Sequence[str]) -> NDArray[np.float32]:
    """Vectors.vectors."""
    texts = list(texts)

    def ask(places: list[int]) -> list[list[float]]:
        return call.own([texts[i] for i in places]).tolist()

    asked = [Question(text, n) for text, n in zip(texts, call.tokens(texts), strict=True)]
    return np.array(call.answered(asked, ask, list[float]), dtype=np.float32) if texts else call.own(texts)


ASKING: Mapping[str, Callable[..., Any]] = {
    "generate": generate,
    "said": said,
    "score": score,
    "top": top,
    "next_from": next_from,
    "told": told,
    "vectors": vectors,
}
"""How each thing that can be asked is counted, by its name in the interfaces."""


def digest(value: Any) -> str:
    """sha256 of plain values and tensors, in order."""
    found = hashlib.sha256()
    for one in value if isinstance(value, tuple | list) else (value,):
        if isinstance(one, torch.Tensor):
            found.update(f"{tuple(one.shape)}{one.dtype}".encode())
            found.update(one.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        elif isinstance(one, tuple | list):
            found.update(digest(one).encode())
        else:
            found.update(repr(one).encode() + b"\0")
    return found.hexdigest()
