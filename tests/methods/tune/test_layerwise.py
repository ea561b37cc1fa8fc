"""The last k blocks: which weights move, at what rate, and that held-out records choose k."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from case import Case
from lfm.core import Codec, Gradients, Inputs, Logits, Model, Sizes
from lfm.core.errors import ConfigError
from lfm.core.method import Amount, check
from lfm.data import records as data
from lfm.data.files import write
from lfm.methods.tune import layerwise
from lfm.models import load
from lfm.runs.run import LocalRun
from lfm.train import seeded
from lfm.train.examine import examiner
from lfm.zoo import vision
from robust import accuracy, zoo

TRAIN = [data.Label(text=f"the {word} sat", label=word) for word in ("cats", "dogs", "birds")]
DEV = [data.Label(text=f"{word} on the mat", label=word) for word in ("cats", "dogs", "birds")]


def case(here: Path) -> Case:
    tiny.classifier(here / "base")
    write(TRAIN, here / "train.jsonl")
    write(DEV, here / "dev.jsonl")
    settings = {"steps": 4, "lr": 0.01, "checkpoint_every": 0.0}
    return Case({"model": ("base",)}, {"train": "train.jsonl", "dev": "dev.jsonl"}, settings)


def tune(directory: Path, work: Path, dev: list[Any] | None = None, **settings: Any) -> tuple[Model, LocalRun]:
    given = {"train": TRAIN} | ({"dev": dev} if dev else {})
    inputs = check("tune.layerwise", layerwise.METHOD, Inputs({"model": (load(directory),)}, given))
    run = LocalRun(0, work)
    made = layerwise.run(layerwise.Config(**({"steps": 6, "lr": 0.01} | settings)), inputs, run)
    assert isinstance(made, Model)
    return made, run


def test_the_last_blocks_and_the_head_move_and_no_others(tmp_path: Path) -> None:
    tiny.classifier(tmp_path / "base")
    before = load(tmp_path / "base").ask(Gradients).module().state_dict()
    for k in (1, 2):
        made, _ = tune(tmp_path / "base", tmp_path / str(k), last=k)
        after = made.ask(Gradients).module().state_dict()
        moved = {name for name in after if not torch.equal(after[name], before[name])}
        first = {name for name in before if ".layer.0." in name or ".layers.0." in name}
        assert first and any(name.startswith("classifier") for name in moved)
        if k == 1:
            assert not moved & first and not any("embedding" in name for name in moved)
        else:
            assert moved & first and any("embedding" in name for name in moved)


@pytest.mark.parametrize("make", [tiny.causal, tiny.masked, tiny.classifier, tiny.seq2seq, tiny.vit])
def test_rates_fall_by_the_block(make: Any, tmp_path: Path) -> None:
    """η · decay^depth, the head at depth 0; each parameter has one rate, and all train where k is all blocks."""
    make(tmp_path / "base")
    module = load(tmp_path / "base").ask(Gradients).module()
    held = layerwise.parts(module)
    rates = layerwise.freeze(module, len(held) - 2, 0.5)
    found = {name: rates(name) for name, _ in module.named_parameters()}
    assert set(found.values()) <= {0.5**d for d in range(len(held))} and max(found.values()) == 1
    assert all(p.requires_grad for p in module.parameters())
    blocks = [name for name in found if any(name.startswith(block) for block in layerwise.all_blocks(module))]
    assert {found[name] for name in blocks} == {0.5**d for d in range(1, len(held) - 1)}
    layerwise.freeze(module, 1, 0.5)
    last = layerwise.all_blocks(module)[-1]
    assert {n for n in blocks if module.get_parameter(n).requires_grad} == {
        n for n in blocks if n.startswith(f"{last}.")
    }
    assert 0 < sum(p.requires_grad for p in module.parameters()) < len(found)


def test_without_blocks_the_layers_that_hold_weights_are_counted_the_last_as_the_head() -> None:
    net = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(3)))
    assert layerwise.parts(net)[0] == [] and len(layerwise.parts(net)) - 2 == 2
    rates = layerwise.freeze(net, 1, 0.5)
    assert [(rates(f"{n}.weight"), net.get_parameter(f"{n}.weight").requires_grad) for n in range(3)] == [
        (0.25, False),
        (0.5, True),
        (1.0, True),
    ]


def test_adams_first_step_is_each_parameters_own_rate(tmp_path: Path) -> None:
    """m/√v of AdamW's first step is ±1 wherever there is a gradient: so what moved most moved by lr · decay^depth, the
    head's depth 0, the last block's 1, the first's 2, that of what precedes them 3."""
    tiny.classifier(tmp_path / "base")
    settings: dict[str, Any] = {"steps": 1, "lr": 1e-3, "warmup": 0.0, "schedule": "constant", "weight_decay": 0.0}
    made, run = tune(tmp_path / "base", tmp_path / "work", last=2, decay=0.25, **settings)
    before = load(tmp_path / "base").ask(Gradients).module().state_dict()
    module = made.ask(Gradients).module()
    moved: dict[int, float] = {}
    for name, after in module.state_dict().items():
        depth = next((d for part, d in (("classifier", 0), ("layer.1.", 1), ("layer.0.", 2)) if part in name), 3)
        if after.is_floating_point() and "pooler" not in name:
            moved[depth] = max(moved.get(depth, 0.0), float((after - before[name]).abs().max()))
    assert moved == pytest.approx({d: 1e-3 * 0.25**d for d in range(4)}, rel=1e-2)
    assert run.notes["trained"] == sum(p.numel() for p in module.parameters())
    assert all(p.requires_grad for p in module.parameters())
    shallow, run = tune(tmp_path / "base", tmp_path / "shallow", last=1, **settings)
    module = shallow.ask(Gradients).module()
    above = [p.numel() for n, p in module.named_parameters() if "embeddings" not in n and "layer.0." not in n]
    assert run.notes["trained"] == sum(above) and all(p.requires_grad for p in module.parameters())


