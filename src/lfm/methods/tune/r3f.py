"""Fine-tune so that a little noise on the embeddings changes nothing: R3F, and R4F with a bound on the head.

    L = CE(f(x), y) + λ · [KL(f(x) ‖ f(x+z)) + KL(f(x+z) ‖ f(x))],   z ~ U(−ε, ε) or N(0, ε²)
    R4F: the head's weight is W / σ(W), σ its largest singular value

Paper: Better Fine-Tuning by Reducing Representational Collapse, arXiv 2008.03156, and its code in fairseq
(examples/rxf). x are the input embeddings; the noised pass has them detached, so that through it the embeddings get no
gradient. Both passes draw their own dropout, as in the code: with dropout on, the term is mostly about that, not about
z. Differs from the paper: the mean of the term is over scored places (the code divides a sequence's sum by the batch);
an image's or a sound's embeddings are its patches or frames. R4F's head has its power iteration's σ divided in when
training ends, so that the result is a plain checkpoint.

Models: any with Gradients and a codec. Data: every record kind. Shapes: z as the embeddings (B, T, width), drawn for
each step. Errors: MismatchError where spectral=true meets a head that is the input embedding too; DivergedError.

    lfm run tune.r3f model=base train=train.jsonl --set noise=normal --set spectral=true --out tuned
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from lfm.core import Codec, Cost, Gradients, Inputs, Meta, Method, Model, Run, Sizes, Slot
from lfm.core.errors import MismatchError
from lfm.core.heavy import nn, torch
from lfm.models import forward, layers
from lfm.train import RECORDS, Fit, seeded, suited, taught, training
from lfm.train.embeddings import changed_embeddings
from lfm.train.losses import symmetric_kl

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.interfaces import Batch
    from lfm.data.task import Task


class Config(Fit, frozen=True):
    weight: Annotated[float, Meta(ge=0, description="λ of the symmetric divergence")] = 1.0
    epsilon: Annotated[float, Meta(ge=0, description="ε: half the width, or the deviation, of the noise")] = 1e-5
    noise: Annotated[Literal["uniform", "normal"], Meta(description="how z is drawn")] = "uniform"
    spectral: Annotated[bool, Meta(description="R4F: hold the largest singular value of the head at 1")] = False
    lr: Annotated[float, Meta(gt=0, description="peak learning rate (AdamW)")] = 1e-4


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    model = inputs.model("model")
    module = model.ask(Gradients).module()
    head = bounded(module, run) if config.spectral else None

    def loss(module: nn.Module, batch: Batch, task: Task) -> Tensor:
        return objective(module, batch, task, config)

    train, dev = inputs.records("train"), inputs.records("dev")
    taught(module, model, train, config, run, dev=dev, objective=loss)
    if head is not None:
        module.eval()  # the power iteration goes on in training only
        nn.utils.parametrize.remove_parametrizations(head, "weight", leave_parametrized=True)
    return model.ask(Gradients).rewrap(module)


def objective(module: nn.Module, batch: Batch, task: Task, config: Config) -> Tensor:
    """CE + λ · symmetric KL between what is said with and without the noise."""
    clean = forward(module, batch)
    with changed_embeddings(module, lambda x: x.detach() + drawn(x, config)):
        noised = forward(module, batch)
    apart = symmetric_kl(task.scored(noised, batch)[0], task.scored(clean, batch)[0])
    return task.loss(clean, batch) + config.weight * apart


def drawn(x: Tensor, config: Config) -> Tensor:
    """z, of the shape of x, from the step's own generator."""
    if config.noise == "uniform":
        return (2 * torch.rand_like(x) - 1) * config.epsilon
    return torch.randn_like(x) * config.epsilon


def bounded(module: nn.Module, run: Run) -> nn.Module:
    """The head, its weight from now on divided by its largest singular value (1802.05957)."""
    name = layers.last_linear(module)
    if layers.shares_weights(module, name):
        raise MismatchError(
            f"the head {name} is the input embedding too",
            why="R4F bounds the head alone",
            fix="spectral=false (R3F), or a model whose head is its own",
        )
    head = module.get_submodule(name)
    with seeded(run.seed_for("spectral")):
        return nn.utils.parametrizations.spectral_norm(head)


def cost(config: Config, sizes: Sizes) -> Cost:
    facts = sizes.model("model")
    once_through = training(config, facts, sizes.data["train"])
    # two passes, forwards and back, whose activations are kept together
    kept = once_through.memory - 20 * facts.parameters
    return once_through._replace(flops=2 * once_through.flops, memory=once_through.memory + max(kept, 0))


METHOD = Method(
    paper="arXiv:2008.03156",
    config=Config,
    models={"model": Slot((Gradients, Codec), help="the model to tune")},
    data=RECORDS,
    agree=suited,
    forms=("checkpoint",),
    run=run,
    cost=cost,
)
