"""What language models learn from text alone: a teacher's own samples in place of data, its answers, its choices.

OMP_NUM_THREADS=1 python benchmarks/distill_language.py samples --seeds 3
OMP_NUM_THREADS=1 python benchmarks/distill_language.py text --seeds 3
OMP_NUM_THREADS=1 python benchmarks/distill_language.py rerank --seeds 3

samples: zoo:lm into one block with new weights; loss a token on other stories and on facts, and KL from the teacher.
text: what zoo:lm answers to questions, into two blocks with new weights (or --student, of any tokenizer); exact match
with the right answers to other questions about the same people.
rerank: topics of stories; heads on zoo:lm's vectors, one learned from 24 examples and one from 400.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lfm import runs
from lfm.core import Codec, Inputs, Logits, Model
from lfm.core.interfaces import Classes
from lfm.core.method import check
from lfm.data.records import Completion, Record, Text
from lfm.data.task import task_for
from lfm.data.wording import wording
from lfm.evals import evaluate
from lfm.methods.distill import rerank, response, samples, text
from lfm.methods.prompt import api_few_shot
from lfm.runs.run import LocalRun
from lfm.train.losses import kl

TEACHER = "zoo:lm"
SHOWN = ("samples", "distinct_pairs", "learned_from", "answers", "threshold", "accuracy_small", "accuracy", "asked")
NOTES: dict[str, float | str] = {}
"""What the last run noted."""


def made(module: Any, models: dict[str, Model], data: dict[str, Sequence[Record]], seed: int, **settings: Any) -> Model:
    """What a method makes, checked as a run checks it."""
    config = module.Config(**settings)
    inputs = Inputs({role: (model,) for role, model in models.items()}, data)
    if module.METHOD.agree:
        module.METHOD.agree(config, inputs)
    with tempfile.TemporaryDirectory() as work:
        run = LocalRun(seed, Path(work))
        done = module.run(config, check(module.__name__, module.METHOD, inputs), run)
    NOTES.clear()
    NOTES.update(run.notes)
    told = {name: run.notes[name] for name in SHOWN if name in run.notes}
    print(f"    seed {seed} {told}", flush=True)
    return done


def losses(model: Model, teacher: Model, records: Sequence[Record]) -> tuple[float, float]:
    """(cross-entropy, KL from the teacher), a token of what the records' task scores."""
    task = task_for(records, model.ask(Codec), model.facts)
    total = np.zeros(3)
    for first in range(0, len(records), 25):
        batch = task.collate(records[first : first + 25])
        q, labels = task.scored(model.ask(Logits).logits(batch), batch)
        p, _ = task.scored(teacher.ask(Logits).logits(batch), batch)
        q, p = q.log_softmax(-1), p.log_softmax(-1)
        total += [-q.gather(1, labels[:, None]).sum().item(), kl(p, q).sum().item(), len(labels)]
    return float(total[0] / total[2]), float(total[1] / total[2])


def by_samples(seeds: int, steps: int, count: int, batch: int) -> None:
    teacher = runs.model(TEACHER)
    stories, facts = list(runs.records("zoo:stories-test"))[:50], list(runs.records("zoo:facts"))[:200]
    real = list(runs.records("zoo:stories"))[:count]
    training = {"steps": steps, "batch_size": batch, "lr": 3e-3, "layers": 1, "start": "random", "precision": "fp32"}
    drawn = {**training, "samples": count, "max_tokens": 64}
    both = {"teacher": teacher, "student": teacher}
    arms: dict[str, Callable[[int], Model]] = {
        "samples": lambda s: made(samples, both, {}, s, **drawn),
        "alone on stories": lambda s: made(response, both, {"train": real}, s, alpha=0.0, temperature=1.0, **training),
        "taught on stories": lambda s: made(response, both, {"train": real}, s, alpha=1.0, temperature=1.0, **training),
        "samples, 1000 first, 2 greedy": lambda s: made(samples, both, {}, s, first=1000, greedy=2, **drawn),
        "samples, no copies (.7)": lambda s: made(samples, both, {}, s, alike=0.7, **drawn),
        "samples at 1.5": lambda s: made(samples, both, {}, s, sampling=1.5, **drawn),
        "samples, text alone": lambda s: made(samples, both, {}, s, alpha=0.0, **drawn),
    }
    told = [*losses(teacher, teacher, stories), *losses(teacher, teacher, facts)]
    print("| learned from | stories: loss | KL | facts: loss | KL |\n|---|---|---|---|---|")
    print(f"| (the teacher) | {' | '.join(f'{v:.3f}' for v in told)} |", flush=True)
    for name, make in arms.items():
        found = []
        for seed in range(seeds):
            model = make(seed)
            found.append([*losses(model, teacher, stories), *losses(model, teacher, facts)])
        print(f"| {name} | {_said(found)} |", flush=True)


