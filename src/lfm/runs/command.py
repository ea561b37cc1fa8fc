"""The command line that places an order."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def command(
    id: str,
    models: Mapping[str, Sequence[Any]],
    data: Mapping[str, Any],
    settings: Mapping[str, Any],
    out: Path,
    *,
    seed: int = 0,
    evals: Sequence[Any] = (),
    form: str = "",
    budget: tuple[int | None, int | None] = (None, None),
    allow_nonfinite: bool = False,
    memory: int | None = None,
) -> str:
    """`lfm run …` that does the same again; what lies below the working directory is named from there."""
    parts = ["lfm", "run", id]
    parts += [f"{role}={_near(ref)}" for role, refs in models.items() for ref in refs]
    parts += [f"{role}={_near(ref)}" for role, ref in data.items()]
    for key, value in settings.items():
        parts += ["--set", f"{key}={value if isinstance(value, str) else json.dumps(value)}"]
    parts += [f"--eval={_near(ref)}" for ref in evals]
    parts += [f"--format={form}"] if form else []
    parts += [f"--seed={seed}"] if seed else []
    parts += [f"--budget-{name}={n}" for name, n in zip(("queries", "tokens"), budget) if n is not None]
    parts += limits(allow_nonfinite=allow_nonfinite, memory=memory)
    return shlex.join([*parts, "--out", _near(out)])


def limits(*, allow_nonfinite: bool, memory: int | None) -> list[str]:
    """The words for what weights may hold and how much memory may be used."""
    return [*(["--allow-nonfinite"] if allow_nonfinite else []), *([f"--max-memory={memory}B"] if memory else [])]


def _near(ref: Any) -> str:
    """A path below the working directory as seen from there; anything else as it is."""
    text = str(ref)
    here = f"{Path.cwd()}/"
    return text.replace(here, "", 1) if here in text else text
