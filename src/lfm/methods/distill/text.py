"""Train a student on what a teacher says: text is all that the teacher tells.

    L = −mean over kept (x, y) of log p(y | x),   y ~ teacher(· | x) at T, or its greedy answer;  x given or synthesised

Papers: Sequence-level knowledge distillation, arXiv 1606.07947 (the teacher's own answers as targets; there by beam
search, here greedy or sampled); Self-Instruct, 2212.10560 (`synthesise`: the teacher is shown a list of 8 prompts, 2 of
them new ones, and goes on with it; a new prompt is kept whose ROUGE-L with every other is below .7); Self-consistency,
2203.11171 (`keep="agreed"`: of several answers those that come to what most come to). The loss is over the answer
alone, its end included unless `max_tokens` cut it, where the teacher tells that. Differs: answers are not weighed by
the teacher's probability, which it does not tell; a request asks for prompts of any kind, not for classes and instances
apart.

What was asked and answered is kept: records.jsonl beside the result holds all pairs that were learned from, which other
methods take. Every query counts, against `--budget-queries` too; answers are steps of the run, and no kill pays for
them twice.

Models: teacher (Text; an endpoint will do), student (Gradients, Codec; causal or encoder-decoder, any tokenizer), judge
(Logprobs, optional: the `worst` answers by mean log-probability a token are left out). Data: prompts; completions and
labels are not read. Errors: ConfigError for several answers without temperature; MismatchError for a student that
writes no text; DataError where a prompt is blank, and where no answer is worth keeping, with what is wrong with them.

    lfm run distill.text teacher=big student=small prompts=prompts.jsonl --set max_tokens=8 --out taught
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from lfm.core import Codec, Cost, Data, DataSlot, Gradients, Inputs, Logprobs, Meta, Method, Model, Run, Sizes, Slot
from lfm.core import Text as Says
from lfm.core.errors import ConfigError, DataError, MismatchError
from lfm.core.finding import table
from lfm.core.heavy import np
from lfm.core.interfaces import Said as Answer
from lfm.core.method import Amount
from lfm.data.files import where
from lfm.data.language import context_of
from lfm.data.records import Completion, Label, Record, Text
from lfm.data.wording import spaced, wording
from lfm.distilling import asking, filtering
from lfm.distilling import lesson as lessons
from lfm.distilling import student as students
from lfm.distilling.answers import finer
from lfm.distilling.student import Taught, formed, smaller
from lfm.models import forward
from lfm.prompting.template import checked, filled
from lfm.train import fit, training

if TYPE_CHECKING:
    from lfm.core.heavy import nn

WRITERS = ("causal-lm", "seq2seq-lm")
"""The tasks of students that say text."""

SPARE = 2
"""Tokens of the student's context that an answer leaves to its prompt and its end."""


class Config(Taught, frozen=True):
    synthesise: Annotated[int, Meta(ge=0, description="new prompts that the teacher is asked to write")] = 0
    shown: Annotated[int, Meta(ge=1, description="prompts that a request for new ones shows")] = 8
    alike: Annotated[float, Meta(gt=0, le=1, description="ROUGE-L with another prompt that is too much")] = 0.7
    answers: Annotated[int, Meta(ge=1, description="answers to each prompt; a query each")] = 1
    temperature: Annotated[float, Meta(ge=0, description="of the answers; 0: greedy")] = 0.0
    max_tokens: Annotated[int, Meta(ge=1, description="of an answer, or of a list of new prompts")] = 128
    stop: Annotated[tuple[str, ...], Meta(description="what ends an answer")] = ()
    ask: Annotated[
        str, Meta(description="how the teacher is asked; {text}: the prompt, which the student gets bare")
    ] = "{text}"
    keep: Annotated[
        Literal["all", "distinct", "agreed"],
        Meta(description="of a prompt's answers: all, each once, or those that come to what most come to, once"),
    ] = "all"
    agreement: Annotated[float, Meta(ge=0, le=1, description="least share of answers that must agree")] = 0.5
    answer: Annotated[str, Meta(description="regular expression of what an answer comes to; empty: its last line")] = ""
    shortest: Annotated[int, Meta(ge=0, description="words of an answer, at least")] = 0
    longest: Annotated[int, Meta(ge=0, description="words of an answer, at most; 0: any")] = 0
    repeats: Annotated[float, Meta(ge=0, le=1, description="most of an answer's spans of words said before")] = 0.5
    ends: Annotated[str, Meta(description="regular expression that an answer ends with; empty: any")] = ""
    worst: Annotated[float, Meta(ge=0, lt=1, description="share of answers left out by the judge's score")] = 0.2


