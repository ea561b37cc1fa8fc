"""What a long sequence of edits does to a model when nobody asks whether they hold: the setting of the literature.

    python benchmarks/edit_sequence.py --model OUT/model --facts OUT/facts.jsonl [--count 1000] [--seeds 3]

Each editor's own arithmetic on one batch after another (rome: one fact), every change kept: no edit is refused, none
solved anew. After some of the batches all edits so far are asked again. ES, PS, NS, port. and ppl × as in
edit_table.py. Blocks are --layers, or the one where values are surest, which the gate then tells. CPU seconds are of
the edits alone.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import edit_table
import testbed
import torch

from lfm import runs
from lfm.data.records import Edit, Fact
from lfm.editing import batch, covariance, keys, outcome, setting, solve
from lfm.editing.keys import Projections
from lfm.editing.setting import Setting
from lfm.methods.edit import alpha_edit, memit, rome, ultra
from lfm.models import structure
from lfm.runs import refs
from lfm.runs.run import LocalRun

Step = Callable[[Sequence[Edit]], None]
"""Puts a batch into the projections, for good."""
EDITORS = ("rome", "memit", "memit, one by one", "alpha_edit", "alpha_edit, one by one", "ultra")
AT_ONCE = 100
KEYS = 400
"""Whose likeness is told."""
ASKED = (1, 3, 10, 30, 100, 200, 300, 500, 700, 1000, 2000)
"""Edits after which all so far are asked."""


def felt(ref: str, edits: Sequence[Edit], block: int, work: Path) -> str:
    """How much of what is written at one edit's key the others read: in ROME's direction, and in AlphaEdit's."""
    run = LocalRun(0, work)
    here = setting.opened(refs.model(ref), (), run, prefixes=5)
    key = keys.at_blocks(here.module, [block], [here.read(edit, block) for edit in edits])[block].T
    moment = covariance.loaded(covariance.moments(here, [block], run, 0.001)[block].matrix, 0.001)
    quiet = solve.quiet(moment, alpha_edit.Config().threshold).basis
    inside = quiet.T @ key

    def others(along: torch.Tensor) -> float:
        read = along.T @ key / (along * key).sum(0)[:, None]
        return read[~torch.eye(len(read), dtype=torch.bool)].square().mean().sqrt().item()

    energy = (inside.square().sum(0) / key.square().sum(0)).mean().item()
    return (
        f"of what is written at one of {len(edits)} keys another reads, root mean square, "
        f"{others(torch.linalg.solve(moment, key)):.3f} (rome, memit) or {others(quiet @ inside):.3f} "
        f"(alpha_edit, in {quiet.shape[1]} of {len(key)} dimensions, with {energy:.2f} of a key's energy)"
    )


def one_by_one(here: Setting, layers: tuple[int, ...], run: LocalRun) -> tuple[Projections, Step]:
    solver = rome.solver(rome.Config(), here, run, layers[-1])
    projections = Projections(here.module, layers[-1:], {})

    def step(edits: Sequence[Edit]) -> None:
        for edit in edits:
            _, _, (b, a) = solver(layers[-1], edit)
            projections.keep({layers[-1]: (b.float()[:, None], a.float()[None])})

    return projections, step


def batched(
    here: Setting, layers: tuple[int, ...], run: LocalRun, ridge: float, made: Any, editor: Any
) -> tuple[Projections, Step]:
    matrices = batch.known(here, ridge, run, made)
    how, projections = editor(here, matrices.get), Projections(here.module, layers, {})
    matrices.ready(layers, ())

    def step(edits: Sequence[Edit]) -> None:
        reads = [here.read(edit, layers[-1]) for edit in edits]
        projections.keep(batch.spread(here, projections, reads, how.find(layers[-1], reads), how))
        how.kept(layers, reads)

    return projections, step


def shifted(here: Setting, layers: tuple[int, ...], run: LocalRun) -> tuple[Projections, Step]:
    projections = Projections(here.module, layers, {})
    how = ultra.shifter(ultra.Config(), here, projections, run)

    def step(edits: Sequence[Edit]) -> None:
        how.begin([here.read(edit, layers[-1]) for edit in edits], edits)
        projections.keep(how.write(range(len(edits))))

    return projections, step


