"""Facts of zoo:lm at random, each given another object of its relation: what an editor makes of them, by draws.

python benchmarks/edit_draws.py edit.t_patcher edit.melo --facts 10 40 --draws 3 --set variant=calinet
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import lfm
from lfm import runs
from lfm.core.errors import LfmError
from lfm.data.records import Edit, Fact

COLUMNS = ("edits", "efficacy", "paraphrase", "neighbours_kept", "perplexity_before", "perplexity_after")


def draw(count: int, seed: int) -> tuple[Edit, ...]:
    """Neighbours: two other people's same fact, and two other facts of the same person; none that is edited itself."""
    facts = [fact for fact in runs.records("zoo:facts") if isinstance(fact, Fact)]
    chance = random.Random(seed)
    chosen = chance.sample(facts, count)
    edited = {fact.prompt for fact in chosen}
    made = []
    for fact in chosen:
        objects = sorted({f.object for f in facts if f.relation == fact.relation} - {fact.object})
        same = [f for f in facts if f.relation == fact.relation and f.subject != fact.subject]
        own = [f for f in facts if f.subject == fact.subject and f.relation != fact.relation]
        beside = chance.sample(same, 2) + chance.sample(own, 2)
        made.append(
            Edit(
                subject=fact.subject,
                relation=fact.relation,
                object=fact.object,
                new_object=chance.choice(objects),
                prompt=fact.prompt,
                paraphrases=fact.paraphrases,
                neighbours=tuple((f.prompt, f.object) for f in beside if f.prompt not in edited),
            )
        )
    return tuple(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("editors", nargs="+")
    parser.add_argument("--facts", type=int, nargs="+", default=[10, 40])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE")
    given = parser.parse_args()
    torch.set_num_threads(1)
    how: dict[str, Any] = {"on_failure": "skip"} | dict(setting.split("=", 1) for setting in given.set)
    print("| editor | facts | draw | " + " | ".join(COLUMNS) + " | CPU seconds |\n" + "|---" * (4 + len(COLUMNS)) + "|")
    for editor in given.editors:
        for count in given.facts:
            for seed in range(given.draws):
                with tempfile.TemporaryDirectory() as work:
                    begun = time.process_time()
                    try:
                        notes = lfm.run(
                            editor, {"model": "zoo:lm"}, {"edits": draw(count, seed)}, out=Path(work) / "out", set=how
                        ).notes
                        told = [f"{float(notes[name]):.3g}" if name in notes else "" for name in COLUMNS]
                    except LfmError as error:
                        told = [str(error), *[""] * (len(COLUMNS) - 1)]
                    row = [editor, count, seed, *told, f"{time.process_time() - begun:.1f}"]
                    print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
