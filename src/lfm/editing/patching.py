"""Patches in natural language (2211.03318): “if …, then …” beside a text classifier, which acts where it applies."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, final

import msgspec

from lfm.core.errors import DataError
from lfm.core.heavy import F, torch
from lfm.core.interfaces import Batch, Codec, Gradients, LowRank
from lfm.core.method import Parts
from lfm.core.model import Facts, Model
from lfm.data.files import where
from lfm.data.language import context_of
from lfm.data.records import Text
from lfm.models import device, forward
from lfm.models.codec import pad, pad_id

if TYPE_CHECKING:
    from torch import Tensor, nn

CONDITION = r"""((?:"[^"]*"|“[^”]*”|[^"“”])+?)"""
"""Whose quotations are whole: what they quote is the condition's, "then" too."""
FORMS = tuple(
    re.compile(rf"^\s*if\s+{CONDITION}{mark}\s+then\s+(.+?)\s*\.?\s*$", re.I | re.S) for mark in (r"\s*,", "")
)
LABEL = re.compile(r"^(?:the\s+)?(?:label|class)\s+is\s+(.+)$", re.I | re.S)
QUOTES = "\"'“”‘’"
MARK = " If: "
"""What stands between a text and what a patch says."""


class Patch(msgspec.Struct, frozen=True):
    """If `condition`, then `consequence`; label: the class that it is, −1 where it is to be read with the text."""

    condition: str
    consequence: str
    label: int = -1


def parsed(records: Sequence[Text], facts: Facts) -> list[Patch]:
    """The patches that texts say. DataError, with file and line, for the first that says none, names a class that the
    model has not, or repeats or contradicts another."""
    found: list[Patch] = []
    first: dict[str, int] = {}
    for number, record in enumerate(records):
        here = where(records, number)
        match = next((match for form in FORMS if (match := form.match(record.text))), None)
        if match is None:
            raise DataError(
                f"{here}: {record.text!r} is no patch",
                why="a patch reads: if CONDITION, then CONSEQUENCE",
                fix=f'such as: if the review says "above and beyond", then the label is {(*facts.labels, "good")[0]}',
            )
        patch = Patch(_plain(match[1]), _plain(match[2]), _label(_plain(match[2]), facts, here))
        known = first.setdefault(patch.condition.lower(), number)
        if known != number:
            same = found[known].consequence == patch.consequence
            raise DataError(
                f"{here} {'repeats' if same else 'contradicts'} {where(records, known)}: if {patch.condition}",
                why="" if same else f"one says {found[known].consequence!r}, the other {patch.consequence!r}",
                fix="leave one of them",
            )
        found.append(patch)
    return found


def _plain(text: str) -> str:
    return " ".join(text.split())


def _label(consequence: str, facts: Facts, here: str) -> int:
    match = LABEL.match(consequence)
    name = match[1].strip(QUOTES) if match else consequence.strip(QUOTES)
    named = {label.lower(): place for place, label in enumerate(facts.labels)}
    if match and name.lower() not in named:
        raise DataError(
            f"{here}: {name!r} is not one of the model's classes",
            why=f"they are {', '.join(facts.labels[:12])}",
            fix="name one of them, or say what is to be read instead: then it was a good day",
        )
    return named.get(name.lower(), -1)


@final
@dataclass(frozen=True)
class Patches:
    """Patches and what reads them, as a program gives it. base: digest of the model beneath.

    gate: the tensors of a Gate. changes: what makes an interpreter of the model; empty where none was trained.
    """

    base: str
    patches: tuple[Patch, ...]
    gate: Mapping[str, Tensor]
    changes: Mapping[str, LowRank]

    def parts(self, model: Model) -> Parts:
        """As a program's parts."""
        tensors = {f"gate.{name}": tensor for name, tensor in self.gate.items()}
        for name, change in self.changes.items():
            tensors |= {f"change.{name}.b": change.b, f"change.{name}.a": change.a}
        state = {
            "base": self.base,
            "patches": [msgspec.to_builtins(patch) for patch in self.patches],
            "transposed": {name: change.transposed for name, change in self.changes.items()},
        }
        return Parts({"model": (model,)}, {name: t.contiguous() for name, t in tensors.items()}, state)


