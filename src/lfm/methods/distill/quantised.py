"""Train a model to do with weights of few bits what it does with full ones: it teaches itself while they are rounded.

    ŵ = s · clip(round(w / s), −q, q),  q = 2^(bits−1) − 1;   L = (1 − α) CE(y, p_ŵ) + α T² KL(pᵗ_T ‖ p_ŵ,T)
    ∂ŵ/∂w = 1 inside, 0 where cut off;   ∂ŵ/∂s = round(w/s) − w/s inside, ±q where cut off

Paper: Model compression via distillation and quantization, arXiv 1802.05668 (quantised distillation: rounded forward,
full weights stepped by the straight-through rule). Learned step sizes s are LSQ's, 1902.08153, in logarithms as in
1903.08066; they begin where rounding alone loses least of the weights. Differs: no scale of the steps' gradient (with
AdamW it would change little); one step an output channel, or a `group` of its inputs; the linear layers of the blocks
alone (embeddings, norms and head stay whole; of a net without blocks, all but the last layer); activations stay whole;
the teacher is the model itself, or a larger one.

What is saved is an ordinary checkpoint whose weights lie on the grid, in the model's own dtype and size: it loads
everywhere, and shows what few bits cost; it is no smaller. The packed formats that transformers reads
(compressed-tensors, torchao, GPTQ, HQQ, …) each need a package of their own, which lfm does not ask for. A packer that
rounds by the largest weight of a group finds these very integers where a group uses its largest (`largest_used` in the
notes); bf16 or fp16 storage rounds the grid itself, by up to 2⁻⁹ or 2⁻¹² of a weight.

Measured (docs/distilling.md): the zoo's ViT at 2 bits is .914 right rounded alone and .981 trained so, as it was whole;
labels do as well as the teacher there, which needs none.

Models: model (Gradients, Logits, Codec), with linear or convolution layers; teacher, optional (Logits, Codec). Data:
every kind; with alpha=1, the default, the classes of records may be empty. Errors: MismatchError; ConfigError where
`group` does not divide a layer's inputs; DataError where a class is empty and alpha < 1; DivergedError.

    lfm run distill.quantised model=base train=texts.jsonl --set bits=4 --out rounded
"""

from __future__ import annotations

from typing import Annotated

from lfm.core import Codec, Cost, Data, DataSlot, Gradients, Inputs, Logits, Meta, Method, Model, Run, Sizes, Slot
from lfm.data.shares import classless
from lfm.distilling import answering
from lfm.distilling import lesson as lessons
from lfm.models import layers
from lfm.train import Fit, fit, training


class Config(Fit, frozen=True):
    bits: Annotated[int, Meta(ge=2, le=8, description="of a weight, its sign among them")] = 4
    group: Annotated[int, Meta(ge=0, description="inputs of an output channel that share a step; 0: all")] = 0
    temperature: Annotated[float, Meta(gt=0, description="T, of both models' answers")] = 1.0
    alpha: Annotated[float, Meta(ge=0, le=1, description="weight of the teacher's answers against the labels'")] = 1.0
    lr: Annotated[float, Meta(gt=0, description="peak learning rate (AdamW)")] = 2e-4
    weight_decay: Annotated[float, Meta(ge=0, description="decoupled weight decay, of matrices only")] = 0.0


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    from lfm.distilling import quantising

    model = inputs.model("model")
    teacher = next(iter(inputs.all("teacher")), model)
    records = classless(inputs.records("train"), model)
    lesson = lessons.lesson(records, teacher, model)
    gradients = model.ask(Gradients)
    module = gradients.module()
    names = layers.projections(module)
    count = quantising.put_on(module, names, config.bits, config.group)
    loss, collate = answering.answered(config, lesson, teacher, module, run)
    losses = fit(module, lesson.numbers, collate, loss, config, run)
    full, groups = quantising.settled(module, names)
    run.note(loss_before=losses[0], loss_after=losses[-1], rounded=count, largest_used=full / groups)
    return gradients.rewrap(module)


def agree(config: Config, inputs: Inputs) -> None:
    for teacher in inputs.all("teacher"):
        lessons.agree(teacher, inputs.model("model"))
    lessons.readable(inputs, role="model", learned=config.alpha < 1)


def cost(config: Config, sizes: Sizes) -> Cost:
    model = sizes.model("model")
    teacher = next(iter(sizes.models.get("teacher", ())), model)
    forwards = teacher.parameters if config.alpha else 0
    whole = training(config, model, sizes.data["train"], forwards=forwards, logits=0)
    return whole._replace(memory=whole.memory + 8 * model.parameters)  # a copy, and its rounding, for the backward pass


METHOD = Method(
    paper="arXiv:1802.05668",
    config=Config,
    models={
        "model": Slot((Gradients, Logits, Codec), help="the model whose weights are rounded, and which teaches itself"),
        "teacher": Slot((Logits, Codec), min=0, help="a better teacher of the same answers"),
    },
    data={
        "train": DataSlot(
            Data.UNLABELED,
            ("text", "completion", "label", "pair", "image", "audio", "fact"),
            help="what the model is asked; text and classless records will do",
        )
    },
    forms=("checkpoint",),
    run=run,
    cost=cost,
    agree=agree,
)
