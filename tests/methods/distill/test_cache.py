"""Answers kept: a student learns from them what it learns from the teacher, and nothing else passes for them."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

import lfm
import tiny
from case import Case
from lfm import runs
from lfm.core import Answers, Codec, Gradients, Inputs, Logits, Model
from lfm.core.errors import AccessError, BudgetError, ConfigError, CorruptError, DataError, MismatchError
from lfm.core.interfaces import Classes, Top
from lfm.core.method import check
from lfm.data import records as data
from lfm.data.files import read, write
from lfm.data.task import task_for
from lfm.distilling import lesson as lessons
from lfm.distilling.telling import IDS, TOLD, gap
from lfm.methods.distill import cache, response
from lfm.models import load
from lfm.models.answers import MANIFEST, manifest_of
from lfm.models.answers.shards import bin_of, index_of
from lfm.models.api import Budget, Meter, open_api
from lfm.models.language import ids_by_text
from lfm.runs.run import LocalRun
from scripted import parrot, scripted

LABELS = [data.Label(text=f"the {w} sat on the mat {i}", label=w) for i, w in enumerate(("cats", "dogs", "birds") * 4)]
TEXTS = [data.Text(text=line) for line in tiny.CORPUS]


def case(here: Path) -> Case:
    tiny.classifier(here / "big")
    write(LABELS, here / "texts.jsonl")
    return Case({"teacher": ("big",)}, {"train": "texts.jsonl"}, {"k": 2})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        tiny.classifier(root / f"classifier{seed}", seed=seed)
        tiny.causal(root / f"causal{seed}", seed=seed)
        tiny.masked(root / f"masked{seed}", seed=seed)
    return root


def keep(teacher: Model, records: Any, out: Path, k: int = 64, **others: Model) -> Model:
    """What distill.cache makes, saved and opened again."""
    inputs = Inputs({"teacher": (teacher,), **{role: (m,) for role, m in others.items()}}, {"train": records})
    config = cache.Config(k=k)
    cache.agree(config, inputs)
    made = cache.run(
        config, check("distill.cache", cache.METHOD, inputs), LocalRun(0, _made(out.with_name(f"w{out.name}")))
    )
    made.save(_made(out))
    again = load(out)
    assert again.digest == made.digest and set(again.gives) == {Answers}
    return again


def _made(path: Path) -> Path:
    path.mkdir()
    return path


def learn(teacher: Model, student: Model, records: Any, work: Path, **settings: Any) -> Model:
    inputs = Inputs({"teacher": (teacher,), "student": (student,)}, {"train": records})
    config = response.Config(**({"steps": 8, "lr": 5e-3, "batch_size": 4, "precision": "fp32"} | settings))
    response.agree(config, inputs)
    made = response.run(config, check("distill.response", response.METHOD, inputs), LocalRun(0, _made(work)))
    assert isinstance(made, Model)
    return made


def said(model: Model, records: Any) -> torch.Tensor:
    """Its log-probabilities at all scored places."""
    task = task_for(records, model.ask(Codec), model.facts)
    batch = task.collate(records)
    return task.scored(model.ask(Logits).logits(batch), batch)[0].log_softmax(-1)


@pytest.mark.parametrize(("name", "k"), [("classifier", 3), ("causal", 400), ("masked", 10_000)])
def test_a_student_of_all_answers_kept_is_the_student_of_the_teacher(
    name: str, k: int, root: Path, tmp_path: Path
) -> None:
    """k = V is an identity, to rounding: at temperature 4, with labels, as the defaults have it."""
    records = LABELS if name == "classifier" else TEXTS
    teacher, student = load(root / f"{name}0"), load(root / f"{name}1")
    kept = keep(teacher, records, tmp_path / "answers", k)
    # answers, not weights: where a gradient is none (a key's bias) Adam makes steps of its rounding
    live, cached = (
        said(learn(t, student, records, tmp_path / f"l{i}"), records) for i, t in enumerate((teacher, kept))
    )
    assert (live - said(student, records)).abs().max() > 0.05
    torch.testing.assert_close(cached, live, rtol=0, atol=2e-4)


def test_what_is_kept_is_what_the_teacher_told(root: Path, tmp_path: Path) -> None:
    """The ids are the k likeliest, log-probabilities within the codec's bound, and what is left out is what is left."""
    teacher = load(root / "causal0")
    kept = keep(teacher, TEXTS, tmp_path / "answers", 16).ask(Answers)
    ids, told = kept.told(range(len(kept)))
    best = said(teacher, TEXTS).topk(16)
    order = np.argsort(-told, 1, kind="stable")
    got = np.take_along_axis(told, order, 1)
    assert [set(row) for row in ids.tolist()] == [set(row) for row in best.indices.tolist()]
    assert np.abs(got - best.values.numpy()).max() < 0.26
    share = np.exp(best.values.numpy())
    assert (share * np.abs(got - best.values.numpy())).sum(1).mean() < 0.001
    assert np.abs(np.exp(told).sum(1) - share.sum(1)).max() < 1e-4


