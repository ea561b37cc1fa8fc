"""Two processes of one run, as a launcher starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]


def both(child: Callable[[Path], None], place: Path, seconds: float = 200) -> None:
    """Run a test module's function in two processes, each told its rank; both must end well.

    Each has a home of its own, as on two machines.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    module = Path(child.__code__.co_filename)
    script = (
        f"import sys; sys.path[:0] = ['tests', {str(module.parent)!r}, 'src']\n"
        f"import {module.stem} as t; t.{child.__name__}(t.Path({str(place)!r}))\n"
    )
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1", "LFM_DEVICE": "cpu"}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            cwd=ROOT,
            env=os.environ
            | common
            | quiet
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LFM_HOME": str(place / f"home{rank}")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=seconds)[0] for process in children]
    finally:
        for process in children:
            process.kill()
    assert [process.returncode for process in children] == [0, 0], "\n".join(said)
