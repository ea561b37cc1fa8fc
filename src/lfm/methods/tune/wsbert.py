"""Train a masked language model on, with rare or hard tokens masked more often than the others.

    p(place | text) ∝ w(token),   w = max(freq, θ)^−α (`by="frequency"`)   or   w = exp(L(token) / τ) (`by="loss"`)

Paper: Weighted Sampling for Masked Language Modeling (WSBERT), arXiv 2302.14225. `share` of a text's tokens are drawn
without replacement by these weights, anew each time that the text is read; of them 80 % are masked, 10 % changed, 10 %
kept (1810.04805). freq counts a token in the records given; the floor θ keeps noise, which is rare too, from being
masked always. L is the token's mean loss where it was last told, measured before each round over all texts as they are
masked then; a token not met has the mean of those met. Values of α, θ and τ are ours, the paper's full text was not at
hand: α = ½, θ = 10, τ = 5 (a model that meets new text loses ten nats on some tokens: with τ = 1 these alone are
masked, and nothing else is learned). Differs: the weights by loss are refreshed by round instead of step by step.

Models: masked language models with Gradients and a codec. Data: texts; longer ones are split. Errors: MismatchError for
another model; DivergedError.

    lfm run tune.wsbert model=base text=texts.jsonl --set by=frequency --out tuned
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from lfm.core import Codec, Cost, Data, DataSlot, Gradients, Inputs, Meta, Method, Model, Run, Sizes, Slot
from lfm.core.errors import MismatchError
from lfm.core.heavy import F, torch
from lfm.data import task as tasks
from lfm.data.language import IGNORED
from lfm.data.records import Text
from lfm.models import device, forward
from lfm.models.codec import pad, pad_id
from lfm.train import Fit, fit, seeded, suited, training

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lfm.core.interfaces import Batch


class Config(Fit, frozen=True):
    by: Annotated[Literal["frequency", "loss"], Meta(description="what a token's weight follows")] = "frequency"
    alpha: Annotated[float, Meta(ge=0, description="α: how much more often rare tokens are masked; 0: as often")] = 0.5
    floor: Annotated[int, Meta(ge=1, description="θ: rarer tokens count as if they were met so often")] = 10
    tau: Annotated[float, Meta(gt=0, description="τ: nats of loss by which a token is masked e times as often")] = 5.0
    share: Annotated[float, Meta(gt=0, lt=1, description="of a text's tokens that are to be told")] = 0.15
    rounds: Annotated[int, Meta(ge=1, description="times that losses are measured and trained on")] = 3
    epochs: Annotated[float, Meta(gt=0, description="passes over the texts in each round, where steps is 0")] = 1.0
    lr: Annotated[float, Meta(gt=0, description="peak learning rate of each round (AdamW)")] = 1e-4


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    model = inputs.model("model")
    codec = model.ask(Codec)
    texts = [cast("Text", record).text for record in tasks.fit(inputs.records("text"), codec, model.facts)]
    rows, special = read(codec.tokenizer, texts, model.facts.context)
    module = model.ask(Gradients).module().to(device())
    counts = torch.bincount(torch.cat(rows), minlength=model.facts.vocabulary)
    dev = tasks.fit(inputs.records("dev"), codec, model.facts)
    asked = tasks.task_for(dev or [Text(text=texts[0])], codec, model.facts)
    before = after = 0.0
    for place in range(config.rounds):
        weights = by_frequency(counts, config.alpha, config.floor)
        if config.by == "loss":
            with seeded(run.seed_for("measure", place)):
                losses, met = measured(module, rows, collated(config, codec, rows, special, torch.ones_like(weights)))
            weights = by_loss(losses, met, config.tau)
        collate = either(collated(config, codec, rows, special, weights), asked.collate)
        told = fit(module, range(len(rows)), collate, loss, config, run, name=f"round-{place}", dev=dev)
        before, after = (before if place else told[0]), told[-1]
    run.note(loss_before=before, loss_after=after)
    return model.ask(Gradients).rewrap(module)


def either(weighted: Callable[[Any], Batch], evenly: Callable[[Any], Batch]) -> Callable[[Any], Batch]:
    """Texts by number masked by weight, and held-out ones evenly, always in one way."""
    return lambda chosen: weighted(chosen) if isinstance(chosen[0], int) else evenly(chosen)


def read(tokenizer: Any, texts: Sequence[str], context: int) -> tuple[list[Tensor], list[Tensor]]:
    """Each text's ids, and which of them are special tokens."""
    cut: dict[str, Any] = {"truncation": True, "max_length": context} if context else {}
    encoded = tokenizer(list(texts), return_special_tokens_mask=True, **cut)
    ids, special = (encoded[name] for name in ("input_ids", "special_tokens_mask"))
    return [torch.tensor(row) for row in ids], [torch.tensor(row).bool() for row in special]