class Said(NamedTuple):
    """A pair, and why it is not learned from; empty where it is."""

    record: Completion
    fault: str


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    student = inputs.model("student")
    example = Completion(prompt="A question", completion=" and its answer")
    students.tried(config, student, run, lessons.lesson([example], student, student))
    given = list(dict.fromkeys(map(asked_by, inputs.records("prompts"))))
    settings: Any = {"max_tokens": config.max_tokens}
    teacher = inputs.model("teacher").ask(Says)
    new: list[str] = []
    if config.synthesise:
        # new prompts are drawn, whatever the answers are: the same list would be said again
        say = asking.saying(teacher, temperature=config.temperature or 1.0, stop=("\n\n",), **settings)
        new = asking.synthesised(say, given, config.synthesise, run, shown=config.shown, alike=config.alike)
    prompts = [*given, *new]
    say = asking.saying(teacher, temperature=config.temperature, stop=config.stop, **settings)
    wrapped = [asked(config, prompt) for prompt in prompts]
    said = judged(
        [
            one
            for prompt, answers in zip(prompts, asking.answered(say, wrapped, run, "answers", config.answers))
            for one in sifted(config, prompt, answers, student)
        ],
        inputs.all("judge"),
        config.worst,
        run,
    )
    kept = [one.record for one in said if not one.fault]
    faults = Counter(one.fault or "kept" for one in said)
    told = ", ".join(f"{count} {fault}" for fault, count in faults.most_common())
    if not kept:
        raise DataError(
            f"no answer of {inputs.model('teacher').ref} is worth learning from",
            why=told,
            fix="allow more (shortest, longest, repeats, ends, agreement), or ask otherwise (ask, max_tokens)",
        )
    open_ended = sum(not record.ends for record in kept)
    run.note(prompts=len(given), new_prompts=len(new), answers=len(said), learned_from=len(kept), cut=open_ended)
    table(f"answers: {told}", [{"answers": fault, "count": count} for fault, count in faults.most_common()]).beside(
        run.work
    )
    asking.leave(kept, run)
    lesson = lessons.lesson(kept, student, student)
    gradients = student.ask(Gradients)
    module = formed(gradients.module(), config, run, lesson=lesson)

    def loss(module: nn.Module, batch: Any) -> Any:
        return lesson.task.loss(forward(module, batch), batch)

    losses = fit(module, lesson.numbers, lesson.collate, loss, config, run)
    run.note(loss_before=losses[0], loss_after=losses[-1])
    return gradients.rewrap(module)


def asked_by(record: Record) -> str:
    """The prompt of a record: a text is one as a whole."""
    return record.text if isinstance(record, Text) else wording(record).prompt


def asked(config: Config, prompt: str) -> str:
    """As the teacher reads it."""
    return filled(config.ask, Label(text=prompt, label="")).prompt


def sifted(config: Config, prompt: str, answers: Sequence[Answer], student: Model) -> list[Said]:
    """A prompt's answers as records, with what is wrong with each. One that was cut does not end."""
    rules = filtering.Rules(shortest=config.shortest, longest=config.longest, repeats=config.repeats, ends=config.ends)
    agreed = [True] * len(answers)
    if config.keep == "agreed":
        agreed = filtering.agreeing([answer for answer, _ in answers], config.answer, config.agreement)
    seen: set[str] = set()
    found: list[Said] = []
    for (answer, cut), agrees in zip(answers, agreed, strict=True):
        fault = filtering.fault(answer, rules) or ("" if agrees else "disagreeing")
        if not fault and config.keep != "all" and answer in seen:
            fault = "said before"
        if not fault and not fits(answer, student):
            fault = "longer than the student reads"
        seen.add(answer)
        record = Completion(prompt=prompt, completion=spaced(prompt, answer), ends=not cut)
        found.append(Said(record, fault))
    return found


def fits(answer: str, student: Model) -> bool:
    """Whether the student's context holds the answer and some of its prompt."""
    tokenizer = student.ask(Codec).tokenizer
    context = context_of(tokenizer, student.facts)
    return not context or len(tokenizer(answer)["input_ids"]) + SPARE <= context


