"""Eight experts in one model, by every fusion there is: the eight-task table of model merging, on the zoo's mirror.

    python benchmarks/fusion_table.py [--only NAME …] [--unlabelled test|train] [--json]

Accuracy in percent on each task's 360 test images, and over all with a 95 % bootstrap interval over images (lfm.evals).
Methods are as they are by default, but for the settings shown. What is learned about a task is learned on images that
the base has not seen: for Fisher, RegMean, Twin-Merging and the soup of its training set; AdaMerging and WEMoE adapt to
the test images without their classes, as their papers do (--unlabelled train: to training images instead). The column
CLIP is what FusionBench reports for CLIP ViT-B/32. Then every two neighbours of the papers' order are held against each
other, with the interval of the paired difference over the same images. A method that is not installed is said to be
absent.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from lfm import models, zoo
from lfm.core import Codec, Inputs, Logits, Model, registry
from lfm.core.config import configure
from lfm.core.method import check
from lfm.data.records import Image
from lfm.data.task import task_for
from lfm.evals.estimate import Metric, difference, estimates, grouped_mean, mean
from lfm.runs.run import LocalRun
from lfm.zoo import vision

TASKS = tuple(vision.TASKS)
SEED = 0


@dataclass(frozen=True)
class Row:
    """A line of the table. clip: the percentage that FusionBench reports, where it has the method."""

    name: str
    id: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    data: str = ""  # "train" or "unlabelled"
    clip: float | None = None


ROWS = (
    Row("pretrained", clip=48.2),
    Row("average", "reuse.linear", clip=66.5),
    Row("greedy soup", "reuse.soup", data="train"),
    Row("Fisher", "reuse.fisher", {"groups": TASKS}, "train", 70.6),
    Row("task arithmetic", "reuse.task_arithmetic", {"scale": 0.3}, clip=68.0),
    Row("TIES", "reuse.ties", clip=72.2),
    Row("DARE", "reuse.dare_linear", {"scale": 0.3}),
    Row("DARE and TIES", "reuse.dare_ties", {"scale": 0.3}),
    Row("RegMean", "reuse.regmean", {"groups": TASKS}, "train", 82.4),
    Row("RegMean++", "reuse.regmean", {"groups": TASKS, "inputs": "merged"}, "train"),
    Row("Iso-C", "reuse.isotropic", {"subspaces": "common"}),
    Row("Iso-CTS", "reuse.isotropic"),
    Row("TSV-Merge", "reuse.tsv"),
    Row("WUDI", "reuse.wudi"),
    Row("SMILE", "reuse.smile"),
    Row("AdaMerging, by task", "reuse.adamerging", {"by": "task"}, "unlabelled"),
    Row("AdaMerging, by tensor", "reuse.adamerging", {}, "unlabelled", 82.6),
    Row("AdaMerging, kept diverse", "reuse.adamerging", {"diversity": 1.0, "lr": 3e-3, "steps": 300}, "unlabelled"),
    Row("WEMoE", "reuse.wemoe", {}, "unlabelled", 89.2),
    Row("Twin-Merging", "reuse.twin", {"groups": TASKS}, "train"),
    Row("individual", clip=90.3),
)


@dataclass(frozen=True)
class Measured:
    """hits: (8, 360), right or not. seconds: CPU time of the fusion and of one task's images."""

    row: Row
    hits: np.ndarray
    seconds: float

    @property
    def overall(self) -> Metric:
        groups = np.repeat(TASKS, self.hits.shape[1]).tolist()
        return estimates([grouped_mean("accuracy", self.hits.ravel(), groups)], seed=SEED, bootstrap=2000)["accuracy"]


def images(task: str, part: str) -> list[Image]:
    """A task's images under its group, of the training set those that the base has not seen."""
    kept = vision.images(task, part)[vision.FEW if part == "train" else 0 :]
    return [msgspec.structs.replace(record, group=task) for record in kept]


def few(part: str, count: int) -> list[Image]:
    """The first `count` of every task, in turn."""
    each = [images(task, part)[:count] for task in TASKS]
    return [record for row in zip(*each, strict=True) for record in row]


