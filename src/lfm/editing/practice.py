"""What learned editors have in common as methods: their settings, what they are given, what they refuse and cost."""

from __future__ import annotations

from typing import Annotated, Literal

from lfm.core.config import Meta
from lfm.core.errors import SlotError
from lfm.core.interfaces import Codec, Gradients, Weights
from lfm.core.method import Cost, Data, DataSlot, Inputs, Sizes, Slot
from lfm.editing import form, lessons, outcome, rows
from lfm.editing.editor import Editor
from lfm.editing.setting import PROBE
from lfm.train.fit import steps_of

ROWS = 5
"""Rows that a lesson is read in: the edit, the edit again in two wordings, two texts that must stay."""


class Practised(outcome.Trained, frozen=True):
    """How an editor of weights is trained, and what its edits must show. A learned editor's Config inherits these."""

    blocks: Annotated[int, Meta(ge=1, description="blocks edited, the last ones")] = 3
    together: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="edits that are one change in practice; none: as many as are to be made, 32 at most"),
    ] = None
    tokens: Annotated[int, Meta(ge=1, description="tokens of text that must stay")] = 8192
    steps: Annotated[int, Meta(ge=1, description="steps of practice")] = 200
    batch_size: Annotated[int, Meta(ge=1, description="edits practised at a time")] = 16
    schedule: Annotated[
        Literal["cosine", "linear", "constant"], Meta(description="how the rate falls after the warm-up")
    ] = "linear"


MODELS = {
    "model": Slot((Gradients, Weights, Codec), help="the language model to edit"),
    "editor": Slot((Editor,), min=0, help="what the method made of it before: the trained editor is used again"),
}
DATA = {
    "edits": DataSlot(Data.FEW_SHOT, ("edit",), help="facts to change"),
    "practice": DataSlot(Data.FEW_SHOT, ("fact", "edit"), optional=True, help="facts to practise editing on"),
    "text": DataSlot(Data.UNLABELED, ("text",), optional=True, help="running text that must stay as it is"),
}


def agree(id: str, config: Practised, inputs: Inputs) -> None:
    """Raises, before any weight is read, where the edits or the inputs cannot go together."""
    rows.agree(inputs.records("edits"), inputs.model("model"))
    model = inputs.model("model")
    form.editable(id, model, inputs.records("text"))
    if inputs.all("editor") and inputs.records("practice"):
        raise SlotError(f"{id} takes either editor or practice", why="an editor that is given is not trained any more")
    if not inputs.all("editor"):
        lessons.agree(id, model.facts.task, inputs.records("practice"), inputs.records("edits"))


def cost(config: Practised, sizes: Sizes) -> Cost:
    """Training where no editor is given, and a backward pass an edit."""
    facts, edits = sizes.model("model"), sizes.data["edits"]
    each = max(edits.tokens // max(1, edits.records), 8)
    trains = not sizes.models.get("editor")
    read = steps_of(config, 1) * config.batch_size * ROWS * each if trains else 0
    width = 5 * facts.width  # of x and δ side by side, the inner width not known before the weights are
    return Cost(
        flops=8.0 * facts.parameters * (read + edits.tokens * ROWS) + 2.5 * facts.parameters * (config.tokens + PROBE),
        steps=3 * config.steps * trains + 3 * edits.records,
        memory=int(4 * facts.parameters + 48 * config.batch_size * each * facts.vocabulary + 64 * width**2),
        disk=16 * width**2 + 8 * width * config.blocks * edits.tokens,
    )
