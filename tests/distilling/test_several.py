"""Of several processes of one run one asks, and all learn from what it was told."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import tiny
from launching import both
from lfm import runs
from lfm.core import Run, launched
from lfm.core.errors import EndpointError
from lfm.core.method import RECORDS
from lfm.data import records as data
from lfm.data.files import write
from lfm.distilling import asking
from scripted import Handler, Reply, Seen, parrot, scripted

PROMPTS = [data.Text(text=f"the {word} sat on") for word in ("cats", "dogs", "birds", "mat")]
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "distill.text": ({"student": "small"}, {"temperature": 1.0, "max_tokens": 4, "steps": 2, "batch_size": 2}),
    "distill.response": ({"student": "small"}, {"steps": 2, "batch_size": 2}),
    "distill.cache": ({"reader": "small"}, {}),
}
"""What each way is given beside the teacher, which is asked over HTTP."""


def order(here: Path, url: str, way: str, out: str) -> runs.Order:
    others, settings = WAYS[way]
    models = {role: [here / name] for role, name in others.items()} | {"teacher": [f"api:{url}#parrot"]}
    role = "prompts" if way == "distill.text" else "train"
    return runs.Order(id=way, models=models, data={role: here / "prompts.jsonl"}, settings=settings, out=here / out)


def child(here: Path) -> None:
    """What each of the two does; what it learned from, and how it ended, go into files by its rank."""

    def learn(records: Sequence[data.Record], run: Run) -> None:
        write(records, here / f"learned.{launched.rank()}.jsonl")
        leave(records, run)

    leave, asking.leave = asking.leave, learn
    url, refusing = ((here / name).read_text() for name in ("url", "refusing"))
    found = {way: runs.execute(order(here, url, way, f"{way}.both")).output.digest for way in WAYS}
    try:
        runs.execute(order(here, refusing, "distill.text", "failed"))
    except EndpointError as error:
        found["failed"] = error.what
    (here / f"{launched.rank()}.json").write_text(json.dumps(found))


def moody() -> Handler:
    """An endpoint that says nothing twice: the same question is answered otherwise each time."""
    number, steady = itertools.count(), parrot()

    def answer(seen: Seen) -> Reply:
        reply = steady(seen)
        if seen.body and isinstance(reply.body, dict) and not seen.body.get("logprobs"):
            for choice in reply.body["choices"]:
                choice["text"] = f"{next(number)} cats"
        return reply

    return answer


def asked(seen: list[Seen]) -> Counter[str]:
    """The questions among requests (whether it gives log-probabilities each process asks for itself)."""
    prompts = [seen.body["prompt"] for seen in seen if seen.body and "prompt" in seen.body]
    every = [one for prompt in prompts for one in (prompt if isinstance(prompt, list) else [prompt])]
    return Counter(one for one in every if any(text.text.startswith(one) for text in PROMPTS))


def tired(seen: Seen) -> Reply:
    """An endpoint that refuses to be asked."""
    return Reply({"error": {"message": "no more"}}, 401) if asked([seen]) else parrot()(seen)


def test_one_asks_and_all_learn_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many questions as one process asks, and one result, of an endpoint that answers otherwise each time; where
    asking fails, it fails for all."""
    tiny.causal(tmp_path / "small")
    write(PROMPTS, tmp_path / "prompts.jsonl")
    monkeypatch.setenv("LFM_HOME", str(tmp_path / "home"))
    with scripted(moody()) as server, scripted(tired) as refusing:
        (tmp_path / "url").write_text(server.url)
        (tmp_path / "refusing").write_text(refusing.url)
        runs.execute(order(tmp_path, server.url, "distill.cache", "one"))
        before = len(server.seen)
        both(child, tmp_path)
    alone = asked(server.seen[:before])  # distill.response asks the same, and finds it answered
    assert asked(server.seen[before:]) == alone + Counter(prompt.text for prompt in PROMPTS)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1]
    learned = [(tmp_path / f"learned.{rank}.jsonl").read_text() for rank in range(2)]
    assert learned[0] == learned[1] == (tmp_path / "distill.text.both" / RECORDS).read_text()
    assert found[0]["failed"] and not (tmp_path / "failed").exists()
    assert found[0]["distill.cache"] == runs.model(tmp_path / "one").digest
