"""What generators are made of and for: shapes, the terms written out, the way down and its sum of gradients."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lfm.distilling.bank import Bank
from lfm.distilling.contrasting import PART, WIDTH, contrast, contrasting
from lfm.distilling.datafree import Scene, Teacher
from lfm.distilling.generator import MOMENTS, Pace, Terms, cropped, found, generator, read_by, wanted
from lfm.distilling.pictures import Frame
from lfm.runs.run import LocalRun
from lfm.train.losses import balance


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 8, 8), (4, 33, 17), (3, 224, 224)])
def test_a_generator_is_of_any_shape(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    net = generator(shape, 10, 4)
    made = net(torch.randn(2, 10))
    assert made.shape == (2, *shape) and 0 < made.min() < made.max() < 1
    first = net[0]
    assert isinstance(first, nn.Linear) and first.out_features <= 2 * 4 * 8 * 8


def softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in row)
    return [math.exp(x) / total for x in row]


def test_the_terms_are_those_written_out() -> None:
    t = [[2.0, -1.0, 0.5], [0.0, 3.0, -2.0]]
    s = [[1.0, 1.5, 0.0], [-1.0, 2.0, 0.0]]
    f = torch.tensor([[1.0, -3.0], [0.5, 0.0]], dtype=torch.float64)
    p, q = [softmax(row) for row in t], [softmax(row) for row in s]
    mean = [(p[0][i] + p[1][i]) / 2 for i in range(3)]
    each = [sum(a * math.log(a / b) for a, b in zip(*rows)) for rows in zip(p, q)]
    parts = {
        "oh": -(math.log(p[0][0]) + math.log(p[1][1])) / 2,
        "adv": -sum(each) / 2,
        "bn": 0.7,
        "bal": sum(m * math.log(m) for m in mean),
        "act": -4.5 / 4,
    }
    told, answered = (torch.tensor(x, dtype=torch.float64) for x in (t, s))
    given: Any = {"answered": answered, "strange": torch.tensor(0.7), "features": f}
    for name, expected in parts.items():
        assert wanted(Terms(**{name: 2.0}), told, **given).item() == pytest.approx(2 * expected, rel=1e-5), name
    whole = wanted(Terms(1, 2, 3, 4, 5), told, **given).item()
    weights = {"adv": 1, "bn": 2, "oh": 3, "bal": 4, "act": 5}
    assert whole == pytest.approx(sum(w * parts[name] for name, w in weights.items()), rel=1e-5)
    classes = torch.tensor([2, 1])
    asked = wanted(Terms(oh=1), told, classes=classes).item()
    assert asked == pytest.approx(-(math.log(p[0][2]) + math.log(p[1][1])) / 2)
    # of the two pictures, the models agree on the second alone
    agreed = wanted(Terms(adv=1), told, answered=answered, agreed=True).item()
    assert agreed == pytest.approx(-each[1] / 2)


def test_balance_is_least_where_classes_are_as_frequent() -> None:
    sure = 50 * torch.eye(4)
    assert balance(sure).item() == pytest.approx(-math.log(4), rel=1e-6)
    assert balance(sure[:1].expand(4, 4)).item() == pytest.approx(0, abs=1e-6)
    assert torch.isfinite(torch.autograd.grad(balance(sure.requires_grad_() * 100), sure)[0]).all()


def test_contrast_is_that_written_out() -> None:
    parts, wholes = (
        nn.functional.normalize(torch.randn(5, 3, generator=torch.Generator().manual_seed(i))) for i in (0, 1)
    )
    each = []
    for i in range(5):
        row = softmax([float(parts[i] @ wholes[j]) / 0.2 for j in range(5)])
        each.append(-math.log(row[i]))
    expected = sum(each[:2]) / 2 + sum(each[2:]) / 3
    wholes.requires_grad_()
    value = contrast(parts.requires_grad_(), wholes, 0.2, 2)
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert contrast(parts, wholes, 0.2, 5).item() == pytest.approx(sum(each) / 5, rel=1e-5)
    value.backward()
    assert parts.grad is not None and wholes.grad is None


def test_views_are_of_a_part_first_and_of_the_whole_after_it(tmp_path: Path) -> None:
    """Means over the pixels that a batch norm reads: those of the part are held against the whole's, by the head."""
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()
    frame = Frame((3, 8, 8), torch.zeros(3, 1, 1), torch.ones(3, 1, 1))
    stage = Scene(frame, 2, Teacher(module), module, lambda images: images, (), module)
    random = torch.Generator().manual_seed(0)
    images = torch.randn(5, 3, 8, 8, generator=random) + 10 * torch.randn(5, 3, 1, 1, generator=random)
    with contrasting(stage, 1e-3, 0.2, False, LocalRun(0, tmp_path)) as unlike:
        stage.asked(images)
        torch.manual_seed(0)
        apart, views = unlike.apart(images, Bank(4, torch.device("cpu")))
    torch.manual_seed(0)
    each = [module[0](x).mean((2, 3)) for x in (cropped(images, PART), images)]
    torch.testing.assert_close(views, torch.cat(each, 1).detach())
    head = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, WIDTH))
    head.load_state_dict({name.removeprefix("parameter/"): t for name, t in unlike.state.result().items()})
    local, whole = (F.normalize(head(x)) for x in each)
    torch.testing.assert_close(apart, F.cross_entropy(local @ whole.T / 0.2, torch.arange(5)))


