"""Train a mixture of adapters, one expert at random each time, and average them into one.

    loss = L(f_A, y) + ½ [KL(f_A ‖ f_B) + KL(f_B ‖ f_A)],   f_A, f_B: the model under two random routings
    W_down = (1/E) Σ_e W_down^(e) in the end

Paper: Wang et al., AdaMix, arXiv 2205.12410: E = 4 experts for the matrix down, one for the matrix up (`share_up`),
after each feed-forward layer; at every forward pass each layer draws its expert, equally likely; averaged, the
adapter costs what one expert costs and does better than one trained alone. The experts begin equal. Differs from the
paper: W_up begins at 0, so that the first forward is the base's. The routings of a step are drawn from the step's own
seed: a run that is killed and resumed ends in the same bytes.

Models: any with Gradients and a codec. Data: every record kind, as its task. The result is a PEFT directory of type
HOULSBY, one adapter, over the base; it cannot be merged. Errors: MismatchError where there are no blocks;
DivergedError.

    lfm run tune.adamix model=base train=facts.jsonl --set width=8 --out adapted
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from lfm import tuners
from lfm.core import Cost, Inputs, Meta, Method, Model, Run, Sizes
from lfm.models import adapter, forward
from lfm.train import RECORDS, suited
from lfm.train.losses import symmetric_kl
from lfm.tuners.tuning import MODEL, Tuning, cost_of, trained

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lfm.core.interfaces import Batch
    from lfm.data.task import Task


class Config(Tuning, frozen=True):
    width: Annotated[int, Meta(ge=1, description="m, of the bottleneck")] = 16
    experts: Annotated[int, Meta(ge=1, description="E, of each matrix that is not shared")] = 4
    share_up: Annotated[bool, Meta(description="one matrix up for all experts")] = True
    consistency: Annotated[float, Meta(ge=0, description="weight of the divergence between two routings")] = 1.0
    train_norms: Annotated[bool, Meta(description="train the norms' gains and biases as well")] = False


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    from lfm.tuners.kinds.adamix import averaged

    settings = tuners.AdaMixConfig(
        width=config.width, experts=config.experts, share_up=config.share_up, train_norms=config.train_norms
    )

    def loss(module: nn.Module, batch: Batch, task: Task) -> Tensor:
        return objective(module, batch, task, config.consistency)

    module = trained(config, inputs, run, settings, loss)
    return adapter.of_settings(inputs.model("model"), *averaged(*adapter.settings_of(module)))  # type: ignore[arg-type]


def objective(module: nn.Module, batch: Batch, task: Task, consistency: float) -> Tensor:
    """The loss under one routing, and half the symmetric divergence between it and another."""
    first = forward(module, batch)
    own = task.loss(first, batch)
    if not consistency:
        return own
    one, other = (task.scored(logits, batch)[0] for logits in (first, forward(module, batch)))
    return own + consistency * symmetric_kl(one, other) / 2


def cost(config: Config, sizes: Sizes) -> Cost:
    facts = sizes.model("model")
    each = (1 + config.experts) * config.width * facts.width
    once = cost_of(config, sizes, each * facts.layers)
    return once._replace(flops=once.flops * (2 if config.consistency else 1))


METHOD = Method(
    paper="arXiv:2205.12410",
    config=Config,
    models=MODEL,
    data=RECORDS,
    forms=("adapter",),
    agree=suited,
    run=run,
    cost=cost,
)
