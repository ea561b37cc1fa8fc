"""One exchange over HTTP: sent once, over kept connections, within a size, to whom we trust."""

from __future__ import annotations

import gzip
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from lfm.models.api.wire import Lost, TooLarge, Unsent, Wire
from scripted import Reply, scripted

CERTIFICATE = Path(__file__).with_name("localhost.pem")
"""Of this machine alone, with its key, for tests: signed by itself, so nobody trusts it."""

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


@contextmanager
def listening(talk: Callable[[socket.socket], None]) -> Iterator[int]:
    """A port each of whose connections is handed to `talk`."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                threading.Thread(target=talk, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


def heard(connection: socket.socket) -> bytes:
    """One request of a known length."""
    said = b""
    while b"\r\n\r\n" not in said:
        if not (more := connection.recv(4096)):
            return b""
        said += more
    head, _, body = said.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0] or 0)
    while len(body) < length:
        body += connection.recv(4096)
    return head + b"\r\n\r\n" + body


def served(connections: list[list[bytes]], connection: socket.socket) -> None:
    """Every request of a connection is answered, and noted with the connection's others."""
    connections.append(requests := [])
    with connection:
        while said := heard(connection):
            requests.append(said)
            connection.sendall(OK)


def test_a_connection_is_kept_for_the_next_request() -> None:
    connections: list[list[bytes]] = []
    with listening(partial(served, connections)) as port:
        wire = Wire({"X-Own": "7"}, None, 100)
        assert [wire.exchange(f"http://127.0.0.1:{port}/", b"{}", 5).status for _ in range(3)] == [200] * 3
    assert [len(requests) for requests in connections] == [3] and b"X-Own: 7\r\n" in connections[0][0]


def test_a_request_on_a_kept_connection_that_breaks_is_not_sent_twice() -> None:
    requests: list[bytes] = []

    def talk(connection: socket.socket) -> None:
        with connection:
            while said := heard(connection):
                requests.append(said)
                if b"second" in said:  # heard, perhaps charged for, and never answered
                    return
                connection.sendall(OK)

    with listening(talk) as port:
        wire, url = Wire({}, None, 100), f"http://127.0.0.1:{port}/"
        assert wire.exchange(url, b"first", 5).content == b"ok"
        with pytest.raises(Lost, match="broke"):
            wire.exchange(url, b"second", 5)
        assert wire.exchange(url, b"third", 5).content == b"ok"
    assert [said.rpartition(b"\n")[2] for said in requests] == [b"first", b"second", b"third"]


def test_a_get_that_breaks_is_not_sent_twice() -> None:
    requests: list[bytes] = []

    def talk(connection: socket.socket) -> None:
        with connection:
            while said := heard(connection):
                requests.append(said)
                if len(requests) == 2:
                    return
                connection.sendall(OK)

    with listening(talk) as port:
        wire, url = Wire({}, None, 100), f"http://127.0.0.1:{port}/"
        assert wire.exchange(url, None, 5).content == b"ok"
        with pytest.raises(Lost):
            wire.exchange(url, None, 5)
    assert len(requests) == 2


@pytest.mark.parametrize("packed", [False, True])
def test_an_answer_is_bounded_in_bytes_unpacked(packed: bool) -> None:
    body = b"x" * 3_000_000
    reply = Reply(gzip.compress(body), 200, {"content-encoding": "gzip"}) if packed else Reply(body)
    with scripted(lambda seen: reply) as script:
        assert Wire({}, None, len(body)).exchange(script.url, b"{}", 20).content == body
        with pytest.raises(TooLarge):
            Wire({}, None, len(body) - 1).exchange(script.url, b"{}", 20)


@pytest.mark.parametrize(
    ("coding", "body", "why"),
    [
        ("gzip", gzip.compress(os.urandom(300))[:-40], "broke off"),
        ("gzip", gzip.compress(b"all")[:-8] + bytes(8), "cannot be unpacked"),
        ("br", b"all", "'br', which was not asked for"),
    ],
    ids=["cut", "wrong sum", "unknown"],
)
def test_an_answer_that_cannot_be_unpacked_whole_is_none(coding: str, body: bytes, why: str) -> None:
    with (
        scripted(lambda seen: Reply(body, 200, {"content-encoding": coding})) as script,
        pytest.raises(Lost, match=why),
    ):
        Wire({}, None, 10_000).exchange(script.url, b"{}", 5)


