"""A server that we did not write: `transformers serve`, where it can be run.

LFM_TRANSFORMERS names the executable of an environment with `transformers[serving]`; docs/serving.md tells the rest.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

import tiny
from lfm.core import Text
from lfm.core.errors import EndpointError
from lfm.core.interfaces import names_of
from lfm.models import load
from lfm.models.api import open_api
from lfm.models.api.client import Patience

SERVER = os.environ.get("LFM_TRANSFORMERS", "")
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
QUICK = Patience(sleep=lambda seconds: None, retries=1)

pytestmark = pytest.mark.skipif(not shutil.which(SERVER or "-"), reason="LFM_TRANSFORMERS names no `transformers`")


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "chat"])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path, bool]]:
    here = tmp_path_factory.mktemp("served")
    model = tiny.causal(here / "model")
    if request.param:
        (model / "chat_template.jinja").write_text(TEMPLATE)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [SERVER, "serve", str(model), "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(here / "hub")}
    with (here / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        for _ in range(600):
            try:
                httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1", model, request.param
    finally:
        server.terminate()
        server.wait(20)


def test_it_gives_text_and_nothing_else(served: tuple[str, Path, bool], tmp_path: Path) -> None:
    url, path, _ = served
    model = open_api(f"api:{url}#{path}", cache=tmp_path, patience=QUICK)
    assert names_of(model.gives) == ["text"]
    prompts = ["The cat sat on", "Paris is the capital"]
    said = model.ask(Text).generate(prompts, max_tokens=6)
    ours = load(path).ask(Text).generate(prompts, max_tokens=6)
    # It decodes an answer by itself, so that a tokenizer that strips leading spaces loses one.
    assert [s.strip() for s in said] == [s.strip() for s in ours]


def test_its_list_of_models_needs_a_cache_directory(served: tuple[str, Path, bool], tmp_path: Path) -> None:
    with pytest.raises(EndpointError, match=r"500|connection broke"):
        open_api(f"api:{served[0]}", cache=tmp_path, patience=QUICK)


def test_another_name_is_refused(served: tuple[str, Path, bool], tmp_path: Path) -> None:
    with pytest.raises(EndpointError, match="pinned"):
        open_api(f"api:{served[0]}#another", cache=tmp_path, patience=QUICK)


def test_what_the_page_says_of_it(served: tuple[str, Path, bool]) -> None:
    """The rows of the table in docs/serving.md."""
    url, path, chat = served

    def status(where: str, **body: object) -> tuple[int, object]:
        reply = httpx.post(f"{url}{where}", json={"model": str(path), **body}, timeout=60, trust_env=False)
        return reply.status_code, reply.json() if reply.status_code == 200 else reply.text

    assert status("/completions", prompt=["a", "b"], max_tokens=1)[0] == 400
    code, answer = status("/completions", prompt="The", max_tokens=1, logprobs=5)
    assert code == 200 and "logprobs" not in answer["choices"][0]  # type: ignore[index]
    assert status("/completions", prompt="The", max_tokens=0, echo=True, logprobs=1)[0] == 500
    assert status("/completions", prompt="The", max_tokens=1, prompt_embeds="AAAA")[0] == 422
    code, answer = status(
        "/chat/completions", messages=[{"role": "user", "content": "The"}], max_tokens=1, logprobs=True, top_logprobs=2
    )
    assert code == (200 if chat else 500)
    if chat:
        assert not answer["choices"][0].get("logprobs")  # type: ignore[index]
