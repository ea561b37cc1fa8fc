"""Every editor of facts on as many edits as one asks for, at once and one after another: what held, and what it cost.

The zoo's language model (or --model, with --facts it knows), once it has passed the gate: values that editors search
for must make it say other objects. Which facts are changed, and the editor's own chance, go by seed.

ES: edits that greedy text shows, once all are made (those refused count as failed); recall: the same, of the edits that
were kept; PS: their paraphrases; NS: facts around them (four each) that it still says, of those it said before; port.:
what follows from an edit; ppl: perplexity on text of the model's own, by what it was before; CPU seconds of the whole
run; kB of what is saved, a patch where the editor makes one. Mean over seeds, ± half of a 95 % interval (Student's t).
A row is kept in --rows once it is there, and not run again.

    python benchmarks/edit_table.py [--counts 1 10 100] [--methods memit ...] [--seeds 3] [--rows rows.jsonl]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import testbed
import torch

from lfm import runs
from lfm.core import registry
from lfm.core.errors import LfmError
from lfm.data import files
from lfm.data.records import Fact, Text
from lfm.methods.edit import memit
from lfm.runs import Order

ONE_BY_ONE = {"batch_size": 1}
HUNDREDS = {"batch_size": 100}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "ft": ("edit.ft", {}),
    "rome": ("edit.rome", {}),
    "memit": ("edit.memit", {}),
    "memit, 100 at a time": ("edit.memit", HUNDREDS),
    "memit, one by one": ("edit.memit", ONE_BY_ONE),
    "emmet": ("edit.memit", {"variant": "emmet"}),
    "alpha_edit": ("edit.alpha_edit", {}),
    "alpha_edit, one by one": ("edit.alpha_edit", ONE_BY_ONE),
    "ultra": ("edit.ultra", {}),
    "grace": ("edit.grace", {}),
    "wise": ("edit.wise", {}),
    "melo": ("edit.melo", {}),
    "t_patcher": ("edit.t_patcher", {}),
    "calinet": ("edit.t_patcher", {"variant": "calinet"}),
    "mend": ("edit.mend", {}),
    "ke": ("edit.ke", {}),
    "serac": ("edit.serac", {}),
    "knowledge_neurons": ("edit.knowledge_neurons", {}),
}
LEARNED = ("mend", "ke", "serac")
"""Trained on the model's other facts first, in every run anew."""
DRAW = 2
"""Which facts are drawn by a seed: rows of another draw are other rows."""
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}
"""Student's t at 97.5 % for so many seeds."""
COLUMNS = {
    "efficacy": "ES",
    "recall": "recall",
    "paraphrase": "PS",
    "neighbours_kept": "NS",
    "portability": "port.",
    "perplexity": "ppl ×",
    "seconds": "CPU s",
    "kilobytes": "kB",
}


def row(model: str, facts: list[Fact], text: str, name: str, count: int, seed: int) -> dict[str, Any]:
    """What one run measured."""
    id, settings = ROWS[name]
    with tempfile.TemporaryDirectory() as here:
        edits, out = Path(here) / "edits.jsonl", Path(here) / "out"
        files.write(testbed.moved(facts, count, seed), edits)
        order = Order(
            id=id,
            models={"model": (model,)},
            data={
                "edits": edits,
                **({"practice": facts} if name in LEARNED else {}),
                **({"text": text} if text and "text" in registry.get(id).method.data else {}),
            },
            out=out,
            settings={"on_failure": "skip", **settings},
            form="adapter" if "adapter" in registry.get(id).method.forms else "",
            seed=seed,
        )
        began = time.process_time()
        try:
            done = runs.execute(order)
        except LfmError as error:
            return {"efficacy": 0.0, "seconds": time.process_time() - began, "error": f"{error.what}: {error.why}"}
        notes: dict[str, Any] = dict(done.notes)
        held = notes.get("edits", count)
        before, after = notes.get("perplexity_before"), notes.get("perplexity_after")
        return {
            "efficacy": notes["efficacy"] * held / count,
            "recall": notes["efficacy"],
            "paraphrase": notes.get("paraphrase"),
            "neighbours_kept": notes.get("neighbours_kept"),
            "portability": notes.get("portability"),
            "perplexity": after / before if before and after else None,
            "seconds": done.cpu_seconds,
            "layers": notes.get("layers", notes.get("layer")),
            "curve": done.curves.get("efficacy of the edits so far"),
            "kilobytes": sum(f.stat().st_size for f in out.rglob("*.safetensors")) / 1000,
        }


def cell(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    mean = statistics.mean(known)
    told = f"{mean:.2f}" if mean < 100 else f"{mean:.0f}"
    if len(known) in T95:
        told += f" ± {T95[len(known)] * statistics.stdev(known) / len(known) ** 0.5:.2f}"
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zoo:lm")
    parser.add_argument("--facts", default="zoo:facts")
    parser.add_argument("--text", default="", help="running text, for models that write none")
    parser.add_argument("--methods", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=Path, default=Path("edit_rows.jsonl"))
    parser.add_argument("--ungated", action="store_true", help="do not search for values first")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    facts = [fact for fact in runs.records(args.facts) if isinstance(fact, Fact)]
    texts = [text for text in (runs.records(args.text) if args.text else ()) if isinstance(text, Text)]
    if not args.ungated:
        print(testbed.gate(args.model, facts, texts, memit.Config()), flush=True)
    known: dict[str, dict[str, Any]] = {}
    if args.rows.exists():
        known = {line["key"]: line for line in map(json.loads, args.rows.read_text().splitlines())}
    for count in args.counts:
        print(f"\n{count} edit{'s' * (count > 1)}\n\n| editor | " + " | ".join(COLUMNS.values()) + " |")
        print("|---" * (len(COLUMNS) + 1) + "|", flush=True)
        for name in args.methods:
            found = []
            for seed in range(args.seeds):
                told = json.dumps(
                    [args.model, args.facts, name, *ROWS[name], count, seed, DRAW, *filter(None, [args.text])]
                )
                key = hashlib.sha256(told.encode()).hexdigest()[:16]
                if key not in known:
                    known[key] = {"key": key, "editor": name, "edits": count, "seed": seed} | row(
                        args.model, facts, args.text, name, count, seed
                    )
                    with args.rows.open("a") as out:
                        out.write(json.dumps(known[key]) + "\n")
                found.append(known[key])
            cells = [cell([each.get(column) for each in found]) for column in COLUMNS]
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
