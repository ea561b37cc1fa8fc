"""What an edit measures of a model is kept, stops when it is enough, and changes no result."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from lfm.core import Inputs, Model
from lfm.core.method import check
from lfm.data.records import Edit, Text
from lfm.editing import choose, covariance, kept, recall, setting
from lfm.methods.edit import grace, memit, rome
from lfm.models import load
from lfm.runs.run import LocalRun

EDITS = (Edit(subject="Ada Ashby", relation="", object="in", new_object="cat", prompt="Here lives Ada Ashby"),)
QUICK: dict[str, Any] = {"prefixes": 3, "tokens": 300, "steps": 60, "collapse": 1e6, "accept": 0.01}
TEXT = tuple(Text(text=line) for line in tiny.CORPUS)


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LFM_HOME", str(tmp_path / "home"))
    return tiny.causal(tmp_path / "base")


def edited(method: Any, base: Path, work: Path) -> tuple[Model, LocalRun]:
    run = LocalRun(0, work)
    inputs = check("edit", method.METHOD, Inputs({"model": (load(base),)}, {"edits": EDITS}))
    return method.run(method.Config(**QUICK, **({} if method is grace else {"reach": 10.0})), inputs, run), run


def test_what_other_code_measured_is_not_taken_for_this_code_s(tmp_path: Path) -> None:
    """Whatever a mechanism of editing imports of lfm decides what it measures."""
    sources = Path(kept.__file__).parent.parent
    imported = {
        name.split(".")[1]
        for file in (sources / "editing").glob("*.py")
        for name in re.findall(r"^ *from (lfm\.\w+)", file.read_text(), re.MULTILINE)
    }
    assert imported <= {*kept.BENEATH}
    copy = tmp_path / "lfm"
    shutil.copytree(sources, copy, ignore=shutil.ignore_patterns("__pycache__"))
    same = kept._code(copy)
    assert same == kept._code()
    for place, changes in (("models/local.py", True), ("tensors/lowrank.py", True), ("report/words.py", False)):
        (copy / place).write_text((copy / place).read_text() + "\n")
        kept._code.cache_clear()
        now = kept._code(copy)
        assert (now != same) == changes, place
        same = now


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("it was measured again")


@pytest.mark.parametrize("method", [rome, memit, grace])
def test_what_is_kept_changes_no_result_and_is_not_measured_again(
    method: Any, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text of its own, prefixes, the covariance and the choice of a block: with none kept, while it is kept, after."""
    monkeypatch.setattr(choose, "candidates", lambda _: [0, 1])
    with monkeypatch.context() as patch:
        patch.setattr(kept, "keep", lambda *_: None)
        without, run = edited(method, base, tmp_path / "without")
    first, again = edited(method, base, tmp_path / "first")
    for module, name in ((covariance, "second_moments"), (setting, "sampled"), (choose, "_gain"), (choose, "said")):
        monkeypatch.setattr(module, name, never)
    second, third = edited(method, base, tmp_path / "second")
    assert without.digest == first.digest == second.digest
    assert run.notes == again.notes == third.notes
    assert run.curves == again.curves == third.curves


