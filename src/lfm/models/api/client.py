"""HTTP to one endpoint: retries, bounded concurrency, a deadline, a size bound, and a key that is never shown."""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, TypeVar, final
from urllib.parse import urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

import msgspec

from lfm.core.errors import EndpointError
from lfm.models.api.refs import KEYS, Endpoint
from lfm.models.api.wire import NOBODY, Answer, CalledOff, Lost, TooLarge, Unsent, Wire
from lfm.models.budget import Meter

A = TypeVar("A")
B = TypeVar("B")

AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Statuses after which the same request may succeed."""

LARGEST = 2**30
"""Bytes of an answer; an input-embedding table is the largest thing that is asked for."""

KEPT = "answers so far are kept: run it again when the server is well"
"""What to do where a server that has answered fails."""

LONGEST_WAIT = 120.0
"""Seconds that a server may make us wait before the next try."""

GRACE = 1.0
"""Seconds for answers under way at a ^C: they are paid for, and kept if they come."""

REDIRECTS = frozenset({301, 302, 303, 307, 308})


@final
@dataclass(frozen=True)
class Patience:
    """timeout: seconds for one whole answer. retries: tries after the first. concurrency: requests at once.
    sleep: instead of the clock's, for tests."""

    timeout: float = 120.0
    retries: int = 5
    concurrency: int = 8
    sleep: Callable[[float], object] | None = None


class Charge(NamedTuple):
    """The worst case of one request."""

    queries: int = 0
    tokens: int = 0


FREE = Charge()


class Refused(Exception):
    """The server understood the request and will not answer it (4xx): it lacks the ability, or the request is wrong."""

    def __init__(self, status: int, said: str) -> None:
        self.status, self.said = status, said
        super().__init__(f"{status}: {said}")


class Closed(EndpointError):
    """Asking otherwise would help nothing: no server there, no access, not an API, or a redirect elsewhere."""


