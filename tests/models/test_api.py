"""Endpoints as models: what they can do is found out, what they say is checked, what they cost is bounded."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm.core import Embeddings, Logprobs, Model, Text
from lfm.core.errors import BudgetError, CorruptError, EndpointError, ModelError, UnsafeError
from lfm.core.interfaces import Top, names_of
from lfm.models import load
from lfm.models.api import Budget, open_api
from lfm.models.api.cache import Cache
from lfm.models.api.capabilities import bound
from lfm.models.api.client import Patience
from lfm.models.budget import Meter
from scripted import HANG, MODELS, Reply, Script, Seen, logprobs_of, parrot, scripted, slowly, then

KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("LFM_API_KEY", raising=False)


class Slept(list[float]):
    """Seconds that would have been slept."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


def opened(script: Script, here: Path, budget: Budget | None = None, **patience: Any) -> Model:
    patience = {"timeout": 5.0, "sleep": Slept(), **patience}
    return open_api(f"api:{script.url}", cache=here / "cache", budget=budget, patience=Patience(**patience))


def generate(model: Model, *prompts: str, **how: Any) -> list[str]:
    return model.ask(Text).generate(prompts, **how)


# What an endpoint can do


@pytest.mark.parametrize(
    ("able", "gives"),
    [
        ({}, ["text", "top", "logprobs"]),
        ({"chat": False}, ["text", "top", "logprobs"]),
        ({"completions": False}, ["text"]),
        ({"logprobs": False}, ["text"]),
        ({"echo": False}, ["text", "top"]),
        ({"lists": False}, ["text", "top", "logprobs"]),
        ({"completions": False, "tops": 20}, ["text", "top"]),
        ({"completions": False, "tops": 5}, ["text", "top"]),
        ({"logprobs": False, "tops": 5}, ["text", "top"]),
    ],
)
def test_it_declares_what_the_server_was_seen_to_do(able: dict[str, bool], gives: list[str], tmp_path: Path) -> None:
    with scripted(parrot(**able)) as script:
        model = opened(script, tmp_path)
        assert names_of(model.gives) == gives
        assert model.ref == f"api:{script.url}#parrot"
        assert generate(model, "abc", "xyz", max_tokens=2) == ["cb", "zy"]


def test_a_chat_that_wants_its_limit_by_another_name(tmp_path: Path) -> None:
    def picky(seen: Seen) -> Reply:
        if seen.body and "max_tokens" in seen.body:
            return Reply({"error": {"message": "use 'max_completion_tokens' instead"}}, 400)
        if seen.body:
            seen.body["max_tokens"] = seen.body["max_completion_tokens"]
        return parrot(completions=False)(seen)

    with scripted(picky) as script:
        assert generate(opened(script, tmp_path), "abc", max_tokens=2) == ["cb"]


def test_a_chat_tells_the_likeliest_first_tokens_of_its_reply(tmp_path: Path) -> None:
    with scripted(parrot(completions=False, tops=5)) as script:
        model = opened(script, tmp_path)
        asked = len(script.posts())
        assert model.ask(Top).top(["abc", "xyz", "abc"], 2) == [
            (("c", -0.5), ("?", -1.5)),
            (("z", -0.5), ("?", -1.5)),
            (("c", -0.5), ("?", -1.5)),
        ]
        assert model.ask(Top).top(["abc"], 1) == [(("c", -0.5),)]
        assert len(script.posts()) - asked == 3, "the same question is asked once"


def test_a_server_is_asked_once(tmp_path: Path) -> None:
    with scripted(parrot()) as script:
        first = opened(script, tmp_path)
        probes = len(script.posts())
        second = opened(script, tmp_path)
        assert 0 < probes == len(script.posts())
        assert first.digest == second.digest
        assert names_of(first.gives) == names_of(second.gives)


def test_the_digest_follows_url_name_and_abilities(tmp_path: Path) -> None:
    with scripted(parrot()) as one, scripted(parrot()) as other, scripted(parrot(echo=False)) as less:
        digests = {opened(script, tmp_path).digest for script in (one, other, less)}
        named = open_api(f"api:{one.url}#macaw", cache=tmp_path)
        assert len(digests | {named.digest}) == 4


