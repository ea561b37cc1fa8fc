"""A trained editor and what it made of a model, as a program that gives both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import msgspec

from lfm.core.config import Config
from lfm.core.interfaces import Codec, Gradients, LowRank, Weights
from lfm.core.method import Parts
from lfm.core.model import Model
from lfm.data.records import Edit
from lfm.models import local
from lfm.models.program import Open, digest, program

if TYPE_CHECKING:
    from torch import Tensor


@final
@dataclass(frozen=True)
class Editor:
    """A trained editor, as a program gives it. layers: names of those that it changes. tensors: the network's.

    bases: digests of the models that it may edit, what it was made over and what it made. edits: those made so far.
    """

    method: str
    bases: tuple[str, ...]
    layers: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    edits: tuple[Edit, ...] = ()


def programmed(
    method: str, config: Config, model: Model, editor: Editor, changes: Mapping[str, LowRank], open: Open
) -> Model:
    """The program: the model, the editor's network, and the change, which can also be saved by itself."""
    tensors = {f"editor.{name}": tensor.cpu().contiguous() for name, tensor in editor.tensors.items()}
    for name, change in changes.items():
        tensors |= {f"change.{name}.b": change.b, f"change.{name}.a": change.a}
    state = {
        "layers": list(editor.layers),
        "transposed": {name: change.transposed for name, change in changes.items()},
        "edits": [msgspec.to_builtins(edit) for edit in editor.edits],
    }
    parts = Parts({"model": (model,)}, tensors, state)
    forms = {form: partial(_write, parts, form) for form in ("adapter", "checkpoint")}
    made = program(method, config, parts, open)
    return replace(made, formats={**made.formats, **forms})


def _write(parts: Parts, form: str, out: Path) -> Model:
    changed = edited(parts)
    return changed.save(out, form)


def edited(parts: Parts) -> Model:
    """The model with the change in its weights."""
    tensors = parts.tensors
    changes = {
        name: LowRank(tensors[f"change.{name}.b"], tensors[f"change.{name}.a"], transposed)
        for name, transposed in parts.state["transposed"].items()
    }
    return parts.model("model").ask(Weights).update(changes)


def opened(method: str, config: Config, parts: Parts) -> dict[type, Callable[[], Any]]:
    """The interfaces of a learned editor's program: those of the edited model, and the editor."""
    model = parts.model("model")

    @cache
    def changed() -> Model:
        return edited(parts)

    def editor() -> Editor:
        found = {n.removeprefix("editor."): t for n, t in parts.tensors.items() if n.startswith("editor.")}
        bases = (model.digest, digest(method, config, parts))
        edits = tuple(msgspec.convert(edit, Edit) for edit in parts.state["edits"])
        return Editor(method, bases, tuple(parts.state["layers"]), found, edits)

    codec = partial(model.ask, Codec)
    gives = dict(local.interfaces(model.facts.task, lambda: changed().ask(Gradients).module(), codec))
    own = {kind: partial(_of, changed, kind) for kind in (Gradients, Weights)}
    return gives | own | {Codec: codec, Editor: editor}


def _of(model: Callable[[], Model], kind: type) -> Any:
    return model().ask(kind)