def opened(parts: Parts) -> Patches:
    """The patches in a program's parts."""
    state, tensors = parts.state, parts.tensors
    changes = {
        name: LowRank(tensors[f"change.{name}.b"], tensors[f"change.{name}.a"], transposed)
        for name, transposed in state["transposed"].items()
    }
    gate = {name.removeprefix("gate."): tensor for name, tensor in tensors.items() if name.startswith("gate.")}
    patches = tuple(msgspec.convert(patch, Patch) for patch in state["patches"])
    return Patches(state["base"], patches, gate, changes)


def learn(kept: Patches, more: Sequence[Patch]) -> Patches:
    """With more patches; one that is there is not learned twice. DataError for another consequence of a condition, and
    for a consequence that nothing was trained to read."""
    known = {patch.condition.lower(): patch for patch in kept.patches}
    for patch in more:
        if patch.label < 0 and not kept.changes:
            raise DataError(
                f"nothing reads the consequence {patch.consequence!r}",
                why="the patches were made with read_steps=0, and it names no class",
                fix="name a class, or make them anew with read_steps",
            )
        other = known.setdefault(patch.condition.lower(), patch)
        if other.consequence != patch.consequence:
            raise DataError(
                f"there is a patch already: if {other.condition}, then {other.consequence}",
                why=f"the same condition cannot mean, too: {patch.consequence}",
                fix="forget that patch first",
            )
    return replace(kept, patches=tuple(known.values()))


def forget(kept: Patches, gone: Sequence[Patch]) -> Patches:
    """Without these patches, the others as they are. DataError for one that is not there."""
    for patch in gone:
        if patch not in kept.patches:
            raise DataError(
                f"there is no patch: if {patch.condition}, then {patch.consequence}",
                why=f"there are {len(kept.patches)}: " + "; ".join(map(worded, kept.patches[:3])),
            )
    return replace(kept, patches=tuple(patch for patch in kept.patches if patch not in gone))


def worded(patch: Patch) -> str:
    """The patch as a sentence."""
    return f"if {patch.condition}, then {patch.consequence}"


