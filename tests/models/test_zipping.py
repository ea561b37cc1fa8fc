"""lfm.models.zipping: the greedy matching against the authors' own, and the merge against formulas written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lfm.models import symmetry as sym
from lfm.models.covariance import across, together
from lfm.models.mixing import load_into, parameters_of
from lfm.models.zipping import Zip, merged, zipped


def correlations(seed: int, n: int) -> torch.Tensor:
    """Of two models' n units over 40 rows: the second's are the first's in another order, with noise; two are alike."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 2 * n, generator=random).double()
    x[:, n:] += 0.7 * x[:, torch.randperm(n, generator=random)]
    x[:, 0] += x[:, 1]
    return torch.corrcoef(x.T)


RECORDED = {
    (0, 4, 0.3, 0.5): [[0, 1, 4], [2, 5], [3, 6], [7]],
    (1, 6, 0.3, 0.5): [[0, 1, 6], [2, 10], [3, 8], [4, 9], [5, 7], [11]],
    (2, 6, 1.0, 1.0): [[0, 6], [1, 7], [2, 10], [3, 11], [4, 9], [5, 8]],
    (3, 9, 0.5, 1.0): [[0, 1, 17], [2, 11], [3, 16], [4, 10], [5, 12], [6, 14], [7, 15], [8, 9], [13]],
}
"""(seed, n, alpha, beta) → which units each new one is made of: what match_tensors_zipit of github.com/gstoica27/ZipIt
(commit 1b6ca40, run with torch 2.13) gives for {"cossim": correlations(seed, n)}."""


@pytest.mark.parametrize("case", RECORDED)
def test_units_are_matched_as_by_the_authors(case: tuple[int, int, float, float]) -> None:
    seed, n, alpha, beta = case
    found = zipped(correlations(seed, n), alpha, beta)
    assert sorted(column.nonzero()[:, 0].tolist() for column in found.unmerge.T) == RECORDED[case]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 7), st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([0.0, 0.5, 1.0]))
def test_every_unit_goes_into_one_new_unit_and_new_units_are_means(
    seed: int, n: int, alpha: float, beta: float
) -> None:
    found = zipped(
        torch.corrcoef(torch.randn(2 * n, 20, generator=torch.Generator().manual_seed(seed))).reshape(2 * n, 2 * n),
        alpha,
        beta,
    )
    assert found.merge.shape == (n, 2 * n) and found.unmerge.shape == (2 * n, n)
    assert found.unmerge.sum(1).tolist() == [1] * (2 * n)
    torch.testing.assert_close(found.merge @ found.unmerge, torch.eye(n).double())
    if beta == 0:
        assert found.within == 0
    if alpha == 0 and beta == 0:
        assert found.unmerge.sum(0).tolist() == [2] * n


def test_a_model_and_its_permuted_copy_are_matched_one_to_one() -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)).double()
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    found = zipped(torch.corrcoef(torch.cat([x, x[:, order]], 1).T), 0.3, 0.5)
    pairs = sorted(column.nonzero()[:, 0].tolist() for column in found.unmerge.T)
    assert pairs == [[i, 6 + order.tolist().index(i)] for i in range(6)]


def test_what_is_written_is_merged_and_what_is_read_unmerged() -> None:
    """Two layers without anything between: the product of the merged ones is ½ Σ Wₘ Uₘ Σ Mₘ Vₘ, written out."""
    random = torch.Generator().manual_seed(0)
    nets = [nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double() for _ in range(2)]
    for net in nets:
        for value in net.parameters():
            value.data.normal_(generator=random)
    found = zipped(torch.corrcoef(torch.randn(8, 30, generator=random).double()), 0.3, 1.0)
    (group,) = sym.symmetry(nets[0], {"x": torch.ones(2, 3).double()}).groups
    made = merged(parameters_of(nets[0]), parameters_of(nets[1]), [(group, found)])
    (a, b), merge, unmerge = map(dict, map(nn.Module.state_dict, nets)), found.merge, found.unmerge
    for name in ("0.weight", "0.bias"):
        torch.testing.assert_close(made[name], merge @ torch.cat([a[name], b[name]]))
    torch.testing.assert_close(made["2.weight"], torch.cat([a["2.weight"], b["2.weight"]], 1) @ unmerge / 2)
    torch.testing.assert_close(made["2.bias"], (a["2.bias"] + b["2.bias"]) / 2)


def test_zipped_one_to_one_a_permuted_copy_is_the_model_itself() -> None:
    random = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    batch = {"x": torch.randn(40, 3, generator=random).double()}
    found = sym.symmetry(net, batch)
    own = parameters_of(net)
    copy = load_into(nn.Sequential(*map(_fresh, net)).double(), sym.permuted(own, sym.drawn(found, random)))
    pairs = together([net, copy], [batch])
    zips = [(pair.group, zipped(pair.correlation, 0.3, 0.0)) for pair in pairs]
    made = merged(own, parameters_of(copy), zips)
    assert sym.difference(net, made, batch) < 1e-6


def _fresh(layer: nn.Module) -> nn.Module:
    return nn.Linear(layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else nn.ReLU()


def test_covariances_are_those_of_all_rows_at_once() -> None:
    random = torch.Generator().manual_seed(0)
    nets = [nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double() for _ in range(2)]
    x = torch.randn(20, 3, generator=random).double()
    with torch.no_grad():
        both = torch.cat([net[1](net[0](x)) for net in nets], 1)
    (pair,) = together(nets, [{"x": x[:7]}, {"x": x[7:]}])
    torch.testing.assert_close(pair.covariance, torch.cov(both.T, correction=0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pair.correlation, torch.corrcoef(both.T), rtol=1e-5, atol=1e-5)
    told = across([pair])(pair.group)
    assert told is not None and told[0].size == 4
    torch.testing.assert_close(told[1]["0"], pair.covariance[:4, 4:])


def test_a_zip_counts_what_is_of_one_model() -> None:
    unmerge = torch.tensor([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]]).double()
    assert Zip(unmerge.T / 2, unmerge).within == 2