def test_the_way_down_gives_the_best_rows_and_the_sum_of_gradients() -> None:
    """Against Adam written out, on a generator of one number: w · z, whose loss has a minimum that steps overshoot."""
    net = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        net.weight.fill_(1.0)
    z = torch.tensor([[2.0]], dtype=torch.float64, requires_grad=True)
    pace = Pace(6, 0.5, 0.1)

    def loss(made: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return (made - 1).square().sum(), {"made": made.detach()}

    rows, sums = found(lambda: net(z), loss, net, z, pace)
    w, y, total, way = 1.0, 2.0, 0.0, []
    moments = {"w": [0.0, 0.0], "y": [0.0, 0.0]}
    for step in range(1, 7):
        way.append(((w * y - 1) ** 2, w * y))
        slopes = {"w": 2 * (w * y - 1) * y, "y": 2 * (w * y - 1) * w}
        total += slopes["w"]
        moves = {}
        for name, slope in slopes.items():
            m = moments[name]
            m[0] = MOMENTS[0] * m[0] + (1 - MOMENTS[0]) * slope
            m[1] = MOMENTS[1] * m[1] + (1 - MOMENTS[1]) * slope**2
            moves[name] = m[0] / (1 - MOMENTS[0] ** step) / (math.sqrt(m[1] / (1 - MOMENTS[1] ** step)) + 1e-8)
        w, y = w - pace.lr * moves["w"], y - pace.lr_z * moves["y"]
    assert sums[0].item() == pytest.approx(total, rel=1e-6)
    least = min(way)
    assert way.index(least) not in (0, 5), "the best is on the way, or this shows nothing"
    assert rows["made"].item() == pytest.approx(least[1], rel=1e-6)
    assert net.weight.item() == pytest.approx(w, rel=1e-6) and z.item() == pytest.approx(y, rel=1e-6)


def test_what_layers_read_is_heard_inside_the_block_alone() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    x = torch.ones(1, 2)
    with read_by([net[1]]) as heard:
        net(x)
        assert torch.equal(heard[0], net[0](x))
    net(2 * x)
    assert torch.equal(heard[0], net[0](x))


def test_a_part_is_as_large_as_the_whole_and_lies_inside_it() -> None:
    torch.manual_seed(0)
    ramp = torch.arange(64.0).view(1, 1, 8, 8)
    ranges = [(part.min().item(), part.max().item()) for part in (cropped(ramp, 0.25) for _ in range(20))]
    assert all(0 <= low < high <= 63 for low, high in ranges)
    assert len(set(ranges)) > 5 and cropped(ramp, 0.25).shape == ramp.shape
    assert torch.equal(cropped(ramp, 1.0), ramp)
