"""Train a student on what its teacher makes of the student's own words.

    y ~ p_s(· | x):   L = 1/|y| Σ_t JSD_β(p_t(· | x, y_<t) ‖ p_s(· | x, y_<t))                      (gkd)
    JSD_β(t ‖ s) = β KL(t ‖ m) + (1 − β) KL(s ‖ m),  m = β t + (1 − β) s

Papers: generalized knowledge distillation, arXiv 2306.13649 (`gkd`: a share `own` of the batches is drawn from the
student as it is at that step, the rest are the records; β = 0 and 1 are forward and reverse KL); MiniLLM, arXiv
2306.08543 (`minillm`: the gradient of the sequences' KL(p_s ‖ p_t) in its single-step part, Σ_t KL(p_s ‖ p_t), and its
long-term part by policy gradient, −Σ_t R_{t+1} log p_s(y_t), R the mean of log p_t/p_s over the tokens to come, drawn
from (1 − mix) p_s + mix p_t, each token weighed by p_s over that); speculative KD, arXiv 2410.11325 (`speculative`: gkd
on the student's words, each token outside the teacher's `top` likeliest drawn anew from the teacher).

Differs: one update for each draw, so MiniLLM's old policy is the present one and its clipping has nothing to clip;
rewards have the mean of the batch's other rows taken off, which changes no expectation (the authors whiten them).
`alpha` < 1 adds the records' own tokens on their batches, as MiniLLM's L_PT does. Prompts are what comes before a
completion, before a conversation's last turn, or a text's first tokens. Neither model's logits are ever whole, where
they are a linear function of hidden states: they are made a few places at a time, of `minillm` twice.

Measured (docs/distilling.md; one seed, two of a 0.26 M story model's five blocks): on its own words the student ends
nearer to its teacher, KL 1.42 (gkd), 1.39 (speculative), 1.30 (minillm) nats a token against 1.51 by forward KL on
records and 1.71 by their tokens; of the records it tells less than either, 3.05 and more against 2.75 and 2.62.

Models: teacher (Logits; Gradients where it gives them, to keep keys and values while it has a hand in drawing),
student (Gradients, Codec): causal, of one vocabulary. A teacher that tells its likeliest tokens alone, as endpoints do,
is refused: each drawn token of each step would be a request, and a divergence of both answers needs all of them; learn
from its texts or from a cache of what it told of records instead. Data: text, completion, chat. Errors: MismatchError
before any weight is read; ConfigError where weights are held in parts (FSDP); DivergedError.

    lfm run distill.on_policy teacher=big student=small train=texts.jsonl --set own=1 --out taught
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from lfm.core import Codec, Cost, Data, DataSlot, Gradients, Inputs, Logits, Meta, Method, Model, Run, Sizes, Slot
from lfm.core.errors import ConfigError, MismatchError
from lfm.core.heavy import F, nn, torch
from lfm.data.language import IGNORED, context_of
from lfm.distilling import drawing
from lfm.distilling import lesson as lessons
from lfm.distilling.student import Taught, formed, smaller
from lfm.distilling.telling import heard, scoring, taught
from lfm.models.codec import pad, pad_id
from lfm.models.device import device
from lfm.train import fit, training, world
from lfm.train.gradient import autocast
from lfm.train.headed import rowwise
from lfm.train.losses import kl
from lfm.train.setting import steps_of

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.core.interfaces import Batch
    from lfm.distilling.lesson import Lesson
    from lfm.train.losses import Divergence

DRAWN = "drawn"
"""The name in a batch that tells it is drawn, not the records'."""
ENDS: Mapping[float, Divergence] = {0.0: "forward", 1.0: "reverse"}
"""What JSD_β is in the limit."""


