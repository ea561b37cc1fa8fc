"""Fine-tune on a task and on the model's own first task together, so that what the model knew is not drowned.

    L(θ) = L_task(θ; train) + `share` · L_pretraining(θ; text)

Paper: Understanding Finetuning for Factual Knowledge Extraction, arXiv 2301.11293, where fine-tuning on facts makes a
model name the objects of the training set too often (`probe.frequency` measures it) and mixing the tasks is one of two
cures; the other, mixing the models, is `tune.model_mixing`. The first task is the one that running text sets the model:
next tokens of a causal model, masked ones of a masked model, the second half of an encoder-decoder. Differs: the paper
mixes in text of the corpus that its model was trained on. Where no text is given, a causal model tells `samples` texts
itself (temperature 1, from its opening token): such text is what the model believes, so no corpus is needed. Each step
takes one batch of the task's records and one of as many texts.

Models: causal, masked and seq2seq language models with Gradients and a codec. Data: `train`, what it should learn;
`text`, optional for a causal model. Errors: MismatchError for another model, or without text where the model cannot
tell any; DivergedError.

    lfm run tune.mixture_ft model=base train=facts.jsonl --set share=1 --set samples=64 --out tuned
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from lfm.core import Codec, Cost, Data, DataSlot, Gradients, Inputs, Meta, Method, Model, Run, Sizes, Slot
from lfm.core.errors import DataError, MismatchError
from lfm.core.method import Amount
from lfm.data import task as tasks
from lfm.data.records import Text
from lfm.models import forward
from lfm.models.local import LocalText
from lfm.train import Fit, fit, suited, training
from lfm.train.batches import beside, parted

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lfm.core.interfaces import Batch


KINDS = ("fact", "completion", "chat", "label", "pair", "text")


class Config(Fit, frozen=True):
    share: Annotated[float, Meta(ge=0, description="weight of the first task's loss beside the new one's")] = 1.0
    samples: Annotated[int, Meta(ge=1, description="texts that the model tells itself where none are given")] = 512
    tokens: Annotated[int, Meta(ge=2, description="longest such text, in tokens")] = 64
    lr: Annotated[float, Meta(gt=0, description="peak learning rate (AdamW)")] = 3e-4


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    model = inputs.model("model")
    codec = model.ask(Codec)
    records, dev = (tasks.fit(inputs.records(role), codec, model.facts) for role in ("train", "dev"))
    module = model.ask(Gradients).module()
    told = inputs.records("text") or tuple(
        Text(text=text) for text in run.step("samples", lambda: samples(config, module, codec, run))
    )
    texts = tasks.fit(told, codec, model.facts)
    task, first = (tasks.task_for(given, codec, model.facts) for given in ([*records, *dev], texts))
    collate = beside(task.collate, texts, first.collate)

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        new, old = parted(batch)
        value = task.loss(forward(module, new), new)
        if not config.share or not module.training:  # what is held out is looked at by the task alone
            return value
        return value + config.share * first.loss(forward(module, old), old)

    losses = fit(module, records, collate, loss, config, run, dev=dev)
    run.note(texts=len(texts), loss_before=losses[0], loss_after=losses[-1])
    return model.ask(Gradients).rewrap(module)


def samples(config: Config, module: nn.Module, codec: Codec, run: Run) -> list[str]:
    """Texts as the causal model tells them from its opening token. DataError where all are empty."""
    speaker = LocalText(lambda: module, codec)
    opening: Any = codec.tokenizer.bos_token or codec.tokenizer.eos_token or ""
    start = "" if codec.tokenizer("")["input_ids"] else opening
    said = speaker.generate(
        [start] * config.samples, max_tokens=config.tokens, temperature=1.0, seed=run.seed_for("samples")
    )
    kept = [text.strip() for text in said if text.strip()]
    if not kept:
        raise DataError("the model tells nothing of its own", fix="give text=FILE with text of what it was trained on")
    return kept


def agree(config: Config, inputs: Inputs) -> None:
    model = inputs.model("model")
    if model.facts.task not in tasks.LANGUAGE:
        raise MismatchError(
            "tune.mixture_ft mixes in the task that a language model began with",
            why=f"{model.ref} is {model.facts.task or 'of no known task'}",
            fix="give a causal, masked or seq2seq language model",
        )
    if model.facts.task != "causal-lm" and not inputs.records("text"):
        raise MismatchError(
            f"a {model.facts.task} cannot tell texts of its own to mix in",
            fix="add text=FILE with text such as it was trained on",
        )
    suited(config, inputs)


def cost(config: Config, sizes: Sizes) -> Cost:
    facts, train, text = sizes.model("model"), sizes.data["train"], sizes.data.get("text")
    told = text if text and text.records else Amount(config.samples, config.samples * config.tokens)
    length = train.tokens / max(train.records, 1) + told.tokens / max(told.records, 1)
    whole = training(config, facts, Amount(train.records, int(length * train.records)))
    if text and text.records:
        return whole
    return whole._replace(
        flops=whole.flops + 2.0 * facts.parameters * told.tokens, steps=whole.steps + config.tokens, tokens=told.tokens
    )


METHOD = Method(
    paper="arXiv:2301.11293",
    config=Config,
    models={"model": Slot((Gradients, Codec), help="the language model to fine-tune")},
    data={
        "train": DataSlot(Data.FEW_SHOT, KINDS, help="what it should learn"),
        "dev": DataSlot(Data.FEW_SHOT, KINDS, optional=True, help="held out: for patience"),
        "text": DataSlot(
            Data.UNLABELED, ("text",), optional=True, help="running text such as it was trained on; else it tells some"
        ),
    },
    forms=("checkpoint",),
    run=run,
    cost=cost,
    agree=agree,
)