def test_of_equal_depths_the_shallower_is_taken_and_patience_alone_looks_at_dev(tmp_path: Path) -> None:
    """At a rate that moves nothing in fp32 all depths lose the same; each is trained under a name of its own."""
    tiny.classifier(tmp_path / "base")
    _, run = tune(tmp_path / "base", tmp_path / "still", DEV, lr=1e-30, checkpoint_every=0.0)
    assert run.notes["held_out_last_1"] == run.notes["held_out_last_2"] and run.notes["last"] == 1
    assert set(run.curves) == {"last 1", "last 2"}
    _, run = tune(tmp_path / "base", tmp_path / "patient", DEV, patience=1, last=1)
    assert set(run.curves) == {"last 1", "last 1 held out"}


def test_a_plan_is_the_sum_over_the_depths_that_are_tried(tmp_path: Path) -> None:
    """flops = tokens · (4 P + 2 P k / L) for each k: forward and activations' gradients whole, weights' of k blocks."""
    facts = load(tiny.classifier(tmp_path / "base")).facts
    sizes = Sizes({"model": (facts,)}, {"train": Amount(8, 80)})
    one, two, both = (layerwise.cost(layerwise.Config(last=k, steps=5, batch_size=4), sizes) for k in (1, 2, 0))
    assert facts.layers == 2 and one.flops == pytest.approx(5 * 4 * 10 * facts.parameters * (4 + 2 / 2))
    assert two.flops == pytest.approx(5 * 4 * 10 * facts.parameters * (4 + 2))
    assert (both.flops, both.steps) == (one.flops + two.flops, 10) and both.memory == two.memory > one.memory


def test_held_out_records_choose_how_deep(tmp_path: Path) -> None:
    """Of the trainings, which are those with k given, the one with the least held-out loss is the result."""
    tiny.classifier(tmp_path / "base")
    made, run = tune(tmp_path / "base", tmp_path / "sweep", DEV)
    model = load(tmp_path / "base")
    losses = {}
    for k in (1, 2):
        one, _ = tune(tmp_path / "base", tmp_path / f"last{k}", DEV, last=k)
        losses[k] = examiner(DEV, model)(one.ask(Logits).logits).loss
        assert run.notes[f"held_out_last_{k}"] == pytest.approx(losses[k], rel=1e-5)
        if run.notes["last"] == k:
            assert one.digest == made.digest
    assert run.notes["last"] == min(losses, key=lambda k: losses[k])
    assert layerwise.depths(12) == [1, 2, 4, 8, 12] and layerwise.depths(1) == [1]


def test_what_says_nothing_of_depth_is_refused(tmp_path: Path) -> None:
    tiny.classifier(tmp_path / "base")
    for last in (3, 9):
        with pytest.raises(ConfigError, match="last=2"):
            tune(tmp_path / "base", tmp_path / "w", last=last)
    agree = layerwise.METHOD.agree
    assert agree
    with pytest.raises(ConfigError, match=r"dev=FILE.*last=K"):
        agree(layerwise.Config(), Inputs({"model": (load(tmp_path / "base"),)}, {}))
    assert Codec in load(tmp_path / "base").gives


@pytest.mark.slow
@pytest.mark.parametrize(("task", "best"), [("noise", 1), ("mirror", 3), ("inversion", 3)])
def test_the_further_the_task_the_deeper_the_tuning_and_any_of_it_beats_starting_anew(
    task: str, best: int, tmp_path: Path
) -> None:
    """A ViT of three blocks that reads upright digits, tuned on 100 of another rendering: of those under noise, which
    it mostly reads, the last block alone does best; of mirrored and inverted ones all blocks together."""
    base, train, test = zoo("vit"), vision.images(task, "train")[:100], vision.images(task, "test")

    def tuned(model: Model, k: int, seed: int) -> float:
        config = layerwise.Config(last=k, lr=1e-3, epochs=10, batch_size=16)
        run = LocalRun(seed, tmp_path / f"{model.ref == base.ref} {k} {seed}")
        made = layerwise.run(config, Inputs({"model": (model,)}, {"train": train}), run)
        assert isinstance(made, Model)
        return accuracy(made, test)

    def anew(seed: int) -> Model:
        with seeded(seed):
            module = base.ask(Gradients).module()
            return base.ask(Gradients).rewrap(type(module)(module.config))

    other = {1: 3, 3: 1}[best]
    for seed in range(3):
        found = {k: tuned(base, k, seed) for k in (1, 2, 3)} | {0: tuned(anew(seed), 3, seed)}
        print(task, seed, round(accuracy(base, test), 3), {k: round(value, 3) for k, value in found.items()})
        assert found[best] > found[other] and found[best] > found[0]
