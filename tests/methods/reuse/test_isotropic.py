"""reuse.isotropic: flat spectra, against the authors' construction written out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny
from case import Case
from lfm.core.errors import CorruptError, MismatchError
from lfm.methods.reuse import isotropic
from methods.reuse import eight
from methods.reuse.merging import bare, merge, tensors


def case(here: Path) -> Case:
    for seed, name in enumerate(("base", "math", "code")):
        tiny.causal(here / name, seed=seed)
    return Case(models={"base": ("base",), "models": ("math", "code")})


def changes(count: int, out: int, inner: int) -> torch.Tensor:
    return torch.randn(count, out, inner, generator=torch.Generator().manual_seed(0))


def test_the_merged_change_keeps_the_sums_directions_and_has_one_singular_value() -> None:
    given = changes(3, 6, 4)
    u, s, v = torch.linalg.svd(given.sum(0), full_matrices=False)
    torch.testing.assert_close(isotropic.common(given), s.mean() * u @ v)
    found = torch.linalg.svdvals(isotropic.common(given))
    torch.testing.assert_close(found, s.mean().expand(4), rtol=1e-5, atol=1e-5)


def by_hand(given: torch.Tensor, share: float) -> torch.Tensor:
    """The authors' steps on buffers that hold all directions, in fp64."""
    given = given.double()
    count, rank = len(given), min(given.shape[1:])
    kept = rank - round((rank - int(rank * share)) / count) * count
    each = (rank - kept) // count
    u, s, v = torch.linalg.svd(given.sum(0), full_matrices=False)
    us, ss, vs = [], [], []
    for change in given:
        left = change - u[:, :kept] @ u[:, :kept].T @ change
        a, b, c = torch.linalg.svd(left, full_matrices=False)
        us, ss, vs = [*us, a[:, :each]], [*ss, b[:each]], [*vs, c[:each]]
    us, ss, vs = torch.cat([*us, u[:, :kept]], 1), torch.cat([*ss, s[:kept]]), torch.cat([*vs, v[:kept]])
    (p, _, q), (a, _, b) = (torch.linalg.svd(m, full_matrices=False) for m in (us, vs))
    return ss.mean() * (p @ q) @ (a @ b)


@pytest.mark.parametrize(("count", "shape", "share"), [(2, (12, 20), 0.5), (3, (20, 12), 0.8), (4, (8, 8), 0.0)])
def test_task_subspaces_are_the_authors(count: int, shape: tuple[int, int], share: float) -> None:
    given = changes(count, *shape)
    torch.testing.assert_close(isotropic.task(given, share).double(), by_hand(given, share), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("share", [1.0, 0.99])
def test_where_all_directions_are_common_both_forms_agree(share: float) -> None:
    given = changes(8, 6, 5)
    torch.testing.assert_close(isotropic.task(given, share), isotropic.common(given), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_more_models_than_directions_leave_room_for_none_of_their_own(share: float) -> None:
    given = changes(9, 4, 7)
    torch.testing.assert_close(isotropic.task(given, share), isotropic.common(given), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("subspaces", ["common", "task"])
def test_models_like_their_base_change_nothing(subspaces: str, tmp_path: Path) -> None:
    base = bare(tmp_path / "base.safetensors", {"w": torch.randn(4, 3), "b": torch.randn(3), "ids": torch.arange(2)})
    assert (
        merge(isotropic, tmp_path, {"base": [base], "models": [base, base]}, subspaces=subspaces).digest == base.digest
    )


def test_vectors_and_what_is_named_are_averaged_and_scaled(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    parts = {"w": (4, 3), "head.weight": (2, 3), "b": (3,), "column": (4, 1)}
    given = [{name: torch.randn(shape, generator=random) for name, shape in parts.items()} for _ in range(3)]
    base, *others = (bare(tmp_path / f"{i}.safetensors", value) for i, value in enumerate(given))
    made = tensors(merge(isotropic, tmp_path, {"base": [base], "models": others}, scale=0.5, average=["head"]))
    for name in ("head.weight", "b", "column"):
        mean = (given[1][name] + given[2][name]) / 2
        torch.testing.assert_close(made[name], given[0][name] + 0.5 * (mean - given[0][name]))
    both = torch.stack([given[1]["w"] - given[0]["w"], given[2]["w"] - given[0]["w"]])
    torch.testing.assert_close(made["w"], given[0]["w"] + 0.5 * isotropic.task(both, 0.8))


def test_models_that_do_not_go_together_or_hold_no_numbers_are_refused(tmp_path: Path) -> None:
    base = bare(tmp_path / "base.safetensors", {"w": torch.ones(3, 2)})
    turned = bare(tmp_path / "turned.safetensors", {"w": torch.ones(2, 3)})
    broken = bare(tmp_path / "broken.safetensors", {"w": torch.full((3, 2), float("nan"))})
    with pytest.raises(MismatchError, match="do not go together"):
        merge(isotropic, tmp_path, {"base": [base], "models": [turned]})
    with pytest.raises(CorruptError, match=r"broken\.safetensors: 'w' holds a NaN"):
        tensors(merge(isotropic, tmp_path, {"base": [base], "models": [broken]}))


@pytest.mark.slow
@pytest.mark.parametrize(("subspaces", "least"), [("common", 0.78), ("task", 0.76)])
def test_over_the_eight_tasks_it_is_far_better_than_the_mean(subspaces: str, least: float, tmp_path: Path) -> None:
    """Measured: mean .725, Iso-C .800, Iso-CTS .784."""
    roles = {"base": [eight.base()], "models": eight.experts()}
    assert eight.accuracy(merge(isotropic, tmp_path, roles, subspaces=subspaces)) > least
