"""A memory of edits in words: a scope classifier finds the edit that a prompt is about, and a second model, told that
edit, answers in the first one's place. What no edit is about never reaches it.

Where the edit is told: before the prompt, in what a causal model goes on from, a masked one fills in, an encoder reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, final

import msgspec

from lfm.core.heavy import torch
from lfm.core.interfaces import Codec, Gradients, Logits, Logprobs, LowRank, Ranked, Said, Score, Text, Weights, said_by
from lfm.core.method import Parts
from lfm.core.model import Model
from lfm.data.records import Edit
from lfm.data.wording import spaced
from lfm.editing import form, memory, outcome
from lfm.editing.cloze import Asked, filled
from lfm.models import device, forward, local, structure
from lfm.models.codec import pad, pad_id
from lfm.models.language import batches

if TYPE_CHECKING:
    from torch import Tensor, nn

WITHIN = 0.5
"""Probability of being in an edit's scope from which on it answers."""


@final
@dataclass(frozen=True)
class Scope:
    """Edits and what answers by them, as a program gives it. base: digest of the model beneath.

    keys (n, k): each edit's prompt as the classifier sees it, one row an edit whatever the others are. map (width, k):
    of the mean hidden state of a text at a block. changes: what makes the second model of the first.
    """

    base: str
    block: int
    edits: tuple[Edit, ...]
    keys: Tensor
    map: Tensor
    changes: Mapping[str, LowRank]

    def parts(self, model: Model) -> Parts:
        """As a program's parts."""
        tensors = {"keys": self.keys, "map": self.map}
        for name, change in self.changes.items():
            tensors |= {f"change.{name}.b": change.b, f"change.{name}.a": change.a}
        state = {
            "base": self.base,
            "block": self.block,
            "edits": [msgspec.to_builtins(edit) for edit in self.edits],
            "transposed": {name: change.transposed for name, change in self.changes.items()},
        }
        return Parts({"model": (model,)}, {name: t.contiguous() for name, t in tensors.items()}, state)


def opened(parts: Parts) -> Scope:
    """The scope in a program's parts."""
    state, tensors = parts.state, parts.tensors
    changes = {
        name: LowRank(tensors[f"change.{name}.b"], tensors[f"change.{name}.a"], transposed)
        for name, transposed in state["transposed"].items()
    }
    edits = tuple(msgspec.convert(edit, Edit) for edit in state["edits"])
    return Scope(state["base"], state["block"], edits, tensors["keys"], tensors["map"], changes)


def taken(scope: Scope, places: Sequence[int]) -> Scope:
    """The scope with the edits at these places alone."""
    index = torch.tensor(list(places), dtype=torch.long)
    edits = tuple(scope.edits[i] for i in places)
    return Scope(scope.base, scope.block, edits, scope.keys[index], scope.map, scope.changes)


def learn(scope: Scope, edits: Sequence[Edit], keys: Tensor) -> Scope:
    """The scope with more edits, of these keys. DataError where one contradicts an edit that it has."""
    fresh = memory.unknown(scope.edits, edits)
    every = (*scope.edits, *(edits[i] for i in fresh))
    return Scope(scope.base, scope.block, every, torch.cat([scope.keys, keys[fresh]]), scope.map, scope.changes)


def joined(scope: Scope, more: Scope) -> Scope:
    """The scope with the other's edits too, which were keyed by the same classifier. DataError as of `learn`."""
    assert torch.equal(scope.map, more.map), "keys of different classifiers"
    return learn(scope, more.edits, more.keys)


def forget(scope: Scope, edits: Sequence[Edit]) -> Scope:
    """The scope without these edits, the rows of the others as they are. DataError for one that it does not have."""
    return taken(scope, memory.without(scope.edits, edits))


def means(module: nn.Module, codec: Codec, block: int, texts: Sequence[str]) -> Tensor:
    """(n, width) fp32 on the CPU: the mean over a text's tokens of what a block puts out, over its length √Σ²/width.

    block: of the stack that reads, the encoder's where there is one.
    """
    rows = [list(row) for row in codec.tokenizer(list(texts))["input_ids"]]
    found: dict[int, Tensor] = {}
    for group in batches([len(row) for row in rows]):
        batch = pad([rows[i] for i in group], pad_id(codec.tokenizer))
        batch["decoder_input_ids"] = batch["input_ids"][:, :1]  # left out where there is no decoder
        with torch.no_grad(), structure.watch(module, [form.at(module, "hidden", block)]) as seen:
            forward(module, batch)
        found.update((i, seen[0][place, : len(rows[i])].float().mean(0).cpu()) for place, i in enumerate(group))
    mean = torch.stack([found[i] for i in range(len(rows))])
    return mean / mean.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12)