def told(batch: Batch, consequences: Sequence[str], tokenizer: Any, limit: int) -> Batch:
    """Each row with a consequence after its text, before the tokens that end every text. A text too long for the model
    loses its end; DataError for a consequence of more than half of what the model reads."""
    mask = list(tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"])
    tail = next((i for i, special in enumerate(reversed(mask)) if not special), 0)
    words = {text: words_of(tokenizer, MARK + sentence(text), limit) for text in dict.fromkeys(consequences)}
    types, rows, kinds = batch.get("token_type_ids"), [], []
    for number, text in enumerate(consequences):
        here, own = batch["attention_mask"][number].bool(), words[text]
        ids = batch["input_ids"][number][here].tolist()
        end = len(ids) - tail
        cut = min(end, limit - len(own) - tail) if limit else end
        rows.append([*ids[:cut], *own, *ids[end:]])
        if types is not None:
            kind = types[number][here].tolist()[:cut]
            kinds.append(kind + kind[-1:] * (len(rows[-1]) - cut))
    made = dict(pad(rows, pad_id(tokenizer)))
    return made if types is None else {**made, "token_type_ids": pad(kinds, 0)["input_ids"]}


def sentence(text: str) -> str:
    """A consequence as the sentence that it stands for."""
    return text[:1].upper() + text[1:] + ("" if text[-1:] in ".!?" else ".")


def words_of(tokenizer: Any, text: str, limit: int) -> list[int]:
    """The tokens of what a patch says. DataError where they leave too little room for a text."""
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if limit and len(ids) > limit // 2:
        raise DataError(
            f"{text.removeprefix(MARK).strip()[:80]!r} is too long for a patch",
            why=f"it is {len(ids)} tokens of the {limit} that the model reads",
            fix="say it in fewer words",
        )
    return ids


def fitting(model: Model, patches: Sequence[Patch]) -> None:
    """DataError for a patch too long to be read."""
    tokenizer = model.ask(Codec).tokenizer
    limit = context_of(tokenizer, model.facts)
    for patch in patches:
        asked(tokenizer, patch.condition, limit)
        words_of(tokenizer, MARK + sentence(patch.consequence), limit)


def asked(tokenizer: Any, condition: str, limit: int) -> list[int]:
    """A condition's tokens. Without quotation marks, so that what it quotes is cut into tokens as within a text."""
    return words_of(tokenizer, " " + _plain(re.sub("(?<!\\w)['‘]|['’](?!\\w)|[\"“”]", " ", condition)), limit)


def odds(gate: Any, module: Any, batch: Batch) -> Tensor:
    """(B,) log odds that each row's condition (asked, asks: ids and mask) holds of its text."""
    table, home = module.get_input_embeddings(), next(module.parameters()).device
    ids, mask, words, there = (batch[key].to(home) for key in ("input_ids", "attention_mask", "asked", "asks"))
    return gate(table(ids).float(), mask, table(words).float(), there)


def mixed(plain: Tensor, gates: Tensor, readings: Mapping[int, Tensor], opens: float) -> Tensor:
    """(B, classes) logits: the plain ones; where the largest gate (patches, B) is above `opens`, the logarithm of

    p = g · I + (1 − g) · softmax(plain),   I = readings[that patch] (B, classes).
    """
    if not len(gates):
        return plain
    gate, which = gates.max(0)
    out = plain.clone()
    for row in (gate > opens).nonzero()[:, 0].tolist():
        g = gate[row].double()
        p = g * readings[int(which[row])][row].double() + (1 - g) * plain[row].double().softmax(-1)
        out[row] = p.clamp(min=torch.finfo(torch.float32).tiny).log().to(out)
    return out


@final
class Patched:
    """The model's logits, by its patches where they apply."""

    def __init__(self, model: Model, kept: Patches, opens: float) -> None:
        self._model, self.kept, self._opens = model, kept, opens

    @cached_property
    def _plain(self) -> nn.Module:
        return self._model.ask(Gradients).module().to(device()).requires_grad_(False)

    @cached_property
    def _interpreter(self) -> nn.Module:
        module: Any = self._model.ask(Gradients).module().requires_grad_(False)
        for name, change in self.kept.changes.items():
            added = change.b @ change.a
            module.get_submodule(name).weight += added.T if change.transposed else added
        return module.to(device())

    @cached_property
    def _gate(self) -> nn.Module:
        from lfm.editing.matching import Gate

        width, k = self.kept.gate["maps.0"].shape
        gate = Gate(width, k, torch.Generator())
        gate.load_state_dict(dict(self.kept.gate))
        return gate.to(device()).requires_grad_(False)

    @cached_property
    def _reads(self) -> tuple[Any, int]:
        tokenizer = self._model.ask(Codec).tokenizer
        return tokenizer, context_of(tokenizer, self._model.facts)

    def gates(self, batch: Batch) -> Tensor:
        """(patches, B) probability that each patch applies. Each is asked by itself: no other says anything to it."""
        tokenizer, limit = self._reads
        count, made = len(batch["input_ids"]), []
        for patch in self.kept.patches:
            ids = torch.tensor([asked(tokenizer, patch.condition, limit)] * count)
            row = {**batch, "asked": ids, "asks": torch.ones_like(ids)}
            made.append(odds(self._gate, self._plain, row).sigmoid())
        return torch.stack(made) if made else torch.zeros(0, count)

    def acts(self, batch: Batch) -> Tensor:
        """(B,) whether a patch acts on a text."""
        with torch.no_grad():
            gates = self.gates(batch)
        return (gates > self._opens).any(0)

    def logits(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            plain = forward(self._plain, batch)
            if not self.kept.patches:
                return plain
            gates = self.gates(batch)
            gate, which = gates.max(0)
            chosen = sorted(set(which[gate > self._opens].tolist()))
            return mixed(plain, gates, {i: self._reading(batch, i, plain) for i in chosen}, self._opens)

    def _reading(self, batch: Batch, patch: int, plain: Tensor) -> Tensor:
        """(B, classes): the class that the patch names, or how the text reads with its consequence."""
        said = self.kept.patches[patch]
        if said.label >= 0:
            return F.one_hot(torch.full((len(plain),), said.label), plain.shape[-1]).to(plain)
        read = told(batch, [said.consequence] * len(plain), *self._reads)
        return forward(self._interpreter, read).softmax(-1)
