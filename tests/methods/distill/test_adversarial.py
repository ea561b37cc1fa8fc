"""Acquire and retain: the composed loss's gradient, against its own written out, and what is remembered."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from case import Case
from lfm.core import Inputs, Model
from lfm.core.errors import ConfigError
from lfm.core.method import check
from lfm.distilling import datafree
from lfm.distilling.bank import Bank
from lfm.distilling.datafree import PIXELS
from lfm.distilling.telling import TOLD
from lfm.methods.distill import adversarial
from lfm.methods.distill.adversarial import retained, unlike
from lfm.models import load
from lfm.runs.run import LocalRun

QUICK: dict[str, Any] = {"steps": 4, "batch_size": 4, "bank": 16, "width": 4, "latent": 8, "every": 2, "memorise": 2}


def distill(teacher: Model, student: Model, work: Path, seed: int = 0, **settings: Any) -> tuple[Model, LocalRun]:
    inputs = Inputs({"teacher": (teacher,), "student": (student,)})
    config = adversarial.Config(**settings)
    adversarial.agree(config, inputs)
    run = LocalRun(seed, work)
    made = adversarial.run(config, check("distill.adversarial", adversarial.METHOD, inputs), run)
    assert isinstance(made, Model)
    return made, run


def case(here: Path) -> Case:
    tiny.vit(here / "big", num_hidden_layers=1)
    tiny.vit(here / "small", seed=1, num_hidden_layers=1)
    return Case({"teacher": ("big",), "student": ("small",)}, {}, QUICK | {"checkpoint_every": 0.0})


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model]:
    root = tmp_path_factory.mktemp("models")
    return load(tiny.vit(root / "big")), load(tiny.vit(root / "small", seed=1, num_hidden_layers=1))


def test_the_gradient_is_that_of_quadratics_in_closed_form() -> None:
    """Of ½ (w − a)ᵀA(w − a) and ½ (w − r)ᵀR(w − r) it is A(w − a) + (I − αA) R(w' − r); to first order without αA."""
    draw = torch.Generator().manual_seed(0)

    def quadratic(root: torch.Tensor) -> torch.Tensor:
        return root @ root.T

    a, r, w = (torch.randn(3, dtype=torch.float64, generator=draw) for _ in range(3))
    A, R = (quadratic(torch.randn(3, 3, dtype=torch.float64, generator=draw)) for _ in range(2))
    alpha = 0.1
    moved = w - alpha * A @ (w - a)
    expected = {
        True: A @ (w - a) + (torch.eye(3).double() - alpha * A) @ R @ (moved - r),
        False: A @ (w - a) + R @ (moved - r),
    }
    for exact, slope in expected.items():
        theta = w.clone().requires_grad_()
        first, then = retained(
            lambda p: (p["w"] - a) @ A @ (p["w"] - a) / 2,
            lambda p: (p["w"] - r) @ R @ (p["w"] - r) / 2,
            {"w": theta},
            alpha,
            exact=exact,
        )
        assert then.item() == pytest.approx(((moved - r) @ R @ (moved - r) / 2).item())
        (first + then).backward()
        assert theta.grad is not None and torch.allclose(theta.grad, slope, atol=1e-12)
    assert not torch.allclose(expected[True], expected[False], atol=1e-3)


def test_the_exact_gradient_is_that_of_differences_through_a_network() -> None:
    """Two layers and a batch norm in fp64, each weight moved by 1e-6 either way."""
    from torch.func import functional_call

    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(3, 4),
        torch.nn.BatchNorm1d(4, track_running_stats=False),
        torch.nn.Tanh(),
        torch.nn.Linear(4, 2),
    ).double()
    new, old, told = (torch.randn(6, n, dtype=torch.float64) for n in (3, 3, 2))

    def loss(x: torch.Tensor, weights: Any) -> torch.Tensor:
        return (functional_call(net, weights, (x,)) - told).square().mean()

    def total(weights: Any) -> torch.Tensor:
        return sum(retained(lambda p: loss(new, p), lambda p: loss(old, p), weights, 0.5), torch.zeros(()).double())

    weights = dict(net.named_parameters())
    total(weights).backward()
    for name, parameter in weights.items():
        assert parameter.grad is not None
        for place in range(parameter.numel()):
            sides = []
            for step in (1e-6, -1e-6):
                moved = {n: p.detach().clone().requires_grad_() for n, p in weights.items()}
                with torch.no_grad():
                    moved[name].view(-1)[place] += step
                sides.append(total(moved).item())
            slope = (sides[0] - sides[1]) / 2e-6
            assert parameter.grad.view(-1)[place].item() == pytest.approx(slope, abs=1e-7), (name, place)


def test_without_weight_memory_changes_nothing_and_with_it_does(pair: tuple[Model, Model], tmp_path: Path) -> None:
    made = {
        key: distill(*pair, tmp_path / key, **(QUICK | settings))[0].digest
        for key, settings in {
            "off": {"retain": 0.0},
            "off, other α": {"retain": 0.0, "inner": 0.5},
            "on": {},
            "first order": {"exact": False},
        }.items()
    }
    assert made["off"] == made["off, other α"]
    assert len(set(made.values())) == 3