def by_frequency(counts: Tensor, alpha: float, floor: int) -> Tensor:
    """w of each token from how often it is met, (V,)."""
    return counts.clamp(min=floor).double() ** -alpha


def by_loss(losses: Tensor, met: Tensor, tau: float) -> Tensor:
    """w of each token from the sum of its losses over the `met` places where it was told, (V,)."""
    mean = losses.sum() / met.sum().clamp(min=1)
    told = torch.where(met > 0, losses / met.clamp(min=1), mean)
    return ((told - told.max()) / tau).exp().clamp(min=1e-12)  # only ratios count


def drawn(ids: Tensor, special: Tensor, weights: Tensor, share: float) -> Tensor:
    """The places of a text that are to be told: `share` of those that hold no special token, one at least."""
    places = (~special).nonzero()[:, 0]
    if not len(places):
        return places
    count = max(1, round(share * len(places)))
    return places[torch.multinomial(weights[ids[places]], count)]


def collated(
    config: Config, codec: Codec, rows: Sequence[Tensor], special: Sequence[Tensor], weights: Tensor
) -> Callable[[Sequence[int]], Batch]:
    """Texts by number, masked anew each time from torch's own generator, which the training loop seeds by step."""
    tokenizer = codec.tokenizer

    def masked(number: int) -> tuple[list[int], list[int]]:
        ids, labels = rows[number].clone(), torch.full_like(rows[number], IGNORED)
        places = drawn(ids, special[number], weights, config.share)
        labels[places] = ids[places]
        kind = torch.rand(len(places))
        ids[places[kind < 0.8]] = tokenizer.mask_token_id
        changed = places[(kind >= 0.8) & (kind < 0.9)]
        ids[changed] = torch.randint(len(tokenizer), (len(changed),))
        return ids.tolist(), labels.tolist()

    def collate(chosen: Sequence[int]) -> Batch:
        made = [masked(number) for number in chosen]
        batch = pad([ids for ids, _ in made], pad_id(tokenizer))
        return {**batch, "labels": pad([labels for _, labels in made], IGNORED)["input_ids"]}

    return collate


def loss(module: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of the tokens to be told."""
    told = forward(module, batch)
    if not bool((batch["labels"] != IGNORED).any()):
        return told.sum() * 0.0
    return F.cross_entropy(told.flatten(0, 1), batch["labels"].to(told.device).flatten(), ignore_index=IGNORED)


def measured(
    module: nn.Module, rows: Sequence[Tensor], collate: Callable[[Sequence[int]], Batch], size: int = 32
) -> tuple[Tensor, Tensor]:
    """Of each token the sum of its losses, and in how many places it was told; (V,) each."""
    module.eval()
    losses, met = torch.zeros(0).double(), torch.zeros(0)
    for start in range(0, len(rows), size):
        batch = collate(range(start, min(start + size, len(rows))))
        with torch.no_grad():
            told = forward(module, batch).log_softmax(-1).cpu()
        if not len(losses):
            losses, met = torch.zeros(told.shape[-1]).double(), torch.zeros(told.shape[-1])
        kept = batch["labels"] != IGNORED
        tokens = batch["labels"][kept]
        losses.index_add_(0, tokens, -told[kept].gather(-1, tokens[:, None])[:, 0].double())
        met.index_add_(0, tokens, torch.ones(len(tokens)))
    return losses, met


def agree(config: Config, inputs: Inputs) -> None:
    model = inputs.model("model")
    if model.facts.task != "masked-lm":
        raise MismatchError(
            "tune.wsbert chooses what a masked language model is asked",
            why=f"{model.ref} is {model.facts.task or 'of no known task'}",
            fix="give a model with a masked-language-modelling head",
        )
    suited(config, inputs)


def cost(config: Config, sizes: Sizes) -> Cost:
    whole = training(config, sizes.model("model"), sizes.data["text"])
    return whole._replace(flops=config.rounds * whole.flops, steps=config.rounds * whole.steps)


METHOD = Method(
    paper="arXiv:2302.14225",
    config=Config,
    models={"model": Slot((Gradients, Codec), help="the masked language model")},
    data={
        "text": DataSlot(Data.UNLABELED, ("text",), help="what it reads"),
        "dev": DataSlot(Data.UNLABELED, ("text",), optional=True, help="held out: for patience, in each round"),
    },
    forms=("checkpoint",),
    run=run,
    cost=cost,
    agree=agree,
)
