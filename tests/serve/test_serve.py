"""The server over every kind of model, and against requests that no client should send."""

from __future__ import annotations

import io
import re
import threading
from base64 import b64encode
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiny
from lfm.core import Codec, Embeddings, Logprobs, Model, Text
from lfm.core.errors import AccessError, BudgetError, DataError, EndpointError, OutputError
from lfm.core.interfaces import names_of
from lfm.models import load
from lfm.models.api import Budget, open_api
from lfm.models.api.embeds import encode
from lfm.models.budget import Meter
from lfm.serve import running

PROMPTS = ["The cat sat", "Paris is the capital of", "naïve café 東京"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(tiny.causal(tmp_path_factory.mktemp("model") / "cat"))


@pytest.fixture(scope="module")
def url(model: Model) -> Iterator[str]:
    with running(model) as url:
        yield url


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
        yield client


def test_behind_http_a_model_is_what_it_is_here(model: Model, url: str, tmp_path: Path) -> None:
    there = open_api(f"api:{url}", cache=tmp_path)
    assert names_of(there.gives) == ["text", "vectors", "top", "logprobs", "embeddings"]
    assert there.facts == model.facts
    for how in ({"max_tokens": 7}, {"max_tokens": 7, "stop": ["a"]}):
        assert there.ask(Text).generate(PROMPTS, **how) == model.ask(Text).generate(PROMPTS, **how)  # type: ignore[arg-type]
    words = [" the", " France.", " a b"]
    for mine, theirs in zip(
        model.ask(Logprobs).score(PROMPTS, words), there.ask(Logprobs).score(PROMPTS, words), strict=True
    ):
        assert mine.tokens == theirs.tokens and theirs.logprobs == pytest.approx(mine.logprobs, abs=1e-5)
    assert same(there.ask(Logprobs).top(PROMPTS, 5), model.ask(Logprobs).top(PROMPTS, 5))
    near, far = model.ask(Embeddings), there.ask(Embeddings)
    assert torch.equal(near.table(), far.table())
    rows = far.embed(PROMPTS)
    assert all(torch.equal(a, b) for a, b in zip(rows, near.embed(PROMPTS), strict=True))
    assert same(far.next_from([r * 1.1 for r in rows], 5), near.next_from([r * 1.1 for r in rows], 5))


def same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Equal rankings, up to rounding; of tokens with one text (parts of characters) the protocol tells the first."""
    return all(
        list(x) == list(y) and list(x.values()) == pytest.approx(list(y.values()), abs=1e-5)
        for x, y in zip(map(first_of_each, a), map(first_of_each, b), strict=True)
    )


def first_of_each(row: Sequence[tuple[str, float]]) -> dict[str, float]:
    return {token: next(v for t, v in row if t == token) for token, _ in row}


def test_echo_and_score_agree(model: Model, url: str, http: httpx.Client) -> None:
    """Two ways to the same numbers: our own /score, and the echo that other clients use."""
    (score,) = model.ask(Logprobs).score(["The cat"], [" sat on"])
    made = post(http, "/completions", prompt="The cat sat on", max_tokens=0, echo=True, logprobs=0)
    told = made["choices"][0]["logprobs"]
    inside = [
        v for v, place in zip(told["token_logprobs"], told["text_offset"], strict=True) if place >= len("The cat")
    ]
    assert inside == pytest.approx(list(score.logprobs), abs=1e-5)
    assert told["top_logprobs"] is None


def post(http: httpx.Client, path: str, **body: Any) -> Any:
    reply = http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_the_digest_is_the_models_and_not_the_ports(model: Model, tmp_path: Path) -> None:
    digests = []
    for _ in range(2):
        with running(model, name="cat") as url:
            there = open_api(f"api:{url}", cache=tmp_path)
            digests.append(there.digest)
            before = there.ask(Text).generate(["The"], max_tokens=2)
    other = load(tiny.causal(tmp_path / "other", seed=5))
    with running(other, name="cat") as url:
        digests.append(open_api(f"api:{url}", cache=tmp_path).digest)
        assert open_api(f"api:{url}", cache=tmp_path).ask(Text).generate(["The"], max_tokens=2) != before
    assert digests[0] == digests[1] != digests[2]


OTHERS = [
    (tiny.masked, ["vectors", "top", "logprobs", "embeddings"]),
    (tiny.seq2seq, ["text", "top", "logprobs", "embeddings"]),
]


@pytest.mark.parametrize(("make", "gives"), OTHERS)
def test_other_language_models(make: Any, gives: list[str], tmp_path: Path) -> None:
    model = load(make(tmp_path / "model"))
    with running(model) as url:
        there = open_api(f"api:{url}", cache=tmp_path)
        assert names_of(there.gives) == gives
        suffixes = () if "text" in gives else (" on the mat", ".")
        args = (["the cat", "paris is the capital of"], [" sat", " france"], suffixes)
        mine, theirs = model.ask(Logprobs).score(*args), there.ask(Logprobs).score(*args)
        assert [s.tokens for s in mine] == [s.tokens for s in theirs]
        assert [s.total for s in theirs] == pytest.approx([s.total for s in mine], abs=1e-5)
        assert same(there.ask(Logprobs).top(args[0], 4, suffixes), model.ask(Logprobs).top(args[0], 4, suffixes))
        rows = there.ask(Embeddings).embed(args[0])
        assert same(there.ask(Embeddings).next_from(rows, 4), model.ask(Embeddings).next_from(rows, 4))


def test_an_endpoint_can_be_served_again(model: Model, url: str, tmp_path: Path) -> None:
    """A chain of two servers, the second with nothing but what the first one's protocol carries."""
    with running(open_api(f"api:{url}", cache=tmp_path / "a")) as second:
        there = open_api(f"api:{second}", cache=tmp_path / "b")
        assert there.ask(Text).generate(PROMPTS[:2], max_tokens=5) == model.ask(Text).generate(
            PROMPTS[:2], max_tokens=5
        )
        with httpx.Client(base_url=second, trust_env=False) as http:
            made = post(http, "/completions", prompt="The cat", max_tokens=0, echo=True, logprobs=1)["choices"][0]
            assert "".join(made["logprobs"]["tokens"]) == made["text"] == "The cat"


def test_a_budget_spent_upstream_is_said_so(url: str, tmp_path: Path) -> None:
    poor = open_api(f"api:{url}", cache=tmp_path, budget=Budget(queries=0))
    with running(poor) as second, httpx.Client(base_url=second, trust_env=False) as http:
        reply = http.post("/completions", json={"prompt": "a", "max_tokens": 1})
        assert reply.status_code == 429 and reply.json()["error"]["code"] == "insufficient_quota"


def test_what_gives_no_text_is_not_served(tmp_path: Path) -> None:
    with pytest.raises(AccessError, match="cannot be served"), running(load(tiny.vit(tmp_path / "vit"))):
        pass


def test_a_port_in_use_is_said_plainly(model: Model, url: str) -> None:
    port = int(url.split(":")[2].split("/")[0])
    with pytest.raises(OutputError, match=f"port {port}"), running(model, port=port):
        pass


def test_abilities_can_be_less_than_a_checkpoints(model: Model, tmp_path: Path) -> None:
    with running(model.only([Text])) as url:
        there = open_api(f"api:{url}", cache=tmp_path)
        assert names_of(there.gives) == ["text"]
        with httpx.Client(base_url=url, trust_env=False) as http:
            for body in ({"prompt": "a", "logprobs": 1}, {"prompt": [1, 2]}, {"prompt_embeds": "AAAA"}):
                reply = http.post("/completions", json={**body, "max_tokens": 1})
                assert reply.status_code == 400 and "does not" in reply.json()["error"]["message"]
            assert http.post("/score", json={"prompts": ["a"], "continuations": ["b"]}).status_code == 400


# prompt_embeds


def test_prompt_embeds_continue_as_their_text_does(wordy: Model) -> None:
    (rows,) = wordy.ask(Embeddings).embed(["The cat sat"])
    out = io.BytesIO()
    torch.save(rows, out)
    how: dict[str, Any] = {"max_tokens": 4, "temperature": 0, "logprobs": 2}
    with running(wordy) as url, httpx.Client(base_url=url, trust_env=False) as http:
        by_text = post(http, "/completions", prompt="The cat sat", **how)["choices"][0]
        for sent in (encode(rows), b64encode(out.getvalue()).decode()):
            by_rows = post(http, "/completions", prompt_embeds=sent, **how)["choices"][0]
            assert by_rows["text"] == by_text["text"]
            values = by_rows["logprobs"]["token_logprobs"]
            assert values == pytest.approx(by_text["logprobs"]["token_logprobs"], abs=1e-4)
        both = post(http, "/completions", prompt_embeds=[encode(rows), encode(rows[:2])], max_tokens=1, temperature=0)
        assert len(both["choices"]) == 2 and both["usage"]["prompt_tokens"] == len(rows) + 2


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"prompt_embeds": encode(torch.ones(2, 7))}, "7 wide, the model is 32"),
        ({"prompt_embeds": encode(torch.ones(2, 32)), "prompt": "a"}, "not both"),
        ({"prompt_embeds": encode(torch.ones(2, 32)), "echo": True}, "echoed"),
        ({"prompt_embeds": []}, "prompt_embeds|length"),
    ],
)
def test_prompt_embeds_that_cannot_be(body: dict[str, Any], said: str, http: httpx.Client) -> None:
    reply = http.post("/completions", json={"max_tokens": 1, **body})
    assert reply.status_code == 400
    assert re.search(said, reply.json()["error"]["message"])