def test_a_name_is_needed_only_where_there_are_several(tmp_path: Path) -> None:
    many = Reply({"data": [{"id": "parrot"}, {"id": "macaw"}]})
    with scripted(then([many], parrot(), path="/models")) as script, pytest.raises(ModelError, match="parrot, macaw"):
        opened(script, tmp_path)


def test_a_server_whose_list_fails_is_used_by_name(tmp_path: Path) -> None:
    """transformers' server answers 500 to /models where it has no cache directory."""
    failing = [Reply(b"Internal Server Error", 500, {"content-type": "text/plain"})] * 4
    with scripted(then(failing, parrot(), path="/models")) as script:
        with pytest.raises(EndpointError, match="500"):
            opened(script, tmp_path)
        model = load(f"{opened_ref(script)}parrot", cache=tmp_path, patience=Patience(sleep=Slept()))
        assert generate(model, "ab", max_tokens=1) == ["b"]


def test_an_address_that_ends_before_the_api_begins_is_told_of(tmp_path: Path) -> None:
    nowhere = [Reply({"detail": "Not Found"}, 404)] * 4
    with scripted(then(nowhere, parrot(), path="/models")) as script:
        bare = script.url.removesuffix("/v1")
        with pytest.raises(EndpointError, match="lists no models") as error:
            open_api(f"api:{bare}", cache=tmp_path, patience=Patience(sleep=Slept()))
    assert f"api:{bare}/v1" in error.value.fix


def opened_ref(script: Script) -> str:
    return f"api:{script.url}#"


# What it says


def test_scores_come_from_the_echo(tmp_path: Path) -> None:
    with scripted(parrot()) as script:
        scores = opened(script, tmp_path).ask(Logprobs).score(["ab", "a"], ["cd", "xyz"])
        assert [s.tokens for s in scores] == [("c", "d"), ("x", "y", "z")]
        assert scores[0].logprobs == (-(ord("c") % 7 + 1.0), -(ord("d") % 7 + 1.0))


def test_the_first_token_of_a_text_has_no_score(tmp_path: Path) -> None:
    with scripted(parrot()) as script, pytest.raises(EndpointError, match="first token"):
        opened(script, tmp_path).ask(Logprobs).score([""], ["ab"])


def echoing(tokens: list[str], values: list[float | None], places: list[int], text: str) -> Any:
    told = {"tokens": tokens, "token_logprobs": values, "text_offset": places, "top_logprobs": None}
    return lambda seen: (
        Reply({"choices": [{"text": text, "index": 0, "logprobs": told}]})
        if isinstance(seen.body, dict) and seen.body.get("prompt") == text
        else parrot()(seen)
    )


@pytest.mark.parametrize(
    ("tokens", "values", "places", "expected"),
    [
        (["The", " cat"], [None, -2.0], [0, 3], (" cat",)),
        (["The c", "at"], [None, -2.0], [0, 5], None),  # the boundary lies within a first token, which has no score
        (["T", "he ca", "t"], [None, -1.0, -2.0], [0, 1, 6], ("he ca", "t")),  # a straddler is the continuation's
        (["<s>", "The", " cat"], [None, -1.0, -2.0], [0, 0, 3], (" cat",)),  # an opening token without width
        (["<s>", "The", " cat"], [None, -1.0, -2.0], [0, 3, 6], (" cat",)),  # vLLM counts its characters
        (["The", " c", "�", "�"], [None, -1.0, -2.0, -3.0], [0, 3, 5, 5], (" c", "�", "�")),  # a letter of two tokens
    ],
)
def test_the_continuation_is_found_in_the_echo(
    tokens: list[str], values: list[float | None], places: list[int], expected: Any, tmp_path: Path
) -> None:
    text = "The cat" if "�" not in tokens else "The cé"
    with scripted(echoing(tokens, values, places, text)) as script:
        logprobs = opened(script, tmp_path).ask(Logprobs)
        if expected is None:
            with pytest.raises(EndpointError, match="first token"):
                logprobs.score(["The"], [text[3:]])
        else:
            assert logprobs.score(["The"], [text[3:]])[0].tokens == expected


