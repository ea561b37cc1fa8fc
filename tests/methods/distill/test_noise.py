"""Pictures out of noise: what each term does to them, whose statistics they get, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import torch as safetensors_torch
from torch import nn
from torch.nn import functional as F

import tiny
from case import Case
from lfm.core import Gradients, Inputs, Model
from lfm.core.errors import ConfigError, DataError, MismatchError
from lfm.distilling import statistics
from lfm.distilling.datafree import PIXELS, Scene, Teacher
from lfm.distilling.pictures import Frame, leaves
from lfm.distilling.telling import TOLD
from lfm.methods.distill import noise
from lfm.models import forward, load
from lfm.runs.run import LocalRun

SMALL: dict[str, Any] = {"steps": 6, "batch_size": 8, "pictures": 8, "every": 3, "iterations": 2}


def case(here: Path) -> Case:
    tiny.vit(here / "big", hidden_size=48)
    tiny.vit(here / "small", seed=1)
    return Case({"teacher": ("big",), "student": ("small",)}, {}, SMALL | {"checkpoint_every": 0.0})


def convolutional() -> nn.Sequential:
    """A random network of two batch norms that has seen pictures of mean .6, in eval mode."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 16, 4),
    )
    for _ in range(30):
        module(0.6 + 0.2 * torch.randn(32, 3, 8, 8))
    return module.eval().requires_grad_(False)


def stage(module: nn.Module, student: nn.Module | None = None) -> Scene:
    frame = Frame((3, 8, 8), torch.full((3, 1, 1), -2.0), torch.full((3, 1, 1), 2.0))
    tell = Teacher(lambda images: forward(module, {PIXELS: images}))
    return Scene(frame, 4, tell, student or module, lambda images: images, (), module)


def made(config: noise.Config, scene: Scene, records: statistics.Records | None = None) -> Any:
    torch.manual_seed(1)
    assert scene.module is not None
    return noise.pictures(config, scene, noise.prior(config, scene, scene.module, records), records)


def settings(**more: Any) -> noise.Config:
    return noise.Config(**({"pictures": 32, "iterations": 60, "picture_lr": 0.1, "tv": 0.0, "match": 0.0} | more))


def test_pictures_are_of_the_classes_asked_and_of_the_statistics_remembered() -> None:
    module = convolutional()
    known = statistics.stored(module)
    scene = stage(module)
    far: dict[float, float] = {}
    sure: dict[float, float] = {}
    for weight in (0.0, 10.0):
        rows = made(settings(match=weight), scene)
        torch.manual_seed(1)
        sure[weight] = F.cross_entropy(rows[TOLD], torch.randperm(32) % 4).item()
        with statistics.matched(module, known) as gap:
            module(rows[PIXELS])
            far[weight] = gap().item()
    assert far[10.0] < 0.5 * far[0.0], far
    assert sure[0.0] < 0.5 and sure[0.0] < sure[10.0] < math.log(4), sure
    assert scene.asked.queries == 2 * 32 * (60 + 1)


def test_one_step_is_adam_on_the_terms_written_out() -> None:
    """Adam's first step is lr times the gradient's sign; the gradient is taken of the formula by hand."""
    module = convolutional()
    scene = stage(module)
    config = settings(iterations=1, jitter=0.0, tv=0.3, l2=0.2, match=2.0, picture_lr=1e-3)
    rows = made(config, scene)
    torch.manual_seed(1)
    classes = torch.randperm(32) % 4
    x = scene.frame.noise(32).requires_grad_(True)
    reads: list[torch.Tensor] = []
    handles = [module[i].register_forward_pre_hook(lambda _, args: reads.append(args[0])) for i in (1, 4)]
    loss = F.cross_entropy(module(x), classes)
    for handle in handles:
        handle.remove()
    for place, read in zip((1, 4), reads, strict=True):
        norm = module[place]
        assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
        loss = loss + 2.0 * (read.mean((0, 2, 3)) - norm.running_mean).norm()
        loss = loss + 2.0 * (read.var((0, 2, 3), unbiased=False) - norm.running_var).norm()
    rough = [x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]]
    rough += [x[..., 1:, 1:] - x[..., :-1, :-1], x[..., 1:, :-1] - x[..., :-1, 1:]]
    loss = loss + 0.3 * sum(part.norm() for part in rough) + 0.2 * x.norm()
    (slope,) = torch.autograd.grad(loss, x)
    stepped = scene.frame.clamp(x.detach() - 1e-3 * slope.sign())
    sure = slope.abs() > 1e-5
    assert sure.float().mean() > 0.9
    assert torch.allclose(rows[PIXELS][sure], stepped[sure], atol=2e-5)


