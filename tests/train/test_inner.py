"""Inner loops: closed forms, and both ways of running them against each other and against torch's Adam."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lfm.train import seeded
from lfm.train.inner import adapted, adapted_mean, worthwhile

GOALS = torch.tensor([[1.0, -2.0, 0.5], [3.0, 0.0, -1.0]])


class Point(nn.Module):
    """Nothing but a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.5, 0.25, -0.75]))


def quadratic(module: Any, batch: Any) -> torch.Tensor:
    return (module.w - batch["goal"].mean(0)).square().sum() / 2


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_sgd_on_quadratics_ends_where_algebra_says(steps: int, at_once: bool) -> None:
    """w_k = a + (1 − lr)^k (w₀ − a) for ½‖w − a‖²; the mean over two tasks is the mean of two such points."""
    module = Point()
    tasks = {"goal": GOALS[:, None, None].expand(2, steps, 4, 3)}
    mean, first = adapted_mean(module, quadratic, tasks, 0.1, "sgd", at_once=at_once)
    start = torch.tensor([0.5, 0.25, -0.75])
    ends = GOALS + 0.9**steps * (start - GOALS)
    torch.testing.assert_close(mean["w"], ends.mean(0))
    torch.testing.assert_close(first, ((start - GOALS).square().sum(1) / 2).mean())
    assert torch.equal(module.w.detach(), start)  # the module stays as it is


def network() -> nn.Module:
    with seeded(0):
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def entropy(module: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(module(batch["x"]), batch["y"])


def batches(tasks: int = 3, steps: int = 4, size: int = 6) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(tasks, steps, size, 4, generator=random)
    return {"x": x, "y": torch.randint(0, 3, (tasks, steps, size), generator=random)}


@pytest.mark.parametrize("rule", ["adam", "sgd"])
def test_all_tasks_at_once_are_the_tasks_one_by_one(rule: Any) -> None:
    module, tasks = network(), batches()
    results = [adapted_mean(module, entropy, tasks, 0.01, rule, at_once=at_once) for at_once in (True, False)]
    for name in results[0][0]:
        torch.testing.assert_close(results[0][0][name], results[1][0][name], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1])


def test_adam_is_torchs_without_first_moment_begun_anew_for_each_task() -> None:
    tasks = batches()
    ends: list[list[torch.Tensor]] = []
    for task in range(3):
        module = network()
        optimizer = torch.optim.Adam(module.parameters(), lr=0.01, betas=(0.0, 0.999))
        for step in range(4):
            optimizer.zero_grad()
            entropy(module, {name: tensor[task, step] for name, tensor in tasks.items()}).backward()
            optimizer.step()
        ends.append([p.detach() for p in module.parameters()])
    mean, _ = adapted_mean(network(), entropy, tasks, 0.01, "adam", at_once=False)
    for got, expected in zip(mean.values(), zip(*ends)):
        torch.testing.assert_close(got, torch.stack(expected).mean(0), rtol=1e-5, atol=1e-6)


def test_one_step_is_joint_training_exactly_as_the_mean_gradient() -> None:
    """k = 1: mean_m (θ − lr g_m) = θ − lr · gradient of the mean loss over all tasks' examples."""
    module, tasks = network(), batches(steps=1)
    mean, _ = adapted_mean(module, entropy, tasks, 0.05, "sgd", at_once=False)
    joint = entropy(module, {"x": tasks["x"].flatten(0, 2), "y": tasks["y"].flatten()})
    gradients = torch.autograd.grad(joint, list(module.parameters()))
    for parameter, gradient, got in zip(module.parameters(), gradients, mean.values()):
        torch.testing.assert_close(got, (parameter - 0.05 * gradient).detach(), rtol=1e-5, atol=1e-7)


def test_frozen_parameters_take_no_steps_and_an_error_inside_puts_all_back() -> None:
    module = network()
    module[0].requires_grad_(False)  # type: ignore[index]
    mean, _ = adapted_mean(module, entropy, batches(), 0.1, "sgd")
    assert set(mean) == {"2.weight", "2.bias"}
    before = [p.detach().clone() for p in module.parameters()]
    trained = [p for p in module.parameters() if p.requires_grad]
    batch = {name: tensor[0, 0] for name, tensor in batches().items()}
    with pytest.raises(KeyError), adapted(trained, [lambda: entropy(module, batch)], 0.1, "sgd"):
        assert not torch.equal(trained[0], before[2])
        raise KeyError
    assert all(torch.equal(p, was) for p, was in zip(module.parameters(), before))


def test_what_cannot_be_done_at_once_is_not_tried() -> None:
    pixels, ids = {"pixel_values": torch.zeros(1)}, {"input_ids": torch.zeros(1)}
    assert worthwhile(network(), pixels)
    assert not worthwhile(network(), ids)
    assert not worthwhile(nn.Sequential(network(), nn.BatchNorm1d(3)), pixels)
    assert not worthwhile(nn.Linear(500, 501), pixels)