def test_next_tokens_come_best_first_and_no_more_than_asked(tmp_path: Path) -> None:
    with scripted(parrot()) as script:
        (ranked,) = opened(script, tmp_path).ask(Logprobs).top(["ab"], 3)
        assert [value for _, value in ranked] == sorted((value for _, value in ranked), reverse=True)
        assert len(ranked) == 3


def test_sampled_prompts_that_are_equal_get_seeds_of_their_own(tmp_path: Path) -> None:
    with scripted(parrot()) as script:
        model = opened(script, tmp_path)
        before = len(script.posts())
        generate(model, "ab", "ab", temperature=1.0, seed=3)
        seeds = [seen.body["seed"] for seen in script.posts()[before:]]
        assert len(seeds) == len(set(seeds)) == 2
        generate(model, "ab", "ab", temperature=1.0, seed=3)
        assert len(script.posts()) == before + 2, "the same seed is the same question"


def choice(**changes: Any) -> dict[str, Any]:
    return {"text": "b", "index": 0, "logprobs": logprobs_of("b", 2, 1), **changes}


LIES: dict[str, Any] = {
    "a web page": b"<!DOCTYPE html><html><head><title>Sign in</title></head></html>",
    "nothing": b"",
    "half an answer": b'{"choices": [{"te',
    "a list": [],
    "no choices": {"id": "x"},
    "text of the wrong type": {"choices": [choice(text=7)]},
    "choices too few": {"choices": []},
    "choices too many": {"choices": [choice(), choice(index=1)]},
    "choices of one number": {"choices": [choice(index=4)]},
    "a token with probability above one": {
        "choices": [choice(logprobs={**logprobs_of("b", 2, 1), "top_logprobs": [{"b": 0.5}]})]
    },
    "probabilities above one together": {
        "choices": [choice(logprobs={**logprobs_of("b", 2, 1), "top_logprobs": [{"a": -0.1, "b": -0.1}]})]
    },
    "not a number": b'{"choices": [{"index": 0, "text": "b", "logprobs": {"tokens": ["b"], "token_logprobs": [-1],'
    b' "top_logprobs": [{"b": NaN}], "text_offset": [0]}}]}',
    "infinity": b'{"choices": [{"index": 0, "text": "b", "logprobs": {"tokens": ["b"], "token_logprobs": [-1],'
    b' "top_logprobs": [{"b": -1e999}], "text_offset": [0]}}]}',
    "no probabilities at all": {"choices": [choice(logprobs=None)]},
    "a word for a number": {"choices": [choice(logprobs={**logprobs_of("b", 2, 1), "top_logprobs": [{"b": "high"}]})]},
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_one_clear_error(lie: str, tmp_path: Path) -> None:
    with scripted(parrot()) as honest:
        opened(honest, tmp_path)  # an honest server, by whose cached abilities we know what to expect
    body = LIES[lie]
    answers = {"lying": False}

    def handler(seen: Seen) -> Reply:
        return Reply(body) if answers["lying"] and seen.method == "POST" else parrot()(seen)

    with scripted(handler) as script:
        model = opened(script, tmp_path)
        answers["lying"] = True
        with pytest.raises(EndpointError) as caught:
            model.ask(Logprobs).top(["ab"], 2)
        assert script.url in str(caught.value) and "\n" not in str(caught.value)
        answers["lying"] = False
        assert model.ask(Logprobs).top(["ab"], 2), "what was wrong was not kept"


ECHO_LIES: dict[str, dict[str, Any]] = {
    "another text": {"text": "xyz"},
    "tokens without values": {"logprobs": {**logprobs_of("abc", 1), "token_logprobs": [None]}},
    "offsets that go back": {"logprobs": {**logprobs_of("abc", 1), "text_offset": [0, 2, 1]}},
    "offsets beyond the text": {"logprobs": {**logprobs_of("abc", 1), "text_offset": [0, 1, 99]}},
    "a value above zero": {"logprobs": {**logprobs_of("abc", 1), "token_logprobs": [None, -1.0, 3.0]}},
    "no offsets": {"logprobs": {**logprobs_of("abc", 1), "text_offset": None}},
}


@pytest.mark.parametrize("lie", ECHO_LIES)
def test_an_echo_that_lies_is_one_clear_error(lie: str, tmp_path: Path) -> None:
    body = {"choices": [{"index": 0, "text": "abc", "logprobs": logprobs_of("abc", 1), **ECHO_LIES[lie]}]}

    def handler(seen: Seen) -> Reply:
        return Reply(body) if seen.body and seen.body.get("prompt") == "abc" else parrot()(seen)

    with scripted(handler) as script, pytest.raises(EndpointError):
        opened(script, tmp_path).ask(Logprobs).score(["ab"], ["c"])


def test_a_web_page_instead_of_an_api_says_what_to_check(tmp_path: Path) -> None:
    page = Reply(b"<html><title>Welcome</title></html>", headers={"content-type": "text/html"})
    with scripted(lambda seen: page) as script, pytest.raises(EndpointError, match=r"web page.*Welcome.*/v1"):
        opened(script, tmp_path)


# How it fails


@pytest.mark.parametrize("handler", [lambda seen: HANG, lambda seen: Reply(b"x" * 4000, drip=0.05)])
def test_a_server_that_hangs_or_drips_is_left(handler: Any, tmp_path: Path) -> None:
    with scripted(handler) as script, pytest.raises(EndpointError, match=r"within|finished"):
        open_api(f"api:{script.url}", cache=tmp_path, patience=Patience(timeout=0.3, retries=1, sleep=Slept()))


def test_nothing_listening_is_said_plainly(tmp_path: Path) -> None:
    with scripted(parrot()) as script:
        pass
    with pytest.raises(EndpointError, match="nothing answers"):
        opened(script, tmp_path)


def test_of_a_server_that_went_away_what_it_answered_is_kept(tmp_path: Path) -> None:
    plain = parrot()
    with scripted(lambda seen: replace(plain(seen), headers={"connection": "close"})) as script:
        text = opened(script, tmp_path).ask(Text)
        assert text.generate(["abc"], max_tokens=2) == ["cb"]
    with pytest.raises(EndpointError, match="nothing answers") as error:
        text.generate(["other"], max_tokens=2)
    assert error.value.fix.startswith("answers so far are kept")
    assert text.generate(["abc"], max_tokens=2) == ["cb"]


def flaky(replies: list[Reply]) -> tuple[Any, Any]:
    """A parrot that, once told to, gives these replies first."""
    state = {"on": False}
    inner = then(replies, parrot())

    def handler(seen: Seen) -> Reply:
        return inner(seen) if state["on"] else parrot()(seen)

    return handler, lambda: state.update(on=True)


def test_it_tries_again_after_what_may_pass(tmp_path: Path) -> None:
    slept = Slept()
    busy = Reply({"error": {"message": "slow down"}}, 429, {"retry-after": "7"})
    later = Reply(b"", 503, {"retry-after": formatdate(time.time() + 60, usegmt=True)})
    handler, begin = flaky([busy, Reply(b"", 500), Reply(b"oops", 502), later])
    with scripted(handler) as script:
        model = opened(script, tmp_path, sleep=slept)
        slept.clear()
        begin()
        assert generate(model, "hello", max_tokens=2) == ["ol"]
    assert len(slept) == 4
    assert slept[0] == 7 and slept[3] > 30, "as long as the server asks, in seconds or by a date"
    assert 0.1 <= slept[1] <= 1.0 and 0.1 <= slept[2] <= 2.0, "else doubling, with jitter"


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (Reply(b"", 500), "500"),
        (Reply({"error": {"message": "quota"}}, 429), "quota"),
        (Reply(b"", 429, {"retry-after": "1e9"}), "wait"),
    ],
)
def test_it_gives_up_with_what_the_server_said(reply: Reply, said: str, tmp_path: Path) -> None:
    handler, begin = flaky([reply] * 99)
    with scripted(handler) as script:
        model = opened(script, tmp_path, retries=2)
        begin()
        before = len(script.posts())
        with pytest.raises(EndpointError, match=said):
            generate(model, "hello")
        assert len(script.posts()) - before == (1 if said == "wait" else 3)