def test_logits_are_learned_by_their_absolute_difference_and_each_term_has_its_weight(
    pair: tuple[Model, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: dict[str, Any] = {}

    @contextmanager
    def judge(scene: Any, terms: Any, *, gap: Any) -> Iterator[None]:
        heard.update(scene=scene, terms=terms, gap=gap)
        yield None

    monkeypatch.setattr(adversarial.generator, "judge", judge)
    monkeypatch.setattr(adversarial.datafree, "distil", lambda *_, loss, **__: heard.update(loss=loss))
    weights = {"adv": 1.0, "bn": 2.0, "oh": 3.0, "bal": 4.0, "act": 5.0}
    distill(*pair, tmp_path, **(QUICK | weights | {"retain": 0.0}))
    assert heard["terms"]._asdict() == weights and heard["gap"] is unlike
    stage = heard["scene"]
    pictures = stage.frame.noise(4, torch.Generator().manual_seed(0))
    told = torch.randn(4, stage.classes, generator=torch.Generator().manual_seed(1))
    expected = (stage.answer(pictures) - told).abs().sum() / (4 * stage.classes)
    torch.testing.assert_close(heard["loss"]({PIXELS: pictures, TOLD: told}), expected)


def test_what_is_remembered_has_its_weight(
    pair: tuple[Model, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """L = 2 + .5 · 3 where what is new costs 2 and what is remembered 3."""

    def retained(acquire: Any, remember: Any, weights: Any, inner: float, *, exact: bool) -> Any:
        nought = 0 * sum(w.sum() for w in weights.values())
        return nought + 2, nought + 3

    monkeypatch.setattr(adversarial, "retained", retained)
    _, run = distill(*pair, tmp_path, **(QUICK | {"steps": 1, "retain": 0.5}))
    assert run.notes["loss_before"] == 3.5


def test_what_is_known_was_put_into_memory_before_with_what_the_teacher_told_of_it(
    pair: tuple[Model, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of a batch of 4 goes in at steps 0 and 2: two pictures are known at steps 0 and 1, then four."""
    seen: list[tuple[Any, Any]] = []

    def listening(acquire: Any, remember: Any, weights: Any, inner: float, *, exact: bool) -> Any:
        assert inner == 0.3
        seen.append((acquire.args[0], remember.args[0]))
        return retained(acquire, remember, weights, inner, exact=exact)

    monkeypatch.setattr(adversarial, "retained", listening)
    distill(*pair, tmp_path, **(QUICK | {"share": 0.5, "inner": 0.3}))

    def shared(step: int, new: int) -> int:
        """How many of those known at a step were new at another, picture and answer."""
        known, made = seen[step][1], seen[new][0]
        same = [(known[name][:, None] == made[name][None]).flatten(2).all(-1) for name in (PIXELS, TOLD)]
        return int((same[0] & same[1]).sum())

    assert [len(known[PIXELS]) for _, known in seen] == [2, 2, 4, 4]
    assert [[shared(step, new) for new in range(4)] for step in range(4)] == [
        [2, 0, 0, 0],
        [2, 0, 0, 0],
        [2, 0, 2, 0],
        [2, 0, 2, 0],
    ]


def test_a_share_of_every_so_many_batches_is_remembered(pair: tuple[Model, Model], tmp_path: Path) -> None:
    config = adversarial.Config(batch_size=8, every=2, memorise=3, share=0.25, width=4, latent=8)
    run = LocalRun(0, tmp_path)
    stage, memory = datafree.scene(config, *pair, run), Bank(5, torch.device("cpu"))
    with ExitStack() as stack:
        synthesise, _ = adversarial.seeking(config, stage, memory, run, stack)
        made: list[int] = []
        for step in range(7):
            synthesise(step, memory)
            made.append(memory.made)
    assert made == [2, 2, 2, 4, 4, 4, 6] and len(memory) == 5


def test_what_the_loss_does_not_have_is_refused(pair: tuple[Model, Model], tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = [{"temperature": 2.0}, {"divergence": "jsd"}]
    for settings in asked:
        with pytest.raises(ConfigError, match="changes nothing here"):
            distill(*pair, tmp_path, **QUICK | settings)


def test_what_is_remembered_is_not_asked_again(pair: tuple[Model, Model], tmp_path: Path) -> None:
    _, run = distill(*pair, tmp_path, **QUICK)
    assert run.notes["queries"] == 4 * 4 + 2 * 4  # each step's pictures, and the generator's at two steps


def test_the_generator_is_paid_by_the_divergence_of_softened_answers_which_has_a_bound() -> None:
    """By hand: of halves and (e/(1+e), 1/(1+e)), which T = 3 makes of logits of 3 and 0, JS is a mean of two KL."""
    told, answered = torch.tensor([[3.0, 0.0]]), torch.zeros(1, 2)
    p, q = np.array([np.e / (1 + np.e), 1 / (1 + np.e)]), np.array([0.5, 0.5])
    m = (p + q) / 2
    expected = (p * np.log(p / m)).sum() / 2 + (q * np.log(q / m)).sum() / 2
    assert unlike(told, answered).item() == pytest.approx(expected, rel=1e-5)
    assert unlike(told, told).item() == pytest.approx(0, abs=1e-7)
    assert unlike(torch.tensor([[9e3, 0.0]]), torch.tensor([[0.0, 9e3]])).item() == pytest.approx(np.log(2), rel=1e-5)


def test_it_is_that_divergence_which_the_generator_seeks(
    pair: tuple[Model, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sought, unsought = (distill(*pair, tmp_path / f"{adv}", **QUICK, adv=adv)[0].digest for adv in (1.0, 0.0))
    monkeypatch.setattr(adversarial, "unlike", lambda told, answered: 0 * answered.sum(-1))
    assert distill(*pair, tmp_path / "none", **QUICK)[0].digest == unsought != sought
