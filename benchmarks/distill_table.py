"""Every method of distillation on every testbed it fits, beside the student trained alone on the same data and steps.

Beds: `lm`, zoo:lm into two blocks with new weights, on its stories (loss a token on others); `vit`, zoo:vit into one
block with new weights, on 300 digits (accuracy); `stories`, stories3M into a Llama of stories260K's size with new
weights, on a part of TinyStories that the teacher may have read (loss a token on another part); `tokens`, the same into
a student of stories260K's 512 tokens (loss a token of its own); `resnet`, ResNet-56 into a new ResNet-20, on CIFAR-10's
JPEG images (accuracy). The last three need LFM_REAL_DATA. All train for --steps steps of one rate and batch (g2sd as
long again before, and `self` and `quantised` what they begin with); a method's further settings are its defaults, or
stand in WAYS. What needs no data is given none. A row is one run in a process of its own: what it scored, its CPU
seconds, how often the teacher was asked where that is counted. Rows already in --rows are not run again.

    python benchmarks/distill_table.py [--beds lm vit] [--ways …] [--seeds 3] [--steps 300] [--rows FILE] [--show]
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cifar_resnet
import torch
import transformers

from lfm import runs
from lfm.core import Inputs, Model, registry
from lfm.core.config import configure
from lfm.core.errors import LfmError
from lfm.core.method import check
from lfm.data.records import Text
from lfm.evals import evaluate
from lfm.models.codec import pad_id
from lfm.models.quiet import quiet
from lfm.runs.run import LocalRun

ALONE = "alone"
WAYS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    ALONE: ("distill.response", {"alpha": 0.0}),
    "response": ("distill.response", {}),
    "response, T=1": ("distill.response", {"temperature": 1.0}),
    "response, reverse": ("distill.response", {"divergence": "reverse"}),
    "response, jsd": ("distill.response", {"divergence": "jsd"}),
    "feature, fitnets": ("distill.feature", {"kind": "fitnets", "places": 0}),
    "feature, attention": ("distill.feature", {"kind": "attention", "places": 0}),
    "feature, ffa": ("distill.feature", {"kind": "ffa", "places": 0}),
    "feature, affinity": ("distill.feature", {"kind": "affinity", "places": 0}),
    "relation": ("distill.relation", {}),
    "relation, weak": ("distill.relation", {"distance": 1.0, "angle": 2.0}),
    "online": ("distill.online", {}),
    "self": ("distill.self", {}),
    "quantised": ("distill.quantised", {"bits": 2}),
    "quantised, labels": ("distill.quantised", {"bits": 2, "alpha": 0.0}),
    "multi_teacher": ("distill.multi_teacher", {}),
    "g2sd": ("distill.g2sd", {}),
    "on_policy, gkd": ("distill.on_policy", {"kind": "gkd"}),
    "on_policy, minillm": ("distill.on_policy", {"kind": "minillm"}),
    "on_policy, speculative": ("distill.on_policy", {"kind": "speculative"}),
    "text": ("distill.text", {"temperature": 1.0}),  # of the answers; after a whole story a greedy one is empty
    "samples": ("distill.samples", {}),
    "cross_tokenizer, spans": ("distill.cross_tokenizer", {}),
    "cross_tokenizer, sorted": ("distill.cross_tokenizer", {"kind": "sorted"}),
    "cross_tokenizer, uld": ("distill.cross_tokenizer", {"kind": "uld"}),
    "deepinversion": ("distill.noise", {"kind": "deepinversion"}),
    "adi": ("distill.noise", {"kind": "adi"}),
    "cake": ("distill.cake", {}),
    "dafl": ("distill.generative", {"kind": "dafl"}),
    "zskt": ("distill.generative", {"kind": "zskt"}),
    "dfq": ("distill.generative", {"kind": "dfq"}),
    "cmi": ("distill.generative", {"kind": "cmi"}),
    "fast": ("distill.generative", {"kind": "fast"}),
    "adversarial": ("distill.adversarial", {}),
    "hard_label, entropy": ("distill.hard_label", {"kind": "entropy"}),
    "hard_label, boundary": ("distill.hard_label", {"kind": "boundary"}),
}
AGAINST: Mapping[str, str] = {"quantised": "quantised, labels"}
"""What a way is held against where that is not the student alone: weights of two bits, by records and no teacher."""
LANGUAGE = ("on_policy", "text", "samples")
PICTURES = ("g2sd", "deepinversion", "adi", "cake", "dafl", "zskt", "dfq", "cmi", "fast", "adversarial", "hard_label")
CLASSES = ("g2sd", "multi_teacher")
"""What only classifiers are asked for here."""
APART = (ALONE, "text", "cross_tokenizer")
"""What learns from a teacher of another vocabulary."""


class Bed(NamedTuple):
    """teachers: the first is the teacher. student: (seed, directory) → what learns. lower: of its score, the better.
    read: what was made, as it is asked for its score. apart: teacher and student have other vocabularies."""

    teachers: Callable[[], list[Model]]
    student: Callable[[int, Path], Model]
    train: Callable[[], Sequence[Any]]
    test: Callable[[], Sequence[Any]]
    metric: str
    lower: bool
    settings: Mapping[str, Any]
    language: bool
    read: Callable[[Model], Model] = lambda made: made
    apart: bool = False


def real() -> Path:
    return Path(os.environ["LFM_REAL_DATA"])


def small(seed: int, here: Path, words: str = "stories3M") -> Model:
    """A Llama of stories260K's shape with the vocabulary of one of the two, and new weights."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(real() / "models" / words)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=172, num_hidden_layers=5, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = pad_id(tokenizer)
    torch.manual_seed(seed)
    path = here / f"small-{seed}"
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return runs.model(path)


