"""Keep edits in a memory beside the weights: near an edit's key, one layer's output is replaced by the edit's value.

    h(x) = v_i   if ‖k(x) − k_i‖ ≤ ε_i for the nearest key k_i,   W k(x) + b otherwise
    v_i = argmin_v −log p(new object | prompt, h = v at the prompt's last token)

Paper: GRACE, arXiv 2211.11031. k(x) is what the projection ending a block's feed-forward layer reads. ε begins at one
radius; edits that agree expand, edits that conflict split the distance between them. What differs: the radius is no
constant (the paper's 1 says nothing in another model) but `radius` × the distance to the nearest of 32 prompts with
another subject; ε is a function of the set of edits, equal to the paper's for two, so that order says nothing and
forgetting one gives exactly what had been made without it; keys are looked up at every token (the authors': at the
prompt's last, then at each that is made), so that cached, uncached and scored text agree; values begin at W k + b, not
at random. The block is found by trying: the last in which edits have values, and texts before a prompt move its key
less than another subject does.

Model: a causal, masked or encoder-decoder language model; the last two with `text`, for they say none of their own. A
masked one has a key and a value for each blank that the new object fills; in an encoder an edit is kept at the
subject's last token (the authors' T5: at the prompt's), in a decoder where it says the object's first: a change there
is read by all that follow. The result is a program, which stores keys, values and radii.
`memory=` adds to an earlier one; with `forget=true` the edits go out of it. Notes are of greedy text. Errors: EditError
for an edit that does not hold (refused or, with on_failure=skip, left out), and where other text suffers; DataError.

    lfm run edit.grace model=base edits=edits.jsonl --out remembered
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from lfm.core import Cost, Inputs, Kept, Method, Model, Parts, Run, Sizes
from lfm.editing import memory, recall, remembering, settled
from lfm.editing.memory import Memory
from lfm.models.program import program

if TYPE_CHECKING:
    from lfm.core.errors import EditError

ID = "edit.grace"


class Config(remembering.Keyed, frozen=True):
    pass


KIND = settled.Kind(Memory, memory.empty, memory.learn, memory.forget, memory.attach)


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    here, kept, edits = remembering.keyed(config, inputs, run, KIND)
    failures: list[EditError] = []
    if edits:
        kept = recall.found(config, here, kept, edits, failures, run)
    fix = "a smaller radius, or another layer"
    kept = settled.settled(here, kept, edits, failures, config, run, KIND, fix=fix)
    return program(ID, config, kept.parts(inputs.model("model")), open)


def open(config: Config, parts: Parts) -> Mapping[type, Callable[[], Any]]:
    """The interfaces of the program: those of the model, answering by the memory, and the memory itself."""
    return remembering.interfaces(parts, memory.opened(parts), memory.attach)


def agree(config: Config, inputs: Inputs) -> None:
    remembering.agree(ID, inputs, config.layer, forget=config.forget)


def cost(config: Config, sizes: Sizes) -> Cost:
    disk = 20 * sizes.model("model").width * sizes.data["edits"].records
    return remembering.cost(config, sizes, together=recall.GROUP, disk=disk)


METHOD = Method(
    paper="arXiv:2211.11031",
    config=Config,
    models=remembering.models(ID, Memory),
    data=remembering.DATA,
    run=run,
    cost=cost,
    agree=agree,
    open=open,
    forms=("program",),
    kept=Kept(Memory, memory.learn, memory.taken, keys=attrgetter("keys")),
)
