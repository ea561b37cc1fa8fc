"""The contract suite catches methods that break their word."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import contract
import outside
import tiny
from case import Case
from lfm.core.errors import AccessError, LfmError

CASE = Case(models={"model": ("model",)})


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LFM_HOME", str(tmp_path / "home"))
    outside.plant(monkeypatch)
    tiny.causal(tmp_path / "model")
    return tmp_path


def test_an_honest_method_passes(here: Path) -> None:
    made = contract.made("edit.nudge", CASE, here)
    contract.uses_what_it_declares(made)
    contract.leaves_inputs_alone(made)
    contract.same_seed_same_digest(made)
    contract.saves_what_it_made(made)
    contract.resumes_to_the_same_digest(made)
    contract.refuses_before_loading(made)


def test_one_that_reads_more_than_it_declares_is_caught(here: Path) -> None:
    with pytest.raises(AccessError, match="weights"):
        contract.made("edit.sneak", CASE, here)


def test_one_that_demands_more_than_it_reads_is_caught(here: Path) -> None:
    made = contract.made("edit.boast", CASE, here)
    with pytest.raises(AssertionError, match="never asks"):
        contract.uses_what_it_declares(made)


@pytest.mark.parametrize("promise", [contract.same_seed_same_digest, contract.resumes_to_the_same_digest])
def test_one_that_draws_its_own_randomness_is_caught(promise: Callable[[contract.Made], None], here: Path) -> None:
    made = contract.made("edit.moody", CASE, here)
    with pytest.raises(AssertionError) as caught:
        promise(made)
    assert "progress" not in str(caught.value)  # its digest it is


def test_one_that_changes_its_input_is_caught(here: Path) -> None:
    with pytest.raises((AssertionError, LfmError)):  # seen at the end, or by the reader whose file has changed
        contract.leaves_inputs_alone(contract.made("edit.vandal", CASE, here))


def test_an_example_goes_on_after_a_backslash() -> None:
    doc = """What it does.

    lfm run edit.nudge model=base \\
      --set size=1   --out moved

    lfm run edit.other model=base
    """
    whole = ["run", "edit.nudge", "model=base", "--set", "size=1", "--out", "moved"]
    assert contract.example_of(doc) == whole and contract.example_of("None.") == []