def judged(said: list[Said], judges: Sequence[Model], worst: float, run: Run) -> list[Said]:
    """The same, of whose good answers the worst by a judge's mean log-probability a token have a fault."""
    good = [i for i, one in enumerate(said) if not one.fault]
    if not judges or not good:
        return said
    records = [said[i].record for i in good]

    def scored() -> list[float]:
        scores = judges[0].ask(Logprobs).score([r.prompt for r in records], [r.completion for r in records])
        return [score.total / max(len(score.logprobs), 1) for score in scores]

    order = np.argsort(run.once("judged", scored), kind="stable")
    poor = {good[i] for i in order[: int(worst * len(good))].tolist()}
    return [one._replace(fault="unlikely") if i in poor else one for i, one in enumerate(said)]


def agree(config: Config, inputs: Inputs) -> None:
    if config.answers > 1 and not config.temperature:
        raise ConfigError("several greedy answers are one answer several times", fix="temperature=1, or answers=1")
    for pattern in (config.answer, config.ends):
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"{pattern!r} is no regular expression", why=str(error)) from None
    checked(config.ask, fills=False)
    students.agree(config, inputs.model("student"))
    if (task := inputs.model("student").facts.task) not in WRITERS:
        raise MismatchError(
            f"{inputs.model('student').ref} cannot learn to answer",
            why=f"it is for {task or 'no known task'}, and writes no text",
            fix=f"a student for {' or '.join(WRITERS)}",
        )
    prompts = inputs.records("prompts")
    teacher = inputs.model("teacher")
    heard = teacher.ask(Codec).tokenizer if teacher.can(Codec) else None
    context = context_of(heard, teacher.facts) if heard else 0
    for place, record in enumerate(prompts):
        if heard and context and (count := len(heard(asked(config, asked_by(record)))["input_ids"])) >= context:
            raise DataError(
                f"{where(prompts, place)}: a prompt of {count} tokens leaves no room to answer",
                why=f"{teacher.ref} reads {context} at most",
                fix="a shorter prompt, or a teacher of longer context",
            )
        if not asked_by(record).strip():
            raise DataError(
                f"{where(prompts, place)}: there is nothing to ask",
                why="the prompt is blank, and endpoints refuse such a one",
                fix="give it words, or leave the record out; distill.samples asks for texts without a prompt",
            )


def cost(config: Config, sizes: Sizes) -> Cost:
    """The most that it can take."""
    teacher, student, given = sizes.model("teacher"), sizes.model("student"), sizes.data["prompts"]
    cut = finer(teacher.vocabulary or student.vocabulary)
    length = given.tokens / max(given.records, 1) * cut
    requests = asking.requests(config.synthesise)
    pairs = (given.records + config.synthesise) * config.answers
    listing = asking.reading(config.shown, length, cut) + config.max_tokens
    tokens = int(pairs * (length + config.max_tokens) + requests * listing)
    learned = Amount(pairs, int(pairs * (length + config.max_tokens)))
    whole = training(config, smaller(config, student), learned)
    judges = sum(facts.parameters for facts in sizes.models.get("judge", ()))
    return whole._replace(
        flops=whole.flops + 2.0 * (tokens * teacher.parameters + learned.tokens * judges),
        steps=whole.steps + config.max_tokens * (requests // asking.ROUND + -(-pairs // asking.CHUNK)),
        memory=whole.memory + 4 * (teacher.parameters + judges),
        queries=pairs + requests + (pairs if judges else 0),
        tokens=tokens + (learned.tokens if judges else 0),
    )


METHOD = Method(
    paper="https://arxiv.org/abs/1606.07947",
    config=Config,
    models={
        "teacher": Slot((Says,), also=(Codec,), help="the model whose answers are learned; an endpoint will do"),
        "student": Slot((Gradients, Codec), help="the model that learns them"),
        "judge": Slot((Logprobs,), min=0, help="scores answers, of which the worst are left out"),
    },
    data={
        "prompts": DataSlot(
            Data.UNLABELED,
            ("text", "completion", "label", "pair", "fact"),
            help="what the teacher is asked, and what new prompts are made after",
        )
    },
    run=run,
    cost=cost,
    agree=agree,
)
