"""Change facts by a network that reads what an edit says and gates the gradient of each weight accordingly.

    W' = W + u σ(η) (∇W ⊙ r cᵀ + s dᵀ),   (r, c, s, d, η) = MLP(BiLSTM(prompt and new object)), r and s softmaxes
    minimise NLL(what an edit must bring about) subject to KL(before ‖ after) ≤ margin on what must stay

Paper: KnowledgeEditor, arXiv 2104.08164. ∇W = Σ_t δ_t x_tᵀ is of low rank, and ∇W ⊙ r cᵀ = Σ_t (δ_t ⊙ r)(x_t ⊙ c)ᵀ of
no higher one: the result can be an adapter. λ of the Lagrangian NLL + λ (KL − margin) rises while the constraint does
not hold and falls while it does; the margin stays where it is (the authors lower theirs step by step). What else
differs: ∇W is in units of its usual size over the edits practised on, u is `rate` × rms(W) / √in, c begins near −1 (a
step downhill), KL is a mean over all tokens of texts that must stay, and the words are read as the model's own
embeddings (theirs begin as these, and train).

It practises on facts (`practice`: each is given another's object; those about subjects of the edits are left out) or,
where there are none, on text of a causal model's own, broken off and given a token that is not its first choice. Edits
are made all at once, each by its own gradient at the model as it is; one that is left out takes its change with it.

Model: a causal, masked or encoder-decoder language model; of the last, its decoder's blocks. The result is a program
over it, with the trained editor in it: as `editor=` it makes further edits (of the model or of the result) in a
backward pass each. `--format adapter` writes the change alone, as a LoRA adapter. Errors: EditError for what greedy
text does not show, or where other text suffers; DataError.

    lfm run edit.ke model=base edits=edits.jsonl practice=facts.jsonl --set rate=1 --set margin=1 --set steps=30 \\
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
from lfm.train import seeded

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lfm.editing.gates import Knowledge

ID = "edit.ke"
FASTER = 100.0
"""λ's rate over the network's."""


class Config(practice.Practised, frozen=True):
    margin: Annotated[float, Meta(gt=0, description="most KL a token, in nats, on what must stay")] = 0.02
    rate: Annotated[float, Meta(gt=0, description="u, over rms(W) / √in")] = 1.0
    hidden: Annotated[int, Meta(ge=1, description="width of the LSTM, each way, and within the gates' networks")] = 128
    condition: Annotated[int, Meta(ge=1, description="width of what is told of an edit")] = 256


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    return learned.edit(ID, config, inputs, run, untrained, train, open)


def untrained(config: Config, bench: Bench, run: Run) -> Knowledge:
    from lfm.editing.gates import Knowledge

    table: Any = bench.module.get_input_embeddings()  # type: ignore[operator]
    width, units = table.weight.shape[1], [config.rate * unit for unit in bench.units]

    def embed(ids: torch.Tensor) -> Tensor:
        return table.weight[ids]

    with seeded(run.seed_for("network")):
        return Knowledge(bench.shapes, units, embed, width, config.hidden, config.condition).to(device())


def train(config: Config, bench: Bench, net: Knowledge, inputs: Inputs, run: Run) -> None:
    def weigh(net: Any, edited: Tensor, stayed: Tensor) -> Tensor:
        beyond = stayed - config.margin
        return edited + net.price.detach() * beyond - net.price * beyond.detach()  # λ ascends

    def floor(_: int) -> None:
        net.price.clamp_(min=0)

    def scale(name: str) -> float:
        return FASTER if name == "price" else 1.0

    learned.practised(config, bench, net, inputs, run, weigh, scale, after=floor)
    run.note(price=float(net.price.detach()))


def open(config: Config, parts: Parts) -> Mapping[type, Callable[[], Any]]:
    """The interfaces of the edited model, and the editor."""
    return editor.opened(ID, config, parts)


METHOD = Method(
    paper="arXiv:2104.08164",
    config=Config,
    models=practice.MODELS,
    data=practice.DATA,
    run=run,
    cost=practice.cost,
    agree=partial(practice.agree, ID),
    open=open,
    forms=("program", "adapter", "checkpoint"),
)