def by_text(seeds: int, steps: int, student: str) -> None:
    teacher, begin = runs.model(TEACHER), runs.model(student)
    ask, other = list(runs.records("zoo:qa")), list(runs.records("zoo:qa-test"))[:200]
    prompts = [Text(text=wording(record).prompt) for record in ask]
    right = [Completion(prompt=w.prompt, completion=w.answer) for w in map(wording, ask)]
    training: dict[str, Any] = {"steps": steps, "batch_size": 16, "lr": 3e-3, "precision": "fp32"}
    training |= {"layers": 2, "start": "random"} if student == TEACHER else {}
    both = {"teacher": teacher, "student": begin}
    said = {**training, "max_tokens": 12, "stop": ("Question",)}

    def score(model: Model) -> float:
        return evaluate(model, other).metrics["exact_match"].value

    def taught(seed: int, **settings: Any) -> Model:
        return made(text, both, {"prompts": prompts}, seed, **said, **settings)

    arms: dict[str, Callable[[int], Model]] = {
        "the right answers": lambda s: made(
            response, {"teacher": begin, "student": begin}, {"train": right}, s, alpha=0.0, temperature=1.0, **training
        ),
        "greedy answers": taught,
        "a drawn answer": lambda s: taught(s, temperature=1.0),
        "five drawn answers": lambda s: taught(s, temperature=1.0, answers=5),
        "five, those that agree": lambda s: taught(s, temperature=1.0, answers=5, keep="agreed", agreement=0.4),
    }
    print("| learned from | exact match |\n|---|---|")
    print(f"| (the teacher) | {score(teacher):.3f} |\n| (the student before) | {score(begin):.3f} |", flush=True)
    for name, make in arms.items():
        print(f"| {name} | {_said([[score(make(seed))] for seed in range(seeds)])} |", flush=True)


def by_choices(seeds: int, most: float) -> None:
    teacher = runs.model(TEACHER)
    train, dev = (list(runs.records("zoo:topics"))[some] for some in (slice(400), slice(400, None)))
    test: list[Any] = list(runs.records("zoo:topics-test"))[:400]

    def head(examples: int, seed: int) -> Model:
        return made(api_few_shot, {"model": teacher}, {"train": train}, seed, examples=examples)

    large, rows = head(400, 0), []
    print("| model | right of all | of those asked about | asked about |\n|---|---|---|---|")
    for seed in range(seeds):
        small = head(24, seed)
        pair = made(rerank, {"small": small, "large": large}, {"dev": dev}, seed, top=3, most=most)
        asked = np.exp(small.ask(Classes).tell(test).max(1)) < float(NOTES["threshold"])
        row = [float(asked.mean())]
        for model in (small, pair, large):
            told = model.ask(Classes)
            right = np.array([told.labels[i] == r.label for i, r in zip(told.tell(test).argmax(1), test, strict=True)])
            row += [float(right.mean()), float(right[asked].mean())]
        rows.append(row)
    mean, spread = np.mean(rows, 0), np.std(rows, 0, ddof=1) if seeds > 1 else np.zeros(len(rows[0]))
    for i, name in enumerate(("the small one", "the pair", "the large one")):
        share = ("0", f"{mean[0]:.2f} ± {spread[0]:.2f}", "1")[i]
        shown = [f"{mean[1 + 2 * i + j]:.3f} ± {spread[1 + 2 * i + j]:.3f}" for j in (0, 1)]
        print(f"| {name} | {shown[0]} | {shown[1]} | {share} |", flush=True)


def _said(found: Sequence[Sequence[float]]) -> str:
    values = np.array(found)
    spread = values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1])
    return " | ".join(f"{mean:.3f} ± {sd:.3f}" for mean, sd in zip(values.mean(0), spread, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["samples", "text", "rerank"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--most", type=float, default=0.5)
    parser.add_argument("--student", default=TEACHER)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.part == "samples":
        by_samples(given.seeds, given.steps, given.samples, given.batch)
    elif given.part == "rerank":
        by_choices(given.seeds, given.most)
    else:
        by_text(given.seeds, given.steps, given.student)


if __name__ == "__main__":
    main()
