"""Mixed batches: one base, many adapters, each row of a batch with its own.

y = W x + b + B_i A_i x,   i the row's adapter; A, B stacked once, a batch's gathered in two batched products a layer
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from lfm.core.errors import ConfigError, MismatchError
from lfm.core.heavy import nn, torch
from lfm.core.interfaces import Batch, Codec, Gradients, Logits, Logprobs, Said, Text
from lfm.core.model import Model
from lfm.models import adapter, structure
from lfm.models.device import device, forward, taken
from lfm.models.language import CausalLogprobs
from lfm.models.mixed.factors import Change, changes
from lfm.models.mixed.text import Asked, answered, asked

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Mixed", "mixed"]


def mixed(base: Model, adapters: Mapping[str, Model | Path | str]) -> Mixed:
    """The base with all these adapters beside it, by name: models, or PEFT directories.

    MismatchError naming the adapter that was made for another base (by digest), that does not fit it, or whose kind is
    neither a change of low rank nor a scale of rows.
    """
    module = base.ask(Gradients).module().to(device()).eval().requires_grad_(False)
    found = {name: _read(base, name, given, module) for name, given in adapters.items()}
    return Mixed(base, module, {n: change for n, (change, _) in found.items()}, {n: d for n, (_, d) in found.items()})


def _read(base: Model, name: str, given: Model | Path | str, module: nn.Module) -> tuple[dict[str, Change], str]:
    """What it changes, and its digest."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) if isinstance(given, Model) else Path(given).expanduser()
        if isinstance(given, Model):
            if "adapter" not in given.formats:
                raise MismatchError(f"{given.ref} is no adapter", why=f"it is a {given.kind}", fix="give an adapter")
            given.save(directory, "adapter")
        elif not (directory / adapter.CONFIG).exists():
            raise MismatchError(f"{directory} is no adapter", why=f"there is no {adapter.CONFIG} in it")
        source = adapter.source_of(directory, lambda *_: base)
        if source.base_digest and source.base_digest != base.digest:
            raise MismatchError(
                f"the adapter {name!r} was made for another base",
                why=f"{base.ref} has digest {base.digest[:12]}, its own has {source.base_digest[:12]}",
                fix=f"give it its own base, {source.config.get('base_model_name_or_path')}",
            )
        return changes(source, module), adapter.digest(source)


