"""lfm.models.norms: batch norms' statistics, against those of their inputs."""

from __future__ import annotations

import torch
from torch import nn

from lfm.models.norms import measured_anew


def test_statistics_are_those_of_the_inputs_and_nothing_else_changes() -> None:
    random = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).eval()
    x = [torch.randn(50, 3, generator=random) * 3 + 1 for _ in range(2)]
    before = {key: value.clone() for key, value in net.state_dict().items()}
    measured_anew(net, [{"x": part} for part in x])
    with torch.no_grad():
        h = [net[0](part) for part in x]
    torch.testing.assert_close(net[1].running_mean, torch.stack([p.mean(0) for p in h]).mean(0))
    torch.testing.assert_close(net[1].running_var, torch.stack([p.var(0) for p in h]).mean(0))
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]) != ("running" in key)
    assert not any(module.training for module in net.modules()) and net[1].momentum == 0.1
