"""HTTP by libcurl, which reads and writes outside the interpreter's lock and keeps its connections."""

from __future__ import annotations

import os
import select
import threading
import time
import zlib
from collections.abc import Mapping
from io import BytesIO
from typing import TYPE_CHECKING, NamedTuple, final

if TYPE_CHECKING:
    from pycurl import Curl, CurlMulti

CONNECT = 10.0
"""Seconds to reach a server in."""

STEP = 0.5
"""Seconds between two looks at whether anybody still waits for the answer."""

PACKED = ("gzip", "x-gzip")
NOBODY = threading.Event()
"""Of a transfer that nobody calls off."""


class Unsent(Exception):
    """The request never reached the server."""


class Lost(Exception):
    """The request went out and no whole answer came back."""


class CalledOff(Exception):
    """Nobody waits for the answer any more."""


class TooLarge(Exception):
    """The answer has more bytes than were allowed."""


class Answer(NamedTuple):
    """headers: by lower-case name."""

    status: int
    headers: Mapping[str, str]
    content: bytes


@final
class Wire:
    """One request at a time for each thread that asks; connections are kept for the next.

    proxy: its address, or None for none, whatever the environment says. most: bytes of an answer, unpacked.
    """

    def __init__(self, headers: Mapping[str, str], proxy: str | None, most: int) -> None:
        self._proxy, self._most = proxy or "", most
        self._headers = [f"{name}: {value}".encode() for name, value in headers.items()]
        # By process, as a connection must not cross a fork: append and pop are atomic.
        self._idle: dict[int, list[tuple[Curl, CurlMulti, int]]] = {}

    def exchange(self, url: str, body: bytes | None, timeout: float, off: threading.Event = NOBODY) -> Answer:
        """What is answered to a JSON body, or to a GET where there is none, within so many seconds; no redirect is
        followed. off: calls it off. Unsent, Lost, TooLarge, CalledOff."""
        import pycurl

        curl, multi = self._kept() or self._opened()
        said, heads = BytesIO(), list[bytes]()
        curl.setopt(pycurl.URL, url.encode())
        curl.setopt(pycurl.WRITEFUNCTION, said.write)
        curl.setopt(pycurl.HEADERFUNCTION, heads.append)
        curl.setopt(pycurl.TIMEOUT_MS, max(1, int(1000 * timeout)))
        curl.setopt(pycurl.CONNECTTIMEOUT_MS, max(1, int(1000 * min(CONNECT, timeout))))
        if body is None:
            curl.setopt(pycurl.HTTPGET, 1)
        else:
            curl.setopt(pycurl.POST, 1)
            curl.setopt(pycurl.POSTFIELDSIZE, len(body))
            # From what cannot be read twice: or libcurl would itself send it again where a kept connection breaks off.
            curl.setopt(pycurl.READFUNCTION, BytesIO(body).read)
        curl.setopt(pycurl.FRESH_CONNECT, body is None)
        multi.add_handle(curl)
        try:
            self._through(multi, said, time.monotonic() + timeout, off)
            failed, socket = multi.info_read()[2], curl.getinfo(pycurl.ACTIVESOCKET)
        finally:
            multi.remove_handle(curl)
        if failed:
            _, code, why = failed[0]
            raise _failure(curl, code, why, timeout)
        status, fields = curl.getinfo(pycurl.RESPONSE_CODE), _fields(heads)
        self._idle.setdefault(os.getpid(), []).append((curl, multi, socket))
        return Answer(status, fields, unpacked(said.getvalue(), fields.get("content-encoding", ""), self._most))

    def _kept(self) -> tuple[Curl, CurlMulti] | None:
        """A connection that its server has not closed: libcurl itself looks once a second only, and a request that is
        lost on a closed one would be charged."""
        idle = self._idle.setdefault(os.getpid(), [])
        while True:
            try:
                curl, multi, socket = idle.pop()
            except IndexError:
                return None
            if socket < 0:  # closed as its last answer said: libcurl opens another
                return curl, multi
            heard = select.poll()
            heard.register(socket, select.POLLIN)
            if not heard.poll(0):
                return curl, multi

    def _through(self, multi: CurlMulti, said: BytesIO, deadline: float, off: threading.Event) -> None:
        """Until the transfer ends. In steps of this thread's own, so that ^C is heard between them."""
        while True:
            under_way = multi.perform()[1]
            if said.tell() > self._most:
                raise TooLarge
            if not under_way:
                return
            if off.is_set():
                raise CalledOff
            multi.select(min(STEP, max(0.001, deadline - time.monotonic())))

    def _opened(self) -> tuple[Curl, CurlMulti]:
        import certifi
        import pycurl

        curl = pycurl.Curl()
        curl.setopt(pycurl.PROTOCOLS, pycurl.PROTO_HTTP | pycurl.PROTO_HTTPS)
        curl.setopt(pycurl.HTTP_VERSION, pycurl.CURL_HTTP_VERSION_1_1)
        curl.setopt(pycurl.USERAGENT, "lfm")
        # Unpacked here: libcurl takes what breaks off in the middle for the whole.
        own = [b"Content-Type: application/json", b"Accept-Encoding: gzip", b"Expect:"]
        curl.setopt(pycurl.HTTPHEADER, [*self._headers, *own])
        curl.setopt(pycurl.NOSIGNAL, 1)
        curl.setopt(pycurl.PROXY, self._proxy)
        curl.setopt(pycurl.CAINFO, os.environ.get("SSL_CERT_FILE") or certifi.where())
        if directory := os.environ.get("SSL_CERT_DIR"):
            curl.setopt(pycurl.CAPATH, directory)
        return curl, pycurl.CurlMulti()


def _failure(curl: Curl, code: int, why: str, timeout: float) -> Exception:
    """Unsent where libcurl never came as far as sending."""
    import pycurl

    if not curl.getinfo(pycurl.REQUEST_SIZE):
        return Unsent(f"nothing answers there ({why})")
    if code == pycurl.E_OPERATION_TIMEDOUT:
        return Lost(f"it did not answer within {timeout:g} s")
    return Lost(f"the connection broke ({why or f'error {code} of libcurl'})")


def unpacked(said: bytes, coding: str, most: int) -> bytes:
    """A body as it was before it was packed. Lost where that is not all of it, TooLarge beyond so many bytes."""
    coding = coding.strip().lower()
    if coding in ("", "identity") or not said:
        return said
    if coding not in PACKED:
        raise Lost(f"the answer is packed as {coding!r}, which was not asked for")
    unpacker = zlib.decompressobj(zlib.MAX_WBITS | 16)
    try:
        found = unpacker.decompress(said, most + 1)
    except zlib.error as error:
        raise Lost(f"the answer cannot be unpacked ({error})") from None
    if len(found) > most:
        raise TooLarge
    if not unpacker.eof:
        raise Lost("the answer broke off")
    return found


def _fields(lines: list[bytes]) -> dict[str, str]:
    """The headers of the last answer: others are of what went before it, such as 100 Continue."""
    fields: dict[str, str] = {}
    for line in lines:
        if line.startswith(b"HTTP/"):
            fields = {}
        name, _, value = line.decode("latin-1").partition(":")
        fields[name.strip().lower()] = value.strip()
    return fields
