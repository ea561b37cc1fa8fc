"""What asking over HTTP takes of this machine beside the server's own time.

    python benchmarks/endpoint.py [--requests 2000] [--concurrency 8] [--delay 0.02]

The server is a process of its own and answers every completion at once, or after --delay. Told are the time that one
request takes from the question to the kept answer (looked up, charged to a budget on disk, sent, checked, written to
the cache), as latency and as CPU of the thread that asks, beside the latency of a bare socket; the CPU of the whole
process for many at once; and, with a server that takes a while, how near the requests under way are to the limit.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lfm.models.api.cache import Cache
from lfm.models.api.capabilities import Capabilities
from lfm.models.api.client import Client, Patience
from lfm.models.api.interfaces import ApiLogprobs, Line
from lfm.models.api.refs import endpoint_of
from lfm.models.budget import Budget, Meter

TOP = {f" word{i}": -0.5 - i for i in range(20)}
ANSWER = {
    "choices": [
        {
            "text": " word0",
            "index": 0,
            "logprobs": {"tokens": [" word0"], "token_logprobs": [-0.5], "top_logprobs": [TOP]},
        }
    ],
    "usage": {"prompt_tokens": 40, "completion_tokens": 1, "total_tokens": 41},
}


def serve(delay: float, port: Any) -> None:
    """Any request's answer, after so many seconds."""
    body = json.dumps(ANSWER).encode()
    answer = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
                await reader.readexactly(int(length or 0))
                if delay:
                    await asyncio.sleep(delay)
                writer.write(answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def run() -> None:
        server = await asyncio.start_server(talk, "127.0.0.1", 0)
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


def asked(line: Line, prompts: Sequence[str]) -> list[tuple[float, float]]:
    """Of each request, as many at once as may be: (seconds, CPU seconds of its thread)."""

    def one(prompt: str) -> tuple[float, float]:
        began, spent = time.perf_counter(), time.thread_time()
        ApiLogprobs(line).top([prompt], 20)
        return time.perf_counter() - began, time.thread_time() - spent

    return line.client.map(one, prompts)


def bare(port: int, count: int) -> list[float]:
    """Seconds of such a request by a socket alone."""
    body = json.dumps({"model": "m", "prompt": "p" * 160, "max_tokens": 1, "temperature": 0, "logprobs": 20}).encode()
    request = b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)
    found: list[float] = []
    with socket.create_connection(("127.0.0.1", port)) as line:
        for _ in range(count):
            began = time.perf_counter()
            line.sendall(request)
            line.recv(2**16)
            found.append(time.perf_counter() - began)
    return found


def ms(values: Sequence[float]) -> str:
    cut = statistics.quantiles(values, n=100)
    return f"median {1000 * cut[49]:.2f} ms, p99 {1000 * cut[98]:.2f} ms"


def with_server(delay: float, use: Callable[[int], None]) -> None:
    here, there = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(delay, there), daemon=True)
    server.start()
    try:
        use(here.recv())
    finally:
        server.terminate()
        server.join()


def main() -> None:
    told = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    told.add_argument("--requests", type=int, default=2000)
    told.add_argument("--concurrency", type=int, default=8)
    told.add_argument("--delay", type=float, default=0.02)
    args = told.parse_args()

    def line(port: int, here: Path, concurrency: int) -> Line:
        meter = Meter(Budget(10**9, 10**9, here / "spent.sqlite"))
        client = Client(
            endpoint_of(f"api:http://127.0.0.1:{port}/v1#m"), meter, Patience(concurrency=concurrency), None
        )
        return Line(client, Cache(here / "cache"), Capabilities(completions=True, top_k=20), "m", "identity")

    def prompts(name: str) -> list[str]:
        return [f"{name} {i} ".ljust(160, "p") for i in range(args.requests)]

    def at_once(port: int) -> None:
        with tempfile.TemporaryDirectory() as place:
            alone, many = line(port, Path(place), 1), line(port, Path(place), args.concurrency)
            asked(alone, prompts("warm")[:50])
            floor = bare(port, args.requests)
            each = asked(alone, prompts("alone"))
            print(f"a bare socket: {ms(floor)}")
            print(
                f"one at a time: latency {ms([s for s, _ in each])}; CPU of the thread {ms([cpu for _, cpu in each])}"
            )
            began, spent = time.perf_counter(), time.process_time()
            each = asked(many, prompts("many"))
            wall, cpu = time.perf_counter() - began, time.process_time() - spent
            print(
                f"{args.concurrency} at once: {len(each) / wall:.0f} requests/s; CPU of the process "
                f"{1000 * cpu / len(each):.2f} ms each, of the thread that asks {ms([cpu for _, cpu in each])}"
            )

    def after_a_while(port: int) -> None:
        with tempfile.TemporaryDirectory() as place:
            some = line(port, Path(place), args.concurrency)
            asked(some, prompts("warm")[:50])
            began = time.perf_counter()
            each = asked(some, prompts("slow"))
            busy = args.requests * args.delay / (time.perf_counter() - began)
            print(
                f"a server of {1000 * args.delay:g} ms: {busy:.1f} of {args.concurrency} under way on average; "
                f"beyond its time {ms([s - args.delay for s, _ in each])}; CPU {ms([cpu for _, cpu in each])}"
            )

    with_server(0.0, at_once)
    if args.delay:
        with_server(args.delay, after_a_while)


if __name__ == "__main__":
    main()
