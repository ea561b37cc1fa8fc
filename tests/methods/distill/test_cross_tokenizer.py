"""Teachers with other tokenizers: with equal ones it is ordinary distillation, with others each term is written out."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import tiny
from case import Case
from lfm.core import Codec, Inputs, Logits, Model
from lfm.core.errors import ConfigError, DataError, MismatchError
from lfm.core.method import check
from lfm.data import records as data
from lfm.data.files import write
from lfm.data.task import task_for
from lfm.distilling import spans
from lfm.methods.distill import cross_tokenizer
from lfm.models import load, local
from lfm.runs.run import LocalRun
from lfm.train import headed
from lfm.train.losses import kd

TEXTS = [data.Text(text=line) for line in tiny.CORPUS]
ASKED = [data.Completion(prompt=line[:20], completion=line[20:]) for line in tiny.CORPUS]


def distill(teacher: Model, student: Model, records: Any, work: Path, seed: int = 0, **settings: Any) -> Any:
    inputs = Inputs({"teacher": (teacher,), "student": (student,)}, {"train": records})
    config = cross_tokenizer.Config(**({"steps": 20, "lr": 5e-3, "batch_size": 6} | settings))
    cross_tokenizer.agree(config, inputs)
    run = LocalRun(seed, work)
    made = cross_tokenizer.run(config, check("distill.cross_tokenizer", cross_tokenizer.METHOD, inputs), run)
    assert isinstance(made, Model)
    return made, run


def other(path: Path, make: Any = tiny.unigram, **config: Any) -> Path:
    """A causal model with a tokenizer of another kind."""
    tokenizer = make()
    tiny.causal(path, vocab_size=len(tokenizer), bos_token_id=None, pad_token_id=0, eos_token_id=1, **config)
    for file in path.glob("*token*"):
        file.unlink()
    tokenizer.save_pretrained(path)
    return path


def case(here: Path) -> Case:
    tiny.causal(here / "big", hidden_size=48)
    other(here / "other", seed=1)
    write(TEXTS, here / "texts.jsonl")
    settings = {"steps": 4, "batch_size": 3, "checkpoint_every": 0.0}
    return Case({"teacher": ("big",), "student": ("other",)}, {"train": "texts.jsonl"}, settings)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        tiny.causal(root / str(seed), seed=seed)
    other(root / "unigram", seed=2)
    other(root / "words", tiny.word_piece, seed=3)
    return root


@pytest.mark.parametrize("records", [TEXTS, ASKED], ids=["text", "completion"])
def test_with_equal_tokenizers_it_is_ordinary_distillation(records: Any, root: Path, tmp_path: Path) -> None:
    """CE + weight · T² KL over every scored token, from both models' logits alone."""
    teacher, student = load(root / "0"), load(root / "1")
    settings = {"steps": 1, "temperature": 2.0, "weight": 0.7, "labels": 0.3, "precision": "fp32"}
    _, run = distill(teacher, student, records, tmp_path, **settings)
    task = task_for(records, student.ask(Codec), student.facts)
    batch = task.collate(records)
    (t, _), (s, labels) = (task.scored(m.ask(Logits).logits(batch), batch) for m in (teacher, student))
    expected = 0.3 * F.cross_entropy(s, labels) + 0.7 * kd(s, t, 2.0)
    assert run.notes["loss_before"] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["sorted", "uld"])
def test_with_equal_tokenizers_both_sorted_losses_are_the_papers_written_out(
    kind: Any, root: Path, tmp_path: Path
) -> None:
    teacher, student = load(root / "0"), load(root / "1")
    _, run = distill(teacher, student, TEXTS, tmp_path, steps=1, kind=kind, weight=1.5, precision="fp32")
    task = task_for(TEXTS, student.ask(Codec), student.facts)
    batch = task.collate(TEXTS)
    (t, _), (s, labels) = (task.scored(m.ask(Logits).logits(batch), batch) for m in (teacher, student))
    apart = (s.softmax(-1).sort(-1).values - t.softmax(-1).sort(-1).values).abs().sum(-1).mean()
    assert run.notes["loss_before"] == pytest.approx((F.cross_entropy(s, labels) + 1.5 * apart).item(), rel=1e-4)


@pytest.mark.parametrize("name", ["unigram", "words"])
def test_every_term_of_other_tokenizers_by_hand(name: str, root: Path, tmp_path: Path) -> None:
    """One text, one row a model: the sum over spans, in plain loops and double precision."""
    teacher, student = load(root / "0"), load(root / name)
    record = data.Text(text="The cat sat on the mat and the dog looked at the cat.")
    _, run = distill(teacher, student, [record], tmp_path, steps=1, labels=0.0, weight=1.0, precision="fp32")
    codecs = [m.ask(Codec) for m in (student, teacher)]
    ours, theirs = (
        spans.read(record, task_for([record], c, m.facts), c.tokenizer)
        for c, m in zip(codecs, (student, teacher), strict=True)
    )
    s, t = (
        m.ask(Logits).logits({"input_ids": torch.tensor([r.ids])})[0].double().log_softmax(-1)
        for m, r in ((student, ours), (teacher, theirs))
    )
    found = spans.align(ours, theirs)
    classes = spans.classes(codecs[0].tokenizer, codecs[1].tokenizer, (s.shape[-1], t.shape[-1]))
    assert any(span.single for span in found) and not all(span.single for span in found)
    total = 0.0
    for span in found:
        p, q = torch.zeros(classes.many).double(), torch.zeros(classes.many).double()
        for id, c in enumerate(classes.theirs):
            p[c] += t[span.theirs[0] - 1, id].exp()
        for id, c in enumerate(classes.ours):
            q[c] += s[span.ours[0] - 1, id].exp()
        total += sum((a * (a / b.clamp(min=1.2e-38)).log()).item() for a, b in zip(p, q) if a > 0)
        if not span.single:
            a = sum(t[i - 1, theirs.ids[i]].item() for i in range(*span.theirs))
            b = sum(s[i - 1, ours.ids[i]].item() for i in range(*span.ours))
            x, y = torch.tensor([a, b]).double().exp()
            total += (x * (a - b) + (1 - x) * ((1 - x) / (1 - y)).log()).item()
    assert run.notes["loss_before"] == pytest.approx(total / len(found), rel=1e-3)