def test_a_request_that_is_refused_is_not_repeated(tmp_path: Path) -> None:
    handler, begin = flaky([Reply({"detail": "the prompt is too long"}, 400)] * 99)
    with scripted(handler) as script:
        model = opened(script, tmp_path)
        begin()
        before = len(script.posts())
        with pytest.raises(EndpointError, match="too long"):
            generate(model, "hello")
        assert len(script.posts()) == before + 1


def test_requests_under_way_are_bounded(tmp_path: Path) -> None:
    with scripted(slowly(parrot(lists=False), 0.02)) as script:
        model = opened(script, tmp_path, concurrency=3)
        prompts = [f"prompt {i}" for i in range(20)]
        with ThreadPoolExecutor(4) as pool:  # callers of our own, all at once
            for said in pool.map(lambda i: generate(model, *prompts[i::4], max_tokens=1), range(4)):
                assert len(said) == 5
        assert 1 < script.most_at_once <= 3


# Keys


@pytest.mark.parametrize("variable", ["OPENAI_API_KEY", "LFM_API_KEY"])
def test_a_key_is_sent_and_appears_nowhere(variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, KEY)

    def tell_tale(seen: Seen) -> Reply:
        assert seen.headers["authorization"] == f"Bearer {KEY}"
        if seen.body and seen.body.get("prompt") == "fail":
            return Reply({"error": {"message": f"your key {KEY} is not good for that"}}, 400)
        reply = parrot()(seen)
        return Reply({**reply.body, "note": KEY}, reply.status)

    with scripted(tell_tale) as script:
        model = opened(script, tmp_path)
        generate(model, "ab")
        with pytest.raises(EndpointError, match="not good for that") as caught:
            generate(model, "fail")
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    monkeypatch.delenv(variable)
    for text in (str(caught.value), model.ref, repr(model), model.digest, kept.decode("latin-1")):
        assert KEY not in text


