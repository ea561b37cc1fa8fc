"""A child process that makes a run and prints a line at each tick, so that its parent can kill it at any of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(id: str, models: str, data: str, settings: str, out: str) -> None:
    import pytest

    import outside
    from lfm import runs

    outside.plant(pytest.MonkeyPatch())
    order = runs.Order(
        id=id, models=json.loads(models), data=json.loads(data), settings=json.loads(settings), out=Path(out), seed=5
    )
    done = runs.execute(order, show=lambda label, at, total: print("tick", label, at, flush=True))
    print("digest", done.output.digest, flush=True)


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent.parent)]
    main(*sys.argv[1:])