@pytest.mark.parametrize("kind", ["spans", "sorted", "uld"])
@pytest.mark.parametrize("records", [TEXTS, ASKED], ids=["text", "completion"])
def test_a_student_of_other_tokens_comes_nearer_to_its_teacher_and_is_saved(
    kind: Any, records: Any, root: Path, tmp_path: Path
) -> None:
    made, run = distill(load(root / "0"), load(root / "unigram"), records, tmp_path / "w", kind=kind, labels=0.0)
    assert run.notes["loss_after"] < 0.9 * run.notes["loss_before"]
    (tmp_path / "out").mkdir()
    made.save(tmp_path / "out")
    assert load(tmp_path / "out").digest == made.digest


@pytest.mark.parametrize("kind", ["spans", "sorted", "uld"])
def test_a_few_rows_through_the_heads_teach_what_whole_logits_teach(
    kind: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five places at a time, so that spans lie across chunks; then neither model's head found."""
    settings: dict[str, Any] = {"steps": 4, "kind": kind, "precision": "fp32"}
    monkeypatch.setitem(headed.ROOM, "cpu", 4 * 5 * load(root / "unigram").facts.vocabulary)
    _, few = distill(load(root / "0"), load(root / "unigram"), TEXTS, tmp_path / "few", **settings)
    monkeypatch.setattr(cross_tokenizer, "headless", lambda *_: None)
    monkeypatch.setattr(local, "headless", lambda *_: None)
    _, whole = distill(load(root / "0"), load(root / "unigram"), TEXTS, tmp_path / "whole", **settings)
    assert few.curves["fit"] == pytest.approx(whole.curves["fit"], rel=1e-4)


@pytest.mark.parametrize("kind", ["spans", "sorted"])
def test_a_batch_that_shares_no_span_teaches_nothing(kind: Any, root: Path, tmp_path: Path) -> None:
    records = [data.Text(text="cat"), TEXTS[0]]
    settings: dict[str, Any] = {"labels": 0.0, "batch_size": 1, "steps": 2}
    _, run = distill(load(root / "0"), load(root / "unigram"), records, tmp_path, kind=kind, **settings)
    assert sorted(run.curves["fit"])[0] == 0.0 < sorted(run.curves["fit"])[1]


def test_who_cannot_be_aligned_is_told_so(root: Path, tmp_path: Path) -> None:
    masked = tiny.masked(tmp_path / "masked")
    blind = [load(path).only((Codec,)) for path in (root / "0", masked)]
    inputs = Inputs({"teacher": (blind[0],), "student": (blind[1],)}, {"train": TEXTS})
    with pytest.raises(MismatchError, match="masked-lm"):
        cross_tokenizer.agree(cross_tokenizer.Config(), inputs)
    with pytest.raises(ConfigError, match="nothing is learned"):
        cross_tokenizer.agree(cross_tokenizer.Config(weight=0.0, labels=0.0), inputs)
    with pytest.raises(DataError, match="never end a token at the same place"):
        distill(load(root / "0"), load(root / "unigram"), [data.Text(text="cat")], tmp_path / "w")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif("LFM_REAL_DATA" not in os.environ, reason="LFM_REAL_DATA is not set")
def test_of_few_texts_a_teacher_of_4096_tokens_keeps_a_student_of_512_from_learning_by_heart(tmp_path: Path) -> None:
    """A whole story model on 24 texts, 20 times over: bits a byte of other stories, against the texts alone."""
    root = Path(os.environ["LFM_REAL_DATA"])
    text = (root / "text" / "tinystories_slice.txt").read_text()
    parts = [data.Text(text=text[i : i + 300].partition(" ")[2]) for i in range(0, 162_000, 300)]
    train, test = parts[:24], parts[500:540]
    teacher, student = (load(root / "models" / name) for name in ("stories3M", "stories260K"))

    def bits(model: Model) -> float:
        task = task_for(test, model.ask(Codec), model.facts)
        batch = task.collate(test)
        logits, labels = task.scored(model.ask(Logits).logits(batch), batch)
        nats = F.cross_entropy(logits, labels, reduction="sum").item()
        return nats / math.log(2) / sum(len(record.text.encode()) for record in test)

    found = {}
    for weight in (0.0, 1.0):
        settings: dict[str, Any] = {"steps": 60, "batch_size": 8, "lr": 1e-3, "weight": weight}
        made, _ = distill(teacher, student, train, tmp_path / str(weight), **settings)
        found[weight] = bits(made)
    print({weight: round(value, 3) for weight, value in found.items()})
    assert found[1.0] < found[0.0] - 0.1, found
