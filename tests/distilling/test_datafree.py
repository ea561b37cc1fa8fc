"""The loop without data: its bank, the teacher's count, another model's pictures, kills."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import save_file

import tiny
from lfm.core import Gradients, Inputs, Model, Sizes, registry
from lfm.core.errors import ConfigError, DivergedError, MismatchError
from lfm.core.model import Facts
from lfm.distilling.bank import Bank
from lfm.distilling.datafree import PIXELS, DataFree, agree, costs, distil, optimizer_of, response, scene
from lfm.distilling.pictures import frame_of, seen
from lfm.distilling.telling import TOLD
from lfm.models import forward, load
from lfm.runs.run import LocalRun
from lfm.train import Fit, state_of
from lfm.train.setting import rate

QUICK: dict[str, Any] = {"steps": 6, "batch_size": 4, "bank": 8, "checkpoint_every": 0.0}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model]:
    from transformers import ViTImageProcessor

    root = tmp_path_factory.mktemp("models")
    small = tiny.vit(root / "small", seed=1, labels=tiny.DIGITS[::-1], image_size=16)
    ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.2] * 3, image_std=[0.4] * 3).save_pretrained(
        small
    )
    return load(tiny.vit(root / "big")), load(small)


def test_a_bank_keeps_the_newest_and_comes_back_from_its_aids() -> None:
    bank = Bank(5, torch.device("cpu"))
    for first in range(0, 12, 3):
        bank.add({PIXELS: torch.arange(first, first + 3).float()[:, None]})
    assert sorted(bank.draw(5)[PIXELS].flatten().tolist()) == [7, 8, 9, 10, 11]
    again = Bank(5, torch.device("cpu"))
    again.load(bank.aids())
    for one in (bank, again):
        one.add({PIXELS: torch.tensor([[12.0], [13.0]])})
    assert torch.equal(again.rows[PIXELS], bank.rows[PIXELS])
    bank.add({PIXELS: torch.arange(20.0, 30.0)[:, None]})
    assert sorted(bank.draw(9)[PIXELS].flatten().tolist()) == [25, 26, 27, 28, 29]


def test_a_bank_with_room_left_comes_back_with_what_it_holds_and_no_graph() -> None:
    bank, again = Bank(8, torch.device("cpu")), Bank(8, torch.device("cpu"))
    made = torch.arange(3.0, requires_grad=True)[:, None] * 2
    bank.add({PIXELS: made})
    again.load(bank.aids())
    for one in (bank, again):
        drawn = one.draw(8)[PIXELS]
        assert sorted(drawn.flatten().tolist()) == [0, 2, 4] and not drawn.requires_grad
    torch.manual_seed(0)
    assert len({tuple(bank.draw(2)[PIXELS].flatten().tolist()) for _ in range(50)}) == 6  # every ordered pair


def test_rows_are_drawn_so_that_each_class_comes_as_often_and_no_row_twice() -> None:
    """96 rows of one class, 4 of another; what was overwritten (class 7) is never drawn."""
    bank = Bank(100, torch.device("cpu"))
    for named in (torch.full((50,), 7), torch.tensor([5] * 96 + [2] * 4)):
        bank.add({PIXELS: torch.arange(float(len(named)))[:, None], "named": named})
    torch.manual_seed(0)
    draws = [bank.draw(2, "named") for _ in range(400)]
    rare = torch.stack([(rows["named"] == 2).sum() for rows in draws]).double().mean().item()
    # the first row is of either class as often; the second, without a row of the first's class, hardly changes that
    assert rare == pytest.approx(1.0, abs=0.12)
    assert all(rows["named"].unique().tolist() in ([2], [5], [2, 5]) for rows in draws)
    whole = bank.draw(300, "named")
    assert sorted(whole[PIXELS].flatten().tolist()) == list(range(100))


def test_a_frame_is_what_the_processor_makes_of_black_and_white(models: tuple[Model, Model]) -> None:
    frame = frame_of(models[0])
    assert frame.shape == (3, 8, 8)
    assert torch.allclose(frame.low, torch.full((3, 1, 1), -1.0)) and torch.allclose(frame.high, torch.ones(3, 1, 1))
    wild = torch.randn(2, 3, 8, 8) * 5
    assert frame.clamp(wild).abs().max() <= 1
    assert torch.allclose(frame.scaled(frame.unit(wild)), wild, atol=1e-5)


def test_a_picture_keeps_its_tones_in_another_models_frame() -> None:
    bare = Model("bare", "module", {}, identify=str)
    one = frame_of(bare, (3, 8, 8), (0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    other = frame_of(bare, (1, 6, 6), (0.5,), (0.5,))
    grey = one.scaled(torch.full((2, 3, 8, 8), 0.25))
    assert torch.allclose(seen(grey, one, other), torch.full((2, 1, 6, 6), (0.25 - 0.5) / 0.5), atol=1e-6)
    with pytest.raises(ConfigError, match="size of the pictures"):
        frame_of(bare)


def trained(models: tuple[Model, Model], work: Path, stop: int = -1, told: bool = False) -> Any:
    """A generator of one bias trained beside; the run is cut off before step `stop`."""
    config = DataFree(**QUICK)
    run = LocalRun(0, work)
    stage = scene(config, *models, run)
    generator = torch.nn.Linear(2, 3 * 8 * 8)
    with torch.no_grad():
        generator.weight.fill_(0.1)
        generator.bias.zero_()
    moments = optimizer_of(generator, config)
    done: list[int] = []

    def synthesise(step: int, bank: Bank) -> dict[str, torch.Tensor]:
        if step == stop:
            raise KeyboardInterrupt
        done.append(step)
        images = generator(torch.randn(4, 2)).view(4, 3, 8, 8).tanh()
        loss = (stage.asked(images) - stage.answer(images)).abs().mean()
        generator.zero_grad()
        (-loss).backward()
        moments.step()
        rows = {PIXELS: images.detach()}
        return rows | {TOLD: stage.asked(rows[PIXELS])} if told else rows

    losses = distil(stage, synthesise, config, run, beside={"generator": state_of(generator, "", moments)})
    return losses, {**stage.student.state_dict(), **generator.state_dict()}, stage.asked.queries, done


def test_killed_it_ends_in_the_same_bytes_and_counts_the_same(models: tuple[Model, Model], tmp_path: Path) -> None:
    whole = trained(models, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(models, tmp_path / "cut", stop=3)
    resumed = trained(models, tmp_path / "cut")
    assert resumed[3] == [3, 4, 5]
    assert whole[0] == resumed[0] and whole[2] == resumed[2] == 6 * (4 + 4)
    assert all(torch.equal(tensor, resumed[1][name]) for name, tensor in whole[1].items())
    assert trained(models, tmp_path / "cut")[2] == 48  # done already: nothing is asked again


def test_answers_beside_the_pictures_are_not_asked_again(models: tuple[Model, Model], tmp_path: Path) -> None:
    asked, kept = trained(models, tmp_path / "asked"), trained(models, tmp_path / "kept", told=True)
    assert kept[2] == asked[2] == 48  # once for each picture in place of once for each use
    assert kept[0] == pytest.approx(asked[0], rel=1e-5)


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_the_students_steps_are_nesterovs_with_the_gradient_cut_to_a_norm(
    models: tuple[Model, Model], tmp_path: Path, clip: float
) -> None:
    """A loss of constant slope 3 for each weight: by hand v ← .9 v + g, θ ← θ − η (g + .9 v), with g the slope, or what
    `clip` leaves of it; η rises in the first half of the steps and falls to nothing in the second."""
    given: dict[str, Any] = {"optimizer": "sgd", "lr": 0.1, "weight_decay": 0.0, "clip": clip, "checkpoint_every": 0.0}
    config = DataFree(steps=6, batch_size=4, bank=4, warmup=0.5, schedule="linear", **given)
    stage = scene(config, *models, LocalRun(0, tmp_path))
    before = [p.detach().clone() for p in stage.student.parameters()]
    images = stage.frame.noise(4, torch.Generator().manual_seed(0))
    modes: list[bool] = []

    def loss(rows: Any) -> torch.Tensor:
        modes.append(stage.student.training)
        return 3 * sum((p.double().sum() for p in stage.student.parameters()), torch.zeros(()).double())

    values = [3 * sum(float(p.double().sum()) for p in before)]
    losses = distil(stage, lambda step, bank: {PIXELS: images}, config, LocalRun(0, tmp_path / "run"), loss=loss)
    count = sum(p.numel() for p in before)
    slope = min(3.0, clip / count**0.5) if clip else 3.0
    assert slope < 3 or not clip
    moved, v = 0.0, 0.0
    for step in range(6):
        v = 0.9 * v + slope
        moved += rate(Fit(lr=0.1, warmup=0.5, schedule="linear"), step, 6) * (slope + 0.9 * v)
        values.append(values[0] - 3 * count * moved)
    for p, was in zip(stage.student.parameters(), before):
        torch.testing.assert_close(was - p.detach(), torch.full_like(was, moved), rtol=1e-3, atol=2e-6)
    assert losses == pytest.approx(values[:-1], rel=1e-4) and all(
        modes
    )  # the loss itself is told, norm and all left out


def test_a_gradient_that_is_not_finite_stops_the_student_though_the_loss_is_finite(
    models: tuple[Model, Model], tmp_path: Path
) -> None:
    config = DataFree(**QUICK)
    stage = scene(config, *models, LocalRun(0, tmp_path))
    images = stage.frame.noise(4, torch.Generator().manual_seed(0))

    def loss(rows: Any) -> torch.Tensor:  # √0 has no slope
        return sum(((0 * p).square().sum().sqrt() for p in stage.student.parameters()), torch.zeros(()))

    with pytest.raises(DivergedError, match=r"lr=1e-04"):
        distil(stage, lambda step, bank: {PIXELS: images}, config, LocalRun(0, tmp_path / "run"), loss=loss)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_what_is_learned_is_the_divergence_of_softened_answers(
    models: tuple[Model, Model], tmp_path: Path, divergence: Any
) -> None:
    """T² D(p_T, q_T) in plain sums, at T = 2; where the rows have the teacher's answers it is not asked."""
    config = DataFree(**QUICK, temperature=2.0, divergence=divergence)
    stage = scene(config, *models, LocalRun(0, tmp_path))
    images = stage.frame.noise(3, torch.Generator().manual_seed(0))
    with torch.no_grad():
        told = stage.asked(images)
        p, q = (torch.softmax(x.double() / 2, -1) for x in (told, stage.answer(images)))
        value = float(response(stage, {PIXELS: images}, config))
        assert stage.asked.queries == 6
        assert float(response(stage, {PIXELS: images, TOLD: told}, config)) == pytest.approx(value, rel=1e-5)
        assert stage.asked.queries == 6

    def kl(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a * (a / b).log()).sum(-1).mean())

    half = (p + q) / 2
    by_hand = {"forward": kl(p, q), "reverse": kl(q, p), "jsd": (kl(p, half) + kl(q, half)) / 2}
    assert value == pytest.approx(4 * by_hand[divergence], rel=1e-4)


