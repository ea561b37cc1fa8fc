"""What language models learn from a teacher's text: its own samples in place of data, and its answers alone.

OMP_NUM_THREADS=1 python benchmarks/distill_language.py samples --seeds 3
OMP_NUM_THREADS=1 python benchmarks/distill_language.py text --seeds 3

samples: zoo:lm into one block with new weights; loss a token on other stories and on facts, and KL from the teacher.
text: what zoo:lm answers to questions, into two blocks with new weights (or --student, of any tokenizer); exact match
with the right answers to other questions about the same people.
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
from lfm.core.method import check
from lfm.data.records import Completion, Record, Text
from lfm.data.task import task_for
from lfm.data.wording import wording
from lfm.evals import evaluate
from lfm.methods.distill import response, samples, text
from lfm.runs.run import LocalRun
from lfm.train.losses import kl

TEACHER = "zoo:lm"


def made(module: Any, models: dict[str, Model], data: dict[str, Sequence[Record]], seed: int, **settings: Any) -> Model:
    """What a method makes, checked as a run checks it."""
    config = module.Config(**settings)
    inputs = Inputs({role: (model,) for role, model in models.items()}, data)
    module.agree(config, inputs)
    with tempfile.TemporaryDirectory() as work:
        run = LocalRun(seed, Path(work))
        done = module.run(config, check(module.__name__, module.METHOD, inputs), run)
    told = {
        name: run.notes[name] for name in ("samples", "distinct_pairs", "learned_from", "answers") if name in run.notes
    }
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


def by_samples(seeds: int, steps: int, count: int) -> None:
    teacher = runs.model(TEACHER)
    stories, facts = list(runs.records("zoo:stories-test"))[:100], list(runs.records("zoo:facts"))[:200]
    real = list(runs.records("zoo:stories"))[:count]
    training = {"steps": steps, "batch_size": 16, "lr": 3e-3, "layers": 1, "start": "random", "precision": "fp32"}
    drawn = {**training, "samples": count, "max_tokens": 96}
    both = {"teacher": teacher, "student": teacher}
    arms: dict[str, Callable[[int], Model]] = {
        "alone on stories": lambda s: made(response, both, {"train": real}, s, alpha=0.0, temperature=1.0, **training),
        "taught on stories": lambda s: made(response, both, {"train": real}, s, alpha=1.0, temperature=1.0, **training),
        "samples": lambda s: made(samples, both, {}, s, **drawn),
        "samples, text alone": lambda s: made(samples, both, {}, s, alpha=0.0, **drawn),
        "samples at 1.5": lambda s: made(samples, both, {}, s, sampling=1.5, **drawn),
        "samples, no copies (.7)": lambda s: made(samples, both, {}, s, alike=0.7, **drawn),
        "samples, 1000 first, 2 greedy": lambda s: made(samples, both, {}, s, first=1000, greedy=2, **drawn),
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


def _said(found: Sequence[Sequence[float]]) -> str:
    values = np.array(found)
    spread = values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1])
    return " | ".join(f"{mean:.3f} ± {sd:.3f}" for mean, sd in zip(values.mean(0), spread, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["samples", "text"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--student", default=TEACHER)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.part == "samples":
        by_samples(given.seeds, given.steps, given.samples)
    else:
        by_text(given.seeds, given.steps, given.student)


if __name__ == "__main__":
    main()
