"""Keep what a teacher tells of records, so that students learn from it again and again, elsewhere, without the teacher.

    a place → its k likeliest ids, their log p, and 1 − Σ p

Paper: none; what response distillation (arXiv 1503.02531) needs of a teacher. Differs from the caches that there are:
sums of all bytes, what is left out is kept, a killed run goes on, and a student that reads otherwise is refused. Of 64
ids a place takes about 105 bytes (stories3M, 4096 tokens) or 120 (a synthetic teacher of 50257), with Σ p |Δ log p|
below .001 (`benchmarks/answers.py`). k = V keeps all in fp32, as told.

Models: teacher (Logits and Codec; or Classes; or, asked in text, Top or Logprobs, and then `reader`, whose tokens are
meant); kept (Answers), optional: answers of this teacher to go on from, of which none is asked for again. Data: every
kind that sets the teacher a task; long texts are split to its context. What is made gives Answers alone, and is a
teacher of distill.response. Errors: MismatchError where `kept` is another teacher's; CorruptError where the teacher
tells what are no numbers, and where kept bytes are damaged.

    lfm run distill.cache teacher=big train=texts.jsonl --set k=2 --out answers
"""

from __future__ import annotations

from typing import Annotated

import lfm.core
from lfm.core import Answers, Codec, Cost, Data, DataSlot, Inputs, Meta, Method, Model, Run, Sizes, Slot
from lfm.core.errors import MismatchError
from lfm.data.shares import classless
from lfm.data.suited import worded
from lfm.distilling import answers, keeping
from lfm.distilling import lesson as lessons

USUAL = 64
"""Likeliest answers of each place, where nothing tells otherwise."""


class Config(lfm.core.Config, frozen=True):
    k: Annotated[
        int,
        Meta(
            ge=0, description="likeliest answers of each place; as many as there are: all, unrounded; 0: 64, or as kept"
        ),
    ] = 0


def run(config: Config, inputs: Inputs, run: Run) -> Model:
    teacher = inputs.model("teacher")
    reader = next(iter(inputs.all("reader")), teacher)
    records = classless(inputs.records("train"), reader)
    lesson = keeping.lesson(records, teacher, reader)
    kept = next(iter(inputs.all("kept")), None)
    k = config.k or (kept.ask(Answers).k if kept else USUAL)
    return keeping.keep(lesson, teacher, reader.facts, k, run, kept)


def agree(config: Config, inputs: Inputs) -> None:
    teacher = inputs.model("teacher")
    worded(inputs.records("train"))
    keeping.agree(teacher, next(iter(inputs.all("reader")), teacher))
    for kept in inputs.all("kept"):
        try:
            lessons.agree(kept, next(iter(inputs.all("reader")), teacher))
        except MismatchError as error:
            whose = "to another reader" if keeping.teacher_of(kept) == teacher.digest else "of another teacher"
            fix = "that one, or new answers (leave kept out)"
            raise MismatchError(f"{kept.ref} holds answers {whose}", why=error.why, fix=fix) from None


def cost(config: Config, sizes: Sizes) -> Cost:
    teacher, amount = sizes.model("teacher"), sizes.data["train"]
    queries, tokens = answers.queries(sizes)
    places = amount.records if teacher.labels else amount.tokens
    return Cost(
        flops=2.0 * teacher.parameters * amount.tokens,
        steps=-(-amount.records // answers.CHUNK),
        memory=4 * teacher.parameters,
        disk=int(places * keeping.bytes_a_place(config.k or USUAL, teacher.vocabulary or len(teacher.labels))),
        queries=queries,
        tokens=tokens,
    )


METHOD = Method(
    paper="none",
    config=Config,
    models={
        "teacher": Slot((), any_of=answers.ASKED, also=(Codec,), help="the model that is asked"),
        "reader": Slot((Codec,), min=0, help="whose tokens are meant, where the teacher is asked in text"),
        "kept": Slot((Answers,), min=0, help="answers of this teacher to go on from"),
    },
    data={
        "train": DataSlot(
            Data.UNLABELED,
            ("text", "completion", "label", "pair", "image", "fact"),
            help="what the teacher is asked; text and classless records will do",
        )
    },
    run=run,
    cost=cost,
    agree=agree,
    forms=("answers",),
)