@pytest.mark.parametrize("key", ["sk-1\r\nx-injected: 1", "clé"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_repeated(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LFM_API_KEY", key)
    with scripted(parrot()) as script, pytest.raises(ModelError, match="LFM_API_KEY holds") as error:
        opened(script, tmp_path)
    assert key not in str(error.value) and not script.seen


def test_a_missing_key_is_asked_for(tmp_path: Path) -> None:
    locked = Reply({"error": {"message": "no key"}}, 401)
    with scripted(lambda seen: locked) as script, pytest.raises(EndpointError, match="LFM_API_KEY"):
        opened(script, tmp_path)


@pytest.mark.parametrize(
    "ref", ["api:https://me:hunter2@host/v1#m", "api:https://hunter2@host/v1", "api:https://h/v1?api_key=hunter2"]
)
def test_credentials_in_a_reference_are_refused_and_not_repeated(ref: str) -> None:
    with pytest.raises(UnsafeError) as caught:
        load(ref)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "ref",
    [
        "api:",
        "api:host",
        "api:ftp://host/v1",
        "api:http://",
        "api:http://host:port/v1",
        "api:http://host/v 1",
        "api:http://h t/v1",
    ],
)
def test_a_reference_that_is_none_is_refused(ref: str) -> None:
    with pytest.raises(ModelError, match="endpoint"):
        load(ref)


def test_a_redirect_to_another_host_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LFM_API_KEY", KEY)
    with scripted(parrot()) as thief:
        away = Reply(b"", 307, {"location": f"{thief.url}/models"})
        with (
            scripted(lambda seen: away) as script,
            pytest.raises(EndpointError, match="redirects elsewhere, to http://127"),
        ):
            opened(script, tmp_path)
        assert thief.seen == []


@pytest.mark.parametrize("location", ["", "http://[::1"])
def test_a_redirect_to_nowhere_is_one_clear_error(location: str, tmp_path: Path) -> None:
    lost = Reply(b"", 303, {"location": location})
    with scripted(lambda seen: lost) as script, pytest.raises(EndpointError, match=r"\(303\) to nowhere.*/v1"):
        opened(script, tmp_path)


def test_an_interrupt_calls_off_what_is_under_way_and_keeps_what_was_answered(tmp_path: Path) -> None:
    """Eight at once to a server that answers four of them and no more; those are not asked again."""
    code = f"""
from pathlib import Path
from lfm.core import Text
from lfm.models.api import open_api
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests may have it ignored
model = open_api(f"api:{{sys.argv[1]}}#parrot", cache=Path({str(tmp_path / "cache")!r}))
model.ask(Text).generate([f"{{i}} asked" for i in range(8)])
"""
    plain = parrot(lists=False)

    def handler(seen: Seen) -> Reply:
        said = str((seen.body or {}).get("prompt"))
        return HANG if said.endswith("asked") and said[0] > "3" else plain(seen)

    def asked(script: Script) -> list[str]:
        return sorted(said for seen in script.posts() if "asked" in (said := str(seen.body.get("prompt"))))

    with scripted(handler) as script:
        asking = subprocess.Popen([sys.executable, "-c", code, script.url], stderr=subprocess.PIPE, text=True)
        while len(asked(script)) < 8:
            assert asking.poll() is None
            time.sleep(0.05)
        asking.send_signal(signal.SIGINT)
        began = time.monotonic()
        _, said = asking.communicate(timeout=25)
        assert time.monotonic() - began < 10 and said.rstrip().endswith("KeyboardInterrupt")
        again = opened(script, tmp_path, timeout=5.0)
        again.ask(Text).generate([f"{i} asked" for i in range(4)])
        assert asked(script) == [f"{i} asked" for i in range(8)]


def test_a_redirect_within_the_host_is_followed(tmp_path: Path) -> None:
    def handler(seen: Seen) -> Reply:
        if seen.path.startswith("/old"):
            return Reply(b"", 308, {"location": seen.path.replace("/old", "/v1")})
        return parrot()(seen)

    with scripted(handler) as script:
        model = open_api(f"api:{script.url.replace('/v1', '/old')}", cache=tmp_path)
        assert generate(model, "ab", max_tokens=1) == ["b"]
    circle = scripted(lambda seen: Reply(b"", 308, {"location": seen.path}))
    with circle as script, pytest.raises(EndpointError, match="circle"):
        opened(script, tmp_path)


# The cache


def test_what_was_answered_is_not_asked_again(tmp_path: Path) -> None:
    with scripted(parrot()) as script:
        model = opened(script, tmp_path)
        first = generate(model, "ab", "cd", "ab")
        before = len(script.posts())
        assert generate(model, "cd", "ab", "ab") == [first[1], first[0], first[0]]
        assert generate(opened(script, tmp_path), "cd") == [first[1]]
        assert len(script.posts()) == before
        generate(model, "cd", max_tokens=1)
        assert len(script.posts()) == before + 1, "another question"


def test_answers_survive_threads_and_processes_at_once(tmp_path: Path) -> None:
    """Writers in four threads and two processes; each key keeps one whole answer, the same for all who ask."""
    code = (
        "import sys; from pathlib import Path; from lfm.models.api.cache import Cache\n"
        "c = Cache(Path(sys.argv[1]))\n"
        "for i in range(200): c.put({str(i): (sys.argv[2] * 50).encode()})\n"
        "print(len(c.get([str(i) for i in range(200)])))"
    )
    others = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name], stdout=subprocess.PIPE) for name in "ab"
    ]
    cache = Cache(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda t: [cache.put({str(i): t.encode() * 50}) for i in range(0, 200, 7)], "cdef"))
    assert [other.communicate()[0].strip() for other in others] == [b"200", b"200"]
    kept = cache.get([str(i) for i in range(200)])
    assert len(kept) == 200 and all(len(set(value)) == 1 and len(value) == 50 for value in kept.values())