def sequence(
    ref: str, edits: list[Edit], name: str, layers: tuple[int, ...], seed: int, work: Path
) -> Iterator[dict[str, Any]]:
    """What is measured along the way."""
    run = LocalRun(seed, work)
    own = {"rome": 20, "ultra": 0}.get(name, 5)
    model = refs.model(ref)
    here = setting.opened(model, (), run, prefixes=own)
    if name == "rome":
        projections, step = one_by_one(here, layers, run)
    elif name == "ultra":
        stack = range(len(structure.blocks(here.module)))
        projections, step = shifted(here, tuple(stack)[len(stack) // 2 :], run)  # as edit.ultra has it
    elif name.startswith("memit"):
        config = memit.Config()
        editor = lambda here, lower: memit.editor(config, here, lower)  # noqa: E731
        projections, step = batched(here, layers, run, config.ridge, covariance.factored, editor)
    else:
        quiet = alpha_edit.Config()
        made = lambda moment: solve.quiet(moment, share=quiet.threshold)  # noqa: E731
        editor = lambda here, known: alpha_edit.editor(quiet, here, known)  # noqa: E731
        projections, step = batched(here, layers, run, quiet.ridge, made, editor)
    size = 1 if name == "rome" or name.endswith("one by one") else AT_ONCE
    before, around = here.perplexity(), outcome.around(here.says, edits)
    spent = 0.0
    for start in range(0, len(edits), size):
        began = time.process_time()
        step(edits[start : start + size])
        spent += time.process_time() - began
        done = min(start + size, len(edits))
        if done in ASKED or done == len(edits):
            so_far = edits[:done]
            neighbours = sum(len(edit.neighbours) for edit in so_far)
            told = outcome.measured(here.says, so_far, so_far, around[:neighbours])
            norms = [keys.weight(keys.projection(here.module, block)[1]).norm().item() for block in projections.blocks]
            yield {"after": done, **told, "perplexity": here.perplexity() / before, "seconds": spent, "norms": norms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zoo:lm")
    parser.add_argument("--facts", default="zoo:facts")
    parser.add_argument("--editors", nargs="+", choices=EDITORS, default=list(EDITORS))
    parser.add_argument("--layers", type=int, nargs="+")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=Path, default=Path("sequence_rows.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    facts = [fact for fact in runs.records(args.facts) if isinstance(fact, Fact)]
    layers = tuple(args.layers or ())
    if not layers:
        gate = testbed.gate(args.model, facts, [], memit.Config())
        print(gate)
        layers = (gate.block,)
    with tempfile.TemporaryDirectory() as work:
        print(felt(args.model, testbed.moved(facts, min(KEYS, args.count), 0), layers[-1], Path(work)), flush=True)
    known = [json.loads(line) for line in args.rows.read_text().splitlines()] if args.rows.exists() else []
    for name in args.editors:
        print(f"\n{name}\n\n| edits | " + " | ".join(edit_table.COLUMNS[c] for c in SHOWN) + " |")
        print("|---" * (len(SHOWN) + 1) + "|", flush=True)
        mine = []
        for seed in range(args.seeds):
            key = {"model": args.model, "editor": name, "layers": list(layers), "count": args.count, "seed": seed}
            made = next((row["measured"] for row in known if row["key"] == key), None)
            if made is None:
                edits = testbed.moved(facts, args.count, seed)
                with tempfile.TemporaryDirectory() as work:
                    made = list(sequence(args.model, edits, name, layers, seed, Path(work)))
                with args.rows.open("a") as out:
                    out.write(json.dumps({"key": key, "measured": made}) + "\n")
            mine.append(made)
        for point in zip(*mine, strict=True):
            cells = [edit_table.cell([each.get(column) for each in point]) for column in SHOWN]
            print(f"| {point[0]['after']} | " + " | ".join(cells) + " |", flush=True)


SHOWN = ("efficacy", "paraphrase", "neighbours_kept", "portability", "perplexity", "seconds")

if __name__ == "__main__":
    main()