@final
class Client:
    """Sends JSON to one endpoint and charges a meter for it."""

    def __init__(self, endpoint: Endpoint, meter: Meter, patience: Patience, key: str | None) -> None:
        self.endpoint, self.meter, self.patience = endpoint, meter, patience
        self._key = key
        self._gate = threading.BoundedSemaphore(patience.concurrency)
        self._jitter = random.Random()
        self._here = threading.local()
        shared = {"Authorization": f"Bearer {key}"} if key else {}
        self._wire = Wire(shared, None if endpoint.local else _proxy(endpoint.url), LARGEST)

    def get(self, path: str, charge: Charge = FREE, **patience: Any) -> bytes:
        """The body that lies at a path."""
        return self._ask(path, None, charge, None, **patience)

    def post(
        self,
        path: str,
        body: Any,
        charge: Charge,
        used: Callable[[bytes], int | None] = lambda _: None,
        **patience: Any,
    ) -> bytes:
        """The answer to a JSON body. used: the tokens that the answer says it took, to settle the charge by."""
        return self._ask(path, msgspec.json.encode(body), charge, used, **patience)

    def map(self, fn: Callable[[A], B], items: Sequence[A]) -> list[B]:
        """fn of each item, as many at once as may be under way. After the first failure no further item is begun; at
        ^C what is under way is called off."""
        if len(items) < 2:
            return [fn(item) for item in items]
        off = threading.Event()
        with ThreadPoolExecutor(
            min(self.patience.concurrency, len(items)), initializer=lambda: setattr(self._here, "off", off)
        ) as pool:
            waiting = [pool.submit(fn, item) for item in items]
            try:
                return [future.result() for future in waiting]
            except BaseException as error:
                for future in waiting:
                    future.cancel()
                if not isinstance(error, Exception):
                    try:
                        wait(waiting, GRACE)
                    finally:
                        off.set()
                raise

    def _ask(
        self,
        path: str,
        body: bytes | None,
        charge: Charge,
        used: Callable[[bytes], int | None] | None,
        *,
        timeout: float | None = None,
        retries: int | None = None,
    ) -> bytes:
        timeout = min(timeout or self.patience.timeout, self.patience.timeout)
        tries = 1 + min(self.patience.retries if retries is None else retries, self.patience.retries)
        trouble, pause, attempt, fix = "", 0.0, 0, ""
        off: threading.Event = getattr(self._here, "off", NOBODY)
        for attempt in range(tries):
            if attempt:
                (off.wait if self.patience.sleep is None else self.patience.sleep)(pause)
                if off.is_set():
                    raise CalledOff
            self.meter.reserve(*charge)
            try:
                with self._gate:
                    status, headers, content = self._once(path, body, timeout, off)
            except Unsent as error:
                self.meter.give_back(*charge)
                trouble, pause = self._plain(error), self._backoff(attempt)
                fix = KEPT if self.meter.spent().queries else "start it, or check the address"
                continue
            except Lost as error:  # the server may have counted it: the charge stays
                trouble, pause, fix = self._plain(error), self._backoff(attempt), ""
                continue
            if 200 <= status < 300:
                self._settle(charge, used(content) if used else None)
                return content
            said, fix = said_by(content), ""
            if status in AGAIN:
                if status == 429:
                    self.meter.give_back(0, charge.tokens)
                trouble = f"it answered {status}{': ' + said if said else ''}"
                pause = max(_retry_after(headers) if status in (429, 503) else 0.0, self._backoff(attempt))
                if pause > LONGEST_WAIT:
                    trouble += f" and asks to wait {pause:.0f} s"
                    break
                continue
            self.meter.give_back(0, charge.tokens)
            raise self._refusal(status, said)
        raise (Closed if fix else EndpointError)(
            f"{self.endpoint.url}{path} gave no answer in {attempt + 1} {'try' if attempt == 0 else 'tries'}",
            why=trouble,
            fix=fix or KEPT,
        )

    def _once(self, path: str, body: bytes | None, timeout: float, off: threading.Event) -> Answer:
        """One exchange, redirects within the same origin followed. No exception carries the key."""
        url, deadline = self.endpoint.url + path, time.monotonic() + timeout
        for _ in range(4):
            try:
                status, headers, content = self._wire.exchange(url, body, max(0.001, deadline - time.monotonic()), off)
            except TooLarge:
                raise EndpointError(f"{url} answered with more than {LARGEST // 2**20} MiB") from None
            if status not in REDIRECTS:
                return Answer(status, headers, self._redacted(content))
            url = self._redirected(status, url, headers.get("location", ""))
        raise EndpointError(f"{self.endpoint.url}{path} redirects in a circle")

    def _redirected(self, status: int, url: str, location: str) -> str:
        try:
            target = urljoin(url, location) if location else ""
            parts = urlsplit(target)
        except ValueError:
            target, parts = "", urlsplit("")
        if not target:
            raise Closed(f"{url} redirects ({status}) to nowhere", fix="is that the API's address? Most end in /v1")
        if parts[:2] != urlsplit(url)[:2]:
            there = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
            raise Closed(
                f"{self.endpoint.url} redirects elsewhere, to {self._plain(there)}",
                why="a key sent there would be a key given away",
                fix="name that address in the reference if it is the one you mean",
            )
        return target

    def _refusal(self, status: int, said: str) -> Exception:
        if status in (401, 403):
            sent = "a key was sent" if self._key else "no key was sent"
            return Closed(
                f"{self.endpoint.url} refused access ({status})",
                why=f"{sent}{'; it said: ' + said if said else ''}",
                fix=f"put the key into {' or '.join(KEYS)}; a key goes out over https or to this machine only",
            )
        return Refused(status, said)

    def _settle(self, charge: Charge, used: int | None) -> None:
        if used is None:
            return
        if used > charge.tokens and self.meter.budget.tokens is not None:
            raise EndpointError(
                f"{self.endpoint.url} claims {used} tokens for a request of at most {charge.tokens}",
                why="the token budget could not be kept with such a count",
                fix="set no token budget if the server adds text of its own to prompts",
            )
        self.meter.give_back(0, charge.tokens - used)

    def _backoff(self, attempt: int) -> float:
        """Seconds before the next try: doubling from half a second, with full jitter so that callers spread out."""
        return self._jitter.uniform(0.1, min(30.0, 0.5 * 2**attempt))

    def _redacted(self, content: bytes) -> bytes:
        return content.replace(self._key.encode(), b"[key]") if self._key else content

    def _plain(self, error: Exception | str) -> str:
        text = str(error) or type(error).__name__
        return text.replace(self._key, "[key]") if self._key else text


def said_by(content: bytes) -> str:
    """What an error's body says, in one line: OpenAI's error, FastAPI's detail, a page's title, or its beginning."""
    try:
        body = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError):
        text = content[:5000].decode("utf-8", "replace")
        title = re.search(r"<title>(.*?)</title>", text, re.IGNORECASE | re.DOTALL)
        return _line(title.group(1) if title else re.sub(r"<[^>]*>", " ", text))
    for name in ("error", "detail", "message"):
        if isinstance(body, dict) and name in body:
            body = body[name]
    return _line(body if isinstance(body, str) else msgspec.json.encode(body).decode())


def _proxy(url: str) -> str | None:
    """The proxy that this machine's settings name for an address."""
    parts, known = urlsplit(url), getproxies()
    return None if proxy_bypass(parts.hostname or "") else known.get(parts.scheme) or known.get("all")


def _line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:200]


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that the server asks for, from a number or an HTTP date; 0 if it asks for nothing intelligible."""
    value = headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0
