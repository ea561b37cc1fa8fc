"""A model of text that is always told some text first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

from lfm.core.interfaces import Logprobs, Ranked, Said, Score, Text, said_by
from lfm.core.model import Model


def interfaces(part: Model, prefix: str) -> dict[type, Callable[[], Any]]:
    """Text and scores of the part, of what it gives of these, with the prefix before everything that it is asked."""
    gives: dict[type, Callable[[], Any]] = {}
    if part.can(Text):
        gives[Text] = lambda: PrefixedText(part.ask(Text), prefix)
    if part.can(Logprobs):
        gives[Logprobs] = lambda: PrefixedLogprobs(part.ask(Logprobs), prefix)
    return gives


@final
class PrefixedText:
    def __init__(self, text: Text, prefix: str) -> None:
        self._text, self._prefix = text, prefix

    def generate(self, prompts: Sequence[str], **how: Any) -> list[str]:
        return [one.text for one in self.said(prompts, **how)]

    def said(self, prompts: Sequence[str], **how: Any) -> list[Said]:
        return said_by(self._text, [self._prefix + prompt for prompt in prompts], **how)


@final
class PrefixedLogprobs:
    def __init__(self, logprobs: Logprobs, prefix: str) -> None:
        self._logprobs, self._prefix = logprobs, prefix

    def score(self, prompts: Sequence[str], continuations: Sequence[str], suffixes: Sequence[str] = ()) -> list[Score]:
        return self._logprobs.score([self._prefix + prompt for prompt in prompts], continuations, suffixes)

    def top(self, prompts: Sequence[str], k: int, suffixes: Sequence[str] = ()) -> list[Ranked]:
        return self._logprobs.top([self._prefix + prompt for prompt in prompts], k, suffixes)
