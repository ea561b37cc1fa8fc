"""What it costs to start: CPU seconds of lfm's commands beside the imports of mergekit and peft.

    python benchmarks/startup.py --peer /path/to/another/venv/bin/python

Every command runs in a fresh process; the commands take turns, so that a busy machine slows all of them alike. A number
is the child's user and system time (not the clock's), the median of the repetitions, with the smallest and the largest.
A peer is looked for in this interpreter and in those given by --peer; one that none of them has is said to be absent.
The package mergekit imports nothing by itself: its module `merge` is what a program that merges imports.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

TARGET = 0.3
"""CPU seconds that `lfm --help` may take."""


class Command(NamedTuple):
    """One thing that is started: its name, and its arguments or None where it is not installed."""

    name: str
    argv: tuple[str, ...] | None


def commands(peers: Sequence[str]) -> list[Command]:
    ours = sys.executable
    lfm = Path(ours).with_name("lfm")
    start = (str(lfm),) if lfm.exists() else (ours, "-c", "import sys; from lfm.cli import main; sys.exit(main())")
    return [
        Command("python -c pass", (ours, "-c", "pass")),
        Command("import lfm", (ours, "-c", "import lfm")),
        Command("lfm --help", (*start, "--help")),
        Command("lfm methods", (*start, "methods")),
        Command("import peft", _importing("peft", [ours, *peers])),
        Command("import mergekit.merge", _importing("mergekit.merge", [ours, *peers])),
        Command("mergekit-yaml --help", _script("mergekit-yaml", [ours, *peers])),
    ]


def _importing(module: str, pythons: Sequence[str]) -> tuple[str, ...] | None:
    package = module.split(".")[0]
    look = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    for python in pythons:
        if subprocess.run([python, "-c", look], check=False).returncode == 0:
            return (python, "-c", f"import {module}")
    return None


def _script(name: str, pythons: Sequence[str]) -> tuple[str, ...] | None:
    found = next((path for python in pythons if (path := Path(python).with_name(name)).exists()), None)
    return (str(found), "--help") if found else None


def cpu_seconds(argv: Sequence[str], where: str) -> float:
    """User and system time of the command and of what it waited for. SystemExit with its output if it fails."""
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(argv, cwd=where, stdout=output, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            output.seek(0)
            raise SystemExit(f"{' '.join(argv)} failed:\n{output.read().decode(errors='replace')}")
    return used.ru_utime + used.ru_stime


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--peer", action="append", default=[], metavar="PYTHON", help="an interpreter that has a peer")
    parser.add_argument("--repeat", type=int, default=7, metavar="N", help="measured starts of each (default 7)")
    parser.add_argument("--json", action="store_true", help="print the measured seconds as JSON")
    given = parser.parse_args()
    listed = commands(given.peer)
    present = [(command.name, command.argv) for command in listed if command.argv]
    took: dict[str, list[float]] = {name: [] for name, _ in present}
    with tempfile.TemporaryDirectory() as where:
        for turn in range(given.repeat + 1):
            for name, argv in present:
                seconds = cpu_seconds(argv, where)
                if turn:  # the first start compiles and fills the file cache
                    took[name].append(seconds)
    middle = {name: median(seconds) for name, seconds in took.items()}
    if given.json:
        print(json.dumps({"cpu_seconds": took, "absent": [c.name for c in listed if not c.argv]}, indent=1))
    else:
        _show(listed, took, middle)
    return 0 if middle["lfm --help"] < TARGET else 1


def _show(listed: Sequence[Command], took: dict[str, list[float]], middle: dict[str, float]) -> None:
    print(f"{'':<22}{'CPU s, median':>14}{'min – max':>16}{'against lfm --help':>26}")
    for name, argv in listed:
        if not argv:
            print(f"{name:<22}{'absent':>14}")
            continue
        # Paired by turn: both of a pair met the same machine.
        ratios = [a / b for a, b in zip(took[name], took["lfm --help"])]
        ratio = f"{median(ratios):.1f}× ({min(ratios):.1f} – {max(ratios):.1f})"
        spread = f"{min(took[name]):.2f} – {max(took[name]):.2f}"
        print(f"{name:<22}{middle[name]:>14.3f}{spread:>16}{ratio:>26}")
    verdict = "met" if middle["lfm --help"] < TARGET else "missed"
    print(f"\nlfm --help: {middle['lfm --help']:.3f} s of CPU; under {TARGET} s is asked: {verdict}")


if __name__ == "__main__":
    sys.exit(main())