def test_a_plan_is_the_students_steps_the_teachers_answers_and_the_making() -> None:
    """By hand for 10 steps of 4: the student 6 · 150 P an image, the teacher 2 · 150 P an answer; 8 pictures made in 3
    passes forth and as much again back."""
    teacher, student = Facts(parameters=1000), Facts(parameters=100)
    config = DataFree(steps=10, batch_size=4)
    told = costs(config, teacher, student, 8, 3)
    assert told.flops == pytest.approx(40 * 6 * 150 * 100 + (40 + 8 * 3 * 2) * 2 * 150 * 1000)
    assert (told.steps, told.queries, told.memory) == (10 + 8 // 4 * 3, 40 + 8 * 3, 4 * (1000 + 4 * 100))
    assert costs(config, teacher, student, 8, 3, 8).queries == 8 + 8 * 3
    seeing = costs(config, teacher._replace(image=(3, 8, 8)), student, 8, 3)  # the bank, and its copy in a checkpoint
    assert seeing.memory - told.memory == 4 * 2 * config.bank * 3 * 8 * 8 > 0


def test_matrices_decay_and_vectors_do_not() -> None:
    for config in (DataFree(lr=0.1, weight_decay=0.5), DataFree(lr=0.1, weight_decay=0.5, optimizer="sgd")):
        net = torch.nn.Linear(2, 3)
        weight, bias = net.weight.detach().clone(), net.bias.detach().clone()
        net.weight.grad, net.bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)
        optimizer_of(net, config).step()
        assert not torch.equal(net.weight, weight) and net.weight.norm() < weight.norm()
        assert torch.equal(net.bias, bias)