class Config(Taught, frozen=True):
    kind: Annotated[Literal["gkd", "minillm", "speculative"], Meta(description="what is drawn, and learned of it")] = (
        "gkd"
    )
    own: Annotated[float, Meta(ge=0, le=1, description="share of the batches that are drawn; the rest are records")] = (
        0.5
    )
    beta: Annotated[float, Meta(ge=0, le=1, description="0: forward KL, 1: reverse KL, between: JSD_β")] = 0.5
    temperature: Annotated[float, Meta(gt=0, description="T, of both models' answers that are compared")] = 1.0
    alpha: Annotated[
        float, Meta(ge=0, le=1, description="on records: weight of the teacher's answers against their own tokens")
    ] = 1.0
    prompt: Annotated[int, Meta(ge=1, description="tokens of a text that are its prompt; half of it at most")] = 16
    new: Annotated[int, Meta(ge=1, description="tokens drawn for a prompt, at most")] = 64
    heat: Annotated[float, Meta(gt=0, description="temperature of the draws")] = 1.0
    mix: Annotated[float, Meta(ge=0, lt=1, description="minillm: the teacher's share in what is drawn")] = 0.2
    top: Annotated[int, Meta(ge=1, description="speculative: of so many likeliest a token may stay")] = 25


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    if world.sharded():
        raise ConfigError("a student held in parts cannot be drawn from", fix="launch it without FSDP")
    teacher, student = inputs.model("teacher"), inputs.model("student")
    lesson = lessons.lesson(inputs.records("train"), teacher, student)
    gradients = student.ask(Gradients)
    module = formed(gradients.module(), config, run, lesson=lesson)
    draw = drawer(config, teacher, student, module)
    drawn = lessons.behind(lesson, teacher, run, collate=lambda numbers: draw(numbers, lesson.collate(numbers)))
    plain = lessons.behind(lesson, teacher, run) if config.alpha else lesson.collate

    def told(numbers: Sequence[int]) -> Batch:
        own = bool(torch.rand(()) < config.own)  # of the step's own seed, as all that is drawn
        return (drawn if own else plain)(numbers)

    kind = "reverse" if config.kind == "minillm" else ENDS.get(config.beta, "jsd")
    how: Any = {"temperature": config.temperature, "kind": kind, "beta": config.beta}
    on_records = taught(lesson, module, config.alpha, **how)
    on_drawn = policy(config, lesson, module) if config.kind == "minillm" else taught(lesson, module, 1.0, **how)

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        return (on_drawn if DRAWN in batch else on_records)(module, batch)

    losses = fit(module, lesson.numbers, told, loss, config, run)
    run.note(loss_before=losses[0], loss_after=losses[-1])
    return gradients.rewrap(module)


def drawer(
    config: Config, teacher: Model, student: Model, module: nn.Module
) -> Callable[[Sequence[int], Batch], Batch]:
    """(record numbers, their batch) → a batch of the same prompts, and what is drawn after them."""
    tokenizer = student.ask(Codec).tokenizer
    limit = context_of(tokenizer, student.facts)
    theirs = _listener(teacher) if config.kind == "speculative" or (config.kind == "minillm" and config.mix) else None
    shared = min(teacher.facts.vocabulary, student.facts.vocabulary)

    def draw(numbers: Sequence[int], batch: Batch) -> Batch:
        prompts = prompts_of(batch, config.prompt)
        room = [min(config.new, limit - len(prompt)) if limit else config.new for prompt in prompts]
        noise = drawing.noise(int(torch.randint(2**62, ())), numbers, max(room))
        with drawing.still(module), autocast(device(), config.precision):
            ours = drawing.remembering(module)
            if theirs is None:
                choose = drawing.alone(ours, shared, config.heat)
            elif config.kind == "minillm":
                choose = drawing.mixed(ours, theirs(), config.mix, shared, config.heat)
            else:
                choose = drawing.proposed(ours, theirs(), config.top, shared, config.heat)
            said = drawing.draw(prompts, choose, noise, room, tokenizer.eos_token_id)
        made = pad([[*p, *s] for p, s in zip(prompts, said, strict=True)], pad_id(tokenizer))
        labels = [[IGNORED] * len(p) + s for p, s in zip(prompts, said, strict=True)]
        return {**made, "labels": pad(labels, IGNORED)["input_ids"], DRAWN: torch.ones(len(said))}

    return draw


def _listener(teacher: Model) -> Callable[[], drawing.Speaker]:
    if not teacher.can(Gradients):
        return lambda: drawing.rereading(teacher.ask(Logits).logits)
    module = teacher.ask(Gradients).module().to(device())
    return lambda: drawing.remembering(module)


