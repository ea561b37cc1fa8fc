"""What a student learns without data, against seconds and the teacher's queries, by every method that can do it.

Three pairs: `vit`, the zoo's ViT of digits and one block of it with new weights; `conv`, four convolutions with batch
norms that are trained here on the same digits, and three of half their width; `resnet`, CIFAR-10's ResNet-56 and a new
ResNet-20 (needs LFM_REAL_DATA; tested on 2,000 JPEG images, on which the teacher has 83 %). Beside them the student
alone on real images: their classes (`real-labels`) and the teacher's answers to them (`real-teacher`), as many steps.
A row is one run: accuracy and agreement with the teacher on test images, wall and CPU seconds, queries. Seconds are of
the whole run, of which the student's own steps are `alone`'s. Rows already in --rows are not run again.

    python benchmarks/data_free.py [--pair vit] [--ways …] [--seeds 3] [--steps 1000] [--rows FILE] [--show]
                                   [--set NAME=VALUE …]
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import cifar_resnet
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lfm import runs
from lfm.core import Codec, Gradients, Inputs, Model, registry
from lfm.core.config import configure
from lfm.core.method import check
from lfm.distilling import statistics as statistics_of
from lfm.distilling.student import Taught, formed
from lfm.models import device, forward, load
from lfm.runs import refs
from lfm.runs.run import LocalRun
from lfm.train import Fit, fit, seeded
from lfm.train.losses import kd

WAYS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "deepinversion": ("distill.noise", {"kind": "deepinversion"}),
    "adi": ("distill.noise", {"kind": "adi"}),
    "lopes": ("distill.noise", {"kind": "lopes"}),
    "cake": ("distill.cake", {}),
    "dafl": ("distill.generative", {"kind": "dafl"}),
    "zskt": ("distill.generative", {"kind": "zskt"}),
    "dfq": ("distill.generative", {"kind": "dfq"}),
    "cmi": ("distill.generative", {"kind": "cmi"}),
    "fast": ("distill.generative", {"kind": "fast"}),
    "adversarial": ("distill.adversarial", {"retain": 0.0}),
    "retain": ("distill.adversarial", {}),
    "entropy": ("distill.hard_label", {"kind": "entropy"}),
    "boundary": ("distill.hard_label", {"kind": "boundary"}),
}
REAL = ("real-labels", "real-teacher")
RECORDED = ("lopes",)
"""Given the teacher's activation records, of 300 real images that the student does not see."""


class Pair(NamedTuple):
    """student: (seed, directory) → a model. train, test: pictures and classes. settings: of every method."""

    teacher: Callable[[], Model]
    student: Callable[[int, Path], Model]
    train: Callable[[], tuple[Tensor, Tensor]]
    test: Callable[[], tuple[Tensor, Tensor]]
    settings: Mapping[str, Any]
    by_kind: Mapping[str, Mapping[str, Any]] = {}


def real() -> Path:
    return Path(os.environ["LFM_REAL_DATA"])


def digits(part: str) -> tuple[Tensor, Tensor]:
    records: Any = refs.records(f"zoo:digits{part}")
    codec = runs.model("zoo:vit").ask(Codec)
    labels = runs.model("zoo:vit").facts.labels
    pixels = codec.images([record.image for record in records])["pixel_values"]
    return pixels, torch.tensor([labels.index(record.label) for record in records])


SIDE, CENTRE, SPREAD = (3, 8, 8), (0.31,) * 3, (0.38,) * 3
"""Of the digits, as the zoo's ViT reads them."""


