"""A prompt read over HTTP: what a server fails to say is asked again or refused, and never taken for an answer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfm import runs
from lfm.core import Inputs, Logprobs, Model
from lfm.core.errors import BudgetError, EndpointError, VerifyError
from lfm.core.interfaces import Classes, Top
from lfm.data import files
from lfm.data.records import Label
from lfm.methods.prompt import manual
from lfm.models.api import Budget, open_api
from lfm.models.api.client import Patience
from lfm.runs.run import LocalRun
from scripted import HANG, Reply, Script, Seen, parrot, scripted, slowly

RECORDS = [Label(text=f"{n} then {end}", label=label) for n in range(6) for end, label in (("a", "good"), ("c", "bad"))]
CONFIG = manual.Config(templates=("{text}",), words={"good": ("a",), "bad": ("c",)}, calibrate=False)
LEAST = parrot(echo=False)
"""It tells the most probable of generated tokens, and nothing else."""


def opened(script: Script, here: Path, budget: Budget | None = None) -> Model:
    patience = Patience(timeout=0.4, retries=3, sleep=lambda _: None)
    return open_api(f"api:{script.url}", cache=here / "cache", budget=budget, patience=patience)


def prompted(model: Model, here: Path) -> Model:
    here.mkdir(exist_ok=True)
    inputs = Inputs({"model": (model,)}, {"train": RECORDS})
    manual.agree(CONFIG, inputs)
    return manual.run(CONFIG, inputs, LocalRun(0, here))


def told(made: Model) -> np.ndarray:
    return made.ask(Classes).tell(RECORDS)


class Failing:
    """The least that servers tell, with one reply in the place of the first answer once it is opened."""

    def __init__(self, reply: Callable[[Seen], Reply]) -> None:
        self.reply, self.left, self.on = reply, 1, False

    def __call__(self, seen: Seen) -> Reply:
        if self.on and seen.path.endswith("completions"):
            self.left -= 1
            if self.left == 0:
                return self.reply(seen)
        return LEAST(seen)


def test_the_most_probable_tokens_alone_are_enough_for_words_among_them(tmp_path: Path) -> None:
    with scripted(LEAST) as script:
        model = opened(script, tmp_path)
        assert model.can(Top) and not model.can(Logprobs)
        found = told(prompted(model, tmp_path / "run"))
    labels = ("bad", "good")
    assert [labels[i] for i in found.argmax(1)] == [record.label for record in RECORDS]


PASSING = {
    "late": lambda _: HANG,
    "busy": lambda _: Reply({"error": {"message": "slow down"}}, 429, {"retry-after": "1"}),
    "down": lambda _: Reply(b"", 503),
    "broken": lambda seen: Reply(LEAST(seen).body, breaks=True),
}


@pytest.mark.parametrize("fault", PASSING)
def test_what_may_pass_is_asked_again_and_changes_nothing(fault: str, tmp_path: Path) -> None:
    with scripted(LEAST) as script:
        expected = told(prompted(opened(script, tmp_path / "well"), tmp_path / "a"))
    handler = Failing(PASSING[fault])
    with scripted(handler) as script:
        model = opened(script, tmp_path / "ill")
        handler.on = True
        assert np.array_equal(told(prompted(model, tmp_path / "b")), expected)
        assert handler.left <= 0


def changed(seen: Seen, change: Callable[[dict[str, Any]], Any]) -> Reply:
    body = json.loads(json.dumps(LEAST(seen).body))
    change(body)
    return Reply(body)


def first(body: dict[str, Any]) -> dict[str, Any]:
    return body["choices"][0]["logprobs"]["top_logprobs"][0]


LIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "too few answers": lambda body: body["choices"].pop(),
    "too many answers": lambda body: body["choices"].append(dict(body["choices"][0])),
    "not a number": lambda body: first(body).update({"a": float("nan")}),
    "nothing": lambda body: first(body).update({"a": None}),
    "more than certain": lambda body: first(body).update({"a": 0.7}),
    "more than 1 together": lambda body: first(body).update({"a": -0.1, "c": -0.1}),
    "other tokens": lambda body: body["choices"][0]["logprobs"].update(top_logprobs=[{"zz": -1.0, "zzz": -2.0}]),
    "no tokens": lambda body: body["choices"][0]["logprobs"].update(top_logprobs=[{}]),
    "no log-probabilities": lambda body: body["choices"][0].update(logprobs=None),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_refused_not_kept_and_what_was_answered_is_not_asked_again(lie: str, tmp_path: Path) -> None:
    handler = Failing(lambda seen: changed(seen, LIES[lie]))
    with scripted(handler) as script:
        model = opened(script, tmp_path)
        handler.on = True
        with pytest.raises(EndpointError):
            prompted(model, tmp_path / "run")
        before = len(script.posts())
        found = told(prompted(opened(script, tmp_path), tmp_path / "run"))
        assert [("bad", "good")[i] for i in found.argmax(1)] == [record.label for record in RECORDS]
        asked = Counter(p for post in script.posts()[before:] for p in post.body["prompt"])
        assert asked and set(asked.values()) == {1}


def test_a_budget_ends_it_and_a_larger_one_goes_on(tmp_path: Path) -> None:
    with scripted(parrot(echo=False, lists=False)) as script:
        opening = opened(script, tmp_path)
        ledger = Budget(queries=5, path=tmp_path / "ledger")
        with pytest.raises(BudgetError, match="5 of 5 queries"):
            prompted(opened(script, tmp_path, ledger), tmp_path / "run")
        paid = len(script.posts())
        prompted(opening, tmp_path / "run")
        asked = Counter(str(post.body.get("prompt")) for post in script.posts())
    assert len(script.posts()) > paid
    assert max(count for prompt, count in asked.items() if "then" in prompt) == 1


KILLED = """
import sys; from pathlib import Path
sys.path.insert(0, sys.argv[3])
import test_faults as here
from lfm.models.api import open_api
from lfm.models.api.client import Patience
model = open_api(f"api:{sys.argv[1]}", cache=Path(sys.argv[2]) / "cache", patience=Patience(concurrency=1))
here.prompted(model, Path(sys.argv[2]) / "run")
"""


def test_after_kill_9_no_answer_is_paid_for_again(tmp_path: Path) -> None:
    """At the server: of all prompts, at most the one that was under way comes twice."""
    with scripted(slowly(parrot(echo=False, lists=False), 0.05)) as script:
        paths = os.pathsep.join(path for path in sys.path if path)
        arguments = [sys.executable, "-c", KILLED, script.url, str(tmp_path), str(Path(__file__).parent)]
        process = subprocess.Popen(arguments, env={**os.environ, "PYTHONPATH": paths})

        def asked() -> list[str]:
            return [post.body["prompt"] for post in script.posts() if "then" in str(post.body.get("prompt"))]

        until = time.monotonic() + 60
        while len(asked()) < 5 and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert 5 <= len(asked()) < len(RECORDS)
        prompted(opened(script, tmp_path), tmp_path / "run")
        counts = Counter(asked())
    assert len(counts) == len(RECORDS) and counts.total() <= len(RECORDS) + 1


def test_an_endpoint_that_changed_is_seen_by_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's own answers are kept, and would agree with themselves whatever the endpoint says today."""
    monkeypatch.setenv("LFM_HOME", str(tmp_path / "home"))
    plain, drifted = parrot(), [0.0]

    def handler(seen: Seen) -> Reply:
        reply = plain(seen)
        for choice in reply.body.get("choices", []) if isinstance(reply.body, dict) else []:
            if told := choice.get("logprobs"):
                first, *others = told["token_logprobs"]
                rest = zip(told["tokens"][1:], others, strict=True)
                told["token_logprobs"] = [first, *(p - drifted[0] * (token == "c") for token, p in rest)]
        return reply

    files.write(RECORDS, tmp_path / "train.jsonl")
    with scripted(handler) as script:
        runs.execute(
            runs.Order(
                id="prompt.manual",
                models={"model": [f"api:{script.url}"]},
                data={"train": tmp_path / "train.jsonl"},
                settings={"calibrate": False, "words": {"good": ["a"], "bad": ["c"]}},
                out=tmp_path / "out",
            )
        )
        before = len(script.posts())
        assert runs.verify(tmp_path / "out").max_abs == 0 and len(script.posts()) > before
        drifted[0] = 1.0
        with pytest.raises(VerifyError, match="otherwise"):
            runs.verify(tmp_path / "out")
