"""How requests go out: through the proxy that the environment names, and compressed answers come back whole."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from lfm.core import Text
from lfm.models.api import open_api
from scripted import Reply, Seen, parrot, scripted


@pytest.mark.parametrize(("spared", "through"), [("", True), ("elsewhere.test", True), ("models.test", False)])
def test_another_machine_is_reached_through_the_environments_proxy(
    spared: str, through: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lfm.models.api.client import _proxy

    monkeypatch.setenv("http_proxy", "127.0.0.1:9")
    monkeypatch.setenv("no_proxy", spared)
    assert _proxy("http://models.test/v1") == ("127.0.0.1:9" if through else None)


def test_the_proxy_is_asked_for_the_whole_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = parrot()
    with scripted(lambda seen: plain(replace(seen, path=urlsplit(seen.path).path))) as script:
        monkeypatch.setenv("http_proxy", script.url.removesuffix("/v1"))
        monkeypatch.delenv("no_proxy", raising=False)
        model = open_api("api:http://models.test/v1#parrot", cache=tmp_path)
        assert model.ask(Text).generate(["abc"], max_tokens=2) == ["cb"]
        assert all(seen.path.startswith("http://models.test/v1/") for seen in script.seen)


def test_this_machine_is_asked_without_a_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted(parrot()) as script:
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
        model = open_api(f"api:{script.url}#parrot", cache=tmp_path)
        assert model.ask(Text).generate(["abc"], max_tokens=2) == ["cb"]


def test_a_compressed_answer_is_read(tmp_path: Path) -> None:
    plain = parrot()

    def packed(seen: Seen) -> Reply:
        reply = plain(seen)
        body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        assert "gzip" in seen.headers["accept-encoding"]
        return Reply(gzip.compress(body), reply.status, {"content-encoding": "gzip"})

    with scripted(packed) as script:
        model = open_api(f"api:{script.url}#parrot", cache=tmp_path)
        assert model.ask(Text).generate(["abc"], max_tokens=2) == ["cb"]
