"""Compiled rules: the numbers are right to the bit, and chunks, threads and a spoiled cache never show."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import tiny
from lfm.core.errors import CorruptError
from lfm.core.home import home
from lfm.core.interfaces import LazyTensor
from lfm.fusing import Each, Rule, engine, fuse, gram, kernel, kth_largest, kth_largest_each, sums, threshold
from lfm.fusing.joins import change, dropped, magnitude, weighted
from lfm.fusing.rows import ranks, row_width, uniform
from lfm.tensors import compiled, lazy
from lfm.tensors.lazy import Held

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def held(*tensors: torch.Tensor) -> list[dict[str, LazyTensor]]:
    return [{"t": Held(tensor)} for tensor in tensors]


def scaled(x: torch.Tensor, by: float, dtype: torch.dtype) -> torch.Tensor:
    """by · x, computed by a kernel and stored as dtype."""
    rule = Rule(weighted, given=lambda name: {"weight": (by,)})
    return fuse(rule, ["t"], held(x), like={"t": Held(torch.empty(0, dtype=dtype))})["t"].read()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_number_is_read_and_written_as_it_is(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    assert torch.equal(scaled(every, 1.0, dtype).view(torch.int16), every.view(torch.int16))
    assert torch.equal(scaled(every, 1.0, torch.float64), every.double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounding_is_to_nearest_even_and_only_once(dtype: torch.dtype) -> None:
    """Midpoints between neighbours, and what lies a hair (2⁻⁴⁰) on either side: fp32 could not tell them apart."""
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    low = torch.rand(20_000, generator=torch.Generator().manual_seed(0)).sub(0.5).mul(100).to(dtype)
    up = (low.view(bits) + 1).view(dtype)
    middle = (low.double() + up.double()) / 2
    even = torch.where((low.view(bits) & 1) == 0, low, up)
    assert torch.equal(scaled(middle, 1.0, dtype), even)
    hair = middle.abs() * 2.0**-40 * (up.double() - low.double()).sign()
    assert torch.equal(scaled(middle + hair, 1.0, dtype), up)
    assert torch.equal(scaled(middle - hair, 1.0, dtype), low)


@pytest.mark.parametrize(
    ("dtype", "largest", "over"), [(torch.float16, 65519.0, 65520.0), (torch.bfloat16, 3.39e38, 3.4e38)]
)
def test_what_a_format_cannot_hold_is_refused(dtype: torch.dtype, largest: float, over: float) -> None:
    assert scaled(torch.tensor([largest], dtype=torch.float64), 1.0, dtype).isfinite().all()
    with pytest.raises(CorruptError, match=r"'t' leaves the range of (b?)float16"):
        scaled(torch.tensor([over], dtype=torch.float64), 1.0, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_an_input_that_is_no_number_is_refused_whatever_is_made_of_it(dtype: torch.dtype, bad: float) -> None:
    values = torch.ones(5000).to(dtype)
    values[4321] = bad
    rule = Rule(weighted, given=lambda name: {"weight": (1.0, 0.0)})
    with pytest.raises(CorruptError, match="'t' holds a NaN or an infinity"):
        fuse(rule, ["t"], held(torch.ones(5000), values))["t"].read()
    with pytest.raises(CorruptError, match="'t' holds a NaN or an infinity"):
        kth_largest(Rule(magnitude), [["t"]], held(values), [[1]])


def test_models_in_different_formats_and_many_of_them() -> None:
    random = torch.Generator().manual_seed(0)
    values = [torch.randn(1000, generator=random).to(DTYPES[i % 4]) for i in range(13)]
    rule = Rule(weighted, given=lambda name: {"weight": range(1, 14)})
    found = fuse(rule, ["t"], held(*values), like=held(torch.empty(0, dtype=torch.float64))[0])["t"].read()
    torch.testing.assert_close(found, sum((i + 1) * v.double() for i, v in enumerate(values)))


@settings(max_examples=30, deadline=None)
@given(
    size=st.integers(1, 3000),
    coarse=st.booleans(),
    dtype=st.sampled_from(DTYPES[:3]),
    seed=st.integers(0, 1000),
    share=st.floats(0, 1),
)
def test_thresholds_are_those_of_a_sort(size: int, coarse: bool, dtype: torch.dtype, seed: int, share: float) -> None:
    random = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(size, generator=random) for _ in range(2))
    a, b = ((t.mul(2).round() / 2 if coarse else t).to(dtype) for t in (a, b))
    rank = max(1, int(share * size))
    (found,) = kth_largest(Rule(magnitude, first=change), [["t"]], held(b), [[rank, size + 1]], base=held(a)[0])
    known = (b.double() - a.double()).float().abs().sort(descending=True).values
    assert found == [float(known[rank - 1]), 0.0]


def test_thresholds_over_several_tensors_and_many_chunks() -> None:
    random = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(n, generator=random) for name, n in (("a", 700_001), ("b", 3), ("c", 40_000))}
    source = {name: Held(t) for name, t in tensors.items()}
    known = torch.cat(list(tensors.values())).abs().sort(descending=True).values
    (found,) = kth_largest(Rule(magnitude), [list(tensors)], [source], [[1, 5000, 700_000]], workers=2)
    assert found == [float(known[i - 1]) for i in (1, 5000, 700_000)]


@pytest.mark.parametrize("rank", [1, 600_000, 1_290_000, 1_300_000])
def test_thresholds_hold_where_a_sample_misleads(rank: int) -> None:
    random = torch.Generator().manual_seed(0)
    values = torch.randn(1_300_000, generator=random)
    for start in range(0, len(values), lazy.CHUNK):  # where samples are taken
        values[start : start + threshold.SAMPLE] *= 1000
    (found,) = kth_largest(Rule(magnitude), [["t"]], held(values), [[rank]], workers=2)
    assert found == [float(values.abs().sort(descending=True).values[rank - 1])]


@settings(max_examples=20, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 2000), min_size=1, max_size=3),
    ranks=st.lists(st.lists(st.integers(1, 2500), max_size=2), min_size=1, max_size=3),
    spread=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_thresholds_of_each_model_are_those_of_it_alone(
    sizes: list[int], ranks: list[list[int]], spread: bool, seed: int
) -> None:
    """Whatever of the others is asked, or nothing; where samples mislead too."""
    random = torch.Generator().manual_seed(seed)
    names = [f"t{i}" for i in range(len(sizes))]

    def drawn(scale: float) -> dict[str, Held]:
        scales = torch.logspace(0, 6 * spread, max(sizes)) * scale
        return {name: Held(torch.randn(n, generator=random) * scales[:n]) for name, n in zip(names, sizes)}

    base, models = drawn(1), [drawn(10.0**i) for i in range(len(ranks))]
    rule, groups = Rule(magnitude, first=change), [names, *[[name] for name in names]]
    each = kth_largest_each(rule, groups, models, [ranks] * len(groups), base=base)
    for i, model in enumerate(models):
        alone = kth_largest(rule, groups, [model], [ranks[i]] * len(groups), base=base)
        assert [found[i] for found in each] == alone


@pytest.mark.parametrize("rank", [1, 600_000, 1_300_000])
def test_thresholds_of_each_hold_where_one_models_sample_misleads(rank: int) -> None:
    random = torch.Generator().manual_seed(0)
    plain, odd = (torch.randn(1_300_000, generator=random) for _ in range(2))
    for start in range(0, len(odd), lazy.CHUNK):
        odd[start : start + threshold.SAMPLE] *= 1000
    ((one, other),) = kth_largest_each(Rule(magnitude), [["t"]], held(plain, odd), [[[rank], [rank]]], workers=2)
    known = [[float(each.abs().sort(descending=True).values[rank - 1])] for each in (plain, odd)]
    assert [one, other] == known


def product(a: int, b: int, x: Each) -> float:
    return x[a] * x[b]


def test_sums_do_not_depend_on_threads_and_rows_add_up() -> None:
    random = torch.Generator().manual_seed(0)
    a, b = (torch.randn(500, 1201, generator=random) for _ in range(2))
    which = [(0, 0), (0, 1)]
    one, two = (sums(Rule(product), ["t"], held(a, b), which, workers=w)["t"] for w in (1, 3))
    assert (one == two).all() and one.shape == (1, 2)
    np.testing.assert_allclose(one[0], [(a.double() ** 2).sum(), (a.double() * b.double()).sum()], rtol=1e-12)
    rows = sums(Rule(product, width=row_width(held(a)[0])), ["t"], held(a, b), which)["t"]
    np.testing.assert_allclose(rows[:, 1], (a.double() * b.double()).sum(1).numpy(), rtol=1e-11, atol=1e-11)
    assert np.array_equal(gram(["t"], held(a, b))["t"][0, 0], one[0])


def test_parameters_of_each_row() -> None:
    x = torch.ones(3, 400_000)
    rule = Rule(weighted, given=lambda name: {"weight": np.array([[1.0], [2.0], [3.0]])}, width=lambda name: 400_000)
    found = fuse(rule, ["t"], held(x))["t"].read()
    assert torch.equal(found, x * torch.tensor([[1.0], [2.0], [3.0]]))
    small = fuse(
        Rule(weighted, given=lambda name: {"weight": [[2.0], [5.0]]}, width=lambda name: 2), ["t"], held(x[0, :4])
    )
    assert small["t"].read().tolist() == [2.0, 2.0, 5.0, 5.0]


def kept(base: float, x: float, random: float) -> float:
    return random


def alone(x: Each) -> float:
    return x[0]


def test_random_numbers_are_those_of_the_place_alone() -> None:
    size = 600_000
    zeros = torch.zeros(size, dtype=torch.float64)
    rule = Rule(alone, first=kept, seed=3)
    lazy = fuse(rule, ["t"], held(zeros), base=held(zeros)[0])["t"]
    whole = lazy.read()
    assert np.array_equal(whole.numpy(), uniform(3, 0, "t", 0, size))
    assert torch.equal(lazy.read_flat(299_999, 300_007), whole[299_999:300_007])  # type: ignore[attr-defined]
    assert abs(float(whole.mean()) - 0.5) < 5 * (1 / 12 / size) ** 0.5
    counts = torch.histc(whole, 64, 0, 1)
    assert float(((counts - size / 64) ** 2 / (size / 64)).sum()) < 63 + 5 * (2 * 63) ** 0.5  # χ², 63 degrees
    others = [uniform(4, 0, "t", 0, size), uniform(3, 1, "t", 0, size), uniform(3, 0, "u", 0, size)]
    assert all(abs(np.corrcoef(whole.numpy(), other)[0, 1]) < 5 / size**0.5 for other in others)


def test_ranks_of_equals_are_in_their_order() -> None:
    assert ranks(np.array([[3.0, -1.0, 3.0, 0.0], [0.0, 0.0, 0.0, -5.0]])).tolist() == [[2, 1, 3, 0], [0, 1, 2, 3]]


def test_compiled_code_is_kept_and_a_spoiled_file_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "home", home)
    monkeypatch.setenv("LFM_HOME", str(tmp_path))
    source = kernel._source(kernel.Formula(magnitude), 1, "", "        pass")
    compiled._load.cache_clear()
    compiled.load(source)
    (file,) = (tmp_path / "compiled").iterdir()
    whole = file.read_bytes()

    def never(*given: object) -> None:
        raise AssertionError("compiled though it was kept")

    with monkeypatch.context() as patch:
        patch.setattr(compiled, "_compile", never)
        compiled._load.cache_clear()
        compiled.load(source)
        patch.setattr(compiled, "_given", lambda: "what every source may name, changed")
        compiled._load.cache_clear()
        with pytest.raises(AssertionError, match="though it was kept"):
            compiled.load(source)
    for spoiled in (whole[:-10], bytes([whole[0] ^ 1]) + whole[1:]):
        file.write_bytes(spoiled)
        compiled._load.cache_clear()
        compiled.load(source)
        assert file.read_bytes() != spoiled and compiled._kept(file) is not None
    monkeypatch.setenv("LFM_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("not a directory")
    compiled._load.cache_clear()
    compiled.load(source)  # where nothing can be kept, it is compiled each time


def test_a_run_that_merges_imports_neither_torch_nor_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(3):
        tiny.causal(tmp_path / str(seed), seed=seed)
    code = (
        "from pathlib import Path; import sys; from lfm import runs\n"
        "for method in ('linear', 'ties', 'dare_ties', 'slerp'):\n"
        "    base = {} if method in ('linear', 'slerp') else {'base': ['0']}\n"
        "    order = runs.Order('reuse.' + method, {**base, 'models': ['1', '2']}, out=Path('out') / method)\n"
        "    done = runs.execute(order)\n"
        "    assert done.verified.max_abs == 0\n"
    )
    done = twice(code, tmp_path, monkeypatch, without={"torch", "transformers", "numba"})
    assert done.returncode == 0, done.stderr


def test_kept_code_that_calls_the_c_library_runs_where_nothing_was_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the linker was not told of, where the compiler was not loaded, left exp at address 0."""
    for seed in range(2):
        tiny.causal(tmp_path / str(seed), seed=seed)
    code = (
        "from pathlib import Path; from lfm import runs\n"
        "runs.execute(runs.Order('reuse.arcee_fusion', {'base': ['0'], 'models': ['1']}, out=Path('out')))\n"
    )
    done = twice(code, tmp_path, monkeypatch, without={"numba"})
    assert done.returncode == 0, done.stderr