def test_the_student_answers_by_the_teachers_classes_and_is_left_alone_while_pictures_are_made(
    models: tuple[Model, Model], tmp_path: Path
) -> None:
    config = DataFree(**QUICK)
    stage = scene(config, *models, LocalRun(0, tmp_path))
    images = stage.frame.noise(3, torch.Generator().manual_seed(0))
    own = models[1].ask(Gradients).module()
    told = forward(own, {PIXELS: stage.view(images)})
    assert stage.view(images).shape == (3, 3, 16, 16)
    assert torch.allclose(stage.answer(images), told.flip(1), atol=1e-6)

    def synthesise(step: int, bank: Bank) -> dict[str, torch.Tensor]:
        assert not stage.student.training and not any(p.requires_grad for p in stage.student.parameters())
        return {PIXELS: images}

    distil(stage, synthesise, replace(config, steps=1), LocalRun(0, tmp_path / "run"))
    assert all(p.requires_grad for p in stage.student.parameters())


def test_what_does_not_go_together_is_told_before_a_weight_is_read(tmp_path: Path) -> None:
    big = load(tiny.vit(tmp_path / "big"))
    with pytest.raises(MismatchError, match="different classes"):
        agree(DataFree(), big, load(tiny.vit(tmp_path / "few", labels=("a", "b"))))
    with pytest.raises(MismatchError, match="does not classify images"):
        agree(DataFree(), big, load(tiny.classifier(tmp_path / "text")))
    with pytest.raises(ConfigError, match="no batch of 64"):
        agree(DataFree(bank=8), big, big)
    for image in ((1, 2), (3, 0, 5)):
        with pytest.raises(ConfigError, match=r"image=\[\d, \d(, \d)?\] describes no pictures"):
            agree(DataFree(image=image), big, big)
    with pytest.raises(ConfigError, match="would not be read"):
        agree(DataFree(mean=(0.5,)), big, big)


