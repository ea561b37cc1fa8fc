"""Two networks from different initializations in one: by their mean, permuted first (Git Re-Basin), or zipped (ZipIt!).

    python benchmarks/trained_apart.py [--seeds N] [--json]

The zoo's digits. Both networks learn all ten, or one the digits 0–4 and the other 5–9. Accuracy in percent and loss in
nats on the 360 test digits, the mean over N pairs of seeds; 256 training images, without classes, for what reads data.
Statistics of batch norms are measured anew in every row but the networks' own.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from lfm import models
from lfm.core import Gradients, Inputs, Logits, Model, registry
from lfm.core.config import configure
from lfm.core.method import check
from lfm.data.shares import batches
from lfm.models.norms import measured_anew
from lfm.runs.run import LocalRun
from lfm.train import seeded
from lfm.train.examine import examiner
from lfm.zoo import vision

ROWS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("mean", "reuse.linear", {}),
    ("permuted, by weights", "reuse.re_basin", {"reset": True}),
    ("permuted, by activations", "reuse.re_basin", {"reset": True, "match": "activations"}),
    ("zipped", "reuse.zipit", {}),
    ("zipped, β = ½", "reuse.zipit", {"beta": 0.5}),
    ("zipped, β = 1", "reuse.zipit", {"beta": 1.0}),
)
NETWORKS = {"ViT": (0, 300), "ResNet of 16 channels": (16, 200), "ResNet of 64": (64, 200)}


def built(width: int, seed: int) -> Any:
    """The zoo's ViT, or a residual network with batch norms: two stages of two blocks, `width` and twice it wide."""
    if not width:
        return vision.build(seed)
    from transformers import ResNetConfig, ResNetForImageClassification

    names = {i: str(i) for i in range(10)}
    back = {name: i for i, name in names.items()}
    sizes = {"embedding_size": width, "hidden_sizes": [width, 2 * width], "depths": [2, 2]}
    with seeded(seed):
        return ResNetForImageClassification(ResNetConfig(**sizes, layer_type="basic", id2label=names, label2id=back))


def trained(name: str, seed: int, classes: str, here: Path) -> Model:
    width, steps = NETWORKS[name]
    module = built(width, seed)
    work = here / f"{width}-{seed}-{classes}"
    making: Any = LocalRun(seed, work / "work")
    making.work.mkdir(parents=True)
    shown = [record for record in vision.shifted() if record.label in classes]
    vision.train(module, shown, making, "network", steps=steps, lr=2e-3, weight_decay=0.05)
    vision.save(module, work / "model")
    return models.load(work / "model")


def fused(id: str, settings: dict[str, Any], pair: tuple[Model, Model], here: Path) -> Model:
    method = registry.get(id).method
    config = configure(method.config, settings)
    seen = {"data": vision.images("identity", "train")} if method.data else {}
    inputs = check(id, method, Inputs({"models": pair}, seen))
    made = method.run(config, inputs, LocalRun(0, Path(tempfile.mkdtemp(dir=here))))
    assert isinstance(made, Model)
    if "reset" in settings or id == "reuse.zipit":
        return made
    shown = batches(pair[0], vision.images("identity", "train")[:256], 32)
    return made.ask(Gradients).rewrap(measured_anew(made.ask(Gradients).module(), shown))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    test = vision.images("identity", "test")
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        for name in NETWORKS:
            for what, classes in (("one task", ("0123456789",) * 2), ("two tasks", ("01234", "56789"))):
                rows = found.setdefault(f"{name}, {what}", {})
                for seed in range(given.seeds):
                    pair = (trained(name, 2 * seed, classes[0], here), trained(name, 2 * seed + 1, classes[1], here))
                    made = [("first", pair[0]), ("second", pair[1])]
                    made += [(row, fused(id, settings, pair, here)) for row, id, settings in ROWS]
                    for row, model in made:
                        score = examiner(test, pair[0])(model.ask(Logits).logits)
                        rows.setdefault(row, []).append((100 * score.accuracy, score.loss))
    means = {k: {r: [sum(x) / len(x) for x in zip(*v)] for r, v in rows.items()} for k, rows in found.items()}
    if given.json:
        print(json.dumps(means, indent=2))
        return
    print("| |" + "".join(f" {name} |" for name in means) + "\n|---" + "|---" * len(means) + "|")
    for row in ("first", "second", *(row for row, *_ in ROWS)):
        cells = [means[name][row] for name in means]
        print(f"| {row} |" + "".join(f" {accuracy:.1f} ({loss:.2f}) |" for accuracy, loss in cells))


if __name__ == "__main__":
    main()
