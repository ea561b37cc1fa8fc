"""lm-evaluation-harness on our models: its requests answered, and its tasks run where it is installed."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from lfm import models
from lfm.core.errors import AccessError, DependencyError
from lfm.core.interfaces import Codec, Gradients, Logits, Logprobs, Text
from lfm.core.model import Model
from lfm.evals import harness

INSTALLED = importlib.util.find_spec("lm_eval") is not None
DOCS = [
    {"q": "The cat sat on", "choices": ["the mat", "the dog", "a town"], "gold": 0},
    {"q": "Paris is the capital of", "choices": ["France", "Italy", "Rome"], "gold": 0},
    {"q": "birds dogs", "choices": ["cats", "good"], "gold": 1},
]
LONG = "the cat sat on the mat and the dog looked. " * 40


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.causal(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Model:
    return models.load(checkpoint)


def told(model: Model, ids: list[int], count: int) -> tuple[float, bool]:
    """The last `count` ids' log-probability by the module itself, one sequence at a time."""
    module: Any = model.ask(Gradients).module()
    with torch.no_grad():
        logits = module(input_ids=torch.tensor([ids])).logits[0, -count - 1 : -1].log_softmax(-1)
    wanted = torch.tensor(ids[-count:])
    return logits.gather(1, wanted[:, None]).sum().item(), bool((logits.argmax(-1) == wanted).all())


@pytest.mark.parametrize("kinds", [(Logits, Codec), (Logprobs, Text)], ids=["logits", "logprobs"])
def test_likelihoods_are_the_modules_own(model: Model, kinds: tuple[type, ...]) -> None:
    tokenizer = model.ask(Codec).tokenizer
    best = model.ask(Text).generate(["The cat"], max_tokens=1)[0]
    pairs = [("The cat sat on", " the mat"), ("The", " capital of France"), ("", "The cat"), ("The cat", best)]
    found = harness.Answers(model.only(kinds)).loglikelihood(pairs)
    for (context, continuation), (total, greedy) in zip(pairs, found):
        ids = tokenizer(context + continuation)["input_ids"]
        expected = told(model, ids, len(ids) - len(tokenizer(context)["input_ids"]))
        assert (total, greedy) == (pytest.approx(expected[0], rel=1e-4), expected[1])
    assert found[3][1] is True


def test_a_long_context_loses_its_beginning(model: Model) -> None:
    tokenizer = model.ask(Codec).tokenizer
    ids = tokenizer(LONG + "the town")["input_ids"]
    count = len(ids) - len(tokenizer(LONG.rstrip())["input_ids"])
    [(total, _)] = harness.Answers(model).loglikelihood([(LONG.rstrip(), " the town")])
    assert total == pytest.approx(told(model, ids[-tiny.CONTEXT - 1 :], count)[0], rel=1e-4)


def test_every_token_of_a_long_text_is_scored_once(model: Model) -> None:
    tokenizer = model.ask(Codec).tokenizer
    ids = tokenizer(LONG)["input_ids"]  # <s> and the text
    n, limit = len(ids) - 1, tiny.CONTEXT
    assert limit < n and n % limit
    expected = 0.0
    for start in range(0, n, limit):
        end = min(start + limit, n)
        expected += told(model, ids[max(0, end - limit) : end + 1], end - start)[0]
    assert harness.Answers(model).rolling([LONG]) == [pytest.approx(expected, rel=1e-5)]
    short = tiny.CORPUS[0]
    by_logits, by_logprobs = (harness.Answers(m).rolling([short]) for m in (model, model.only([Logprobs])))
    assert by_logits == pytest.approx(by_logprobs, rel=1e-5)


def test_generation_stops_where_the_task_says(model: Model) -> None:
    answers = harness.Answers(model)
    free = answers.generate([("The cat", {"max_gen_toks": 12})])[0]
    stop = free.strip()[3]
    cut, again = answers.generate(
        [("The cat", {"max_gen_toks": 12, "until": stop}), ("The cat", {"max_gen_toks": 12, "until": [stop, "\n"]})]
    )
    assert cut == again == free[: free.index(stop)]


def test_the_first_token_stands_for_greedy_text_where_nothing_else_is_told(model: Model) -> None:
    answers = harness.Answers(model.only([Logprobs]))
    best = model.ask(Text).generate(["The cat"], max_tokens=2)[0]
    [(_, greedy)] = answers.loglikelihood([("The cat", best)])
    assert greedy and "judged by its first token" in answers.notes[0]


def test_a_model_without_language_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AccessError, match="logits with a codec, logprobs or text"):
        harness.Answers(models.load(tiny.vit(tmp_path)))


