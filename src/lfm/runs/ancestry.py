"""What was made from what."""

from __future__ import annotations

from pathlib import Path
from typing import final

import msgspec

from lfm import record
from lfm.core.errors import ModelError
from lfm.runs import ledger


@final
class Node(msgspec.Struct, frozen=True, kw_only=True):
    """A model or finding. method: what made it; empty for one that no run made. parents: digests, with their roles."""

    digest: str
    label: str
    path: str
    method: str = ""
    kind: str = ""
    parents: tuple[tuple[str, str], ...] = ()


def lineage(directory: Path) -> dict[str, Node]:
    """Every ancestor of a run's output by digest, the output first; then what no run is known to have made."""
    if not (directory / record.RUN).exists():
        raise ModelError(f"{directory} was not made by a run", why=f"it has no {record.RUN}")
    known = {entry.digest: entry for entry in ledger.entries() if entry.method}
    nodes: dict[str, Node] = {}
    waiting = [directory]
    while waiting:
        here = waiting.pop(0)
        run = record.read(here)
        if run.output.digest in nodes and nodes[run.output.digest].method:
            continue
        nodes[run.output.digest] = Node(
            digest=run.output.digest,
            label=run.title or here.name,
            path=str(here),
            method=run.id,
            kind=run.output.kind,
            parents=tuple((i.digest, i.role) for i in run.inputs),
        )
        for i in run.inputs:
            made = Path(i.path) if i.path else None
            if made and (made / record.RUN).exists() and record.read(made).output.digest == i.digest:
                waiting.append(made)
            elif i.digest in known and (Path(known[i.digest].path) / record.RUN).exists():
                waiting.append(Path(known[i.digest].path))
            elif i.digest not in nodes:
                label = i.ref if ":" in i.ref else Path(i.ref).name
                nodes[i.digest] = Node(digest=i.digest, label=label, path=i.path, kind=i.kind)
    return nodes
