"""augment.knn_lm: the paper's mixture, over a datastore that is exactly the text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lfm
import tiny
from case import Case
from lfm.core import Codec, Features, Inputs, Logits, Logprobs, Text
from lfm.core.errors import LfmError
from lfm.data import files, records
from lfm.methods.augment import knn_lm
from lfm.runs import LocalRun

TEXT = "The cat sat on the mat and the dog looked at the cat."
OTHER = "Paris is the capital of France. Rome is the capital of Italy."


def case(here: Path) -> Case:
    tiny.causal(here / "model")
    files.write([records.Text(text=TEXT), records.Text(text=OTHER)], here / "text.jsonl")
    return Case(models={"model": ("model",)}, data={"text": "text.jsonl"}, settings={"k": 8})


def made(here: Path, texts: list[str], **settings: object) -> lfm.Model:
    if not (here / "model").exists():
        tiny.causal(here / "model")
    (here / "work").mkdir(exist_ok=True)
    given = Inputs({"model": (lfm.load(here / "model"),)}, {"text": [records.Text(text=t) for t in texts]})
    run = LocalRun(0, here / "work" / str(len(list((here / "work").iterdir()))))
    result = knn_lm.run(knn_lm.Config(**settings), given, run)  # type: ignore[arg-type]
    assert isinstance(result, lfm.Model)
    return result


def test_the_mixture_is_the_papers_formula(tmp_path: Path) -> None:
    program = made(tmp_path, [TEXT], k=3, weight=0.4, temperature=0.7)
    base = lfm.load(tmp_path / "model")
    ids = base.ask(Codec).texts([TEXT])["input_ids"]
    query = base.ask(Codec).texts(["the dog sat on"])
    (stored,) = base.ask(Features).features({"input_ids": ids}, [("ffn_in", -1)])
    keys, values = stored[0, :-1].half().double(), ids[0, 1:]
    (f,) = base.ask(Features).features(query, [("ffn_in", -1)])
    own = base.ask(Logits).logits(query).double().softmax(-1)[0, -1]
    spread = float((keys.float() - keys.float().mean(0)).square().sum(1).mean())
    squared = (f[0, -1].double() - keys).square().sum(1)
    near = squared.argsort()[:3]
    weights = torch.exp(-squared[near] / (0.7 * spread))
    expected = 0.6 * own
    for w, v in zip(weights / weights.sum(), values[near]):
        expected[v] += 0.4 * w
    got = program.ask(Logits).logits(query)[0, -1].double().exp()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert float(got.sum()) == pytest.approx(1, abs=1e-5)


def test_weight_zero_is_the_model_and_weight_one_recalls_the_text(tmp_path: Path) -> None:
    base = lfm.load(tiny.causal(tmp_path / "model"))
    batch = base.ask(Codec).texts([OTHER])
    plain = made(tmp_path, [TEXT], weight=0.0).ask(Logits).logits(batch)
    assert torch.equal(plain, base.ask(Logits).logits(batch))
    recalled = made(tmp_path, [OTHER], weight=1.0, k=1).ask(Logits).logits(batch)
    assert torch.equal(recalled[0, :-1].argmax(-1), batch["input_ids"][0, 1:])
    prompt = "Paris is the capital"
    assert OTHER.startswith(
        prompt + made(tmp_path, [OTHER], weight=1.0, k=1).ask(Text).generate([prompt], max_tokens=3)[0]
    )


def test_the_order_of_the_text_changes_nothing(tmp_path: Path) -> None:
    scores = [
        made(tmp_path, texts, k=5).ask(Logprobs).score(["the cat"], [" sat on the mat"])[0].total
        for texts in ([TEXT, OTHER], [OTHER, TEXT])
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_a_long_text_is_stored_once_with_context(tmp_path: Path) -> None:
    long = " ".join([TEXT, OTHER] * 12)
    base = lfm.load(tiny.causal(tmp_path / "model"))
    ids = base.ask(Codec).texts([long])["input_ids"][0]
    assert len(ids) > 2 * base.facts.context
    rows = knn_lm.stretches(base, [long])
    (tmp_path / "work").mkdir()
    kept = knn_lm.store(base, rows, LocalRun(0, tmp_path / "work"))
    assert kept["values"].tolist() == ids[1:].tolist()


def test_known_text_is_told_better_than_by_the_model_alone(tmp_path: Path) -> None:
    program, base = made(tmp_path, [TEXT], k=4), lfm.load(tmp_path / "model")
    with_text, alone = (m.ask(Logprobs).score([""], [TEXT])[0].total for m in (program, base))
    assert with_text > alone


def test_with_all_the_weight_on_neighbours_what_they_do_not_say_is_a_number(tmp_path: Path) -> None:
    program = made(tmp_path, [TEXT], weight=1.0, k=2)
    logits = program.ask(Logits).logits(program.ask(Codec).texts([OTHER]))
    assert logits.isfinite().all()
    assert ((logits.exp() > 0).sum(-1) <= 2).all()
    torch.testing.assert_close(logits.exp().sum(-1), torch.ones(logits.shape[:2]))


def test_generation_mixes_where_it_reads_and_says_the_same(tmp_path: Path) -> None:
    program = made(tmp_path, [TEXT, OTHER], k=4, weight=0.6)
    logits = program.ask(Logits)
    batch = program.ask(Codec).texts(["The cat sat", "Paris is the capital of"])
    last = logits.logits(batch, last=True)  # type: ignore[call-arg]
    ends = torch.arange(2), batch["attention_mask"].sum(1) - 1
    torch.testing.assert_close(last[ends], logits.logits(batch)[ends])
    base = lfm.load(tmp_path / "model").ask(Logits).logits(batch).log_softmax(-1)
    torch.testing.assert_close(last[0, 0], base[0, 0])


def test_the_cache_is_a_kernel_over_the_same_text(tmp_path: Path) -> None:
    """p = .3 p_cache + .7 p_LM at the last token, the cache's sum written out; a text's first token has none."""
    program = made(tmp_path, [OTHER], weight=0.0, cache=4, cache_weight=0.3, temperature=0.2)
    base = lfm.load(tmp_path / "model")
    batch = base.ask(Codec).texts([TEXT])
    ids, (f,) = batch["input_ids"][0], base.ask(Features).features(batch, [("ffn_in", -1)])
    keys = base.ask(Features).features(base.ask(Codec).texts([OTHER]), [("ffn_in", -1)])[0][0, :-1].half().double()
    scale = 0.2 * float((keys - keys.mean(0)).square().sum(1).mean())
    end = len(ids) - 1
    kernel = torch.exp(-(f[0, end - 4 : end] - f[0, end]).double().square().sum(1) / scale)
    expected = 0.7 * base.ask(Logits).logits(batch)[0, end].double().softmax(-1)
    for w, v in zip(kernel / kernel.sum(), ids[end - 3 : end + 1], strict=True):
        expected[v] += 0.3 * w
    got = program.ask(Logits).logits(batch)[0]
    torch.testing.assert_close(got[end].double().exp(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got[0], base.ask(Logits).logits(batch)[0, 0].log_softmax(-1))


def test_settings_left_open_are_chosen_where_held_out_text_is_likeliest(tmp_path: Path) -> None:
    """Text that comes again calls for the neighbours; text unlike the rest for the model alone."""
    again, unlike = (
        made(tmp_path, [*[TEXT] * 9, last], k=2, weight=None, temperature=None)
        for last in (TEXT, "7 0 1 東京 9 naïve “quoted” 3 8 2 6")
    )
    weights = [program_config(p, tmp_path)["weight"] for p in (again, unlike)]
    assert weights[0] == max(knn_lm.WEIGHTS)
    assert weights[1] < 0.2


def program_config(program: lfm.Model, here: Path) -> dict[str, float]:
    import json

    out = here / f"saved {len(list(here.iterdir()))}"
    out.mkdir()
    program.save(out)
    return json.loads((out / "program.json").read_text())["config"]


def test_too_little_text_to_choose_on_is_said(tmp_path: Path) -> None:
    with pytest.raises(LfmError, match="too little text to choose on"):
        made(tmp_path, [TEXT], weight=None)


def test_shares_past_one_are_refused() -> None:
    with pytest.raises(LfmError, match="sum to more than 1"):
        knn_lm.agree(knn_lm.Config(weight=0.95, cache=5, cache_weight=0.1), Inputs({}, {}))


def test_text_of_nothing_is_refused(tmp_path: Path) -> None:
    tiny.causal(tmp_path / "model")
    with pytest.raises(LfmError, match="fewer than two tokens"):
        made(tmp_path, [""])
