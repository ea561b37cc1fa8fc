"""What editors that keep facts beside the weights have in common as methods: settings, what they are given, what they
begin with, refuse and give."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Generic, NamedTuple

from lfm.core.config import Meta
from lfm.core.errors import SlotError
from lfm.core.interfaces import Codec, Gradients
from lfm.core.method import Cost, Data, DataSlot, Inputs, Parts, Run, Sizes, Slot
from lfm.data.records import Edit
from lfm.editing import form, outcome, recall, rows, setting, settled
from lfm.editing.choose import candidates
from lfm.editing.recall import K
from lfm.editing.settled import Kind
from lfm.models import device, local

if TYPE_CHECKING:
    from torch import nn

    from lfm.editing.setting import Setting

Forget = Annotated[bool, Meta(description="take the edits out of the memory, by prompt and new object")]


class Keyed(recall.Recall, frozen=True):
    """How an edit is found by its key, and what it must show to be kept. An editor's Config inherits these."""

    layer: Annotated[
        int | None, Meta(description="block whose keys tell edits apart, from 0; none: try them on the first edits")
    ] = None
    prefixes: Annotated[int, Meta(ge=1, description="texts of its own before a prompt, to try a block")] = 8
    tokens: Annotated[int, Meta(ge=1, description="tokens of text that pieces are taken from")] = 4096
    collapse: outcome.Collapse = outcome.COLLAPSE
    on_failure: outcome.OnFailure = "refuse"
    forget: Forget = False


DATA = {
    "edits": DataSlot(Data.FEW_SHOT, ("edit",), help="facts to change, or to forget"),
    "text": DataSlot(Data.UNLABELED, ("text",), optional=True, help="running text that is to stay as it is"),
}


def models(id: str, kind: type, *needs: type, forgets: bool = True) -> dict[str, Slot]:
    """The model to edit, and what the method made of it before. needs: what else is asked of the model."""
    uses = "to add to or to forget from" if forgets else "to add to"
    return {
        "model": Slot((Gradients, Codec, *needs), help="the language model to edit"),
        "memory": Slot((kind,), min=0, help=f"what {id} made of it before, {uses}"),
    }


class Begun(NamedTuple, Generic[K]):
    """kept: what is there before the edits are made, less what is to be forgotten. edits: those to make."""

    here: Setting
    kept: K
    edits: list[Edit]


def begun(
    inputs: Inputs,
    run: Run,
    kind: Kind[K],
    block: Callable[[Setting, list[Edit]], int],
    *,
    prefixes: int,
    tokens: int,
    forget: bool,
) -> Begun[K]:
    """Where an editor starts. block: what chooses one, where no memory has."""
    model, given = inputs.model("model"), list(inputs.records("edits"))
    edits = [] if forget else given
    kept = settled.earlier(model, inputs.all("memory"), kind.type)
    here = setting.opened(model, inputs.records("text"), run, prefixes=prefixes, tokens=tokens)
    if kept is None:
        kept = kind.empty(here.module, model.digest, form.numbered(here.module, block(here, edits)))
    return Begun(here, kind.forget(kept, *given) if forget else kept, edits)


def keyed(config: Keyed, inputs: Inputs, run: Run, kind: Kind[K]) -> Begun[K]:
    """The same of an editor by keys: the block is the one that is set, or chosen by trying."""

    def block(here: Setting, edits: list[Edit]) -> int:
        return recall.chosen(config, here, edits, run) if config.layer is None else config.layer

    how = {"prefixes": config.prefixes, "tokens": config.tokens, "forget": config.forget}
    return begun(inputs, run, kind, block, **how)


def interfaces(parts: Parts, kept: K, attach: Callable[[nn.Module, K], Any]) -> Mapping[type, Callable[[], Any]]:
    """Of a program that keeps edits: those of its model, answering by what is kept, and that itself."""
    model = parts.model("model")

    def built() -> nn.Module:
        module = model.ask(Gradients).module().to(device())
        attach(module, kept)
        return module

    gives = dict(local.interfaces(model.facts.task, built, lambda: model.ask(Codec)))
    return gives | {Codec: lambda: model.ask(Codec), type(kept): lambda: kept}


def agree(
    id: str, inputs: Inputs, layer: int | None, *, forget: bool = False, tasks: Sequence[str] = tuple(form.KINDS)
) -> None:
    """Raises, before any weight is read: DataError for edits that do not go together, SlotError for a memory that is
    wanting or has its block already or for text that is, MismatchError for a model that is no language model or has no
    such block."""
    given = inputs.all("memory")
    rows.agree(inputs.records("edits"), inputs.model("model"))
    if forget and not given:
        raise SlotError(f"{id} has nothing to forget from", fix="add memory=REF")
    if given and layer is not None:
        raise SlotError(f"{id} takes either memory or layer", why="the memory's edits are of one block")
    form.editable(id, inputs.model("model"), inputs.records("text"), () if layer is None else (layer,), tasks)


def cost(config: Keyed, sizes: Sizes, *, together: int, disk: int) -> Cost:
    """Of an editor by keys that searches for so many edits at a time. disk: what it then keeps, in bytes."""
    facts, edits = sizes.model("model"), sizes.data["edits"]
    tried = len(candidates(facts.layers + 1)) if config.layer is None and facts.layers else 0
    prompt = 8 + edits.tokens // max(1, edits.records)
    searches = edits.records + tried * min(recall.TRIED, edits.records)
    a_prompt = 2.0 * facts.parameters * prompt
    return Cost(
        flops=searches * a_prompt * (3 * config.steps + recall.RIVALS) + 2.5 * facts.parameters * config.tokens,
        steps=(-(-edits.records // together) + tried) * 2 * config.steps,
        memory=4 * facts.parameters + 24 * prompt * max(together, recall.RIVALS) * facts.vocabulary,
        disk=disk,
    )