def test_the_loss_of_the_k_likeliest_is_the_papers_over_k_and_the_rest(root: Path, tmp_path: Path) -> None:
    teacher, student = load(root / "causal0"), load(root / "causal1")
    kept = keep(teacher, TEXTS[:4], tmp_path / "answers", 32)
    config = response.Config(steps=1, batch_size=4, temperature=1.0, alpha=1.0, precision="fp32")
    inputs = Inputs({"teacher": (kept,), "student": (student,)}, {"train": TEXTS[:4]})
    run = LocalRun(0, _made(tmp_path / "work"))
    response.run(config, inputs, run)
    t, s = said(teacher, TEXTS[:4]).double(), said(student, TEXTS[:4]).double()
    best = t.topk(32)
    p, q = best.values.exp(), s.gather(-1, best.indices).exp()
    p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, q))
    expected = (p * (p / q).log()).sum(-1).mean().item()
    assert run.notes["loss_before"] == pytest.approx(expected, rel=2e-3)


def test_classes_are_told_by_the_students_numbers(root: Path, tmp_path: Path) -> None:
    teacher = load(root / "classifier0")
    module: Any = load(root / "classifier1").ask(Gradients).module()
    turned = [2, 0, 1]
    names = [tiny.LABELS[i] for i in turned]
    module.config.id2label, module.config.label2id = dict(enumerate(names)), {n: i for i, n in enumerate(names)}
    student = load(root / "classifier1").ask(Gradients).rewrap(module)
    expected = said(teacher, LABELS)[:, turned]
    for k in (2, 3):
        kept = keep(teacher, LABELS, tmp_path / f"answers{k}", k)
        lesson = lessons.lesson(LABELS, kept, student)
        batch = lessons.told(lesson, kept, LocalRun(0, tmp_path))(range(len(LABELS)))
        if k == 3:
            torch.testing.assert_close(batch[TOLD], expected)
            continue
        assert [set(row) for row in batch[IDS].tolist()] == [set(r) for r in expected.topk(2).indices.tolist()]
        assert (batch[TOLD] - expected.gather(1, batch[IDS])).abs().max() < 0.01


def test_the_likeliest_classes_of_one_record_are_not_taken_for_all_of_them(root: Path, tmp_path: Path) -> None:
    """Of k = 2 of 3 classes a batch of one record may have the first two: its loss is still over three outcomes."""
    teacher, student = load(root / "classifier0"), load(root / "classifier1")
    kept = keep(teacher, LABELS, tmp_path / "answers", 2)
    lesson = lessons.lesson(LABELS, kept, student)
    told = lessons.told(lesson, kept, LocalRun(0, tmp_path))
    first = [i for i, row in enumerate(said(teacher, LABELS).topk(2).indices.tolist()) if set(row) == {0, 1}]
    assert first, "no record has the first two classes for its likeliest: another seed"
    batch = told(first[:1])
    t, s = (said(model, LABELS)[first[0]].double() for model in (teacher, student))
    apart = gap(student.ask(Logits).logits(lesson.collate(first[:1])), batch).item()
    assert apart == pytest.approx((t.exp() * (t - s)).sum().item(), rel=1e-2)