def told(part: slice) -> list[Text]:
    """Pieces of TinyStories, of 600 characters."""
    whole = (real() / "text" / "tinystories_slice.txt").read_text(encoding="utf-8")
    return [Text(text=whole[i : i + 600]) for i in range(0, len(whole) - 600, 600)][part]


FRESH = {"layers": 2, "start": "random"}
BEDS: Mapping[str, Bed] = {
    "lm": Bed(
        lambda: [runs.model("zoo:lm")],
        lambda seed, here: runs.model("zoo:lm"),
        lambda: list(runs.records("zoo:stories"))[:400],
        lambda: list(runs.records("zoo:stories-test"))[:100],
        "loss", True, {**FRESH, "lr": 3e-3, "temperature": 1.0, "batch_size": 16}, True,
    ),
    "vit": Bed(
        lambda: [runs.model("zoo:vit"), runs.model("zoo:vit-identity")],
        lambda seed, here: runs.model("zoo:vit"),
        lambda: list(runs.records("zoo:digits"))[:300],
        lambda: list(runs.records("zoo:digits-test")),
        "accuracy", False, {**FRESH, "layers": 1, "lr": 1e-3, "batch_size": 32}, False,
    ),
    "stories": Bed(
        lambda: [runs.model(real() / "models" / "stories3M")],
        small,
        lambda: told(slice(0, 250)),
        lambda: told(slice(270, 320)),
        "loss", True, {"lr": 3e-3, "temperature": 1.0, "batch_size": 16}, True,
    ),
    "tokens": Bed(
        lambda: [runs.model(real() / "models" / "stories3M")],
        lambda seed, here: small(seed, here, "stories260K"),
        lambda: told(slice(0, 250)),
        lambda: told(slice(270, 320)),
        "loss", True, {"lr": 3e-3, "temperature": 1.0, "batch_size": 16}, True, apart=True,
    ),
    "resnet": Bed(
        lambda: [cifar_resnet.reading(cifar_resnet.known(real(), depth)) for depth in (56, 20)],
        lambda seed, here: cifar_resnet.reading(cifar_resnet.new(20, seed, here)),
        lambda: cifar_resnet.pictures(real() / "cifar10" / "train.parquet"),
        lambda: cifar_resnet.pictures(real() / "cifar10" / "test.parquet"),
        "accuracy", False, {"lr": 1e-3, "batch_size": 64}, False, cifar_resnet.reading,
    ),
}  # fmt: skip
NORMALISED = {"image": cifar_resnet.SHAPE, "mean": cifar_resnet.MEAN, "std": cifar_resnet.STD}


def suits(way: str, bed: Bed) -> bool:
    name = way.split(",")[0]
    if bed.apart or name == "cross_tokenizer":
        return bed.apart and name in APART
    return name not in (PICTURES + CLASSES if bed.language else LANGUAGE)


def inputs_of(way: str, bed: Bed, seed: int, steps: int, here: Path) -> Inputs:
    """The bed's models and records under the method's own roles."""
    method = registry.get(WAYS[way][0]).method
    student = bed.student(seed, here)
    teachers = bed.teachers()
    if way == ALONE:
        teachers = [student]
    given: dict[str, tuple[Model, ...]] = {}
    for role, slot in method.models.items():
        if role == "teacher":
            given[role] = tuple(teachers[:1] if slot.max == 1 else teachers)
        elif role == "student":
            given[role] = (student,) if slot.min == 1 else (student, bed.student(seed + 1, here))
        elif role == "model":  # a student that has learned alone teaches its like
            (here / ALONE).mkdir()
            given[role] = (made(ALONE, bed, seed, steps, here / ALONE)[0],)
    data = {role: bed.train() for role in ("train", "prompts") if role in method.data}
    return Inputs(given, data)


