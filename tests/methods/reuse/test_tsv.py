"""reuse.tsv: leading singular vectors, decorrelated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny
from case import Case
from lfm.methods.reuse import tsv
from lfm.subspaces.matrices import orthonormal
from methods.reuse import eight
from methods.reuse.merging import bare, merge, tensors


def case(here: Path) -> Case:
    for seed, name in enumerate(("base", "math", "code")):
        tiny.causal(here / name, seed=seed)
    return Case(models={"base": ("base",), "models": ("math", "code")})


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("count", "out", "inner"), [(2, 12, 20), (3, 20, 13), (8, 9, 9)])
def test_it_is_the_authors_construction(count: int, out: int, inner: int) -> None:
    """Their buffers of all r directions, filled from the left, in fp64; the rest of them is zero."""
    given = randn(count, out, inner)
    rank = min(out, inner)
    each = rank // count
    u, s, v = (torch.zeros(*shape, dtype=torch.float64) for shape in ((out, rank), (rank,), (rank, inner)))
    for i, change in enumerate(given.double()):
        a, b, c = torch.linalg.svd(change, full_matrices=False)
        part = slice(i * each, (i + 1) * each)
        u[:, part], s[part], v[part] = a[:, :each], b[:each], c[:each]
    used = each * count
    (p, _, q), (a, _, b) = (torch.linalg.svd(m, full_matrices=False) for m in (u[:, :used], v[:used]))
    torch.testing.assert_close(tsv.merged(given).double(), p @ q @ torch.diag(s[:used]) @ a @ b, rtol=1e-4, atol=1e-4)


def test_changes_in_subspaces_of_their_own_are_added_whole() -> None:
    """Nothing to decorrelate: two changes of rank 2, orthogonal to each other, come through as their sum."""
    u, v = torch.linalg.qr(randn(8, 4))[0], torch.linalg.qr(randn(6, 4))[0]
    first = u[:, :2] @ torch.diag(torch.tensor([3.0, 1.0])) @ v[:, :2].T
    second = u[:, 2:] @ torch.diag(torch.tensor([2.0, 0.5])) @ v[:, 2:].T
    torch.testing.assert_close(tsv.merged(torch.stack([first, second])), first + second, rtol=1e-4, atol=1e-5)


def test_a_single_model_is_itself_and_a_share_of_it_its_best_approximation(tmp_path: Path) -> None:
    base = bare(tmp_path / "base.safetensors", {"w": randn(6, 5), "b": randn(3)})
    model = bare(tmp_path / "model.safetensors", {"w": randn(6, 5).flip(0), "b": randn(3) + 1})
    roles = {"base": [base], "models": [model]}
    for name, value in tensors(merge(tsv, tmp_path, roles)).items():
        torch.testing.assert_close(value, tensors(model)[name], rtol=1e-4, atol=1e-5)
    change = tensors(model)["w"] - tensors(base)["w"]
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    best = (u[:, :2] * s[:2]) @ v[:2]
    found = tensors(merge(tsv, tmp_path, roles, share=0.4))["w"] - tensors(base)["w"]
    torch.testing.assert_close(found, best, rtol=1e-4, atol=1e-5)


def test_more_models_than_directions_keep_their_first() -> None:
    given = randn(5, 3, 4)
    assert torch.linalg.matrix_norm(tsv.merged(given)) > 0.5 * torch.linalg.svdvals(given)[:, 0].max()


@pytest.mark.parametrize("shape", [(6, 3), (3, 6), (4, 4)])
def test_the_nearest_orthonormal_matrix(shape: tuple[int, int]) -> None:
    given = randn(*shape)
    found = orthonormal(given)
    gram = found.T @ found if shape[0] >= shape[1] else found @ found.T
    torch.testing.assert_close(gram, torch.eye(min(shape)), rtol=1e-5, atol=1e-5)
    for _ in range(20):  # no other is nearer
        other = torch.linalg.qr(torch.randn(max(shape), min(shape)))[0]
        other = other if shape[0] >= shape[1] else other.T
        assert (found - given).norm() <= (other - given).norm() + 1e-5


@pytest.mark.slow
def test_over_the_eight_tasks_it_is_far_better_than_the_mean(tmp_path: Path) -> None:
    """Measured: mean .725, TSV-Merge .805."""
    assert eight.accuracy(merge(tsv, tmp_path, {"base": [eight.base()], "models": eight.experts()})) > 0.78