# Requests that no client should send


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("POST", "/completions", b"", 400),
        ("POST", "/completions", b"{", 400),
        ("POST", "/completions", b"[]", 400),
        ("POST", "/completions", b"{}", 400),
        ("POST", "/completions", b'{"prompt": "\xff"}', 400),
        ("POST", "/completions", b"[" * 100_000, 400),
        ("POST", "/chat/completions", b'{"messages": []}', 400),
        ("POST", "/chat/completions", b'{"messages": [{"content": "no role"}]}', 400),
        ("POST", "/score", b'{"prompts": ["a"], "continuations": ["b", "c"]}', 400),
        ("POST", "/input_embeddings", b'{"input": []}', 400),
        ("GET", "/completions", b"", 405),
        ("GET", "/nothing", b"", 404),
        ("GET", "/models/other", b"", 404),
        ("GET", "/input_embeddings?model=other", b"", 404),
    ],
)
def test_malformed_requests(method: str, path: str, content: bytes, status: int, http: httpx.Client) -> None:
    reply = http.request(method, path, content=content)
    assert reply.status_code == status
    error = reply.json()["error"]
    assert (
        set(error) == {"message", "type", "param", "code"} and error["message"] and "Traceback" not in error["message"]
    )


PLAIN = st.none() | st.booleans() | st.integers(-2, 9) | st.floats(-2, 2) | st.text(max_size=4)
VALUES = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
)
FIELDS = st.sampled_from(
    [
        "prompt",
        "max_tokens",
        "temperature",
        "top_p",
        "stop",
        "seed",
        "n",
        "echo",
        "logprobs",
        "suffix",
        "user",
        "stream_options",
    ]
)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(FIELDS, VALUES, max_size=5))
def test_any_json_gets_an_answer_or_a_reason(http: httpx.Client, body: dict[str, Any]) -> None:
    reply = http.post("/completions", json={"max_tokens": 1, **body})
    assert reply.status_code in (200, 400), reply.text
    assert ("choices" if reply.status_code == 200 else "error") in reply.json()


