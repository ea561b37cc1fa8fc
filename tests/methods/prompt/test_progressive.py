"""prompt.progressive: a prompt a task, nothing forgotten, each readable by peft alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import peft
import pytest
import torch

import promptings
import tiny
from case import Case
from lfm import models, zoo
from lfm.core import Codec, Inputs, Logits, Model, Text
from lfm.core.errors import ConfigError, DataError, MismatchError
from lfm.data import files
from lfm.data import records as data
from lfm.data.files import write
from lfm.data.task import task_for
from lfm.methods.prompt import progressive as method
from lfm.methods.prompt import soft
from lfm.methods.tune import full
from lfm.models import adapter
from lfm.runs.run import LocalRun
from lfm.train import taught as train_on
from lfm.train.examine import examiner
from lfm.tuners import prompts
from methods.reuse.eight import fuse

FIRST = [data.Label(text=f"the {w} sat on the mat", label=w, group="a") for w in ("cats", "dogs", "birds")]
SECOND = [data.Label(text=f"{x} is the capital", label="dogs", group="b/c") for x in ("paris", "rome", "berlin")]
FACTS = [data.Fact(subject=w, relation="is", object="happy", prompt=f"{w} are", group="a") for w in ("cats", "dogs")]
FACTS += [data.Fact(subject=w, relation="in", object="Rome", prompt=f"{w} is in", group="b") for w in ("Ada", "Paris")]
SMALL: dict[str, Any] = {"steps": 4, "batch_size": 2, "prompt_tokens": 3, "hidden": 8, "lr": 0.05}


def case(here: Path) -> Case:
    tiny.causal(here / "base")
    write(FACTS, here / "tasks.jsonl")
    return Case({"base": ("base",)}, {"train": "tasks.jsonl"}, {**SMALL, "checkpoint_every": 0.0})


def taught(base: Model, records: Any, work: Path, earlier: Any = (), **settings: Any) -> tuple[Model, LocalRun]:
    roles = {"base": [base], "earlier": list(earlier)}
    return fuse(method, work, {k: v for k, v in roles.items() if v}, {"train": records}, **{**SMALL, **settings})


def logits(model: Model, texts: list[str]) -> torch.Tensor:
    return model.ask(Logits).logits(model.ask(Codec).texts(texts))


def test_a_new_prompt_is_its_mlp_beside_itself_before_the_earlier_ones() -> None:
    """By hand: W₂ tanh(W₁ p + b₁) + b₂ + p for each token; the earlier rows as they were, and without a gradient."""
    from lfm.tuners.growing import Growing

    begin, earlier = torch.randn(2, 4), torch.randn(3, 4)
    encoder = Growing(begin, earlier, 5)
    named = dict(encoder.named_parameters())
    inner = torch.tanh(begin @ named["mlp.0.weight"].T + named["mlp.0.bias"])
    by_hand = inner @ named["mlp.2.weight"].T + named["mlp.2.bias"] + begin
    told = encoder(torch.arange(5))
    torch.testing.assert_close(told, torch.cat([by_hand, earlier])[None])
    assert {name for name, p in encoder.named_parameters() if p.requires_grad} == {
        *("embedding.weight", "mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias")
    }


def test_a_tasks_prompt_is_its_own_and_then_all_earlier_ones(tmp_path: Path) -> None:
    base = models.load(tiny.causal(tmp_path / "base"))
    made, run = taught(base, FACTS, tmp_path)
    held = made.ask(method.Prompts)
    assert held.names == ("a", "b") and run.notes["prompt_tokens"] == 6
    both, own = held.rows(2), held.tensors
    assert torch.equal(both, torch.cat([own["prompt/1"], own["prompt/0"]])) and len(held.rows(1)) == 3
    assert torch.equal(logits(made, ["cats are"]), logits(held.task("b"), ["cats are"]))
    assert made.facts.context == base.facts.context - 6
    with pytest.raises(DataError, match=r"no task 'c' was learned.*'a', 'b'"):
        held.task("c")


def test_a_task_answers_as_it_did_while_it_was_learned(tmp_path: Path) -> None:
    """At a rate that moves nothing, the loss in training is that of what is kept: its own rows, the earlier as read."""
    base = models.load(tiny.causal(tmp_path / "base"))
    made, run = taught(base, FACTS, tmp_path, lr=1e-12, steps=1)
    for name, records in (("a", FACTS[:2]), ("b", FACTS[2:])):
        task = task_for(records, base.ask(Codec), base.facts)
        batch = task.collate(records)
        told = made.ask(method.Prompts).task(name).ask(Logits).logits(batch)
        assert float(task.loss(told, batch)) == pytest.approx(float(run.notes[f"loss {name}"]), rel=1e-4)


@pytest.mark.parametrize("kind", ["causal", "classifier"])
def test_a_task_answers_bit_for_bit_as_before_others_came(kind: str, tmp_path: Path) -> None:
    base = models.load(getattr(tiny, kind)(tmp_path / "base"))
    first, second = (FIRST, SECOND) if kind == "classifier" else (FACTS[:2], FACTS[2:])
    alone, _ = taught(base, first, tmp_path)
    both, _ = taught(base, second, tmp_path, [alone])
    before, after = (m.ask(method.Prompts).task("a") for m in (alone, both))
    assert before.digest == after.digest
    assert torch.equal(logits(before, ["the cats sat"]), logits(after, ["the cats sat"]))
    assert not torch.equal(logits(both, ["the cats sat"]), logits(alone, ["the cats sat"]))
    at_once, _ = taught(base, [*first, *second], tmp_path)
    assert at_once.digest == both.digest  # in one run or two, by the same seed


@pytest.mark.parametrize("kind", ["causal", "masked", "classifier", "seq2seq"])
def test_each_task_is_a_prompt_that_peft_alone_reads(kind: str, tmp_path: Path) -> None:
    """From the saved directory: the program comes back, and tasks/NAME are plain PEFT directories."""
    path = getattr(tiny, kind)(tmp_path / "base")
    base = models.load(path)
    records: Any = [*FIRST, *SECOND] if kind == "classifier" else FACTS
    made, _ = taught(base, records, tmp_path)
    made.save(out := promptings.directory(tmp_path / "out"))
    again = models.load(out)
    assert again.digest == made.digest
    names = sorted(path.name for path in (out / "tasks").iterdir())
    assert names == (["a", "task-1"] if kind == "classifier" else ["a", "b"])
    batch: Any = dict(base.ask(Codec).texts(["the cats sat"]))
    if kind == "seq2seq":
        batch["labels"] = batch["input_ids"]
    for name, saved in zip(made.ask(method.Prompts).names, names, strict=True):
        ours = again.ask(method.Prompts).task(name).ask(Logits).logits(batch)
        assert torch.equal(models.load(out / "tasks" / saved).ask(Logits).logits(batch), ours)
        theirs = promptings.plain(kind, path, out / "tasks" / saved)
        given = {k: v for k, v in batch.items() if k != "labels"}
        if kind == "seq2seq":
            given["decoder_input_ids"] = theirs.get_base_model().prepare_decoder_input_ids_from_labels(batch["labels"])
        with torch.no_grad():
            told = theirs(**given).logits
        told = told[:, -batch["input_ids"].shape[1] :] if kind in ("causal", "masked") else told
        torch.testing.assert_close(told, ours, rtol=1e-4, atol=1e-5)
    if kind == "causal":
        assert again.ask(Text).generate(["cats"], max_tokens=4) == made.ask(Text).generate(["cats"], max_tokens=4)


def test_what_does_not_fit_is_refused_before_a_weight_is_read(tmp_path: Path) -> None:
    base, other = (models.load(tiny.classifier(tmp_path / f"{seed}", seed=seed)) for seed in (0, 1))
    made, _ = taught(base, FIRST, tmp_path)
    with pytest.raises(MismatchError, match="over another base"):
        taught(other, SECOND, tmp_path, [made])
    with pytest.raises(DataError, match="has learned 'a' already"):
        taught(base, FIRST, tmp_path, [made])
    with pytest.raises(DataError, match=f"label {len(SECOND) + 1}: 'group' names no task"):
        taught(base, [*SECOND, msgspec.structs.replace(SECOND[0], group="")], tmp_path)
    with pytest.raises(ConfigError, match="a prompt of 127 tokens leaves no room"):
        taught(base, SECOND, tmp_path, [made], prompt_tokens=124)


TOKENS = 10


def one_prompt(base: Model, tasks: Any, run: LocalRun, **settings: Any) -> list[Model]:
    """One soft prompt taught each task after the other: the model after each."""
    module = prompts.opened(base, peft.PromptTuningConfig(num_virtual_tokens=TOKENS, num_transformer_submodules=1))
    with torch.no_grad():
        rows = prompts.vocabulary_rows(module, TOKENS, run.generator("words"))
        module.prompt_encoder["default"].embedding.weight.copy_(rows)
    made = []
    for name, records in tasks.items():
        train_on(module, prompts.roomy(base, TOKENS), records, soft.Config(**settings), run, name=name)
        made.append(adapter.over(base, module))
    return made


def whole_model(base: Model, tasks: Any, run: LocalRun, **settings: Any) -> list[Model]:
    """All weights taught each task after the other."""
    made: list[Model] = []
    for name, records in tasks.items():
        inputs = Inputs({"model": (made[-1] if made else base,)}, {"train": records})
        tuned = full.run(full.Config(**settings), inputs, LocalRun(run.seed, run.work / name))
        assert isinstance(tuned, Model)
        made.append(tuned)
    return made


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_it_forgets_nothing_where_training_in_turn_does(tmp_path: Path) -> None:
    """Letters and then moods on zoo:lm, three seeds: what the held-out loss on the letters rises by once the moods are
    learned; and what the moods' is after the letters' prompt, and without it."""
    base = models.load(zoo.model("lm"))
    names = ("letters", "moods")
    train = {name: [msgspec.structs.replace(r, group=name) for r in files.read(zoo.data(name))[:192]] for name in names}
    held = {name: files.read(zoo.data(name + "-test"))[:64] for name in names}
    how: dict[str, Any] = {"steps": 60, "batch_size": 8}

    def loss(model: Model, name: str) -> float:
        return examiner(held[name], model)(model.ask(Logits).logits).loss

    for seed in range(3):
        run = LocalRun(seed, promptings.directory(tmp_path / f"{seed}"))
        made = method.run(
            method.Config(**how, lr=0.03),
            Inputs({"base": (base,)}, {"train": [r for records in train.values() for r in records]}),
            run,
        )
        tasks = made.ask(method.Prompts)
        again = LocalRun(seed, tmp_path / f"{seed}" / "again")
        first = method.grown(method.Config(**how, lr=0.03), method.Prompts(base, (), (), {}), *pair(train, 0), again)
        alone = LocalRun(seed, tmp_path / f"{seed}" / "alone")
        own = method.grown(method.Config(**how, lr=0.03), method.Prompts(base, (), (), {}), *pair(train, 1), alone)
        soft_ = one_prompt(base, train, run, **how, lr=0.03)
        full_ = whole_model(base, train, run, **how, lr=3e-4)
        rise = {
            "progressive": loss(tasks.task("letters"), "letters") - loss(first.task("letters"), "letters"),
            "one prompt": loss(soft_[1], "letters") - loss(soft_[0], "letters"),
            "full tuning": loss(full_[1], "letters") - loss(full_[0], "letters"),
        }
        moods = {"after letters": loss(tasks.task("moods"), "moods"), "alone": loss(own.task("moods"), "moods")}
        print(seed, {how: round(value, 3) for how, value in (rise | moods).items()}, "base", loss(base, "letters"))
        assert rise["progressive"] == 0 < min(rise["one prompt"], rise["full tuning"])


def pair(train: Any, place: int) -> tuple[str, Any]:
    return list(train.items())[place]