def test_a_connection_that_its_server_closed_unsaid_is_not_used() -> None:
    """Or the request would be lost on it, and charged."""
    requests: list[bytes] = []

    def talk(connection: socket.socket) -> None:
        with connection:
            requests.append(heard(connection))
            connection.sendall(OK)

    with listening(talk) as port:
        wire, url = Wire({}, None, 100), f"http://127.0.0.1:{port}/"
        for _ in range(4):
            assert wire.exchange(url, b"{}", 5).content == b"ok"
            time.sleep(0.05)
    assert len(requests) == 4


def test_a_fork_opens_connections_of_its_own() -> None:
    connections: list[list[bytes]] = []
    with listening(partial(served, connections)) as port:
        code = f"""
import os
from lfm.models.api.wire import Wire
wire = Wire({{}}, None, 100)
def ask(body):
    assert wire.exchange("http://127.0.0.1:{port}/", body, 5).content == b"ok"
ask(b"before")
if not (child := os.fork()):
    ask(b"child")
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
ask(b"after")
"""
        subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
    bodies = [[said.rpartition(b"\n")[2] for said in requests] for requests in connections]
    assert bodies == [[b"before", b"after"], [b"child"]]


def test_an_answer_without_a_length_ends_with_its_connection() -> None:
    def talk(connection: socket.socket) -> None:
        with connection:
            heard(connection)
            connection.sendall(b"HTTP/1.0 200 OK\r\nRetry-After: 7\r\n\r\nall")

    with listening(talk) as port:
        answer = Wire({}, None, 100).exchange(f"http://127.0.0.1:{port}/", b"{}", 5)
    assert (answer.content, answer.headers["retry-after"]) == (b"all", "7")


def test_a_server_whose_headers_drip_is_left() -> None:
    def talk(connection: socket.socket) -> None:
        with connection:
            heard(connection)
            for i in range(100):
                try:
                    connection.sendall(OK[i : i + 1])
                except OSError:
                    return
                time.sleep(0.1)

    with listening(talk) as port, pytest.raises(Lost, match=r"within 0\.5 s"):
        Wire({}, None, 100).exchange(f"http://127.0.0.1:{port}/", b"{}", 0.5)


@contextmanager
def secured() -> Iterator[str]:
    """A server with a certificate of its own making."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)

    def talk(connection: socket.socket) -> None:
        try:
            with context.wrap_socket(connection, server_side=True) as safe:
                while heard(safe):
                    safe.sendall(OK)
        except OSError:
            pass  # it was not trusted

    with listening(talk) as port:
        yield f"https://localhost:{port}/"


def test_a_certificate_that_nobody_signed_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with secured() as url, pytest.raises(Unsent, match="certificate"):
        Wire({}, None, 100).exchange(url, b"{}", 5)


def test_certificates_are_those_that_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
    with secured() as url:
        wire = Wire({}, None, 100)
        assert [wire.exchange(url, b"{}", 5).content for _ in range(2)] == [b"ok", b"ok"]


def test_only_http_is_spoken(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    with pytest.raises(Unsent):
        Wire({}, None, 100).exchange(f"file://{tmp_path}/secret", None, 5)


def test_an_interrupt_is_heard_while_a_server_says_nothing(tmp_path: Path) -> None:
    def talk(connection: socket.socket) -> None:
        with connection:
            heard(connection)
            (tmp_path / "heard").touch()
            time.sleep(30)

    with listening(talk) as port:
        code = (  # whoever started the tests may have the interrupt ignored
            "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
            f"from lfm.models.api.wire import Wire; Wire({{}}, None, 9).exchange('http://127.0.0.1:{port}/', b'', 60)"
        )
        asking = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, env=os.environ, text=True)
        while not (tmp_path / "heard").exists():
            assert asking.poll() is None
            time.sleep(0.05)
        asking.send_signal(signal.SIGINT)
        _, said = asking.communicate(timeout=10)
    assert "KeyboardInterrupt" in said and said.count("Traceback") == 1
