"""Where interfaces come from. `load(ref)` reads nothing but a directory's small files."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lfm.core.errors import MismatchError, ModelError, UnsafeError
from lfm.core.model import Model
from lfm.models.device import device, forward

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Find", "device", "forward", "load"]

Find = Callable[[str], str | None]
"""digest → a reference of a model with that digest, if one is known."""


Schemes = Mapping[str, Callable[[str], Model]]
"""prefix → what opens the rest of a reference that begins with it."""


def load(
    ref: str | Path,
    *,
    module: Callable[[], nn.Module] | None = None,
    find: Find | None = None,
    schemes: Schemes | None = None,
    **api: Any,
) -> Model:
    """A model by reference: a directory (checkpoint, adapter, program), a .safetensors file, or `api:URL[#model]`.

    module: builds the architecture of a bare state dict. find: where a part or base may lie if it has moved.
    schemes: other kinds of reference. api: what lfm.models.api.open_api takes. ModelError says what was looked for.
    """
    text = str(ref)
    for prefix, opened in (schemes or {}).items():
        if text.startswith(prefix):
            return opened(text.removeprefix(prefix))
    if text.startswith("api:"):
        from lfm.models.api import open_api

        return open_api(text, **api)
    path = Path(text).expanduser()
    if path.is_file() and path.suffix == ".safetensors":
        from lfm.models.checkpoint import open_bare

        return open_bare(path.absolute(), module)  # a link's own name has the suffix
    if path.is_file():
        from lfm.tensors.files import PICKLED, open_tensors

        if path.suffix in PICKLED:
            open_tensors(path)
        raise ModelError(f"{text} is not a model", fix="give a directory, a .safetensors file, or api:URL")
    if not path.is_dir():
        hub = " or download it first (`hf download`)" if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@\w+)?", text) else ""
        near = sorted(p.name for p in path.parent.glob(f"{path.name[:3]}*")) if path.parent.is_dir() else []
        raise ModelError(
            f"there is no model {text!r}",
            why=f"in {path.parent} there is {', '.join(near[:3])}" if near else "no such directory",
            fix=f"give a directory, a .safetensors file, zoo:NAME (see `lfm zoo`), or api:URL{hub}",
        )
    return _directory(path.absolute(), module, find, {**api, "schemes": schemes})


def _directory(path: Path, module: Any, find: Find | None, rest: dict[str, Any]) -> Model:
    def part(ref: str, digest: str) -> Model:
        error: ModelError | MismatchError | None = None
        try:
            found = load(ref, find=find, **rest)
            if not digest or found.digest == digest:
                return found
            error = MismatchError(f"{ref} has digest {found.digest[:12]}, {path} was made with {digest[:12]}")
        except ModelError as missing:
            error = missing
        other = find(digest) if find and digest else None
        if other:
            return load(other, find=find, **rest)
        raise ModelError(
            f"{path} is made over a model that cannot be found",
            why=error.what,
            fix=f"put the model with digest {digest[:12] or '(not recorded)'} back at {ref or 'its path'}, or run "
            "`lfm lineage --rebuild DIR` over the directory it lies in",
        )

    names = {file.name for file in path.iterdir()}
    if "program.json" in names:
        from lfm.models.program import open_program

        return open_program(path, part)
    if "adapter_config.json" in names:
        from lfm.models.adapter import open_adapter

        return open_adapter(path, part)
    if names & {"answers.json", "answers-00000.index"}:
        from lfm.models.answers import open_answers

        return open_answers(path)
    from lfm.models.checkpoint import CONFIG, open_bare, open_checkpoint

    if CONFIG in names and module is None:
        return open_checkpoint(path)
    if "model.safetensors" in names or "model.safetensors.index.json" in names:
        return open_bare(path, module)
    if "finding.json" in names:
        raise ModelError(f"{path} holds a finding, not a model", fix=f"read it with `lfm report {path}`")
    pickled = sorted(n for n in names if n.endswith((".bin", ".pt", ".pth", ".ckpt")))
    if pickled:
        raise UnsafeError(f"{path} has only pickled weights ({pickled[0]})", why="lfm unpickles nothing")
    raise ModelError(f"{path} is not a model", why="it has no config.json, adapter_config.json or program.json")
