"""prompt.bbt: the paper's scale and losses, known optima, and real answers over real HTTP."""

from __future__ import annotations

import json
import math
import os
import random
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
from case import Case
from lfm import runs
from lfm.core import Embeddings, Facts, Inputs, Logprobs, Model, Sizes, Text
from lfm.core.errors import BudgetError, ConfigError, DataError
from lfm.core.interfaces import Ranked
from lfm.data import files
from lfm.data.files import amount
from lfm.data.records import Label, Record
from lfm.methods.prompt import bbt
from lfm.models import load
from lfm.models.api import Budget, open_api
from lfm.models.budget import Meter
from lfm.models.prompted import EmbeddingsLogprobs, EmbeddingsText, pieces, prompted
from lfm.prompting import blackbox
from lfm.runs.run import LocalRun
from lfm.serve import running

TRAIN = [
    Label(text=f"The {n} sat on the {m}.", label=label)
    for n, m, label in (("cat", "mat", "good"), ("dog", "cat", "bad"), ("mat", "dog", "good"), ("town", "world", "bad"))
]
SMALL = {"prompt_tokens": 3, "d": 8, "calls": 24, "popsize": 6, "dev_every": 2}


def case(here: Path) -> Case:
    tiny.causal(here / "model")
    files.write(TRAIN, here / "train.jsonl")
    files.write(TRAIN[2:], here / "dev.jsonl")
    return Case(models={"model": ("model",)}, data={"train": "train.jsonl", "dev": "dev.jsonl"}, settings=SMALL)


def tune(
    model: Model, here: Path, train: Sequence[Record], dev: Sequence[Record] = (), **settings: Any
) -> tuple[Model, LocalRun]:
    here.mkdir(exist_ok=True)
    run = LocalRun(0, here)
    data = {"train": train, **({"dev": dev} if dev else {})}
    return bbt.run(bbt.Config(**settings), Inputs({"model": (model.only([Embeddings]),)}, data), run), run


class Bowl:
    """A model whose answer depends on the sum of what it reads: " yes" leads by peak − ‖sum − target‖² nats."""

    def __init__(self, width: int = 4, vocabulary: int = 64) -> None:
        self.width = width
        self.rows = torch.randn(vocabulary, width, generator=torch.Generator().manual_seed(0)) * 0.5
        self.target = torch.full((width,), 2.0)
        self.peak, self.asked = 3.0, 0

    def table(self) -> Tensor:
        return self.rows

    def embed(self, texts: Sequence[str]) -> list[Tensor]:
        """A row a word, too small to matter and known by the word."""
        crumbs = [[[zlib.crc32(word.encode()) * 1e-20] * self.width for word in text.split()] for text in texts]
        return [torch.tensor(rows).reshape(-1, self.width) for rows in crumbs]

    def next_from(self, embeds: Sequence[Tensor], k: int, also: Sequence[str] = ()) -> list[Ranked]:
        self.asked += len(embeds)
        lead = [self.peak - float(((e.sum(0) - self.target) ** 2).sum()) for e in embeds]
        found = [[(" yes", -math.log1p(math.exp(-x))), (" no", -math.log1p(math.exp(min(x, 700.0))))] for x in lead]
        return [tuple(sorted(row, key=lambda pair: -pair[1])) for row in found]


def bowl() -> tuple[Bowl, Model]:
    inside = Bowl()
    return inside, Model(
        ref="bowl",
        kind="module",
        gives={Embeddings: lambda: inside},
        identify=lambda: "bowl",
        look=lambda: Facts(width=4),
    )


YES = [Label(text=f"is {n} right", label="yes") for n in "abc"] + [Label(text="is d wrong", label="no")]


# The maths


def project(table: Tensor, config: bbt.Config, run: LocalRun) -> Tensor:
    std = float(table.std(correction=0))
    return blackbox.projection(std, config.prompt_tokens * table.shape[1], config, run.generator("A"))


