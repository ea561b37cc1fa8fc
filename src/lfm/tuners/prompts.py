"""Training peft's prompts on a model's task: what the methods that keep the whole model frozen share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from lfm.core import Codec, Cost, Gradients, Inputs, Meta, Method, Model, Run, Sizes, Slot
from lfm.core.errors import ConfigError, DataError, MismatchError
from lfm.core.heavy import peft, torch
from lfm.core.method import Data, DataSlot
from lfm.data import task as tasks
from lfm.models import adapter, forward, virtual
from lfm.models import layers as found
from lfm.models.codec import pad_id
from lfm.models.quiet import quiet
from lfm.train import Fit, seeded, suited, taught, training

if TYPE_CHECKING:
    from peft.config import PeftConfig
    from torch import Tensor

    from lfm.core.interfaces import Batch
    from lfm.data.records import Record

READ = ("text", "completion", "chat", "label", "pair", "fact")
"""The kinds of records that models of text read."""
RECORDS = {
    "train": DataSlot(Data.FEW_SHOT, READ, help="what the prompt should make it say"),
    "dev": DataSlot(Data.FEW_SHOT, READ, optional=True, help="held out: for patience"),
}
MODEL = {"model": Slot((Gradients, Codec), help="the model to prompt; its weights stay as they are")}
PADDING = 3
"""Tokens of padding that must make no difference."""


class Prompting(Fit, frozen=True):
    """What every trained prompt's method is set by, beside its own settings."""

    prompt_tokens: Annotated[int, Meta(ge=1, description="length of the prompt")] = 20
    weight_decay: Annotated[float, Meta(ge=0, description="decoupled weight decay, of matrices only")] = 0.0
    clip: Annotated[float, Meta(ge=0, description="largest norm of the gradient; 0: any")] = 1.0


def prompted(
    config: Prompting,
    inputs: Inputs,
    run: Run,
    settings: PeftConfig,
    begin: Callable[[Any], None] = lambda module: None,
) -> Model:
    """The model with a prompt of these settings before its input, trained on the records, as an adapter.

    begin: what is done to the peft module before it trains. MismatchError where peft cannot prompt this model.
    """
    model = inputs.model("model")
    within = roomy(model, config.prompt_tokens)
    with seeded(run.seed_for("prompt")):
        module = opened(model, settings)
    begin(module)
    tried(module, within, inputs.records("train"))
    taught(module, within, inputs.records("train"), config, run, dev=inputs.records("dev"))
    return adapter.over(model, module, ref="prompt")


def roomy(model: Model, count: int) -> Model:
    """The model, said to have a context that is shorter by so many tokens."""
    return replace(model, look=lambda facts=model.facts: virtual.shortened(facts, count), _opened={})


def opened(model: Model, settings: Any) -> Any:
    """A fresh peft module of the model with a prompt of these settings, whose answer is as long as its input.

    A classifier's head trains along with it, as in peft.
    """
    facts, module = model.facts, model.ask(Gradients).module()
    settings.task_type = virtual.PEFT_TASKS[facts.task]
    if facts.labels:
        settings.modules_to_save = found.heads(module)
    kind = settings.peft_type.value.lower()
    try:
        with quiet():
            prompted: Any = peft.get_peft_model(module, settings)  # type: ignore[arg-type]
    except (ValueError, NotImplementedError, TypeError, AttributeError, KeyError) as error:
        raise refused(model, kind, error) from None
    kept = prompted.peft_config["default"]
    kept.modules_to_save = sorted(set(kept.modules_to_save or ())) or None
    return virtual.answering(prompted)


def tried(module: Any, model: Model, records: Sequence[Record]) -> None:
    """Answer the first record once: MismatchError where the prompt is not read, or padding is taken for text."""
    codec = model.ask(Codec)
    kind = module.peft_config["default"].peft_type.value.lower() if hasattr(module, "peft_config") else "a prompt"
    first = tasks.fit(records[:1], codec, model.facts)[:1]
    task = tasks.task_for(first, codec, model.facts)
    batch = task.collate(first)
    module.eval()
    prompts = [
        p for name, p in module.named_parameters() if p.requires_grad and not name.startswith(("base_model.", "base."))
    ]
    try:
        with quiet():
            answer = forward(module, batch)
            slopes = torch.autograd.grad(answer.square().sum(), prompts, allow_unused=True)
            left = (model.facts.context or sys.maxsize) - batch["input_ids"].shape[1]
            with torch.no_grad():
                padded = forward(module, longer(batch, min(PADDING, max(left, 0)), pad_id(codec.tokenizer)))
    except (ValueError, NotImplementedError, TypeError, AttributeError, KeyError, RuntimeError, IndexError) as error:
        raise refused(model, kind, error) from None
    if not any(slope is not None and bool(slope.abs().sum() > 0) for slope in slopes):
        raise refused(model, kind, "what it answers does not depend on the prompt")
    told = answer.detach()
    padded = padded if told.ndim == 2 else padded[:, : told.shape[1]]
    if not torch.allclose(told, padded, rtol=1e-3, atol=1e-3 * float(told.abs().max())):
        raise refused(model, kind, "its head looks for the last token by its id, and a prompt reaches it as embeddings")