def conv(width: int, deep: int) -> nn.Module:
    """Convolutions with batch norms, of width channels, twice and then four times as many."""
    widths = [3, *(width * 2 ** min(i, 2) for i in range(deep))]
    layers: list[nn.Module] = []
    for i, (given, wide) in enumerate(pairwise(widths)):
        layers += [nn.Conv2d(given, wide, 3, 2 if i == 1 else 1, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


def bare(build: Callable[[], nn.Module], module: nn.Module, path: Path) -> Model:
    save_file({name: tensor for name, tensor in module.state_dict().items() if tensor.ndim}, path)
    return load(path, module=build)


def new_conv(seed: int, here: Path) -> Model:
    build = partial(conv, 16, 3)
    with seeded(seed):
        return bare(build, build(), here / "student.safetensors")


@cache
def taught_conv() -> Model:
    build, scratch = partial(conv, 32, 4), tempfile.TemporaryDirectory()
    atexit.register(scratch.cleanup)  # its weights are read as long as it is asked
    here = Path(scratch.name)
    with seeded(0):
        module = build()
    pixels, classes = digits("")
    config = Fit(epochs=12, batch_size=64, lr=3e-3, precision="fp32")

    def collate(numbers: Any) -> Any:
        chosen = list(numbers)
        return {"pixel_values": pixels[chosen], "labels": classes[chosen]}

    def loss(module: Any, batch: Any) -> Tensor:
        return torch.nn.functional.cross_entropy(forward(module, batch), batch["labels"])

    fit(module, range(len(pixels)), collate, loss, config, LocalRun(0, here))
    return bare(build, module, here / "teacher.safetensors")


VARIED = {"jitter": 0.125, "flip": True}
PAIRS = {
    "vit": Pair(
        lambda: runs.model("zoo:vit"),
        lambda seed, here: runs.model("zoo:vit"),
        lambda: digits(""),
        lambda: digits("-test"),
        {"layers": 1, "start": "random"},
    ),
    "conv": Pair(
        taught_conv,
        new_conv,
        lambda: digits(""),
        lambda: digits("-test"),
        {"image": SIDE, "mean": CENTRE, "std": SPREAD},
    ),
    "resnet": Pair(
        lambda: cifar_resnet.known(real(), 56),
        lambda seed, here: cifar_resnet.new(20, seed, here),
        lambda: cifar_resnet.images(real() / "cifar10" / "train.parquet"),
        lambda: cifar_resnet.images(real() / "cifar10" / "test.parquet"),
        {"image": cifar_resnet.SHAPE, "mean": cifar_resnet.MEAN, "std": cifar_resnet.STD},
        {"deepinversion": {"flip": True}, "adi": {"flip": True}, "cmi": VARIED, "fast": VARIED},
    ),
}


def told(model: Model, pixels: Tensor) -> Tensor:
    """Logits (N, classes)."""
    place = device()
    module = model.ask(Gradients).module().to(place).eval()
    with torch.no_grad():
        parts = [forward(module, {"pixel_values": part.to(place)}).cpu() for part in pixels.split(200)]
    return torch.cat(parts)


def recorded(pair: Pair, path: Path) -> Path:
    module, pixels = pair.teacher().ask(Gradients).module().to(device()).eval(), pair.train()[0][:300].to(device())
    batches = [partial(forward, module, {"pixel_values": part}) for part in pixels.split(100)]
    statistics_of.write(statistics_of.recorded(module, batches), path)
    return path


def from_real(way: str, pair: Pair, seed: int, steps: int, images: int, here: Path) -> tuple[Model, int]:
    """The student alone: on real images' classes, or on the teacher's answers to them."""
    run = LocalRun(seed, here)
    gradients = pair.student(seed, here).ask(Gradients)
    taught = Taught(**{key: value for key, value in pair.settings.items() if key in ("layers", "start")})
    module = formed(gradients.module(), taught, run)
    pixels, classes = pair.train()
    chosen = torch.randperm(len(pixels), generator=run.generator("images"))[:images]
    pixels, classes = pixels[chosen], classes[chosen]
    answers = told(pair.teacher(), pixels) if way == "real-teacher" else None

    def collate(numbers: Any) -> Any:
        return {"pixel_values": pixels[list(numbers)], "number": torch.tensor(list(numbers))}

    def loss(module: Any, batch: Any) -> Tensor:
        made, numbers = forward(module, batch), batch["number"].cpu()
        if answers is not None:
            return kd(made, answers[numbers].to(made), 4.0)
        return torch.nn.functional.cross_entropy(made, classes[numbers].to(made.device))

    # the rates of lfm.distilling.datafree
    config = Fit(steps=steps, batch_size=64, lr=1e-3, weight_decay=1e-4, schedule="cosine", precision="fp32")
    fit(module, range(len(pixels)), collate, loss, config, run)
    return gradients.rewrap(module), 0 if answers is None else len(pixels)


def made_by(way: str, pair: Pair, seed: int, settings: Mapping[str, Any], here: Path) -> tuple[Model, int]:
    id, own = WAYS[way]
    method = registry.get(id).method
    if way in RECORDED:
        own = {**own, "records": str(recorded(pair, here / "records.safetensors"))}
    config = configure(method.config, {**pair.settings, **own, **pair.by_kind.get(way, {}), **settings})
    inputs = Inputs({"teacher": (pair.teacher(),), "student": (pair.student(seed, here),)})
    if method.agree:
        method.agree(config, inputs)
    run = LocalRun(seed, here)
    made = method.run(config, check(id, method, inputs), run)
    assert isinstance(made, Model)
    return made, int(run.notes["queries"])


def row(name: str, way: str, seed: int, steps: int, images: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    pair = PAIRS[name]
    with tempfile.TemporaryDirectory() as scratch:
        here = Path(scratch)
        pair.teacher()  # made before the clock starts
        wall, cpu = time.perf_counter(), time.process_time()
        if way in REAL:
            made, queries = from_real(way, pair, seed, steps, images, here)
        else:
            known = WAYS[way][0]
            takes = registry.get(known).method.config.__struct_fields__
            given = {key: value for key, value in settings.items() if key in takes}
            made, queries = made_by(way, pair, seed, {"steps": steps, **given}, here)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    pixels, classes = pair.test()
    mine, theirs = told(made, pixels).argmax(-1), told(pair.teacher(), pixels).argmax(-1)
    return {
        "pair": name,
        "way": way,
        "seed": seed,
        "steps": steps,
        "images": images if way in REAL else 0,
        "settings": dict(settings),
        "accuracy": (mine == classes).double().mean().item(),
        "agreement": (mine == theirs).double().mean().item(),
        "teacher": (theirs == classes).double().mean().item(),
        "seconds": round(wall, 1),
        "cpu": round(cpu, 1),
        "queries": queries,
        "device": str(device()),
    }


def show(rows: list[dict[str, Any]]) -> None:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for each in rows:
        key = (each["pair"], each["steps"], json.dumps(each["settings"]), each["images"], each["way"])
        groups.setdefault(key, []).append(each)
    print("| pair | steps | settings | from | accuracy | of the teacher's answers | CPU s | queries | seeds |")
    print("|---|---|---|---|---|---|---|---|---|")
    for (pair, steps, settings, images, way), runs_ in sorted(groups.items()):

        def over(key: str, runs_: list[dict[str, Any]] = runs_) -> str:
            values = [100 * run[key] for run in runs_]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            return f"{statistics.mean(values):.1f}{spread}"

        cpu = statistics.mean(run["cpu"] for run in runs_)
        shown = f"{way} ({images})" if images else way
        asked = runs_[0]["queries"]
        print(
            f"| {pair} | {steps} | {settings} | {shown} | {over('accuracy')} | {over('agreement')} | {cpu:.0f} | "
            f"{asked:,} | {len(runs_)} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=list(PAIRS), default="vit")
    parser.add_argument("--ways", nargs="*", default=[*REAL, *WAYS], choices=[*REAL, *WAYS])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--images", type=int, default=300, help="real images, for the student alone")
    parser.add_argument("--set", nargs="*", default=[], help="NAME=VALUE for every method that has it")
    parser.add_argument("--rows", type=Path, default=Path("data_free_rows.jsonl"))
    parser.add_argument("--show", action="store_true")
    given = parser.parse_args()
    settings = {name: json.loads(value) for name, value in (each.split("=", 1) for each in given.set)}
    rows = [json.loads(line) for line in given.rows.read_text().splitlines()] if given.rows.exists() else []

    def key(each: Mapping[str, Any]) -> str:
        return json.dumps([each[name] for name in ("pair", "way", "seed", "steps", "images", "settings")])

    known = {key(each) for each in rows}
    for seed in range(0 if given.show else given.seeds):
        for way in given.ways:
            images = given.images if way in REAL else 0
            about = {"pair": given.pair, "way": way, "seed": seed, "steps": given.steps, "images": images}
            if key(about | {"settings": settings}) in known:
                continue
            rows.append(row(given.pair, way, seed, given.steps, given.images, settings))
            with given.rows.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(json.dumps(rows[-1]), flush=True)
    show(rows)


if __name__ == "__main__":
    main()