@final
class Mixed:
    """A base in memory once, and its adapters' factors. From any thread: batches wait for one another, and texts that
    are asked for meanwhile are answered together."""

    def __init__(
        self,
        base: Model,
        module: nn.Module,
        adapters: Mapping[str, Mapping[str, Change]],
        digests: Mapping[str, str],
    ) -> None:
        from lfm.models.mixed.modules import Turn

        self.base, self.names, self._digests = base, tuple(adapters), digests
        self._turn, self._module = Turn(), module
        _gather(module, list(adapters.values()), self._turn)
        self._busy, self._guard = threading.Lock(), threading.Lock()
        self._waiting: list[tuple[Asked, list[Said | Exception]]] = []

    def logits(self, batch: Batch, adapters: Sequence[str | None]) -> Tensor:
        """fp32 logits. adapters: each row's by name, None for the base itself. ConfigError for a name not known."""
        rows = len(next(iter(batch.values())))
        if len(adapters) != rows:
            raise ConfigError(f"{len(adapters)} adapters are named for {rows} rows")
        self._numbers(adapters)
        with self._busy, torch.no_grad(), self._taking(adapters):
            return forward(self._module, batch)

    def generate(self, prompts: Sequence[str], adapters: Sequence[str | None], **how: Any) -> list[str]:
        """What each adapter says after its prompt."""
        return [one.text for one in self.said(prompts, adapters, **how)]

    def said(
        self,
        prompts: Sequence[str],
        adapters: Sequence[str | None],
        *,
        max_tokens: int = 64,
        temperature: float = 0.0,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> list[Said]:
        """As generate, with whether each was cut. Whoever gets the module first answers all who came meanwhile."""
        if len(adapters) != len(prompts):
            raise ConfigError(f"{len(adapters)} adapters are named for {len(prompts)} prompts")
        self._numbers(adapters)
        codec = self.base.ask(Codec)
        rows = asked(self._module, codec, prompts, adapters, max_tokens, temperature, stop, seed)
        mine: list[tuple[Asked, list[Said | Exception]]] = [(row, []) for row in rows]
        with self._guard:
            self._waiting += mine
        with self._busy:
            with self._guard:
                taken, self._waiting = self._waiting, []
            try:
                with torch.no_grad():
                    texts = answered(self._module, codec, [row for row, _ in taken], self._taking)
                for (_, out), text in zip(taken, texts, strict=True):
                    out.append(text)
            except Exception as error:  # theirs to be told of as well
                for _, out in taken:
                    out.append(error)
        texts = []
        for _, (told,) in mine:
            if isinstance(told, Exception):
                raise told
            texts.append(told)
        return texts

    def model(self, name: str | None) -> Model:
        """One adapter, or None for the base, as a model that shares memory and batches with the others."""
        self._numbers([name])
        gives: dict[type, Any] = {Logits: partial(_One, self, name)}
        if Codec in self.base.gives:
            gives[Codec] = lambda: self.base.ask(Codec)
            if self.base.facts.task in ("causal-lm", "seq2seq-lm"):
                gives[Text] = partial(_One, self, name)
            if self.base.facts.task == "causal-lm":
                gives[Logprobs] = lambda: CausalLogprobs(
                    _One(self, name).logits, self.base.ask(Codec), context=lambda: self.base.facts.context
                )
        ref = f"{self.base.ref}#{name}" if name else self.base.ref
        return Model(
            ref,
            "module",
            gives,
            identify=lambda: self._digests[name] if name else self.base.digest,
            look=lambda: self.base.facts,
        )

    def _numbers(self, adapters: Sequence[str | None]) -> list[int]:
        known = {name: place for place, name in enumerate(self.names)}
        for name in adapters:
            if name is not None and name not in known:
                raise ConfigError(f"there is no adapter {name!r}", fix=f"there are: {', '.join(self.names) or 'none'}")
        return [len(known) if name is None else known[name] for name in adapters]

    @contextmanager
    def _taking(self, adapters: Sequence[str | None]) -> Iterator[None]:
        from lfm.models.mixed.modules import plan

        of = self._numbers(adapters)
        before, where = self._turn.plan, next(self._module.parameters()).device
        if any(name is not None for name in adapters):
            same = before is not None and before.of.tolist() == of
            self._turn.plan = before if same else plan(of, where)
            yield
        else:
            self._turn.plan = None
            yield


@final
class _One:
    """One adapter of a mixture: its texts and logits."""

    def __init__(self, mixture: Mixed, name: str | None) -> None:
        self._mixture, self._name = mixture, name

    def logits(self, batch: Batch) -> Tensor:
        return self._mixture.logits(batch, [self._name] * len(next(iter(batch.values()))))

    def generate(self, prompts: Sequence[str], **how: Any) -> list[str]:
        return [one.text for one in self.said(prompts, **how)]

    def said(self, prompts: Sequence[str], **how: Any) -> list[Said]:
        return self._mixture.said(prompts, [self._name] * len(prompts), **how)


def _gather(module: nn.Module, adapters: Sequence[Mapping[str, Change]], turn: Any) -> None:
    """Put the adapters' changes into the module's linear layers, and pack the weights of all where that is faster."""
    from lfm.models.mixed.modules import Joined, Part, packed

    layers = {name: (layer, inside, out) for name, layer, inside, out in structure.linears(module)}
    groups = _beside(module, [*layers])
    while groups:
        names = groups.pop()
        given = [[each.get(name) for each in adapters] for name in names]
        some, product = [layers[name][0] for name in names], packed([layers[name][0] for name in names])
        scaled = any(change is not None and change.into is not None for each in given for change in each)
        if len(names) > 1 and (product is None or scaled):
            groups += [[name] for name in names]
            continue
        if product is None and not any(change is not None for change in given[0]):
            continue
        sizes = layers[names[0]][1], [layers[name][2] for name in names]
        joined = Joined(product or some[0], given, sizes, turn, some[0].weight)  # type: ignore[arg-type]
        for place, (name, layer) in enumerate(zip(names, some, strict=True)):
            shown = (layer.weight, layer.bias) if product is None else (product.weight, product.bias)
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, Part(joined, place, None if product else layer, *shown))


def _beside(module: nn.Module, names: Sequence[str]) -> list[list[str]]:
    """The linear layers, those of one parent together that read the same tensor, as a text of two tokens shows."""
    takes = taken(type(module)) or ()
    seen: dict[tuple[str, int, int], list[str]] = {}
    kept: list[Tensor] = []

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            kept.append(given[0])  # alive: no other tensor gets its id
            seen.setdefault((name.rpartition(".")[0], id(given[0]), given[0]._version), []).append(name)

        return hook

    handles = [module.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]
    try:
        if "input_ids" in takes:
            ids = torch.zeros(1, 2, dtype=torch.long)
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids}
            with torch.no_grad():
                forward(module, batch)
    finally:
        for handle in handles:
            handle.remove()
    met = [name for some in seen.values() for name in some]
    groups = [some for some in seen.values() if len(some) > 1 and all(met.count(name) == 1 for name in some)]
    joined = {name for some in groups for name in some}
    return groups + [[name] for name in names if name not in joined]
