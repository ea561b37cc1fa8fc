"""Change facts by a network that turns their gradients into edits of the weights, trained once and used many times.

    W' = W − α Σ_t δ̃_t x̃_tᵀ,   (x̃, δ̃) = g((x, δ) normalised),   g(z) = two layers z + [s ⊙ (UVz + b) + o]₊
    loss = c_edit · NLL(what an edit must bring about) + c_loc · KL(before ‖ after) on what must stay

Of a layer that reads x, δ is the gradient of an edit's loss at what it writes: W's gradient is Σ_t δ_t x_tᵀ. Weights of
one shape share a network but for s and o; it begins as the identity, so that an edit begins as a gradient step of the
normalised factors. Paper: MEND, arXiv 2110.11309. What differs: the step is taken downhill whatever the sign that α
begins with (the authors add, and let α turn negative); x and δ are normalised by their statistics over all edits
practised on, for the model is frozen (theirs run along); α begins at `rate` in units of W's root mean square over √in.
Layers are the feed-forward projections of the last `blocks` blocks.

It practises on facts (`practice`: each is given another's object; those about subjects of the edits are left out, so
that none is given away) or, where there are none, on text of a causal model's own, broken off and given a token that is
not its first choice. Edits are made all at once, each by its own gradient at the model as it is: their order says
nothing, and one that is left out takes its change with it. It practises on sums of as many as are to be made
(`together`), half of them of one relation: of more than it practised on few hold. c_edit is .1 in the paper.

Model: a causal, masked or encoder-decoder language model; of the last, its decoder's blocks. The result is a program
over it, with the trained editor in it: as `editor=` it makes further edits (of the model or of the result) in a
backward pass each. `--format adapter` writes the change alone, as a LoRA adapter. Errors: EditError for what greedy
text does not show, or where other text suffers; DataError.

    lfm run edit.mend model=base edits=edits.jsonl practice=facts.jsonl --set c_edit=1 --set rate=1 --set steps=30 \\
      --set collapse=4 --set on_failure=skip --out edited
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from lfm.core import Inputs, Meta, Method, Model, Parts, Run
from lfm.editing import editor, learned, practice
from lfm.editing.learned import Bench
from lfm.models import device

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.editing.residual import Mend

ID = "edit.mend"
FASTER = 10.0
"""α's rate over the network's."""


class Config(practice.Practised, frozen=True):
    c_edit: Annotated[float, Meta(gt=0, description="weight of the edits' loss")] = 1.0
    c_loc: Annotated[float, Meta(ge=0, description="weight of what must stay")] = 1.0
    rank: Annotated[int, Meta(ge=1, description="of the residual layers")] = 1920
    rate: Annotated[float, Meta(gt=0, description="first α, over rms(W) / √in")] = 0.3


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    return learned.edit(ID, config, inputs, run, untrained, train, open)


def untrained(config: Config, bench: Bench, run: Run) -> Mend:
    from lfm.editing.residual import Mend

    units = [config.rate * unit for unit in bench.units]
    return Mend(bench.shapes, units, config.rank, run.generator("network")).to(device())


def train(config: Config, bench: Bench, net: Mend, inputs: Inputs, run: Run) -> None:
    def weigh(_: Any, edited: Tensor, stayed: Tensor) -> Tensor:
        return config.c_edit * edited + config.c_loc * stayed

    def scale(name: str) -> float:
        return FASTER if name == "rates" else 1.0

    learned.practised(config, bench, net, inputs, run, weigh, scale)


def open(config: Config, parts: Parts) -> Mapping[type, Callable[[], Any]]:
    """The interfaces of the edited model, and the editor."""
    return editor.opened(ID, config, parts)


METHOD = Method(
    paper="arXiv:2110.11309",
    config=Config,
    models=practice.MODELS,
    data=practice.DATA,
    run=run,
    cost=practice.cost,
    agree=partial(practice.agree, ID),
    open=open,
    forms=("program", "adapter", "checkpoint"),
)