def test_what_does_not_fit_is_refused_before_training(root: Path, tmp_path: Path) -> None:
    teacher, student = load(root / "causal0"), load(root / "causal1")
    kept = keep(teacher, TEXTS[:4], tmp_path / "answers", 8)
    with pytest.raises(MismatchError, match=r"no answers to 2 of 6 records .*kept="):
        learn(kept, student, TEXTS, tmp_path / "more")
    write(TEXTS, tmp_path / "texts.jsonl")
    with pytest.raises(MismatchError, match=r"the first: \S*texts.jsonl:5"):
        learn(kept, student, read(tmp_path / "texts.jsonl"), tmp_path / "file")
    tokenizer = tiny.byte_bpe()
    tokenizer.add_tokens(["<new>"])
    longer = tiny.causal(tmp_path / "words", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(longer)
    with pytest.raises(MismatchError, match=r"different vocabularies(.|\n)*distill.cross_tokenizer"):
        learn(kept, load(longer), TEXTS, tmp_path / "other")
    manifest = tmp_path / "answers" / MANIFEST
    facts = load(root / "causal0").facts
    shutil.copytree(manifest.parent, tmp_path / "respelled")
    respelled = tmp_path / "respelled" / MANIFEST
    others = facts._replace(vocabulary_digest=facts.vocabulary_digest[::-1])
    respelled.write_bytes(msgspec.json.encode(manifest_of(respelled.parent, "other", "", others, 8, 400)))
    with pytest.raises(MismatchError, match=r"has 400 tokens, \S* as many, of which some are others"):
        learn(load(respelled.parent), student, TEXTS[:4], tmp_path / "equal")
    with pytest.raises(MismatchError, match=r"for causal-lm(.|\n)*give a student for causal-lm, or a teacher for text"):
        learn(kept, load(root / "classifier0"), LABELS, tmp_path / "third")
    classes, classifier = tmp_path / "classes", load(root / "classifier0")
    with pytest.raises(MismatchError, match=r"never asked about them(?!, or)"):
        learn(keep(classifier, LABELS[:2], classes, 2), classifier, LABELS, tmp_path / "unasked")
    short = tiny.causal(tmp_path / "short", max_position_embeddings=16)
    with pytest.raises(MismatchError, match="shorter context"):
        learn(kept, load(short), TEXTS[:4], tmp_path / "fourth")


def test_answers_are_added_to_those_of_the_same_teacher_alone(root: Path, tmp_path: Path) -> None:
    teacher = load(root / "causal0")
    first = keep(teacher, TEXTS[:4], tmp_path / "first", 8)
    asked = 0
    logits = teacher.ask(Logits)

    class Counting:
        def logits(self, batch: Any) -> torch.Tensor:
            nonlocal asked
            asked += len(batch["input_ids"])
            return logits.logits(batch)

    counting = replace(teacher, gives={**teacher.gives, Logits: Counting}, _opened={})
    more = keep(counting, TEXTS, tmp_path / "more", 8, kept=first)
    assert asked == 2 and len(more.ask(Answers)) == 6
    before, after = first.ask(Answers), more.ask(Answers)
    for number in range(4):
        assert all(np.array_equal(a, b) for a, b in zip(before.told([number]), after.told([number]), strict=True))
    with pytest.raises(MismatchError, match="answers of another teacher"):
        keep(load(root / "causal1"), TEXTS, tmp_path / "none", 8, kept=first)
    with pytest.raises(ConfigError, match="k=8"):
        keep(teacher, TEXTS, tmp_path / "neither", 9, kept=first)
    assert keep(teacher, TEXTS, tmp_path / "usual", 0, kept=first).ask(Answers).k == 8
    assert keep(teacher, TEXTS[:1], tmp_path / "bare", 0).ask(Answers).k == cache.USUAL
    tokenizer = tiny.byte_bpe()
    tokenizer.add_tokens(["<new>"])
    longer = tiny.causal(tmp_path / "words", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(longer)
    given = Inputs({"teacher": (load(longer),), "kept": (first,)}, {"train": TEXTS})
    with pytest.raises(MismatchError, match=r"holds answers of another teacher(.|\n)*words 401(.|\n)*leave kept out"):
        cache.agree(cache.Config(), given)
    read = Inputs({"teacher": (teacher,), "reader": (load(longer),), "kept": (first,)}, {"train": TEXTS})
    with pytest.raises(MismatchError, match="different vocabularies"):
        cache.agree(cache.Config(), read)
    spoken = replace(teacher, gives={Top: lambda: None}, _opened={})
    read = Inputs({"teacher": (spoken,), "reader": (load(longer),), "kept": (first,)}, {"train": TEXTS})
    with pytest.raises(MismatchError, match="holds answers to another reader"):
        cache.agree(cache.Config(), read)


def test_rows_that_pad_a_teachers_vocabulary_are_no_answers(root: Path, tmp_path: Path) -> None:
    padded = load(tiny.causal(tmp_path / "padded", vocab_size=408))
    for k in (399, 408):
        kept = keep(padded, TEXTS, tmp_path / f"answers{k}", k)
        ids, _ = kept.ask(Answers).told([0])
        assert ids.max() < 400
        learn(kept, load(root / "causal1"), TEXTS, tmp_path / f"w{k}", steps=1)


def test_where_kept_answers_will_not_do_it_is_said_what_they_teach_by(root: Path, tmp_path: Path) -> None:
    keep(load(root / "causal0"), TEXTS, tmp_path / "answers", 8)
    write(TEXTS, tmp_path / "texts.jsonl")
    given = {"teacher": str(tmp_path / "answers"), "student": str(root / "causal1")}
    with pytest.raises(AccessError) as error:
        lfm.run("distill.on_policy", given, {"train": tmp_path / "texts.jsonl"}, out=tmp_path / "out")
    assert error.value.fix == "methods that work with it: distill.response"


def test_a_torn_or_damaged_cache_is_told_of(root: Path, tmp_path: Path) -> None:
    kept = keep(load(root / "causal0"), TEXTS, tmp_path / "answers", 8)
    student = load(root / "causal1")
    for name, harm, what in (
        ("torn", lambda file: file.write_bytes(file.read_bytes()[:-3]), "is torn"),
        ("longer", lambda file: file.write_bytes(file.read_bytes() + b"x"), "is torn"),
        ("damaged", lambda file: file.write_bytes(b"\xff" + file.read_bytes()[1:]), "is damaged"),
        ("gone", lambda file: file.unlink(), "is missing"),
    ):
        shutil.copytree(tmp_path / "answers", tmp_path / name)
        harm(bin_of(tmp_path / name, 0))
        with pytest.raises(CorruptError, match=what):  # before anything is trained
            lessons.told(lessons.lesson(TEXTS, kept, student), load(tmp_path / name), LocalRun(0, tmp_path))
    manifest = tmp_path / "answers" / MANIFEST
    told = manifest.read_bytes()
    for wrong, what in ((told.replace(b'"k": 8', b'"k": 9'), "not as it was written"), (b"{", "does not describe")):
        manifest.write_bytes(wrong)
        with pytest.raises(CorruptError, match=what):
            lessons.told(lessons.lesson(TEXTS, kept, student), load(tmp_path / "answers"), LocalRun(0, tmp_path))
    manifest.unlink()
    with pytest.raises(CorruptError, match="does not describe answers"):
        load(tmp_path / "answers")
    manifest.write_bytes(told)
    index = index_of(tmp_path / "answers", 0)
    index.write_bytes(index.read_bytes()[::-1])
    with pytest.raises(MismatchError, match=r"index is not what answers.json says"):
        _ = load(tmp_path / "answers").digest
    index.unlink()
    with pytest.raises(MismatchError, match=r"answers.json says(.|\n)*there is no such file"):
        _ = load(tmp_path / "answers").digest
    assert kept.kind == "answers"


def test_a_copy_of_answers_is_held_against_what_it_tells_of_itself(root: Path, tmp_path: Path) -> None:
    keep(load(root / "classifier0"), LABELS, tmp_path / "answers", 2)
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "answers", copy)
    assert "12 places" in str(runs.verify(copy))
    told = (copy / MANIFEST).read_text()
    first, second = load(copy).facts.labels[:2]
    swapped = told.replace(first, "?").replace(second, first).replace("?", second)
    (copy / MANIFEST).write_text(swapped)
    with pytest.raises(CorruptError, match="not as it was written"):
        runs.verify(copy)
    (copy / MANIFEST).write_text(told)
    bin_of(copy, 0).write_bytes(b"\xff" + bin_of(copy, 0).read_bytes()[1:])
    with pytest.raises(CorruptError, match="is damaged"):
        runs.verify(copy)


def test_a_run_cut_off_within_a_chunk_goes_on_to_the_same_bytes(root: Path, tmp_path: Path) -> None:
    teacher = load(root / "causal0")
    keep(teacher, TEXTS, tmp_path / "answers", 8)
    work = tmp_path / "wanswers"
    place = work / "answers"
    whole = [file.read_bytes() for file in (bin_of(place, 0), index_of(place, 0))]
    for file, cut in ((bin_of(place, 0), len(whole[0]) - 3), (index_of(place, 0), len(whole[1]) // 2 + 1)):
        file.write_bytes(file.read_bytes()[:cut])
    (work / "steps" / "answers.json").unlink()  # it is written after the last chunk
    cache.run(cache.Config(k=8), Inputs({"teacher": (teacher,)}, {"train": TEXTS}), LocalRun(0, work))
    assert [file.read_bytes() for file in (bin_of(place, 0), index_of(place, 0))] == whole


def test_records_that_ask_nothing_are_told_of(root: Path, tmp_path: Path) -> None:
    blank = Inputs({"teacher": (load(root / "causal0"),), "student": (load(root / "causal1"),)},
                   {"train": [*TEXTS, data.Text(text=" ")]})  # fmt: skip
    for method in (cache, response):
        with pytest.raises(DataError, match="text 7: 'text' is blank"):
            method.agree(method.Config(), blank)
    empty = Inputs({"teacher": blank.models["teacher"]}, {"train": [data.Text(text="")]})
    with pytest.raises(DataError, match="ask nothing"):
        cache.run(cache.Config(k=8), empty, LocalRun(0, tmp_path))


def test_a_teacher_that_tells_no_numbers_is_told_of_with_the_record(root: Path, tmp_path: Path) -> None:
    teacher = load(root / "causal0")

    class Broken:
        def logits(self, batch: Any) -> torch.Tensor:
            found = teacher.ask(Logits).logits(batch)
            found[2, 3] = math.nan
            return found

    broken = replace(teacher, gives={**teacher.gives, Logits: Broken}, _opened={})
    with pytest.raises(CorruptError, match="told no numbers of text 3"):
        keep(broken, TEXTS, tmp_path / "answers")


def test_a_teacher_asked_in_text_tells_what_its_logits_tell(root: Path, tmp_path: Path) -> None:
    """The likeliest tokens by their text, one question a place: the same answers, but for pieces of characters, which
    all read alike, and for prefixes that are read as other tokens than they are in the whole text."""
    teacher, student = load(root / "causal0"), load(root / "causal1")
    spoken = teacher.only((Top,)) if teacher.can(Top) else _top_alone(teacher)
    lesson = lessons.lesson(TEXTS[:3], spoken, student)
    run = LocalRun(0, tmp_path)
    batch = lessons.told(lesson, spoken, run)(range(3))
    expected = said(teacher, TEXTS[:3])
    tokenizer = student.ask(Codec).tokenizer
    got = torch.full_like(expected, -math.inf).scatter(1, batch[IDS], batch[TOLD])
    told = torch.isfinite(got)
    alike = [i for ids in ids_by_text(tokenizer, len(tokenizer)).values() if len(ids) > 1 for i in ids]
    known = torch.ones(len(tokenizer), dtype=torch.bool).index_fill(0, torch.tensor(alike), False)
    right = ((got - expected).abs() < 1e-4) | ~told
    labels = torch.cat([lesson.collate([i])["labels"][0, 1:] for i in range(3)])
    first = (batch[TOLD] == 0).any(1)
    assert first.sum() == 3 and torch.equal(batch[IDS][first, 0], labels[first])  # before them there is no text
    got, expected, told, right = (x[~first] for x in (got, expected, told, right))
    assert right.all(1).double().mean() > 0.8  # the prefixes that are read as the text is
    assert (told.sum(1) == known[expected.topk(64).indices].sum(1))[right.all(1)].all()
    with pytest.raises(AccessError, match="reader=STUDENT"):
        keep(spoken, TEXTS[:3], tmp_path / "none")
    kept = keep(spoken, TEXTS[:3], tmp_path / "answers", 20, reader=student)
    learn(kept, student, TEXTS[:3], tmp_path / "learned", temperature=1.0)


def test_an_endpoint_is_paid_once(root: Path, tmp_path: Path) -> None:
    """One query a place; stopped by its budget it goes on, and what was kept of it costs nothing again."""
    student, texts = load(root / "causal1"), [data.Text(text=f"{i} the cat") for i in range(100, 172)]
    with scripted(parrot(chat=False, echo=False)) as script:

        def teacher(queries: int) -> tuple[Model, Meter]:
            meter = Meter(Budget(queries=queries))
            return open_api(f"api:{script.url}", cache=tmp_path / "cache", meter=meter), meter

        lesson = lessons.lesson(texts, student, student)
        tokenizer = student.ask(Codec).tokenizer

        def asked(numbers: Any) -> int:
            """Different texts before a place; after <s> alone there is none."""
            rows = [lesson.collate([i])["input_ids"][0].tolist() for i in numbers]
            said = {tokenizer.decode(row[:end], skip_special_tokens=True) for row in rows for end in range(2, len(row))}
            return len(said - {""})

        teacher(100)  # what it can do is asked once, and kept
        model, _ = teacher(asked(range(64)) + 5)
        inputs = Inputs({"teacher": (model,), "student": (student,)}, {"train": texts})
        config = response.Config(steps=2, batch_size=4, temperature=1.0)
        response.agree(config, inputs)
        (tmp_path / "work").mkdir()
        with pytest.raises(BudgetError):
            response.run(config, check("distill.response", response.METHOD, inputs), LocalRun(0, tmp_path / "work"))
        kept = len(list((tmp_path / "work" / "steps").glob("teacher*.json")))
        again, meter = teacher(100_000)
        inputs = Inputs({"teacher": (again,), "student": (student,)}, {"train": texts})
        response.run(config, check("distill.response", response.METHOD, inputs), LocalRun(0, tmp_path / "work"))
        assert kept == 1 and 0 < meter.spent().queries <= asked(range(72)) - asked(range(64))
        last, meter = teacher(0)
        keep(last, texts, tmp_path / "answers", 64, reader=student)
        assert meter.spent().queries == 0


def _top_alone(teacher: Model) -> Model:
    from lfm.core.interfaces import Logprobs

    return replace(teacher, gives={Top: lambda: teacher.ask(Logprobs)}, _opened={})


def test_a_teacher_of_classes_is_asked_once_a_record(root: Path, tmp_path: Path) -> None:
    teacher, student = load(root / "classifier0"), load(root / "classifier1")
    expected = said(teacher, LABELS)

    class Naming:
        labels = tiny.LABELS

        def tell(self, records: Any) -> Any:
            return expected[[LABELS.index(r) if r in LABELS else _place(r) for r in records]].numpy()

    def _place(record: Any) -> int:
        return next(i for i, r in enumerate(LABELS) if r.text == record.text)

    naming = replace(teacher, gives={Classes: Naming}, _opened={})
    batch = lessons.told(lessons.lesson(LABELS, naming, student), naming, LocalRun(0, tmp_path))(range(len(LABELS)))
    torch.testing.assert_close(batch[TOLD], expected)
    kept = keep(naming, LABELS, tmp_path / "answers")
    cached, live = (said(learn(t, student, LABELS, tmp_path / str(i)), LABELS) for i, t in enumerate((kept, teacher)))
    torch.testing.assert_close(cached, live, rtol=0, atol=2e-4)


@pytest.mark.slow
def test_kept_whole_by_a_killed_run(tmp_path: Path) -> None:
    """Killed as it asks, and torn, and run again: the same bytes as left alone."""
    tiny.causal(tmp_path / "big")
    write([data.Text(text=f"{line} {i}") for i in range(200) for line in tiny.CORPUS], tmp_path / "texts.jsonl")
    command = [sys.executable, "-m", "lfm", "run", "distill.cache", "teacher=big", "train=texts.jsonl", "--set", "k=8"]
    env = {**os.environ, "LFM_HOME": str(tmp_path / "home")}
    going = subprocess.Popen([*command, "--out", "cut"], cwd=tmp_path, env=env, stderr=subprocess.DEVNULL,
                             stdout=subprocess.DEVNULL)  # fmt: skip
    place = tmp_path / ".cut.lfm" / "answers"
    until = time.monotonic() + 120
    while not index_of(place, 0).exists() and time.monotonic() < until and going.poll() is None:
        time.sleep(0.005)
    going.send_signal(signal.SIGKILL)
    going.wait()
    assert index_of(place, 0).exists() and not (tmp_path / "cut").exists()
    with bin_of(place, 0).open("ab") as torn:  # as if it had died while it wrote
        torn.write(b"half a run of bytes")
    with index_of(place, 0).open("ab") as torn:
        torn.write(b"half")
    for out in ("cut", "alone"):
        subprocess.run([*command, "--out", out], cwd=tmp_path, env=env, check=True, capture_output=True)
    records = [json.loads((tmp_path / out / "run.json").read_text()) for out in ("cut", "alone")]
    assert records[0]["output"]["digest"] == records[1]["output"]["digest"]
    for name in ("answers-00000.bin", "answers-00000.index", "code.bin"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_a_student_learns_from_a_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way: kept by a run, verified, and a teacher by its path alone."""
    monkeypatch.setenv("LFM_HOME", str(tmp_path / "home"))
    tiny.causal(tmp_path / "big")
    tiny.causal(tmp_path / "small", seed=1)
    write(TEXTS, tmp_path / "texts.jsonl")
    texts = tmp_path / "texts.jsonl"
    done = runs.execute(
        runs.Order("distill.cache", {"teacher": [tmp_path / "big"]}, {"train": texts}, {"k": 8}, tmp_path / "answers")
    )
    assert done.verified.max_abs == 0 and runs.verify(tmp_path / "answers").max_abs == 0
    shutil.rmtree(tmp_path / "big")
    models = {"teacher": [tmp_path / "answers"], "student": [tmp_path / "small"]}
    settings = {"steps": 4, "batch_size": 4, "temperature": 1.0}
    made = runs.execute(runs.Order("distill.response", models, {"train": texts}, settings, tmp_path / "taught"))
    assert float(made.notes["loss_after"]) < float(made.notes["loss_before"])
    damaged = bin_of(tmp_path / "answers", 0)
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(CorruptError, match="is damaged"):
        runs.verify(tmp_path / "answers")
