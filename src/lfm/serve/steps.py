"""One token at a time, for what whole texts do not tell: log-probabilities, nucleus sampling, ids and embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, final

from lfm.core.heavy import torch
from lfm.core.interfaces import Codec, Embeddings, Logits, Logprobs
from lfm.core.model import Model
from lfm.models.codec import pad, pad_id
from lfm.models.language import batches, continuation, ids_by_text, piece
from lfm.serve.wire import Bad, Embeds, Ids, Prompt, Text

if TYPE_CHECKING:
    from torch import Tensor


class Candidate(NamedTuple):
    """A possible next token: its text, its log-probability, and what to add to the state if it is chosen."""

    text: str
    logprob: float
    token: Any


class Stepper(Protocol):
    """How a state (what has been read so far) becomes candidates, best first, and grows by one of them."""

    def start(self, prompt: Prompt) -> Any: ...

    def candidates(self, states: Sequence[Any], k: int) -> list[list[Candidate]]: ...

    def grown(self, state: Any, chosen: Candidate) -> Any: ...

    def said(self, start: Any, state: Any, text: str, chosen: Candidate) -> str:
        """The text after a choice in this state; before it, it was `text`, and at first `start` was all there was."""
        ...


def stepper_for(model: Model, prompt: Prompt, *, suffix: str = "", also: Sequence[str] = ()) -> Stepper:
    """The most exact way that this model has. Bad where it has none. also: tokens told wherever they rank."""
    if also and not isinstance(prompt, Embeds):
        raise Bad("logprob_tokens go with prompt_embeds", param="logprob_tokens")
    causal = model.facts.task in ("causal-lm", "")
    if isinstance(prompt, Embeds):
        return ByEmbeds(model, also)
    if isinstance(prompt, Text) and suffix and Logprobs in model.gives:
        return ByText(model, suffix)
    if model.can(Codec, Logits) and causal:
        return ByIds(model)
    if isinstance(prompt, Text) and Logprobs in model.gives:
        return ByText(model, suffix)
    what = "token ids" if isinstance(prompt, Ids) else "log-probabilities, or what they would be made from"
    raise Bad(f"this model does not give {what}", code="not_offered")


@final
class ByIds:
    """Exact ids and a forward pass a step."""

    def __init__(self, model: Model) -> None:
        self._logits, self._tokenizer = model.ask(Logits), model.ask(Codec).tokenizer
        self._vocabulary = model.facts.vocabulary or len(self._tokenizer)

    def start(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, Ids):
            if not all(0 <= i < self._vocabulary for i in prompt.ids):
                raise Bad(f"token ids go from 0 to {self._vocabulary - 1}", param="prompt")
            return prompt.ids
        assert isinstance(prompt, Text)
        ids = list(self._tokenizer(prompt.text)["input_ids"])
        if len(ids) > 1 and ids[-1] == self._tokenizer.eos_token_id:
            ids.pop()  # a tokenizer that closes every text would ask what follows the end
        if not ids:
            raise Bad("the prompt is empty and the tokenizer has no token to open a text with", param="prompt")
        return tuple(ids)

    def logits(self, states: Sequence[Sequence[int]]) -> list[Tensor]:
        """(t, V) log-probabilities of each row, those after its last token included."""
        found: list[Any] = [None] * len(states)
        for group in batches([len(state) for state in states]):
            logits = self._logits.logits(pad([list(states[i]) for i in group], pad_id(self._tokenizer)))
            for place, i in enumerate(group):
                found[i] = logits[place, : len(states[i])].float().log_softmax(-1).cpu()
        return found

    def candidates(self, states: Sequence[Any], k: int) -> list[list[Candidate]]:
        return [self.ranked(row[-1], k) for row in self.logits(states)]

    def ranked(self, row: Tensor, k: int) -> list[Candidate]:
        values, ids = row.topk(min(k, len(row)))
        return [Candidate(piece(self._tokenizer, i), v, i) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]

    def grown(self, state: tuple[int, ...], chosen: Candidate) -> tuple[int, ...]:
        return (*state, chosen.token)

    def said(self, start: Any, state: Any, text: str, chosen: Candidate) -> str:
        # Decoded anew each time: a character may be made of several tokens.
        return continuation(self._tokenizer, [*state, chosen.token], len(start))


@final
class ByText:
    """Text that grows by ranked tokens' texts: any model that ranks next tokens."""

    def __init__(self, model: Model, suffix: str) -> None:
        self._logprobs, self._suffix = model.ask(Logprobs), suffix
        self._special = _special(model)

    def start(self, prompt: Prompt) -> str:
        assert isinstance(prompt, Text)
        return prompt.text

    def candidates(self, states: Sequence[Any], k: int) -> list[list[Candidate]]:
        suffixes = [self._suffix] * len(states) if self._suffix else ()
        ranked = self._logprobs.top(list(states), k, suffixes)
        return [[Candidate(text, value, text) for text, value in row] for row in ranked]

    def grown(self, state: str, chosen: Candidate) -> str:
        return state + chosen.token

    def said(self, start: Any, state: Any, text: str, chosen: Candidate) -> str:
        return text if chosen.text in self._special else text + chosen.text


@final
class ByEmbeds:
    """Input embeddings that grow by the rows of chosen tokens (which needs a tokenizer to find them)."""

    def __init__(self, model: Model, also: Sequence[str]) -> None:
        self._embeddings, self._also = model.ask(Embeddings), also
        self._model = model
        self._special = _special(model)

    def start(self, prompt: Prompt) -> Tensor:
        assert isinstance(prompt, Embeds)
        return prompt.rows

    def candidates(self, states: Sequence[Any], k: int) -> list[list[Candidate]]:
        ranked = self._embeddings.next_from(list(states), k, self._also)
        return [[Candidate(text, value, text) for text, value in row] for row in ranked]

    def grown(self, state: Tensor, chosen: Candidate) -> Tensor:
        if Codec not in self._model.gives:
            raise Bad("after prompt_embeds this model gives one token: set max_tokens to 1", param="max_tokens")
        table = self._embeddings.table()
        ids = ids_by_text(self._model.ask(Codec).tokenizer, len(table)).get(chosen.token, [])
        if len(ids) != 1:
            raise Bad(f"after prompt_embeds nothing can follow {chosen.token!r}: {len(ids)} tokens read so")
        return torch.cat([state, table[ids]])

    def said(self, start: Any, state: Any, text: str, chosen: Candidate) -> str:
        return text if chosen.text in self._special else text + chosen.text


def _special(model: Model) -> frozenset[str]:
    return frozenset(model.ask(Codec).tokenizer.all_special_tokens) if Codec in model.gives else frozenset()