@pytest.mark.parametrize("name", ["answers.sqlite", "budget.sqlite"])
def test_a_damaged_file_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"not a database, but long enough to be taken for one" * 40)
    with pytest.raises(CorruptError, match=name):
        Cache(tmp_path) if name == "answers.sqlite" else Meter(Budget(path=tmp_path / name)).spent()


# The budget


def charged(script: Script) -> tuple[int, int]:
    """(prompts, most tokens) that a server saw on its model's endpoints: what a bill would rest on."""
    queries = tokens = 0
    for seen in script.posts():
        prompts = next(seen.body[name] for name in ("prompt", "messages", "input") if name in seen.body)
        prompts = prompts if isinstance(prompts, list) else [prompts]
        texts = [p["content"] if isinstance(p, dict) else p for p in prompts]
        queries += len(texts)
        tokens += sum(map(len, texts)) + len(texts) * seen.body.get("max_tokens", 0)
    return queries, tokens


@pytest.mark.parametrize(("queries", "tokens"), [(30, None), (None, 900), (30, 900), (0, None), (3, None), (None, 40)])
def test_a_budget_is_never_exceeded(queries: int | None, tokens: int | None, tmp_path: Path) -> None:
    """From probing on, with callers in several threads, whatever the server fails at."""
    flakes = [Reply(b"", 500), Reply(b"", 429)] * 3
    budget = Budget(queries, tokens, tmp_path / "budget.sqlite")
    with scripted(then(flakes, slowly(parrot(), 0.005))) as script:
        stopped = 0
        try:
            model = opened(script, tmp_path, budget)
        except (BudgetError, EndpointError):
            stopped, model = 4, None
        if model:
            with ThreadPoolExecutor(4) as pool:
                for outcome in pool.map(lambda t: attempt(model, t), range(4)):
                    stopped += outcome
        assert stopped == 4
        served = charged(script)
        spent = Meter(budget).spent()
        assert served[0] == spent.queries <= (math.inf if queries is None else queries)
        assert spent.tokens <= (math.inf if tokens is None else tokens)