def test_a_memorys_block_is_not_tried_again(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    search = recall.search

    def counted(module: Any, block: int, *rest: Any, **settings: Any) -> Any:
        tried.append(block)
        return search(module, block, *rest, **settings)

    monkeypatch.setattr(recall, "search", counted)
    first, run = edited(grace, base, tmp_path / "first")
    assert tried == [0, 1, tried[-1]]  # both blocks, and then the edit's value in one of them
    second, again = edited(grace, base, tmp_path / "second")
    assert tried[3:] == tried[2:3]
    assert first.digest == second.digest and run.notes == again.notes and run.curves == again.curves


def test_what_another_model_or_text_gave_is_not_taken(base: Path, tmp_path: Path) -> None:
    def moment(directory: Path, text: tuple[Text, ...], ridge: float = 0.001) -> torch.Tensor:
        run = LocalRun(0, tmp_path / "work")
        here = setting.opened(load(directory), text, run, prefixes=0, tokens=200)
        return covariance.moments(here, [0], run, ridge)[0].matrix

    mine = moment(base, TEXT)
    assert torch.equal(mine, moment(base, TEXT))
    assert not torch.equal(mine, moment(base, TEXT[::-1]))
    assert not torch.equal(mine, moment(tiny.causal(tmp_path / "other", seed=1), TEXT))


@pytest.mark.parametrize("harm", ["killed before the end", "half a file", "one bit", "other numbers", "not JSON"])
def test_what_is_not_whole_is_made_anew(harm: str, base: Path, tmp_path: Path) -> None:
    key = {"model": "m", "block": 0}
    kept.keep("covariance", key, {"tokens": 3}, {"moment": torch.eye(64)})
    (place,) = (tmp_path / "home" / "editing").iterdir()
    if harm == "killed before the end":
        place.rename(place.with_name(".making-x"))
    elif harm == "half a file":
        with (place / "tensors.safetensors").open("r+b") as file:
            file.truncate(1000)
    elif harm == "one bit":
        content = bytearray((place / "tensors.safetensors").read_bytes())
        content[-5] ^= 1
        (place / "tensors.safetensors").write_bytes(content)
    elif harm == "other numbers":
        (place / "told.json").write_text((place / "told.json").read_text().replace("3", "4", 1))
    else:
        (place / "told.json").write_text('{"told"')
    assert kept.recalled("covariance", key) is None
    kept.keep("covariance", key, {"tokens": 3}, {"moment": torch.eye(64)})
    told, tensors = kept.recalled("covariance", key) or ({}, {})
    assert told == {"tokens": 3} and torch.equal(tensors["moment"], torch.eye(64))


def test_where_nothing_can_be_written_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LFM_HOME", str(tmp_path / "file" / "home"))
    assert kept.known("said", {"model": "m"}, lambda: ["a"]) == ["a"]


def test_the_excess_is_the_damage_of_the_rough_update_over_the_best(base: Path) -> None:
    """By hand: ‖b aᵀ C^½‖² of a = u/(uᵀk), from u of another C and from u = C⁻¹k."""
    random = torch.Generator().manual_seed(0)
    root, key = torch.randn(6, 6, dtype=torch.float64, generator=random), torch.randn(6, 1, dtype=torch.float64)
    moment, rough = root @ root.T, torch.randn(6, 1, dtype=torch.float64, generator=random)
    best = torch.linalg.solve(moment, key)

    def damage(u: torch.Tensor) -> float:
        a = u / (u * key).sum()
        return float((a * (moment @ a)).sum())

    assert covariance.excess(rough, best, moment, key) == pytest.approx(damage(rough) / damage(best) - 1)
    assert covariance.excess(best, best, moment, key) == pytest.approx(0, abs=1e-9)
    assert covariance.excess(-3 * best, best, moment, key) == pytest.approx(0, abs=1e-9)


@given(st.lists(st.integers(1, 40), max_size=60))
def test_no_row_is_lost_or_read_twice(lengths: list[int]) -> None:
    rows = [[i] * n for i, n in enumerate(lengths)]
    parts = covariance.doublings(rows)
    assert [row for part in parts for row in part] == rows and all(parts)


def test_an_eighth_is_read_first() -> None:
    assert [len(part) for part in covariance.doublings([[0]] * 80)] == [10, 10, 20, 40]


def test_text_that_repeats_itself_is_enough_after_the_first_doubling(base: Path, tmp_path: Path) -> None:
    run = LocalRun(0, tmp_path / "work")
    here = setting.opened(load(base), (Text(text=tiny.CORPUS[0]),) * 100, run, prefixes=0, tokens=1600)
    total = sum(map(len, here.text))
    found = covariance.moments(here, [0, 1], run, 0.001)
    whole = covariance.second_moments(here.module, here.codec, [0, 1], here.text, run)
    for block in (0, 1):
        assert total / 8 < found[block].tokens <= total / 4 + len(here.text[0])
        assert found[block].excess == pytest.approx(0, abs=1e-3)
        torch.testing.assert_close(found[block].matrix, whole[block], rtol=1e-3, atol=1e-3 * float(whole[block].max()))


def test_text_that_does_not_converge_is_read_to_its_end_and_said_so(base: Path, tmp_path: Path) -> None:
    run = LocalRun(0, tmp_path / "work")
    here = setting.opened(load(base), TEXT, run, prefixes=0, tokens=200)
    found = covariance.moments(here, [0], run, 0.001)[0]
    assert found.tokens == sum(map(len, here.text)) and found.excess > covariance.TOLERANCE