def right(model: Model, task: str) -> list[bool]:
    """Of each of a task's test images, whether the model names its class."""
    records = images(task, "test")
    asked = task_for(records, model.ask(Codec), model.facts)
    batch = asked.collate(records)
    said = asked.predict(model.ask(Logits).logits(batch), batch)
    return [a == b for a, b in zip(said, asked.truth(records), strict=True)]


def fused(row: Row, base: Model, experts: Sequence[Model], data: Mapping[str, Sequence[Image]], work: Path) -> Model:
    """What the row's method makes of the experts."""
    method = registry.get(row.id).method
    roles = {"base": (base,), "models": tuple(experts)}
    records = dict.fromkeys(method.data, data[row.data]) if row.data else {}
    config = configure(method.config, row.settings)
    inputs = check(row.id, method, Inputs({role: roles[role] for role in method.models}, records))
    if method.agree:
        method.agree(config, inputs)
    made = method.run(config, inputs, LocalRun(SEED, work))
    assert isinstance(made, Model)
    return made


def measure(row: Row, base: Model, experts: Sequence[Model], data: Mapping[str, Sequence[Image]]) -> Measured:
    began = time.process_time()
    with tempfile.TemporaryDirectory() as work:
        if row.name == "individual":
            each = dict(zip(TASKS, experts))
        else:
            model = fused(row, base, experts, data, Path(work)) if row.id else base
            right(model, TASKS[0])  # lazy tensors are computed when the model is first asked
            each = dict.fromkeys(TASKS, model)
        took = time.process_time() - began
        return Measured(row, np.array([right(each[task], task) for task in TASKS], dtype=np.float64), took)


def order(found: Sequence[Measured]) -> list[tuple[Measured, Measured, Metric]]:
    """Neighbours in the papers' order, worse first, with ours of the second less ours of the first."""
    known = sorted((m for m in found if m.row.clip is not None), key=lambda m: m.row.clip or 0.0)
    pairs = []
    for worse, better in pairwise(known):
        both = [mean("accuracy", m.hits.ravel()) for m in (worse, better)]
        pairs.append((worse, better, estimates([difference(*both)], seed=SEED, bootstrap=2000)["accuracy"]))
    return pairs


def show(found: Sequence[Measured], absent: Sequence[Row]) -> None:
    print("| | " + " | ".join(task[:9] for task in TASKS) + " | all eight | CLIP | CPU s |")
    print("|---" * (len(TASKS) + 4) + "|")
    for m in found:
        each = " | ".join(f"{100 * value:.1f}" for value in m.hits.mean(1))
        told = m.overall
        interval = f"{100 * told.value:.1f} ({100 * told.low:.1f}–{100 * told.high:.1f})"
        print(f"| {m.row.name} | {each} | {interval} | {m.row.clip or ''} | {m.seconds:.1f} |")
    for row in absent:
        print(f"{row.name}: {row.id} is absent")
    print("\nThe papers' order, neighbours (the second is better there), and here:")
    for worse, better, gap in order(found):
        verdict = "holds" if gap.low > 0 else "is reversed" if gap.high < 0 else "is open"
        told = f"{100 * gap.value:+.1f} points ({100 * gap.low:+.1f} to {100 * gap.high:+.1f})"
        print(f"  {worse.row.name} < {better.row.name}: {told}, {verdict}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="these lines of the table")
    parser.add_argument("--unlabelled", choices=("test", "train"), default="test", help="what is adapted to")
    parser.add_argument("--json", action="store_true", help="print hits and seconds as JSON")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    base = models.load(zoo.model("vit-base"))
    experts = [models.load(zoo.model(f"vit-{task}")) for task in TASKS]
    data = {"train": few("train", 256), "unlabelled": few(asked.unlabelled, 360)}
    wanted = [row for row in ROWS if not asked.only or row.name in asked.only]
    absent = [row for row in wanted if row.id and row.id not in registry.ids()]
    found = []
    for row in wanted:
        if row not in absent:
            print(row.name, file=sys.stderr, flush=True)
            found.append(measure(row, base, experts, data))
    if asked.json:
        rows = {m.row.name: {"accuracy": m.hits.mean(1).tolist(), "cpu_seconds": m.seconds} for m in found}
        print(json.dumps(rows, indent=1))
    else:
        show(found, absent)
    return 0


if __name__ == "__main__":
    sys.exit(main())
