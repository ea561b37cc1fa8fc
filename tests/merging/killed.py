"""A process that makes one merge again and again in forks, each killed at another point, and tells what each left.

    python killed.py HERE POINTS LFM-WORDS…

Points are numbers of an operation on files (open, rename, mkdir, remove, …: before it), or of a byte that the writer of
weights writes ("b1234": after it). POINTS: how many of them to try, spread evenly over all; 0 for every operation and
two hundred bytes. Each fork is killed by SIGKILL and the run is made again, at every other point killed once more on
its way. A line a point on standard output: the point, what could be loaded after the kill, and whether the result is
that of the run which was left alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

from lfm.cli import run

EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.copyfile", "shutil.rmtree")


def loadable(here: Path) -> dict[str, str]:
    """Directories that transformers would take for a model, each with its weights' digest."""
    found = {}
    for config in here.rglob("config.json"):
        place = config.parent
        index = place / "model.safetensors.index.json"
        if (place / "model.safetensors").exists():
            files = [place / "model.safetensors"]
        elif index.exists():
            files = [place / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        else:
            continue
        content = [file.read_bytes() if file.exists() else b"missing" for file in files]
        found[str(place.relative_to(here))] = hashlib.sha256(b"".join(content) + config.read_bytes()).hexdigest()
    return found


def within(here: Path, words: list[str], point: str = "", count: Path | None = None) -> int:
    """The run in a fork: its exit code, negative for a signal. point: where it kills itself; count: what it counts."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    counted = {"events": 0, "bytes": 0}
    lock = threading.Lock()
    pwrite, armed = os.pwrite, [True]

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def heard(event: str, args: tuple[object, ...]) -> None:
        if armed[0] and event in EVENTS and str(here) in str(args[0]):
            with lock:
                counted["events"] += 1
                if point == str(counted["events"]):
                    die()

    def cut(fd: int, data: memoryview, at: int) -> int:
        with lock:
            left = int(point[1:]) - counted["bytes"] if point.startswith("b") else len(data) + 1
            if left <= len(data):
                pwrite(fd, data[:left], at)
                die()
            counted["bytes"] += len(data)
        return pwrite(fd, data, at)

    sys.addaudithook(heard)
    os.pwrite = cut  # type: ignore[assignment]
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        code = run(words)
    armed[0] = False
    if count:
        count.write_text(json.dumps(counted))
    os._exit(code)


def main(here: Path, points: int, words: list[str]) -> None:
    count = here / "count"
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        assert run(words) == 0  # modules are read and kernels compiled, for all forks
    shutil.rmtree(here / "out")
    assert within(here, words, count=count) == 0
    all_of = json.loads(count.read_text())
    count.unlink()
    inputs = loadable(here)
    alone = inputs.pop("out")
    shutil.rmtree(here / "out")
    events = [str(i + 1) for i in range(all_of["events"])]
    bytes_ = [f"b{1 + i * (all_of['bytes'] - 1) // 200}" for i in range(200)]
    asked = [*events, *bytes_]
    for i, point in enumerate(asked if not points else asked[:: max(1, len(asked) // points)]):
        code = within(here, words, point)
        left = {place: digest for place, digest in loadable(here).items() if place not in inputs}
        left_out = (here / "out").exists()
        if not left_out and i % 2:
            within(here, words, asked[(7 * i) % len(asked)])
        ended = (here / "out").exists()  # killed once it was published: what it was made in may lie there yet
        again = 0 if ended else within(here, words)
        made = loadable(here).get("out")
        names = sorted(path.name for path in here.iterdir() if path.name.startswith(".out"))
        said = {
            "point": point,
            "code": code,
            "mixed": [place for place, digest in left.items() if digest != alone],
            "out": left_out and "out" not in left,
            "again": again,
            "same": made == alone,
            "left": names if not ended else [],
        }
        print(json.dumps(said), flush=True)
        shutil.rmtree(here / "out", ignore_errors=True)
        shutil.rmtree(here / ".out.lfm", ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