def test_a_prompt_beyond_the_context_is_refused_and_not_answered_with_noise(model: Model, http: httpx.Client) -> None:
    told = http.post("/completions", json={"model": "cat", "prompt": "cat " * model.facts.context, "max_tokens": 1})
    assert (told.status_code, told.json()["error"]["code"]) == (400, "context_length_exceeded")
    with pytest.raises(DataError, match="leaves no room"):
        model.ask(Text).generate(["cat " * model.facts.context])


def test_a_request_is_bounded(model: Model) -> None:
    from starlette.testclient import TestClient

    from lfm.serve import app

    with TestClient(app(model, "cat", largest=1000)) as client:
        assert client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200
        for body in ({"content": b"x" * 2000}, {"content": iter([b"x" * 600] * 3)}):  # with a length, and in chunks
            assert client.post("/v1/completions", **body).status_code == 413


def test_a_model_that_fails_is_a_500_without_its_insides(model: Model) -> None:
    class Broken:
        def generate(self, *args: Any, **how: Any) -> list[str]:
            raise RuntimeError("a secret path")

    broken = Model(ref="broken", kind="module", gives={Text: Broken}, identify=lambda: "0")
    with running(broken) as url, httpx.Client(base_url=url, trust_env=False) as http:
        reply = http.post("/completions", json={"prompt": "a"})
        assert reply.status_code == 500 and "secret" not in reply.text and "RuntimeError" in reply.text
        assert http.get("/models").status_code == 200, "the server lives on"


def test_requests_wait_for_one_another() -> None:
    class Alone:
        def __init__(self) -> None:
            self.busy, self.most, self.lock = 0, 0, threading.Lock()

        def generate(self, prompts: Sequence[str], **how: Any) -> list[str]:
            with self.lock:
                self.busy += 1
                self.most = max(self.most, self.busy)
            threading.Event().wait(0.01)
            with self.lock:
                self.busy -= 1
            return [p.upper() for p in prompts]

    alone = Alone()
    with running(Model(ref="alone", kind="module", gives={Text: lambda: alone}, identify=lambda: "0")) as url:

        def ask(i: int) -> str:
            return httpx.post(f"{url}/completions", json={"prompt": f"p{i}"}, trust_env=False).json()["choices"][0][
                "text"
            ]

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(ask, range(16))) == [f"P{i}" for i in range(16)]
    assert alone.most == 1


def test_a_budget_holds_over_our_own_server(url: str, model: Model, tmp_path: Path) -> None:
    """Charges are settled by the server's own counts, which are the tokenizer's."""
    budget = Budget(tokens=300, path=tmp_path / "b.sqlite")
    there = open_api(f"api:{url}", cache=tmp_path, budget=budget)
    assert Meter(budget).spent() == (0, 0), "our server tells what it can do: nothing is probed"
    there.ask(Text).generate(["The cat"], max_tokens=3)
    count = len(model.ask(Codec).tokenizer("The cat")["input_ids"])
    assert count < Meter(budget).spent().tokens <= count + 3
    with pytest.raises(BudgetError):
        there.ask(Text).generate([f"The cat number {i}" for i in range(100)], max_tokens=9)
    assert Meter(budget).spent().tokens <= 300


def test_a_server_that_is_gone_is_an_endpoint_error(model: Model, tmp_path: Path) -> None:
    from lfm.models.api.client import Patience

    with running(model) as url:
        there = open_api(f"api:{url}", cache=tmp_path, patience=Patience(retries=1, sleep=lambda s: None))
    with pytest.raises(EndpointError, match="nothing answers"):
        there.ask(Text).generate(["The cat"])