def test_a_missing_harness_is_named_with_its_command(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(DependencyError, match=r'pip install "learn-from-model\[lm-eval\]"'):
        harness.run(model, ["arc_easy"])


def test_results_become_evaluations(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the harness, of the interface and the result's shape of lm_eval 0.4.13."""
    asked: dict[str, Any] = {}

    class Request(types.SimpleNamespace):
        args: tuple[str, ...]

    class LM:
        pass

    def simple_evaluate(*, model: Any, tasks: list[Any], **settings: Any) -> dict[str, Any]:
        asked.update(settings, tasks=tasks)
        asked["pairs"] = model.loglikelihood([Request(args=("The cat", " sat"))])
        asked["texts"] = model.loglikelihood_rolling([Request(args=("The cat",))])
        asked["said"] = model.generate_until([Request(args=("The cat", {"max_gen_toks": 2}))])
        row = {"alias": "t", "acc,none": 0.5, "acc_stderr,none": 0.1, "em,strict": 1, "em_stderr,strict": "N/A"}
        sample = {"arguments": [["The cat", " sat"]], "filtered_resps": [(-1.0, True)], "target": "0"}
        return {"results": {"t": row}, "n-samples": {"t": {"effective": 8}}, "samples": {"t": [sample] * 9}}

    class TaskManager:
        def __init__(self, **settings: Any) -> None:
            asked.update(settings)

    for name, members in {
        "lm_eval": {"evaluator": types.SimpleNamespace(simple_evaluate=simple_evaluate)},
        "lm_eval.api": {},
        "lm_eval.api.model": {"LM": LM},
        "lm_eval.tasks": {"TaskManager": TaskManager},
    }.items():
        module = types.ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    [(name, found)] = harness.run(model, ["t"], limit=8, seed=3).items()
    assert (name, found.kind, found.records, found.access, found.model) == ("t", "t", 8, "logits", model.digest)
    accuracy = found.metrics["acc"]
    assert (accuracy.value, accuracy.n) == (0.5, 8)
    assert (accuracy.low, accuracy.high) == (pytest.approx(0.5 - 0.1959964), pytest.approx(0.5 + 0.1959964))
    assert found.metrics["em_strict"].value == 1.0 and "no standard error" in found.metrics["em_strict"].basis
    assert len(found.samples) == 5 and found.samples[0].prompt == "The cat"
    answers = harness.Answers(model)
    assert asked["pairs"] == answers.loglikelihood([("The cat", " sat")])
    assert asked["texts"] == answers.rolling(["The cat"]) and len(asked["said"]) == 1
    assert (asked["limit"], asked["random_seed"], asked["include_defaults"]) == (8, 3, True)


@pytest.mark.skipif(not INSTALLED, reason="the lm-eval extra is not installed")
@pytest.mark.filterwarnings("ignore")
def test_the_harness_scores_our_model_as_its_own(
    checkpoint: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Local tasks of each kind of request, against the harness's `hf` model; no network."""
    for switch in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(switch, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "mc.jsonl").write_text("\n".join(map(json.dumps, DOCS)))
    (tmp_path / "tx.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in (*tiny.CORPUS, LONG)))

    def task(name: str, file: str, kind: str, metrics: list[str], **rest: Any) -> dict[str, Any]:
        return {
            "task": name,
            "dataset_path": "json",
            "test_split": "test",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / file)}},
            "output_type": kind,
            "metric_list": [{"metric": metric} for metric in metrics],
            **rest,
        }

    asked = {"doc_to_text": "{{q}}", "doc_to_target": "{{choices[gold]}}"}
    choice = {"doc_to_text": "{{q}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}"}
    tasks = [
        task("mc", "mc.jsonl", "multiple_choice", ["acc", "acc_norm"], **choice),
        task("ll", "mc.jsonl", "loglikelihood", ["perplexity", "acc"], **asked),
        task(
            "ge",
            "mc.jsonl",
            "generate_until",
            ["exact_match"],
            **asked,
            generation_kwargs={"until": ["."], "max_gen_toks": 8},
        ),
    ]
    rolling = task("ro", "tx.jsonl", "loglikelihood_rolling", ["word_perplexity", "bits_per_byte"])
    rolling |= {"doc_to_text": "", "doc_to_target": "{{text}}"}
    ours = harness.run(model, [*tasks, rolling])

    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    def theirs(tasks: list[Any], **settings: Any) -> dict[str, Any]:
        peer = HFLM(pretrained=str(checkpoint), device="cpu", dtype="float32", batch_size=2, **settings)
        manager = TaskManager(include_defaults=False)
        return lm_eval.simple_evaluate(model=peer, tasks=tasks, task_manager=manager, bootstrap_iters=0)["results"]

    expected = theirs(tasks) | theirs([rolling], add_bos_token=False)
    for name, found in ours.items():
        assert found.metrics and found.records == (7 if name == "ro" else 3)
        for metric, value in found.metrics.items():
            assert value.value == pytest.approx(expected[name][f"{metric},none"], rel=1e-4), (name, metric)
