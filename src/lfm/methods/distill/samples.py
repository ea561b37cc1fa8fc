"""Distil a language model without data: the student learns from what the teacher says of itself.

    x ~ teacher at sampling temperature τ, no two of ROUGE-L ≥ `alike`
    L = α T² KL(pᵗ_T ‖ p_T) + (1 − α) CE(x, p),   at every place of x;   p_T = softmax(logits / T)

Paper: LLM-QAT, arXiv 2305.17888 (the teacher's samples stand in for its data; each token of the vocabulary begins as
many of them, 2 to 4 tokens after it are the likeliest, all others sampled: `first`, `greedy`). Differs: `first` counts
the likeliest openings by the teacher, which rare tokens are not; any student of the teacher's vocabulary learns, not
only the teacher quantised; near copies are left out; `openings` are what samples begin with, for a teacher that tells
no next tokens. There is no top-p: no endpoint is asked for it.

records.jsonl beside the result holds the samples, which other methods take as data. Measured: docs/distilling.md.

Models: teacher (Text; with Logits and Codec its answers are learned at each place; with alpha=0 text will do, from an
endpoint and to another vocabulary; `first` needs Top or Logprobs), student (Gradients, Codec; causal). Data: none.
Errors: MismatchError for two vocabularies, AccessError for what the teacher does not tell, both before a weight is
read; DataError where nothing that it says is new.

    lfm run distill.samples teacher=big student=small --set samples=16 --set max_tokens=8 --set first=4 --out taught
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from lfm.core import Codec, Cost, Gradients, Inputs, Logits, Logprobs, Meta, Method, Model, Run, Sizes, Slot
from lfm.core import Text as Says
from lfm.core.errors import AccessError, DataError, MismatchError
from lfm.core.interfaces import Top
from lfm.core.method import Amount
from lfm.data.records import Text
from lfm.distilling import answering, asking, filtering
from lfm.distilling import lesson as lessons
from lfm.distilling import student as students
from lfm.distilling.answering import Answering
from lfm.distilling.answers import finer
from lfm.distilling.student import formed, smaller
from lfm.train import fit, training

ROUNDS = 2
"""Times as many samples are drawn as are wanted, at most: what is left out is drawn again."""


class Config(Answering, frozen=True):
    samples: Annotated[int, Meta(ge=1, description="texts to learn from")] = 512
    max_tokens: Annotated[int, Meta(ge=1, description="of a text, at most")] = 128
    sampling: Annotated[float, Meta(gt=0, description="temperature of the samples: above 1 more various")] = 1.0
    first: Annotated[int, Meta(ge=0, description="likeliest first tokens that begin as many texts each; 0: drawn")] = 0
    greedy: Annotated[int, Meta(ge=0, description="tokens after the opening that are the likeliest, not drawn")] = 0
    openings: Annotated[tuple[str, ...], Meta(min_length=1, description="what texts begin with, as many each")] = ("",)
    alike: Annotated[float, Meta(gt=0, le=1, description="ROUGE-L with another sample that is too much")] = 1.0
    repeats: Annotated[float, Meta(ge=0, le=1, description="most of a text's spans of words said before")] = 0.5
    alpha: Annotated[
        float, Meta(ge=0, le=1, description="weight of the teacher's answers against its text; 0: text alone")
    ] = 1.0


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    teacher, student = inputs.model("teacher"), inputs.model("student")
    students.tried(config, student, run, lessons.lesson([Text(text="Any text will do.")], student, student))
    texts = drawn(config, teacher, run)
    records = [Text(text=text) for text in texts]
    asking.leave(records, run)
    lesson = lessons.lesson(records, teacher, student)
    gradients = student.ask(Gradients)
    module = formed(gradients.module(), config, run, lesson=lesson)

    loss, collate = answering.answered(config, lesson, teacher, module, run)
    losses = fit(module, lesson.numbers, collate, loss, config, run)
    run.note(loss_before=losses[0], loss_after=losses[-1])
    return gradients.rewrap(module)


def drawn(config: Config, teacher: Model, run: Run) -> list[str]:
    """The samples. Every 64 questions are a step of the run. DataError where there are none."""
    says = teacher.ask(Says)
    openings = run.once("openings", lambda: begun(config, teacher))
    rules = filtering.Rules(repeats=config.repeats)
    kept: list[str] = []

    def say(prompts: Sequence[str], seed: int) -> list[str]:
        """What is said after each."""
        begun = dict.fromkeys(prompts, "")
        if config.greedy:
            begun = dict(zip(begun, says.generate(list(begun), max_tokens=config.greedy), strict=True))
        asked = [prompt + begun[prompt] for prompt in prompts]
        said = says.generate(asked, max_tokens=config.max_tokens, temperature=config.sampling, seed=seed)
        return [begun[prompt] + more for prompt, more in zip(prompts, said, strict=True)]

    most = ROUNDS * config.samples
    each = min(asking.CHUNK, config.samples)
    for number in run.track(range(0, most, each), "samples"):
        if len(kept) >= config.samples:
            break
        size = min(each, most - number)
        prompts = [openings[(number + i) % len(openings)] for i in range(size)]
        said = run.once(
            f"samples {number}",
            lambda prompts=prompts, number=number: say(prompts, run.seed_for("samples", number)),
        )
        good = [one + more for one, more in zip(prompts, said, strict=True) if not filtering.fault(more, rules)]
        kept += [good[i] for i in filtering.new(good, kept, config.alike)]
    if not kept:
        raise DataError(
            f"{teacher.ref} says nothing to learn from",
            why=f"all that it says is empty, or repeats itself in more than {config.repeats:.0%} of its words",
            fix="openings=[…], another sampling, or larger repeats",
        )
    kept = kept[: config.samples]
    run.note(samples=len(kept), distinct_pairs=round(filtering.distinct(kept), 4))
    return kept


def begun(config: Config, teacher: Model) -> list[str]:
    """What samples begin with: the openings, or each with its likeliest next tokens."""
    if not config.first:
        return list(config.openings)
    telling: Top = teacher.ask(Logprobs if teacher.can(Logprobs) else Top)
    told = telling.top(config.openings, config.first)
    return [one + token for one, ranked in zip(config.openings, told, strict=True) for token, _ in ranked]


def agree(config: Config, inputs: Inputs) -> None:
    teacher, student = inputs.model("teacher"), inputs.model("student")
    students.agree(config, student)
    if student.facts.task != "causal-lm":
        raise MismatchError(
            f"{student.ref} cannot learn running text", why=f"its task is {student.facts.task or 'unknown'}"
        )
    if config.first and not (teacher.can(Top) or teacher.can(Logprobs)):
        raise AccessError(
            f"{teacher.ref} tells no next tokens",
            why=f"first={config.first} asks for the likeliest of them",
            fix='openings=["…", …] begins texts otherwise',
        )
    if config.alpha:
        if not (teacher.can(Logits) and teacher.can(Codec)):
            raise AccessError(
                f"{teacher.ref} does not give logits",
                why=f"alpha={config.alpha} learns from its answers at each place",
                fix="alpha=0 learns from its text alone",
            )
        try:
            lessons.agree(teacher, student)
        except MismatchError as error:
            raise MismatchError(error.what, why=error.why, fix=f"{error.fix}, or alpha=0 here") from None


def cost(config: Config, sizes: Sizes) -> Cost:
    """The most that it can take."""
    teacher, student = sizes.model("teacher"), sizes.model("student")
    asked = ROUNDS * config.samples
    batches = -(-asked // min(asking.CHUNK, config.samples))
    begun = min(asked, batches * len(config.openings) * max(config.first, 1)) if config.greedy else 0
    bare = len(config.openings) if config.first else 0
    opening = (
        2 + finer(teacher.vocabulary or student.vocabulary) * max(len(one.encode()) for one in config.openings) / 4
    )
    read = asked * (opening + config.greedy) + (begun + bare) * opening
    written = asked * config.max_tokens + begun * config.greedy + bare
    learned = Amount(config.samples, config.samples * config.max_tokens)
    heard = teacher.parameters if config.alpha else 0
    whole = training(config, smaller(config, student), learned, forwards=heard)
    return whole._replace(
        flops=whole.flops + 2.0 * (read + written) * teacher.parameters,
        steps=whole.steps + batches * (config.max_tokens + config.greedy),
        memory=whole.memory + 4 * (teacher.parameters - heard),
        queries=asked + begun + bare,
        tokens=int(read + written),
    )


METHOD = Method(
    paper="https://arxiv.org/abs/2305.17888",
    config=Config,
    models={
        "teacher": Slot((Says,), also=(Logits, Codec, Logprobs, Top), help="the model that is learned from"),
        "student": Slot((Gradients, Codec), help="the model that learns"),
    },
    run=run,
    cost=cost,
    agree=agree,
)