def made(way: str, bed: Bed, seed: int, steps: int, here: Path) -> tuple[Model, Mapping[str, Any]]:
    id, own = WAYS[way]
    method = registry.get(id).method
    inputs = inputs_of(way, bed, seed, steps, here)
    normalised = NORMALISED if bed is BEDS["resnet"] else {}
    wanted = {**bed.settings, "steps": steps, **normalised, **own}
    known = method.config.__struct_fields__
    config = configure(method.config, {key: value for key, value in wanted.items() if key in known})
    if method.agree:
        method.agree(config, inputs)
    run = LocalRun(seed, here / "work")
    (here / "work").mkdir()
    done = method.run(config, check(id, method, inputs), run)
    assert isinstance(done, Model)
    return done, run.notes


def row(name: str, way: str, seed: int, steps: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    bed = BEDS[name]
    found: dict[str, Any] = {"bed": name, "way": way, "seed": seed, "steps": steps}
    with tempfile.TemporaryDirectory() as scratch, quiet():
        began = time.process_time()
        try:
            model, notes = made(way, bed, seed, steps, Path(scratch))
        except LfmError as error:
            return found | {"error": error.what}
        found |= {"cpu": round(time.process_time() - began, 1), "queries": notes.get("queries", 0)}
        found["score"] = scored(model, bed)
    return found


def scored(model: Model, bed: Bed) -> float:
    found = evaluate(bed.read(model), bed.test()).metrics
    return math.log(found["perplexity"].value) if bed.lower else found["accuracy"].value


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Means ± half of a 95 % interval over seeds, and of what is gained on alone (or AGAINST), seed by seed."""
    print("| bed | steps | from | score | gained on alone | CPU s | seeds |\n|---|---|---|---|---|---|---|")
    for name, steps in sorted({(r["bed"], r["steps"]) for r in rows}):
        here = [r for r in rows if (r["bed"], r["steps"]) == (name, steps)]
        found = {(r["way"], r["seed"]): r["score"] for r in here if "score" in r}
        for way in WAYS:
            other = AGAINST.get(way, ALONE)
            some = [r for r in here if r["way"] == way]
            if errors := [r["error"] for r in some if "error" in r]:
                print(f"| {name} | {steps} | {way} | {errors[0]} | – | – | {len(some)} |")
                continue
            if not some:
                continue
            sign = -1 if BEDS[name].lower else 1
            held = [(r["score"], found[other, r["seed"]]) for r in some if (other, r["seed"]) in found]
            gains = [sign * (score - alone) for score, alone in held]
            cpu = statistics.mean(r["cpu"] for r in some)
            scores = said([r["score"] for r in some])
            gained = "–" if way in (ALONE, *AGAINST.values()) or not gains else said(gains)
            print(f"| {name} | {steps} | {way} | {scores} | {gained} | {cpu:.0f} | {len(some)} |")


T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57}
"""Student's t at 97.5 %, by the number of values."""


def said(values: Sequence[float]) -> str:
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    return f"{mean:.3f} ± {T[len(values)] * statistics.stdev(values) / len(values) ** 0.5:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beds", nargs="+", default=["lm", "vit"], choices=list(BEDS))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, max(T) + 1))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=Path, default=Path("distill_rows.jsonl"))
    parser.add_argument("--show", action="store_true", help="only print what is in --rows")
    given = parser.parse_args()
    rows = [json.loads(line) for line in given.rows.read_text().splitlines()] if given.rows.exists() else []
    rows = [r for r in rows if given.show or "error" not in r]  # what failed is tried again
    known = {(r["bed"], r["way"], r["seed"], r["steps"]) for r in rows}
    asked = [
        (name, way, seed, given.steps)
        for name in given.beds
        for seed in range(given.seeds)
        for way in given.ways
        if suits(way, BEDS[name])
    ]
    if not given.show:
        # a process each: nothing of one run is left to the next
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            for one in asked:
                if one not in known:
                    rows.append(pool.apply(row, one))
                    print(rows[-1], flush=True)
                    with given.rows.open("a") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
    show(rows)


if __name__ == "__main__":
    main()