def longer(batch: Batch, count: int, filler: int) -> Batch:
    """The batch with so many places of padding after its input."""
    made, ids = dict(batch), batch["input_ids"]
    more = ids.new_full((len(ids), count), filler)
    mask = batch.get("attention_mask", torch.ones_like(ids))
    for name in made.keys() & {"token_type_ids"}:
        made[name] = torch.cat([made[name], torch.zeros_like(more)], 1)
    return {
        **made,
        "input_ids": torch.cat([ids, more], 1),
        "attention_mask": torch.cat([mask, torch.zeros_like(more)], 1),
    }


def refused(model: Model, kind: str, why: object) -> MismatchError:
    return MismatchError(
        f"{kind} cannot stand before the input of {model.ref}",
        why=str(why).splitlines()[0] if str(why) else type(why).__name__,
        fix="tune.lora adapts any model with linear layers",
    )


def agree(config: Prompting, inputs: Inputs) -> None:
    """A method's `agree`: whether the model reads text and leaves room for the prompt, before any weight is read."""
    model = inputs.model("model")
    readable(model, inputs)
    room(config.prompt_tokens, model)


def readable(model: Model, inputs: Inputs) -> None:
    """DataError where the records set the model no task, or it reads no tokens before which a prompt could stand."""
    suited(None, inputs)
    task = model.facts.task
    if task not in virtual.PEFT_TASKS:
        raise DataError(
            f"{model.ref} is a model for {task or 'no task that is known'}: it reads no tokens before which a prompt "
            "could stand",
            fix=f"a model for {', '.join(virtual.PEFT_TASKS)}",
        )


def room(count: int, model: Model) -> None:
    """ConfigError where a prompt of so many tokens leaves less than a token of the context."""
    context = model.facts.context
    if context and count >= context - 1:
        raise ConfigError(
            f"a prompt of {count} tokens leaves no room for text",
            why=f"{model.ref} reads {context} tokens at most",
            fix=f"prompt_tokens={max(1, context // 4)}",
        )


def table(module: Any) -> Tensor:
    """(vocabulary, width): the input embeddings of a module, or of the one inside a peft module."""
    inner = module.get_base_model() if hasattr(module, "get_base_model") else module
    return inner.get_input_embeddings().weight.detach()


def vocabulary_rows(module: Any, count: int, random: torch.Generator) -> Tensor:
    """(count, width): embeddings of words drawn from the vocabulary."""
    rows = table(module)
    return rows[torch.randint(len(rows), (count,), generator=random).to(rows.device)].float()


def text_rows(module: Any, tokenizer: Any, text: str, count: int) -> Tensor:
    """(count, width): embeddings of the text's tokens, cut, or said again and again. ConfigError for no token."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ConfigError(f"{text!r} has no token to begin from", fix="text=… words, or none for random words")
    rows = table(module)
    return rows[torch.tensor((ids * -(-count // len(ids)))[:count], device=rows.device)].float()


def cost_of(config: Prompting, sizes: Sizes, trained: float, role: str = "model") -> Cost:
    """What `prompted` takes, of so many parameters that train; each record is longer by the prompt."""
    facts, amount = sizes.model(role), sizes.data["train"]
    amount = amount._replace(tokens=amount.tokens + amount.records * config.prompt_tokens)
    return training(config, facts, amount, share=min(1.0, trained / max(facts.parameters, 1)))


def method(paper: str, config: type[Any], run: Callable[..., Model], cost: Callable[..., Cost]) -> Method[Any]:
    """The Method of a prompt that is kept as peft's."""
    return Method(
        paper=paper, config=config, models=MODEL, data=RECORDS, forms=("adapter",), agree=agree, run=run, cost=cost
    )