def prompts_of(batch: Batch, tokens: int) -> list[list[int]]:
    """What stands before the last thing that each row is scored on; of a text, which is scored from its second token
    on, so many tokens, and half of it at most."""
    found = []
    for ids, labels, mask in zip(*(batch[key].tolist() for key in ("input_ids", "labels", "attention_mask"))):
        length = sum(mask)
        scored = [i for i in range(length) if labels[i] != IGNORED]
        first = next((i for i in reversed(scored) if labels[i - 1] == IGNORED), length)
        found.append(ids[: max(1, min(tokens, length // 2)) if first <= 1 else first])
    return found


def policy(config: Config, lesson: Lesson, module: nn.Module) -> Callable[[nn.Module, Batch], Tensor]:
    """MiniLLM's loss of a module on a drawn batch."""
    answered = scoring(lesson, module)

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        student, labels = answered(module, batch)

        def measure(logits: Tensor, part: slice) -> Tensor:
            t = heard(batch, part)
            width = min(logits.shape[-1], t.shape[-1])  # a vocabulary may be padded to a round number
            s, t = (F.log_softmax(x[:, :width].float() / config.temperature, -1) for x in (logits, t))
            return torch.stack([kl(s, t), *(x.gather(-1, labels[part, None])[:, 0] for x in (s, t))], -1)

        apart, said, theirs = rowwise(student, measure).unbind(-1)
        return weighed(apart, said, theirs, batch, config.mix)

    return loss


def weighed(apart: Tensor, said: Tensor, theirs: Tensor, batch: Batch, mix: float) -> Tensor:
    """MiniLLM's surrogate, whose gradient is the paper's estimate: a mean over N drawn tokens.

    apart: (N,) KL(p_s ‖ p_t). said, theirs: (N,) log p_s and log p_t of what was drawn.
    """
    now, theirs = said.detach(), theirs.detach()
    weight = now.exp() / ((1 - mix) * now.exp() + mix * theirs.exp())
    told = to_come(theirs - now, (batch["labels"][:, 1:] != IGNORED).to(now.device))
    return (weight * (apart - told * said)).mean()


def to_come(rewards: Tensor, places: Tensor) -> Tensor:
    """Of rewards (N,) at the N true places (B, T): at each, the mean of its row's later ones, less what that is on the
    mean in the other rows. 0 where none are to come."""
    filled = rewards.new_zeros(places.shape).masked_scatter(places, rewards)
    later = rewards.new_ones(places.shape[1], places.shape[1]).tril(-1)
    with torch.autocast(rewards.device.type, enabled=False):  # counts above 256 are no numbers of bf16
        count = places.to(rewards.dtype) @ later
        mean = filled @ later / count.clamp(min=1)
    real = (places & (count > 0)).to(rewards.dtype)
    each, many = (mean * real).sum(1), real.sum(1)
    others = (each.sum() - each) / (many.sum() - many).clamp(min=1)
    return ((mean - others[:, None]) * real)[places]


def agree(config: Config, inputs: Inputs) -> None:
    teacher, student = inputs.model("teacher"), inputs.model("student")
    if config.kind == "minillm" and config.heat != config.temperature:
        raise ConfigError(
            f"minillm draws at heat {config.heat:g} and learns at temperature {config.temperature:g}",
            why="its gradient is of the distribution that is drawn from",
            fix="give both the same value",
        )
    if student.facts.task != "causal-lm":
        raise MismatchError(
            f"a {student.facts.task or 'model without a task'} says nothing of its own",
            why="on-policy distillation draws texts from the student, token by token",
            fix="a causal language model; distill.response teaches the others",
        )
    lessons.agree(teacher, student)
    lessons.readable(inputs)


def cost(config: Config, sizes: Sizes) -> Cost:
    teacher, student = sizes.model("teacher"), smaller(config, sizes.model("student"))
    amount = sizes.data["train"]
    whole = training(config, student, amount, forwards=teacher.parameters, logits=0)
    helped = config.kind == "speculative" or (config.kind == "minillm" and config.mix > 0)
    batches = steps_of(config, max(amount.records, 1)) * config.accumulate * config.own
    drawn = batches * min(config.batch_size, max(amount.records, 1)) * (config.prompt + config.new)
    return whole._replace(
        flops=whole.flops + drawn * 2 * (student.parameters + helped * teacher.parameters),
        steps=whole.steps + int(batches * config.new) * (1 + helped),
        memory=whole.memory + 4 * sizes.model("student").parameters + 4 * helped * teacher.parameters,
    )


METHOD = Method(
    paper="arXiv:2306.13649",
    config=Config,
    models={
        "teacher": Slot((Logits,), also=(Codec, Gradients), help="the model that judges what the student says"),
        "student": Slot((Gradients, Codec), help="the model that speaks and learns"),
    },
    data={
        "train": DataSlot(
            Data.UNLABELED, ("text", "completion", "chat"), help="texts whose beginnings are the student's prompts"
        )
    },
    run=run,
    cost=cost,
    agree=agree,
)