def bare() -> torch.nn.Sequential:
    """A network that no config describes, with a batch norm."""
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, 2, 1),
        torch.nn.BatchNorm2d(4),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(4 * 16, 5),
    )


PLANNED: list[tuple[str, dict[str, Any]]] = [
    ("noise", {"pictures": 6, "every": 4, "iterations": 2}),
    ("noise", {"pictures": 6, "every": 4, "iterations": 1, "statistics": "leaves"}),
    ("cake", {"pictures": 7, "groups": 3, "every": 4, "iterations": 2}),
    ("generative", {"kind": "dafl", "every": 4, "width": 4, "latent": 4}),
    ("generative", {"kind": "fast", "every": 4, "rounds": 2, "before": 1, "width": 4, "latent": 4}),
    ("generative", {"kind": "cmi", "every": 4, "rounds": 2, "before": 1, "width": 4, "latent": 4, "jitter": 0.2}),
    ("adversarial", {"every": 4, "width": 4, "latent": 4}),
    ("hard_label", {"queries": 9, "rounds": 2, "width": 4, "latent": 4}),
    ("hard_label", {"kind": "boundary", "queries": 150, "tries": 1, "moves": 0, "halvings": 2}),
]


@pytest.mark.parametrize("name, settings", PLANNED)
def test_a_plan_counts_the_queries_of_its_run_and_only_the_seed_tells_what_is_made(
    models: tuple[Model, Model], tmp_path: Path, name: str, settings: dict[str, Any]
) -> None:
    method = registry.get(f"distill.{name}").method
    config = method.config(**QUICK | settings)
    inputs = Inputs({"teacher": (models[0],), "student": (models[1],)}, {})
    made = []
    for chance in (1, 2):
        torch.manual_seed(chance)  # of whoever calls
        run = LocalRun(0, tmp_path / f"run{chance}")
        done = method.run(config, inputs, run)
        assert isinstance(done, Model)
        made.append(done.ask(Gradients).module().state_dict())
        sizes = Sizes({role: tuple(model.facts for model in some) for role, some in inputs.models.items()}, {})
        assert method.cost is not None and method.cost(config, sizes).queries == run.notes["queries"]
    assert all(torch.equal(tensor, made[1][name]) for name, tensor in made[0].items())


def test_bare_modules_with_batch_norms_learn_too_and_reload(tmp_path: Path) -> None:
    from lfm.methods.distill import noise

    for seed, name in enumerate(("big", "small")):
        torch.manual_seed(seed)
        save_file(bare().state_dict(), tmp_path / f"{name}.safetensors")
    big, small = (load(tmp_path / f"{name}.safetensors", module=bare) for name in ("big", "small"))
    shape: dict[str, Any] = {"image": (3, 8, 8), "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "optimizer": "sgd"}
    config = noise.Config(**QUICK | shape | {"pictures": 8, "every": 3, "iterations": 2, "kind": "adi"})
    inputs = Inputs({"teacher": (big,), "student": (small,)}, {})
    noise.agree(config, inputs)
    run = LocalRun(0, tmp_path / "run")
    made = noise.run(config, inputs, run)
    assert isinstance(made, Model) and run.notes["queries"] == 2 * 8 * 3
    (tmp_path / "out").mkdir()
    made.save(tmp_path / "out")
    again = load(tmp_path / "out", module=bare).ask(Gradients).module()
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(again(x), made.ask(Gradients).module()(x))
    assert not torch.equal(again(x), small.ask(Gradients).module()(x))
    with pytest.raises(ConfigError, match="size of the pictures"):
        noise.agree(noise.Config(), inputs)
    for name, wrong in {"image": (3, 0, 8), "mean": (0.5, 0.5), "std": (0.5, 0.0, 0.5)}.items():
        with pytest.raises(ConfigError, match=r"describes? no pictures"):
            noise.agree(replace(config, **{name: wrong}), inputs)
    with pytest.raises(ConfigError, match=r"does not read pictures of \[3, 9, 8\]"):
        noise.run(replace(config, image=(3, 9, 8)), inputs, LocalRun(0, tmp_path / "other"))