def attempt(model: Model, thread: int) -> bool:
    try:
        for i in range(50):
            generate(model, f"{thread} {i} a", f"{thread} {i} b", max_tokens=8)
    except BudgetError:
        return True
    return False


def test_a_run_that_was_stopped_goes_on_with_a_larger_budget(tmp_path: Path) -> None:
    prompts = [f"prompt {i}" for i in range(40)]
    with scripted(parrot(lists=False)) as script:
        with pytest.raises(BudgetError, match="larger budget"):
            generate(opened(script, tmp_path, Budget(queries=25, path=tmp_path / "b.sqlite")), *prompts)
        first = {
            seen.body["prompt"] for seen in script.posts("v1/completions") if isinstance(seen.body["prompt"], str)
        } & set(prompts)
        assert 0 < len(first) < 40
        before = len(script.posts())
        wide = Budget(queries=100, path=tmp_path / "b.sqlite")
        assert generate(opened(script, tmp_path, wide), *prompts) == [p[::-1][:64] for p in prompts]
        again = [seen.body["prompt"] for seen in script.posts()[before:]]
        assert sorted(again) == sorted(set(prompts) - first), "kept answers cost nothing again"
        assert Meter(wide).spent().queries == charged(script)[0]


def test_usage_settles_the_charge(tmp_path: Path) -> None:
    with scripted(parrot()) as script:
        budget = Budget(tokens=10_000, path=tmp_path / "b.sqlite")
        model = opened(script, tmp_path, budget)
        before = Meter(budget).spent().tokens
        assert generate(model, "abcdef", max_tokens=50) == ["fedcba"]
        assert Meter(budget).spent().tokens == before + 12


