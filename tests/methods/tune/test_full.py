"""Full fine-tuning: what is scored, and that packing changes how records lie and not what is learned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from case import Case
from lfm import runs
from lfm.core import Codec, Gradients, Inputs, Model
from lfm.core.errors import ConfigError, DataError, MismatchError
from lfm.core.method import check
from lfm.data import packing
from lfm.data import records as data
from lfm.data.files import write
from lfm.data.task import task_for
from lfm.methods.tune import full
from lfm.models import forward, load
from lfm.runs.run import LocalRun

PAIRS = [
    data.Completion(prompt=f"the {word}", completion=" sat on the mat" * (1 + place % 3))
    for place, word in enumerate(("cats", "dogs", "birds", "happy cats", "mat"))
]


def case(here: Path) -> Case:
    tiny.causal(here / "base")
    write(PAIRS, here / "pairs.jsonl")
    return Case({"model": ("base",)}, {"train": "pairs.jsonl"}, {"steps": 6, "checkpoint_every": 0.0, "pack": 64})


def tune(directory: Path, records: list[Any], work: Path, dev: list[Any] | None = None, **settings: Any) -> Any:
    given = {"train": records} | ({"dev": dev} if dev else {})
    inputs = check("tune.full", full.METHOD, Inputs({"model": (load(directory),)}, given))
    run = LocalRun(0, work)
    made = full.run(full.Config(**({"steps": 30, "lr": 0.01} | settings)), inputs, run)
    assert isinstance(made, Model)
    return made, run


@pytest.mark.parametrize("kind", ["causal", "gpt2"])
def test_packed_records_lose_and_teach_what_they_do_apart(kind: str, tmp_path: Path) -> None:
    """Loss and gradient over the same records, in rows of 48 tokens and apart; rotary and learned places."""
    tiny.causal(tmp_path / "base")
    model = load(tmp_path / "base")
    if kind == "gpt2":
        import transformers

        settings = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=len(tiny.byte_bpe()))
        transformers.GPT2LMHeadModel(settings).save_pretrained(tmp_path / "gpt2")
        tiny.byte_bpe().save_pretrained(tmp_path / "gpt2")
        model = load(tmp_path / "gpt2")
    task = task_for(PAIRS, model.ask(Codec), model.facts)
    rows = packing.packed(PAIRS, task.collate, model.facts, 48)
    assert len(rows.rows) < len(PAIRS) and rows.filled > 0.6
    assert sorted(i for row in rows.rows for i in row) == list(range(len(PAIRS)))
    found = []
    for batch in (task.collate(PAIRS), rows.collate(rows.rows)):
        module = model.ask(Gradients).module()
        loss = task.loss(forward(module, batch), batch)
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in module.named_parameters()}))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-6)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-3, atol=1e-5)


def test_a_packed_training_is_the_training_of_its_records(tmp_path: Path) -> None:
    tiny.causal(tmp_path / "base")
    _, one = tune(tmp_path / "base", PAIRS, tmp_path / "a", steps=4, lr=1e-3)
    _, other = tune(tmp_path / "base", PAIRS, tmp_path / "b", steps=4, lr=1e-3, pack=64)
    assert other.curves["fit"] == pytest.approx(one.curves["fit"], rel=1e-4)
    assert other.notes["rows"] < len(PAIRS)  # type: ignore[operator]


def test_a_prompt_is_read_and_not_scored(tmp_path: Path) -> None:
    """The first step's loss is the mean over the completions' tokens and their end, written out."""
    tiny.causal(tmp_path / "base")
    model = load(tmp_path / "base")
    tokenizer, module = model.ask(Codec).tokenizer, model.ask(Gradients).module()
    total = count = 0.0
    for pair in PAIRS:
        ids = tokenizer(pair.prompt + pair.completion)["input_ids"] + [tokenizer.eos_token_id]
        first = len(tokenizer(pair.prompt)["input_ids"])
        with torch.no_grad():
            told = module(torch.tensor([ids])).logits[0].log_softmax(-1)
        total -= sum(float(told[place - 1, ids[place]]) for place in range(first, len(ids)))
        count += len(ids) - first
    for pack in (0, 64):
        _, run = tune(tmp_path / "base", PAIRS, tmp_path / str(pack), steps=1, pack=pack)
        assert run.curves["fit"] == pytest.approx([total / count], rel=1e-5)


def test_held_out_records_are_looked_at_packed_or_not(tmp_path: Path) -> None:
    tiny.causal(tmp_path / "base")
    looks = [
        tune(tmp_path / "base", PAIRS[:4], tmp_path / str(pack), PAIRS[4:], steps=0, epochs=3, pack=pack, patience=9)[1]
        for pack in (0, 64)
    ]
    assert len(looks[0].curves["fit held out"]) == 3
    assert looks[1].curves["fit held out"] == pytest.approx(looks[0].curves["fit held out"], rel=1e-3)


def test_what_cannot_be_packed_is_refused(tmp_path: Path) -> None:
    tiny.causal(tmp_path / "base")
    with pytest.raises(DataError, match=r"does not fit a row of 8.*pack="):
        tune(tmp_path / "base", PAIRS, tmp_path / "w", pack=8)
    write([data.Text(text=t) for t in ("the cat", "the cats sat on it")], tmp_path / "a.jsonl")
    given = Inputs({"model": (load(tmp_path / "base"),)}, {"train": runs.records(tmp_path / "a.jsonl")})
    with pytest.raises(DataError, match=r"a.jsonl:2: (\d+) tokens do not fit a row of 8.*pack=\1 or more"):
        full.agree(full.Config(pack=8), given)
    full.agree(full.Config(pack=18), given)
    tiny.seq2seq(tmp_path / "seq2seq")
    with pytest.raises(MismatchError, match="causal"):
        tune(tmp_path / "seq2seq", PAIRS, tmp_path / "w", pack=64)

    def leaking(batch: Any) -> torch.Tensor:  # a model whose state runs along the row
        return batch["input_ids"].float().cumsum(1)[..., None]

    task = task_for(PAIRS, load(tmp_path / "base").ask(Codec), load(tmp_path / "base").facts)
    with pytest.raises(MismatchError, match="see each other"):
        packing.held_apart(leaking, PAIRS, task.collate)


@pytest.mark.parametrize("make", [tiny.masked, tiny.classifier, tiny.seq2seq, tiny.vit])
def test_models_of_other_tasks_learn_too(make: Any, tmp_path: Path) -> None:
    import numpy as np

    records: dict[Any, list[Any]] = {
        tiny.masked: [data.Text(text=f"the {word} sat on the mat") for word in ("cats", "dogs")],
        tiny.classifier: [data.Label(text=f"the {word} sat", label=word) for word in ("cats", "dogs", "birds")],
        tiny.seq2seq: PAIRS,
        tiny.vit: [data.Image(image=np.full((8, 8), 28 * i, np.uint8), label=str(i)) for i in range(9)],
    }
    make(tmp_path / "base")
    made, run = tune(tmp_path / "base", records[make], tmp_path / "w", lr=3e-3)
    assert float(run.notes["loss_after"]) < 0.7 * float(run.notes["loss_before"])
    (tmp_path / "out").mkdir()
    made.save(tmp_path / "out")
    assert load(tmp_path / "out").digest == made.digest


def test_a_limit_of_memory_is_answered_with_settings_that_keep_to_it(tmp_path: Path) -> None:
    tiny.causal(tmp_path / "base")
    write([data.Text(text="the cats sat on the mat " * 10)] * 64, tmp_path / "long.jsonl")

    def order(**settings: Any) -> runs.Order:
        models = {"model": [tmp_path / "base"]}
        given = {"train": tmp_path / "long.jsonl"}
        return runs.Order(id="tune.full", models=models, data=given, settings={"batch_size": 64, **settings})

    asked = runs.plan(runs.prepare(order())).memory
    less = runs.plan(runs.prepare(order(batch_size=16, accumulate=4))).memory
    with pytest.raises(ConfigError, match=r"--max-memory.*batch_size=16, accumulate=4"):
        runs.execute(replace(order(), memory=less, out=tmp_path / "out"))
    assert less < asked and not (tmp_path / "out").exists()