@pytest.mark.parametrize(("alpha", "sigma", "d"), [(1.0, 1.0, 500), (2.0, 0.5, 100)])
def test_the_projection_has_the_papers_scale(alpha: float, sigma: float, d: int, tmp_path: Path) -> None:
    table = torch.randn(100, 16, generator=torch.Generator().manual_seed(1)) * 0.3 + 0.1
    config = bbt.Config(alpha=alpha, sigma=sigma, d=d, prompt_tokens=20)
    a = project(table, config, LocalRun(0, tmp_path))
    scale = alpha * np.std(table.numpy()) / (np.sqrt(d) * sigma)  # as in the reference code's __init__
    assert a.shape == (20 * 16, d)
    standard = a / scale
    n = standard.numel()
    assert abs(float(standard.mean())) < 5 / n**0.5  # five standard errors of a mean, and of a variance
    assert abs(float(standard.var()) - 1) < 5 * (2 / n) ** 0.5


def test_from_a_standard_normal_z_the_prompt_moves_by_alpha_stds(tmp_path: Path) -> None:
    """What the scale is for: (A z)_i has standard deviation α · std(E) when z ~ N(0, σ² I)."""
    table = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    config = bbt.Config(alpha=1.5, sigma=0.7, d=200, prompt_tokens=50)
    a = project(table, config, LocalRun(3, tmp_path))
    z = torch.randn(200, 40, generator=torch.Generator().manual_seed(2)) * 0.7
    assert float((a @ z).std()) == pytest.approx(1.5 * float(table.std(correction=0)), rel=0.02)


def test_losses_are_those_of_the_reference() -> None:
    """By hand from utils.py and bbt.py of txsun1997/Black-Box-Tuning: hinge sums over wrong classes, then / n."""
    told = torch.tensor([[-1.0, -2.0, -4.0], [-3.0, -0.5, -0.5]], dtype=torch.float64)
    right = torch.tensor([0, 2])
    by_hand = (
        1 + math.log(sum(map(math.exp, (-1, -2, -4)))) + 0.5 + math.log(sum(map(math.exp, (-3, -0.5, -0.5))))
    ) / 2
    assert float(blackbox.cross_entropy(told, right, 2.0)) == pytest.approx(by_hand)
    assert float(blackbox.hinge(told, right, 2.0)) == pytest.approx(((2 - 2 + 1) + 0 + 0 + 2.0) / 2)
    shifted = told + torch.tensor([[5.0], [-7.0]])  # log-probabilities or logits: it makes no difference
    for loss in blackbox.LOSSES.values():
        assert float(loss(shifted, right, 2.0)) == pytest.approx(float(loss(told, right, 2.0)))


def test_it_finds_a_known_optimum(tmp_path: Path) -> None:
    """Three of four records are right at most: the least loss has a closed form in the lead that the bowl gives."""
    _, model = bowl()
    made, run = tune(model, tmp_path, YES, calls=1200, d=12, prompt_tokens=2, popsize=12)
    lead = np.linspace(-3, 3, 6001)  # the optimum lies inside: ¾ of the records want it high, ¼ low
    least = (0.75 * np.log1p(np.exp(-lead)) + 0.25 * np.log1p(np.exp(lead))).min()
    assert least == pytest.approx(0.5623, abs=1e-3)  # the entropy of (¾, ¼): the lead is log 3
    assert float(run.notes["loss_before"]) > least + 0.05
    assert float(run.notes["loss_after"]) == pytest.approx(least, abs=1e-4)
    rows = made.ask(Embeddings).next_from([torch.zeros(0, 4)], 2)[0]
    assert dict(rows)[" yes"] == pytest.approx(math.log(0.75), abs=0.02)
    assert run.curves["train loss"][0] > run.curves["train loss"][-1]