def test_competition_makes_pictures_that_divide_the_student_from_the_teacher() -> None:
    module = convolutional()
    torch.manual_seed(5)
    student = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4)).requires_grad_(False)
    apart: dict[str, float] = {}
    for kind in ("deepinversion", "adi"):
        scene = stage(module, student)
        rows = made(settings(kind=kind, competition=10.0), scene)
        apart[kind] = noise.between(scene.answer(rows[PIXELS]), rows[TOLD]).item()
    assert apart["adi"] > 1.5 * apart["deepinversion"], apart


def test_the_divergence_is_jensen_shannons() -> None:
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    p, q = (a / 3).softmax(-1), (b / 3).softmax(-1)
    m = (p + q) / 2
    written = ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)).mean() / 2
    assert torch.allclose(noise.between(a, b), written, atol=1e-6)
    assert noise.between(a, a) < 1e-6


def test_records_are_kept_as_they_are_and_drawn_from_as_they_say(tmp_path: Path) -> None:
    module = convolutional()
    batches = [torch.rand(300, 3, 8, 8) for _ in range(2)]
    records = statistics.recorded(module, [lambda part=part: module(part) for part in batches])
    logits = module(torch.cat(batches)).double()
    own = logits[logits.argmax(-1) == int(logits.argmax(-1)[0])]
    index = int(logits.argmax(-1)[0])
    assert torch.allclose(records.mean[index].double(), own.mean(0), atol=1e-5)
    assert torch.allclose(records.cov[index].double(), torch.cov(own.T), atol=1e-5)
    statistics.write(records, tmp_path / "records.safetensors")
    again = statistics.opened(tmp_path / "records.safetensors")
    assert torch.equal(again.cov, records.cov) and torch.equal(again.layers["4"].var, records.layers["4"].var)
    torch.manual_seed(0)
    drawn = statistics.drawn(records, torch.full((4000,), index))
    scale = records.cov[index].diagonal().sqrt()
    assert ((drawn.mean(0) - records.mean[index]).abs() < 4 * scale / 4000**0.5 + 1e-6).all()
    assert torch.allclose(torch.cov(drawn.T), records.cov[index], atol=0.15 * float(scale.max()) ** 2)


def test_without_a_step_pictures_are_what_they_begin_as() -> None:
    scene = stage(convolutional())
    for begin, wanted in (("noise", scene.frame.noise), ("leaves", lambda many: leaves(scene.frame, many))):
        rows = made(settings(begin=begin, iterations=0), scene)
        torch.manual_seed(1)
        torch.randperm(32)
        assert torch.equal(rows[PIXELS], wanted(32))


def test_lopes_pictures_answer_what_was_drawn() -> None:
    module = convolutional()
    records = statistics.recorded(module, [lambda: module(0.6 + 0.2 * torch.randn(400, 3, 8, 8))])
    rows = made(settings(kind="lopes", iterations=150), stage(module), records)
    torch.manual_seed(1)
    wanted = statistics.drawn(records, torch.randperm(32) % 4)
    assert F.mse_loss(rows[TOLD], wanted) < 0.05 * wanted.var()


def test_a_transformer_without_records_may_be_held_against_dead_leaves(tmp_path: Path) -> None:
    module = load(tiny.vit(tmp_path / "vit")).ask(Gradients).module().requires_grad_(False)
    scene = Scene(
        Frame((3, 8, 8), torch.full((3, 1, 1), -1.0), torch.ones(3, 1, 1)),
        10,
        Teacher(lambda images: forward(module, {PIXELS: images})),
        module,
        lambda images: images,
        (),
        module,
    )

    def told(config: noise.Config) -> float:
        rows = made(config, scene)
        torch.manual_seed(2)
        with noise.prior(settings(statistics="leaves", match=1.0), scene, module, None)() as far, torch.no_grad():
            module(rows[PIXELS])
            return float(far())

    short: dict[str, Any] = {"pictures": 8, "iterations": 10}
    assert told(settings(statistics="leaves", match=1.0, **short)) < told(settings(statistics="none", **short))