def test_a_server_that_claims_more_than_it_could_take_is_named(tmp_path: Path) -> None:
    def greedy(seen: Seen) -> Reply:
        reply = parrot()(seen)
        if seen.body and seen.body.get("prompt") == "abc":
            reply.body["usage"] = {"prompt_tokens": 10**6, "completion_tokens": 0, "total_tokens": 10**6}
        return reply

    with scripted(greedy) as script:
        budget = Budget(tokens=1000, path=tmp_path / "b.sqlite")
        with pytest.raises(EndpointError, match="claims 1000000 tokens"):
            generate(opened(script, tmp_path, budget), "abc")
        assert Meter(budget).spent().tokens <= 1000
        assert generate(opened(script, tmp_path), "abc"), "without a token budget it does not matter"


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 50), st.floats(0, 1)), max_size=30),
    st.integers(0, 40),
    st.integers(0, 200),
)
def test_reservations_fit_or_change_nothing(asked: list[tuple[int, int, float]], queries: int, tokens: int) -> None:
    meter = Meter(Budget(queries, tokens))
    for q, t, used in asked:
        before = meter.spent()
        fits = before.queries + q <= queries and before.tokens + t <= tokens
        try:
            meter.reserve(q, t)
        except BudgetError:
            assert not fits and meter.spent() == before
            continue
        assert fits
        meter.give_back(0, t - math.floor(t * used))
        assert meter.spent() == (before.queries + q, before.tokens + math.floor(t * used))


def test_callers_in_threads_and_processes_share_one_budget(tmp_path: Path) -> None:
    path = tmp_path / "b.sqlite"
    code = (
        "import sys; from pathlib import Path; from lfm.models.budget import Budget, Meter\n"
        "from lfm.core.errors import BudgetError\n"
        "meter, got = Meter(Budget(100, 1000, Path(sys.argv[1]))), 0\n"
        "for _ in range(100):\n"
        "    try: meter.reserve(1, 9); got += 1\n"
        "    except BudgetError: break\n"
        "print(got)"
    )
    others = [subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) for _ in range(2)]
    meter, got = Meter(Budget(100, 1000, path)), []

    def take() -> None:
        for _ in range(100):
            try:
                meter.reserve(1, 9)
                got.append(1)
            except BudgetError:
                return

    threads = [threading.Thread(target=take) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    total = len(got) + sum(int(other.communicate()[0]) for other in others)
    assert total == meter.spent().queries == 100


def test_a_killed_process_leaves_its_reservation_charged(tmp_path: Path) -> None:
    path = tmp_path / "b.sqlite"
    code = (
        "import os, sys; from pathlib import Path; from lfm.models.budget import Budget, Meter\n"
        "Meter(Budget(10, 100, Path(sys.argv[1]))).reserve(2, 30); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert Meter(Budget(10, 100, path)).spent() == (2, 30)


@given(st.text(max_size=60))
def test_no_text_makes_more_tokens_than_its_bound(text: str) -> None:
    """Against a byte-level tokenizer, the one that makes the most tokens of a text, over every normal form."""
    import unicodedata

    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert len(unicodedata.normalize(form, text).encode("utf-8", "surrogatepass")) <= bound(text)
    assert len(text.encode("utf-8", "surrogatepass")) <= bound(text)


def test_an_endpoint_has_no_files(tmp_path: Path) -> None:
    with scripted(parrot()) as script:
        model = opened(script, tmp_path)
        assert model.kind == "api" and not model.formats and Embeddings not in model.gives
        assert model.facts.task == "causal-lm"


def test_abilities_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    odd = Reply({"data": [{"id": "parrot", "lfm": {"digest": 7, "can": []}}]})
    with scripted(lambda seen: odd) as script, pytest.raises(EndpointError, match="no sense"):
        opened(script, tmp_path)
    assert json.loads(json.dumps(MODELS.body))