def test_where_nothing_is_better_the_prompt_stays_where_it_began(tmp_path: Path) -> None:
    """z = 0 is P₀, to the bit: here every step away from it is a step away from the optimum."""
    inside, model = bowl()
    places = torch.randint(64, (2,), generator=LocalRun(0, tmp_path).generator("p0"))
    inside.target, inside.peak = inside.rows[places].sum(0), math.log(3)
    made, run = tune(model, tmp_path, YES, prompt_tokens=2, d=6, calls=40, popsize=8)
    made.save(out := _made(tmp_path / "out"))
    from lfm.tensors.files import open_tensors

    assert torch.equal(open_tensors(out / "program.safetensors")["prompt"].read(), inside.rows[places])
    assert run.notes["loss_before"] == run.notes["loss_after"] == pytest.approx(0.5623, abs=1e-4)


def test_one_class_teaches_nothing(cat: Model, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'good'"):
        tune(cat, tmp_path, [TRAIN[0], TRAIN[2]], **SMALL)


def _made(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.mark.parametrize("loss", ["ce", "hinge"])
def test_the_dev_records_choose(loss: str, tmp_path: Path) -> None:
    """Dev records that say the opposite keep the prompt from going where the training records pull it."""
    _, model = bowl()
    against = [Label(text="is it", label="no")]
    made, run = tune(model, tmp_path, YES, against, calls=200, d=6, prompt_tokens=2, popsize=10, loss=loss)
    assert float(run.notes["accuracy_after"]) >= float(run.notes["accuracy_before"]) == 1.0
    assert dict(made.ask(Embeddings).next_from([torch.zeros(1, 4)], 2)[0])[" no"] > math.log(0.5)


def test_it_asks_no_more_than_it_says(tmp_path: Path) -> None:
    inside, model = bowl()
    config = {"calls": 205, "d": 6, "prompt_tokens": 2, "popsize": 10, "dev_every": 3}
    tune(model, tmp_path, YES, YES[:2], **config)
    looks = 1 + 7  # at the start, and after generations 3, 6, … 18 and the last
    assert inside.asked == 200 * 4 + looks * 2
    sizes = Sizes({"model": (Facts(width=4),)}, {"train": amount(YES), "dev": amount(YES[:2])})
    cost = bbt.cost(bbt.Config(**config), sizes)
    assert inside.asked <= cost.queries and cost.steps == 20


def test_patience_saves_calls_and_restarts_share_them(tmp_path: Path) -> None:
    """Dev records that nothing can please end each search after its first looks; what is left goes to the next."""
    _, model = bowl()
    against = [Label(text="is it", label="no")]
    how: dict[str, Any] = {"calls": 400, "d": 6, "prompt_tokens": 2, "popsize": 10, "dev_every": 2}
    _, whole = tune(model, tmp_path / "whole", YES, YES, **how)
    assert whole.notes["generations"] == 40
    _, ended = tune(model, tmp_path / "ended", YES, against, **how, patience=2, loss="hinge", margin=1e-9)
    first = int(ended.notes["generations"])
    assert first < 40 and first % 2 == 0
    _, again = tune(model, tmp_path / "again", YES, YES, **how, restarts=4)
    assert again.notes["generations"] == 40
    starts = [again.curves["train loss"][i] for i in (0, 10, 20, 30)]
    assert len(set(starts)) == 4 and min(starts) > min(again.curves["train loss"])


def test_a_template_without_the_text_is_refused(cat: Model) -> None:
    with pytest.raises(ConfigError, match=r"has no \{text\}"):
        check_agree(cat, template="It was")


def check_agree(model: Model, **settings: Any) -> None:
    assert bbt.METHOD.agree
    bbt.METHOD.agree(bbt.Config(**settings), Inputs({"model": (model,)}, {"train": TRAIN}))


def test_fewer_calls_than_a_generation_are_one(cat: Model, tmp_path: Path) -> None:
    _, run = tune(cat, tmp_path, TRAIN, **{**SMALL, "calls": 4})
    assert run.notes["generations"] == 1


def test_texts_that_are_alike_are_asked_once(tmp_path: Path) -> None:
    inside, model = bowl()
    tune(model, tmp_path, [*YES, YES[0], YES[0]], calls=40, d=6, prompt_tokens=2, popsize=10)
    assert inside.asked == (40 + 1) * 4  # the start too; six records, four texts


@pytest.mark.parametrize("search", ["cma", "sep-cma", "lm-ma", "random", "spsa"])
def test_any_search_is_no_worse_than_where_it_began(search: str, tmp_path: Path) -> None:
    _, model = bowl()
    _, run = tune(model, tmp_path, YES, calls=200, d=6, prompt_tokens=2, popsize=10, search=search)
    assert float(run.notes["loss_after"]) < float(run.notes["loss_before"])


# Words and tokens


@pytest.fixture(scope="module")
def cat(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(tiny.causal(tmp_path_factory.mktemp("cat") / "cat"))


def test_words_that_begin_alike_are_refused(cat: Model, tmp_path: Path) -> None:
    alike = [replace_label(TRAIN[0], "cats"), replace_label(TRAIN[1], "catzzz")]
    embeddings = cat.ask(Embeddings)
    assert pieces(embeddings, "The", " cats")[1][0][1] == pieces(embeddings, "The", " catzzz")[1][0][1]
    with pytest.raises(ConfigError, match=r"'cats' and 'catzzz' begin with the same token ' cat'.*words"):
        tune(cat, tmp_path / "a", alike, **SMALL)
    tune(cat, tmp_path / "b", alike, words={"catzzz": "dog"}, **SMALL)


def replace_label(record: Label, label: str) -> Label:
    return Label(text=record.text, label=label)


def replace_text(record: Label, text: str) -> Label:
    return Label(text=text, label=record.label)


def test_tokens_asked_for_are_told_wherever_they_rank(cat: Model, tmp_path: Path) -> None:
    """Here and over HTTP: the loss does not depend on how many alternatives are told."""
    rows = cat.ask(Embeddings).embed(["The cat sat"])
    (every,) = cat.ask(Embeddings).next_from(rows, 400)
    last = [text for text, _ in every if [t for t, _ in every].count(text) == 1][-2:]
    with running(cat) as url:
        there = open_api(f"api:{url}", cache=tmp_path)
        for model in (cat, there):
            (told,) = model.ask(Embeddings).next_from(rows, 1, last)
            assert [text for text, _ in told] == [every[0][0], *last]
            assert [v for _, v in told[1:]] == pytest.approx([dict(every)[text] for text in last], abs=1e-5)


@pytest.mark.parametrize("text", [" the", " cat sat", " naïve café", "東京", " Paris is", ".", " 2 plus"])
def test_tokens_are_found_from_embeddings_alone(cat: Model, text: str) -> None:
    """As the model's own tokenizer has them, whole characters where they are several tokens."""
    prompt = "The cat"
    whole, found = pieces(cat.ask(Embeddings), prompt, text)
    (score,) = cat.ask(Logprobs).score([prompt], [text])
    assert len(found) == len(score.tokens)
    assert "".join(piece for _, piece in found) == text
    assert [place for place, _ in found] == list(range(len(whole) - len(found), len(whole)))


def test_a_prompt_of_no_tokens_changes_nothing(cat: Model) -> None:
    """Text, scores and rankings made from embeddings alone are the model's own."""
    bare = prompted(cat, torch.zeros(0, 32))
    prompts, words = ["The cat sat", "Paris is"], [" on the mat", " the capital"]
    mine = bare[Logprobs]().score(prompts, words)
    for a, b in zip(mine, cat.ask(Logprobs).score(prompts, words), strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    assert [r[0][0] for r in bare[Logprobs]().top(prompts, 3)] == [r[0][0] for r in cat.ask(Logprobs).top(prompts, 3)]
    assert isinstance(bare[Text](), EmbeddingsText) and isinstance(bare[Logprobs](), EmbeddingsLogprobs)
    said = bare[Text]().generate(prompts, max_tokens=3, temperature=1.0, seed=4)
    assert said == bare[Text]().generate(prompts, max_tokens=3, temperature=1.0, seed=4)


# Texts that are too long


LONG = [Label(text="The mat and the town and the dog . " * 40 + r.text, label=r.label) for r in TRAIN]
"""Each far beyond the 128 tokens of the tiny models' context."""


def kinds(here: Path) -> dict[str, tuple[Model, str]]:
    """A model of each kind, and a template with words around the text, and after the answer where it reads those."""
    return {
        "causal": (load(tiny.causal(here / "causal")), "So : {text} It was"),
        "masked": (load(tiny.masked(here / "masked")), "so : {text} it was {mask} , no less"),
        "seq2seq": (load(tiny.seq2seq(here / "seq2seq", max_position_embeddings=128)), "So : {text} It was"),
    }


@pytest.mark.parametrize("kind", ["causal", "masked", "seq2seq"])
def test_a_text_that_is_too_long_loses_its_beginning_and_the_template_stays(kind: str, tmp_path: Path) -> None:
    """What is read is, row by row, the text whose beginning was left out by hand."""
    model, template = kinds(tmp_path)[kind]
    embeddings, room = model.ask(Embeddings), 60
    for record in LONG:
        whole = blackbox.filled(template, record)
        (rows,) = embeddings.embed([whole.prompt], *([[whole.suffix]] if whole.suffix else []))
        read = blackbox.fitted(embeddings, rows, *whole, limit=room, frame=blackbox.frame(template))
        assert len(rows) > len(read) == room
        words = record.text.split()
        ends = [Label(text=" ".join(words[i:]), label="") for i in range(1, len(words))]
        by_hand = [blackbox.filled(template, end) for end in ends]
        suffixes = [[one.suffix for one in by_hand]] if whole.suffix else []
        cut = embeddings.embed([one.prompt for one in by_hand], *suffixes)
        near = min(cut, key=lambda one: (abs(len(one) - room), len(one)))
        head = 3  # what opens the text and "so :", and the tail is the template's and the text's own end
        assert torch.equal(read[:head], near[:head]) and torch.equal(read[-40:], near[-40:])


@pytest.mark.parametrize("kind", ["causal", "masked", "seq2seq"])
def test_long_texts_are_learnt_from_and_asked_alike(kind: str, tmp_path: Path) -> None:
    """The notes tell how many were cut; and the made model, asked in the same words, tells what training saw."""
    model, template = kinds(tmp_path)[kind]
    how: dict[str, Any] = {**SMALL, "template": template, "prompt_tokens": 20}
    words = {"good": "cat", "bad": "dog"}
    made, run = tune(model, tmp_path / "work", LONG, LONG[2:], words=words, **how)
    assert run.notes["texts_shortened"] == len(LONG) + len(LONG[2:])
    asked = [blackbox.filled(template, record) for record in LONG]
    suffixes = [[one.suffix for one in asked]] if kind == "masked" else []
    prompts, asks = [one.prompt for one in asked], made.ask(Logprobs)
    scores = [asks.score(prompts, [f" {word}"] * len(asked), *suffixes) for word in words.values()]
    told = np.array([[score.total for score in row] for row in scores])
    right = [["good", "bad"].index(record.label) for record in LONG]
    hits = (told.argmax(0) == right)[2:].mean()
    assert hits == pytest.approx(float(run.notes["accuracy_after"]))
    _, short = tune(model, tmp_path / "short", TRAIN, words=words, **how)
    assert "texts_shortened" not in short.notes


def test_a_template_that_leaves_no_room_is_refused_and_says_what_would_do(cat: Model, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"So : .* cannot be left out.*room for 3.*prompt_tokens"):
        tune(cat, tmp_path, LONG, template="So : {text} It was a", prompt_tokens=124, d=8, calls=24)


def test_over_http_long_texts_are_cut_the_same(cat: Model, tmp_path: Path) -> None:
    here, run = tune(cat, tmp_path / "here", LONG, **SMALL)
    with running(cat) as url:
        there, over = tune(open_api(f"api:{url}", cache=tmp_path / "cache"), tmp_path / "there", LONG, **SMALL)
        assert over.notes["texts_shortened"] == run.notes["texts_shortened"] == len(LONG)
        scores = [m.ask(Logprobs).score([LONG[0].text], [" good"])[0].total for m in (here, there)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)


@pytest.mark.parametrize("template", ["", "So : {text} It was"])
def test_a_plan_holds_where_every_text_is_cut(template: str, cat: Model, tmp_path: Path) -> None:
    """Of all texts that are cut only the template's words are asked for once more; the budget of `cost` is enough,
    without what it allows for the check of what is saved."""
    words = {"good": "good and kind and mild and warm", "bad": "bad and cold and mean and grim"}
    how: dict[str, Any] = {**SMALL, "template": template, "words": words}
    spent: dict[str, int] = {}
    with running(cat) as url:
        for name, train in (("short", TRAIN), ("long", LONG)):
            dev = [replace_text(record, f"{record.text} again") for record in train[2:]]
            sizes = files.sizes(Inputs({"model": (cat,)}, {"train": train, "dev": dev}))
            cost = bbt.cost(bbt.Config(**how), sizes)
            check = blackbox.CHECK, blackbox.CHECK * (how["prompt_tokens"] + 50)
            ledger = tmp_path / f"{name}.sqlite"
            budget = Budget(cost.queries - check[0], cost.tokens - check[1], ledger)
            model = open_api(f"api:{url}", cache=tmp_path / name, budget=budget)
            _, run = tune(model, tmp_path / f"work {name}", train, dev, **how)
            assert run.notes.get("texts_shortened", 0) == (len(train) + len(dev) if name == "long" else 0)
            spent[name] = Meter(budget).spent().queries
    assert spent["long"] == spent["short"] + 1


# As a program


def test_it_comes_back_from_its_directory(cat: Model, tmp_path: Path) -> None:
    made, _ = tune(cat, tmp_path / "work", TRAIN, TRAIN, **SMALL)
    made.save(out := _made(tmp_path / "out"))
    again = load(out)
    assert again.digest == made.digest and again.kind == "program"
    prompts, words = ["The cat sat", "Paris"], [" good", " bad dog"]
    assert again.ask(Logprobs).score(prompts, words) == made.ask(Logprobs).score(prompts, words)
    assert again.ask(Text).generate(prompts, max_tokens=4) == made.ask(Text).generate(prompts, max_tokens=4)
    assert again.ask(Logprobs).score(prompts, words) != cat.ask(Logprobs).score(prompts, words)


def test_peft_reads_the_same_prompt(cat: Model, tmp_path: Path) -> None:
    import peft
    import transformers

    made, _ = tune(cat, tmp_path / "work", TRAIN, **SMALL)
    made.save(out := _made(tmp_path / "peft"), "peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(cat.ref)
    tuned = peft.PeftModel.from_pretrained(base, str(out)).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(cat.ref)
    with torch.no_grad():
        logits = tuned(**tokenizer("The cat sat", return_tensors="pt")).logits[0, -1].log_softmax(-1)
    (ours,) = made.ask(Logprobs).top(["The cat sat"], 400)
    assert sorted((v for _, v in ours), reverse=True) == pytest.approx(sorted(logits.tolist(), reverse=True), abs=1e-4)
    assert json.loads((out / "adapter_config.json").read_text())["num_virtual_tokens"] == 3


# Over HTTP


def test_over_http_it_is_the_same_within_its_budget_and_after_it(cat: Model, tmp_path: Path) -> None:
    """The budget that `cost` names is enough; a smaller one stops it, and it goes on to the same prompt."""
    # Of words as long as are looked into, each beginning is a question too.
    asked: dict[str, Any] = {
        **SMALL,
        "words": {"good": "good and kind and mild and warm", "bad": "bad and cold and mean and grim"},
    }
    here, _ = tune(cat, tmp_path / "here", TRAIN, TRAIN[2:], **asked)
    with running(cat) as url:

        def over(work: str, budget: Budget, cache: str) -> Model:
            there = open_api(f"api:{url}", cache=tmp_path / cache, budget=budget)
            return tune(there, tmp_path / work, TRAIN, TRAIN[2:], **asked)[0]

        cost = bbt.cost(bbt.Config(**asked), files.sizes(Inputs({"model": (cat,)}, {"train": TRAIN, "dev": TRAIN[2:]})))
        enough = Budget(cost.queries, cost.tokens, tmp_path / "enough.sqlite")
        whole = over("whole", enough, "a")
        spent = Meter(enough).spent()
        assert 24 * 4 < spent.queries <= cost.queries and spent.tokens <= cost.tokens
        small = tmp_path / "small.sqlite"
        with pytest.raises(BudgetError):
            over("broken", Budget(tokens=spent.tokens // 2, path=small), "b")
        assert Meter(Budget(path=small)).spent().tokens <= spent.tokens // 2
        resumed = over("broken", Budget(tokens=2 * spent.tokens, path=small), "b")
        assert resumed.digest == whole.digest
        rows = [torch.zeros(1, 32)]
        mine, theirs = (dict(reversed(m.ask(Embeddings).next_from(rows, 5)[0])) for m in (here, whole))
        assert set(mine) == set(theirs)  # tokens that read the same are told once over HTTP
        assert all(theirs[token] == pytest.approx(value, abs=1e-3) for token, value in mine.items())


def test_the_whole_run_is_within_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening, measuring before and after, the method, and the check of what was saved: all under one limit."""
    monkeypatch.setenv("LFM_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    here = case(tmp_path)
    seen: list[tuple[Budget, int]] = []
    reserve = Meter.reserve
    monkeypatch.setattr(Meter, "reserve", lambda m, q, t: (seen.append((m.budget, q)), reserve(m, q, t))[1])
    models = {role: [f"serve:{tmp_path / name}" for name in names] for role, names in here.models.items()}

    def order(out: str, queries: int) -> runs.Order:
        return runs.Order(
            id="prompt.bbt",
            models=models,
            data={"train": "train.jsonl"},
            settings=here.settings,
            evals=["dev.jsonl"],
            out=tmp_path / out,
            budget=(queries, None),
        )

    done = runs.execute(order("out", 10**6))
    assert seen and {budget.queries for budget, _ in seen} == {10**6}
    assert done.queries == sum(queries for _, queries in seen) and done.tokens > done.queries
    assert len({budget.path for budget, _ in seen}) == 1
    models = {"model": [str(tmp_path / "out")]}  # a program over an endpoint is no way around it
    with pytest.raises(BudgetError):
        runs.execute(order("again", 10))


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.skipif("LFM_REAL_DATA" not in os.environ, reason="LFM_REAL_DATA is not set")
def test_it_improves_a_real_model_over_http(tmp_path: Path) -> None:
    """SST-2 with a story model of 0.26 M parameters: held-out accuracy rises over the prompt it began with."""
    data = Path(os.environ["LFM_REAL_DATA"])
    records = list(files.read(data / "sst2/train.jsonl"))
    random.Random(0).shuffle(records)
    by_class = {c: [r for r in records if isinstance(r, Label) and r.label == c and len(r.text) < 120] for c in "01"}
    train, dev = ([r for c in "01" for r in by_class[c][a : a + 16]] for a in (0, 16))
    with running(load(data / "models/stories260K")) as url:
        _, run = tune(
            open_api(f"api:{url}", cache=tmp_path / "cache"),
            tmp_path / "work",
            train,
            dev,
            template="{text} It was so",
            words={"0": "bad", "1": "good"},
            prompt_tokens=5,
            d=100,
            calls=400,
        )
    assert float(run.notes["accuracy_after"]) > float(run.notes["accuracy_before"])
