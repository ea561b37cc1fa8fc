"""Texts as vectors: of models here, behind `lfm serve`, and behind endpoints that lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from lfm.core import Codec, Vectors
from lfm.core.errors import BudgetError, EndpointError
from lfm.core.interfaces import names_of
from lfm.models import load
from lfm.models.api import Budget, open_api
from lfm.models.api.client import Patience
from lfm.serve import running
from scripted import MODELS, Handler, Reply, Seen, scripted

TEXTS = ["The cat sat on the mat.", "dogs", "Rome is the capital of Italy and Paris of France."]


@pytest.mark.parametrize("task", [tiny.causal, tiny.masked, tiny.encoder, tiny.classifier])
def test_a_vector_is_the_mean_of_the_last_blocks_states(task: Any, tmp_path: Path) -> None:
    """Padding does not count, and texts together are what they are alone."""
    model = load(task(tmp_path / "model"))
    found = model.ask(Vectors).vectors(TEXTS)
    assert found.dtype == np.float32 and np.linalg.norm(found, axis=1) == pytest.approx(np.ones(3), abs=1e-6)
    alone = np.concatenate([model.ask(Vectors).vectors([text]) for text in TEXTS])
    assert found == pytest.approx(alone, abs=1e-5)
    assert len(model.ask(Vectors).vectors([])) == 0


def test_an_encoders_are_what_transformers_says(tmp_path: Path) -> None:
    model = load(tiny.encoder(tmp_path / "model"))
    from transformers import AutoModel

    batch = model.ask(Codec).tokenizer(TEXTS[:1], return_tensors="pt")
    with torch.no_grad():
        mean = AutoModel.from_pretrained(tmp_path / "model").eval()(**batch).last_hidden_state[0].mean(0)
    assert model.ask(Vectors).vectors(TEXTS[:1])[0] == pytest.approx((mean / mean.norm()).numpy(), abs=1e-5)


def test_a_text_longer_than_the_context_loses_its_end(tmp_path: Path) -> None:
    model = load(tiny.encoder(tmp_path / "model"))
    assert model.ask(Vectors).vectors(["cat " * 4 * tiny.CONTEXT]).shape[0] == 1


def test_what_is_served_is_what_is_here(tmp_path: Path) -> None:
    model = load(tiny.encoder(tmp_path / "model"))
    with running(model) as url:
        there = open_api(f"api:{url}", cache=tmp_path / "cache")
        assert names_of(there.gives) == ["vectors"]
        found = there.ask(Vectors).vectors([*TEXTS, TEXTS[0]])
        assert found[:3] == pytest.approx(model.ask(Vectors).vectors(TEXTS), abs=1e-6)
        assert (found[3] == found[0]).all()
        openai = pytest.importorskip("openai")
        with openai.OpenAI(base_url=url, api_key="none") as client:
            theirs = client.embeddings.create(model=client.models.list().data[0].id, input=TEXTS).data
        assert np.array([one.embedding for one in theirs]) == pytest.approx(found[:3], abs=1e-6)


def speaker(vector: Any = None, *, count: int = 0) -> Handler:
    """An endpoint of vectors alone: (length of the text, 1), or what is given for texts longer than one letter."""

    def answer(seen: Seen) -> Reply:
        if seen.path.endswith("/models"):
            return MODELS
        if not seen.path.endswith("/embeddings"):
            return Reply({"error": {"message": "this model only embeds"}}, 400)
        texts = [seen.body["input"]] if isinstance(seen.body["input"], str) else seen.body["input"]
        data = [
            {"index": i, "embedding": vector if vector is not None and len(text) > 1 else [float(len(text)), 1.0]}
            for i, text in enumerate(texts)
        ]
        short = count and any(len(text) > 1 for text in texts)
        tokens = {"prompt_tokens": len(texts), "total_tokens": len(texts)}
        return Reply({"data": data[: -count or None] if short else data, "usage": tokens})

    return answer


def opened(url: str, here: Path, budget: Budget | None = None) -> Any:
    patience = Patience(timeout=5.0, sleep=lambda seconds: None)
    return open_api(f"api:{url}", cache=here / "cache", budget=budget, patience=patience)


def test_an_endpoint_of_vectors_is_found_out_and_asked_once_for_a_text(tmp_path: Path) -> None:
    with scripted(speaker()) as script:
        model = opened(script.url, tmp_path)
        assert names_of(model.gives) == ["vectors"]
        probes = len(script.posts())
        assert model.ask(Vectors).vectors(["abc", "a", "abc"]).tolist() == [[3, 1], [1, 1], [3, 1]]
        (asked,) = script.posts()[probes:]
        assert asked.body["input"] == ["abc", "a"]
        again = opened(script.url, tmp_path)
        assert again.ask(Vectors).vectors(["abc"]).tolist() == [[3, 1]] and len(script.posts()) == probes + 1


@pytest.mark.parametrize(
    ("handler", "why"),
    [
        (speaker([float("nan"), 1.0]), "NaN|not allow"),
        (speaker([1.0, 2.0, 3.0]), "3 numbers, and one of 2 before"),
        (speaker([]), "no number"),
        (speaker(count=1), "gave 1 answers"),
        (speaker("abc"), "protocol does not allow"),
    ],
)
def test_what_makes_no_sense_is_refused_and_not_kept(handler: Handler, why: str, tmp_path: Path) -> None:
    with scripted(handler) as script:
        model = opened(script.url, tmp_path)
        vectors = model.ask(Vectors)
        assert vectors.vectors(["a"]).tolist() == [[1, 1]]
        for _ in range(2):  # a lie that were kept would not be asked for again
            before = len(script.posts())
            with pytest.raises(EndpointError, match=why):
                vectors.vectors(["abc", "de"])
            assert len(script.posts()) > before


def test_texts_are_paid_for(tmp_path: Path) -> None:
    with scripted(speaker()) as script:
        model = opened(script.url, tmp_path, Budget(queries=8))
        model.ask(Vectors).vectors(["abc"])
        with pytest.raises(BudgetError):
            model.ask(Vectors).vectors([f"text {i}" for i in range(8)])