def apart(one: Tensor, other: Tensor) -> Tensor:
    """(n, m) −log p(in scope) = ‖difference‖² of what the classifier sees (2206.06520, its embedding variant)."""
    return (one[:, None] - other[None]).square().sum(-1)


def nearest(keys: Tensor, asked: Tensor) -> list[int]:
    """Of each row asked (m, k), the edit (n, k) that it is most likely about; −1 where that is about none."""
    if not len(keys):
        return [-1] * len(asked)
    far, place = apart(asked, keys).min(1)
    return [i if p else -1 for i, p in zip(place.tolist(), ((-far).exp() > WITHIN).tolist(), strict=True)]


def statement(edit: Edit) -> str:
    """The edit as a sentence that goes before what is asked."""
    return edit.prompt + spaced(edit.prompt, edit.new_object) + edit.suffix + " "


@final
class Routed:
    """Text and probabilities by prompt: the base's own, or where an edit is about the prompt the second model's."""

    def __init__(self, model: Model, scope: Scope) -> None:
        self._model, self.scope = model, scope

    @cached_property
    def second(self) -> Model:
        """The model that is told an edit."""
        return self._model.ask(Weights).update(self.scope.changes)

    @cached_property
    def _module(self) -> nn.Module:
        return self._model.ask(Gradients).module().to(device()).requires_grad_(False)

    @cached_property
    def _base(self) -> Mapping[type, Callable[[], Any]]:
        codec = self._model.ask(Codec)
        return local.interfaces(self._model.facts.task, lambda: self._module, lambda: codec)

    def about(self, prompts: Sequence[str]) -> list[int]:
        """The edit that each prompt is about, −1 for none."""
        if not prompts or not self.scope.edits:
            return [-1] * len(prompts)
        seen = means(self._module, self._model.ask(Codec), self.scope.block, prompts)
        return nearest(self.scope.keys, seen @ self.scope.map)

    def generate(self, prompts: Sequence[str], **how: Any) -> list[str]:
        return [one.text for one in self.said(prompts, **how)]

    def said(self, prompts: Sequence[str], **how: Any) -> list[Said]:
        return self._both(Text, prompts, lambda speaker, asked, _: said_by(speaker, asked, **how))

    def score(self, prompts: Sequence[str], continuations: Sequence[str], suffixes: Sequence[str] = ()) -> list[Score]:
        endings = suffixes or [""] * len(prompts)

        def scored(judge: Any, asked: Sequence[str], places: Sequence[int]) -> list[Score]:
            return judge.score(asked, [continuations[i] for i in places], [endings[i] for i in places])

        return self._both(Logprobs, prompts, scored)

    def top(self, prompts: Sequence[str], k: int, suffixes: Sequence[str] = ()) -> list[Ranked]:
        endings = suffixes or [""] * len(prompts)

        def first(judge: Any, asked: Sequence[str], places: Sequence[int]) -> list[Ranked]:
            return judge.top(asked, k, [endings[i] for i in places])

        return self._both(Logprobs, prompts, first)

    def says(self, asked: Sequence[Asked]) -> list[bool]:
        """Whether greedy text from each bare prompt begins with the answer; whether a masked model fills it in."""
        if self._model.facts.task != form.MASKED_LM:
            return outcome.saying(self)(asked)
        codec = self._model.ask(Codec)

        def told(judge: Any, prompts: Sequence[str], places: Sequence[int]) -> list[bool]:
            reads = [(prompt, *asked[i][1:]) for prompt, i in zip(prompts, places, strict=True)]
            return filled(judge.logits, codec, reads)

        return self._both(Logits, [prompt for prompt, _, _ in asked], told)

    def _both(
        self, kind: type, prompts: Sequence[str], ask: Callable[[Any, Sequence[str], Sequence[int]], list[Any]]
    ) -> list[Any]:
        """What the base says to the prompts that are about no edit, and the second model to the others."""
        about = self.about(prompts)
        outside = [i for i, edit in enumerate(about) if edit < 0]
        inside = [i for i, edit in enumerate(about) if edit >= 0]
        found: dict[int, Any] = {}
        if outside:
            found.update(zip(outside, ask(self._base[kind](), [prompts[i] for i in outside], outside), strict=True))
        if inside:
            told = [statement(self.scope.edits[about[i]]) + prompts[i] for i in inside]
            found.update(zip(inside, ask(self.second.ask(kind), told, inside), strict=True))
        return [found[i] for i in range(len(prompts))]