def twice(
    code: str, here: Path, monkeypatch: pytest.MonkeyPatch, *, without: set[str]
) -> subprocess.CompletedProcess[str]:
    """Python code run here, where what is not yet kept is compiled, and then in a process without these libraries."""
    (here / "home").mkdir()
    (here / "home" / "compiled").symlink_to(compiled.home() / "compiled")
    monkeypatch.setenv("LFM_HOME", str(here / "home"))
    monkeypatch.chdir(here)
    exec(code, {})
    (here / "out").rename(here / "out-first")
    check = f"import sys; assert not set({sorted(without)}) & set(sys.modules), sorted(sys.modules)"
    return subprocess.run([sys.executable, "-c", code + check], capture_output=True, text=True, check=False)


def test_a_rule_reads_only_what_it_names(tmp_path: Path) -> None:
    save_file({"t": torch.ones(4)}, tmp_path / "m.safetensors")
    rule = Rule(alone)
    task = engine.task_of(rule, "t", held(torch.ones(4)), held(torch.ones(4))[0])
    assert len(task.inputs) == 1
    assert len(engine.task_of(Rule(alone, first=dropped), "t", held(torch.ones(4)), held(torch.ones(4))[0]).inputs) == 2


def test_a_merge_of_merges_has_buffers_of_its_own_at_every_depth() -> None:
    """The inner merge is computed while the outer one's first inputs are already in its buffers."""
    x = [torch.randn(300_000, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(3)]
    mean = Rule(weighted, given=lambda name: {"weight": (0.5, 0.5)})
    inner = fuse(mean, ["t"], held(x[1], x[2]))
    outer = fuse(mean, ["t"], [*held(x[0]), inner])["t"].read()
    assert torch.equal(outer, 0.5 * x[0] + 0.5 * (0.5 * x[1] + 0.5 * x[2]))
