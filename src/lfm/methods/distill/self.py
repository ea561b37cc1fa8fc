"""Train a model again from the start, taught by what it was: a born-again network, generation after generation.

    L_g = (1 − α) CE(y, p_g) + α T² KL(p_{g−1,T} ‖ p_g,T),   g = 1 … `generations`, p_0 the model given

Paper: Born-again neural networks, arXiv 1805.04770 (labels and teacher alike: α = ½, T = 1, the defaults). The student
has its teacher's architecture, and new weights each time. Differs: AdamW; the last generation is given, where the paper
also averages the answers of all of them; `start=weights` goes on from the model's weights instead, which is no longer
the paper's, and `layers` keeps some of the blocks.

Measured (docs/distilling.md): a small ViT on 300 digits, .922 right, came to .925 and .929 in two generations, and to
.925 trained once more without a teacher: no gain that seeds do not make (deviations up to .019).

Models: model (Logits, Gradients, Codec), of any task. Data: every kind; with alpha=1 the classes of records may be
empty. Errors: DataError, also where a class is empty and alpha < 1; ConfigError where start=random and the
architecture is none of transformers'; DivergedError.

    lfm run distill.self model=base train=texts.jsonl --set generations=2 --out born
"""

from __future__ import annotations

from typing import Annotated, Literal

from lfm.core import Codec, Cost, Data, DataSlot, Gradients, Inputs, Logits, Meta, Method, Model, Run, Sizes, Slot
from lfm.data.shares import classless
from lfm.distilling import answering
from lfm.distilling import lesson as lessons
from lfm.distilling.student import Taught, formed, smaller
from lfm.train import fit, training


class Config(Taught, frozen=True):
    generations: Annotated[int, Meta(ge=1, description="how often it is trained anew, each taught by the last")] = 1
    temperature: Annotated[float, Meta(gt=0, description="T, of both generations' answers")] = 1.0
    alpha: Annotated[float, Meta(ge=0, le=1, description="weight of the last generation against the labels")] = 0.5
    start: Annotated[
        Literal["weights", "random"], Meta(description="whether a generation begins with new weights or the model's")
    ] = "random"


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    model = inputs.model("model")
    records = classless(inputs.records("train"), model)
    gradients, teacher = model.ask(Gradients), model
    for generation in range(1, config.generations + 1):
        lesson = lessons.lesson(records, teacher, model)
        module = formed(gradients.module(), config, run, generation, lesson=lesson)
        loss, told = answering.answered(config, lesson, teacher, module, run, name=f"teacher-{generation}")
        losses = fit(module, lesson.numbers, told, loss, config, run, name=f"generation-{generation}")
        run.note(**{f"loss_{generation}": losses[-1]})
        teacher = gradients.rewrap(module)
    return teacher


def agree(config: Config, inputs: Inputs) -> None:
    lessons.readable(inputs, role="model", learned=config.alpha < 1)


def cost(config: Config, sizes: Sizes) -> Cost:
    model = sizes.model("model")
    forwards = model.parameters if config.alpha else 0
    whole = training(config, smaller(config, model), sizes.data["train"], forwards=forwards, logits=0)
    return whole._replace(flops=whole.flops * config.generations, steps=whole.steps * config.generations)


METHOD = Method(
    paper="arXiv:1805.04770",
    config=Config,
    models={"model": Slot((Logits, Gradients, Codec), help="the trained model that teaches its like")},
    data={
        "train": DataSlot(
            Data.UNLABELED,
            ("text", "completion", "label", "pair", "image", "audio", "fact"),
            help="what it was trained on, as a rule",
        )
    },
    forms=("checkpoint",),
    run=run,
    cost=cost,
    agree=agree,
)