def test_what_cannot_be_is_refused_before_a_weight_is_read(tmp_path: Path) -> None:
    model = load(tiny.vit(tmp_path / "vit"))
    inputs = Inputs({"teacher": (model,), "student": (model,)}, {})
    with pytest.raises(ConfigError, match="makes pictures from records"):
        noise.agree(noise.Config(kind="lopes"), inputs)
    (tmp_path / "text").write_text("no")
    for file in ("none", "text"):
        with pytest.raises(DataError, match="holds no records"):
            noise.agree(noise.Config(records=str(tmp_path / file)), inputs)


@pytest.mark.parametrize(
    ("name", "harm", "what"),
    [
        ("logits.cov", lambda t: t[:3], "logits.cov"),
        ("logits.mean", lambda t: t * float("nan"), "no numbers"),
        ("layers.vit.layernorm.var", lambda t: t / 0, "layernorm holds what are no numbers"),
        ("layers.vit.layernorm.var", lambda t: t[:3], r"variances \[3\]"),
        ("layers.vit.layernorm.var", None, "layers.vit.layernorm.var is missing"),
    ],
)
def test_damaged_records_are_told_of(name: str, harm: Any, what: str, tmp_path: Path) -> None:
    model = load(tiny.vit(tmp_path / "vit"))
    module: Any = model.ask(Gradients).module()
    shown = [lambda: module(torch.rand(40, 3, 8, 8)).logits]
    statistics.write(statistics.recorded(module, shown), tmp_path / "records")
    tensors = safetensors_torch.load_file(tmp_path / "records")
    held = tensors.pop(name)
    if harm:
        tensors[name] = harm(held).contiguous()
    safetensors_torch.save_file(tensors, tmp_path / "records")
    with pytest.raises(DataError, match=f"holds no records(.|\n)*{what}"):
        noise.agree(
            noise.Config(records=str(tmp_path / "records")), Inputs({"teacher": (model,), "student": (model,)}, {})
        )


def test_records_of_a_narrower_model_are_refused(tmp_path: Path) -> None:
    model, other = load(tiny.vit(tmp_path / "vit")), load(tiny.vit(tmp_path / "wide", hidden_size=64))
    module: Any = model.ask(Gradients).module()
    shown = [lambda: module(torch.rand(40, 3, 8, 8)).logits]
    statistics.write(statistics.recorded(module, shown), tmp_path / "records")
    config = noise.Config(records=str(tmp_path / "records"), steps=1)
    inputs = Inputs({"teacher": (other,), "student": (other,)}, {})
    with pytest.raises(MismatchError, match=r"another model(.|\n)*has 64 channels"):
        noise.run(config, inputs, LocalRun(0, tmp_path / "run"))


def test_another_models_records_are_refused(tmp_path: Path) -> None:
    module = convolutional()
    statistics.write(statistics.recorded(module, [lambda: module(torch.rand(40, 3, 8, 8))]), tmp_path / "records")
    model = load(tiny.vit(tmp_path / "vit"))
    config = noise.Config(records=str(tmp_path / "records"))
    with pytest.raises(MismatchError, match="records of another model"):
        noise.run(config, Inputs({"teacher": (model,), "student": (model,)}, {}), LocalRun(0, tmp_path / "run"))


@pytest.mark.slow
def test_a_student_learns_the_zoos_digits_from_optimised_noise(tmp_path: Path) -> None:
    from lfm import zoo
    from lfm.core import Codec
    from lfm.data.task import task_for
    from lfm.zoo import vision

    teacher = load(zoo.model("vit"))
    config = noise.Config(steps=600, every=30, iterations=40, lr=3e-3, picture_lr=0.1, layers=1, start="random")
    made = noise.run(config, Inputs({"teacher": (teacher,), "student": (teacher,)}, {}), LocalRun(0, tmp_path))
    assert isinstance(made, Model)
    records = vision.images("identity", "test")
    batch = task_for(records, teacher.ask(Codec), teacher.facts).collate(records)
    with torch.no_grad():
        right = (forward(made.ask(Gradients).module(), batch).argmax(-1) == batch["labels"]).double().mean()
    print(f"right {right:.4f}")
    assert right > 0.2
