"""Every discovered method keeps the same promises."""

from __future__ import annotations

from pathlib import Path

import pytest

import contract
from lfm.core import registry

OURS = sorted(id for id, module in registry.ids().items() if module.startswith("lfm.methods."))


@pytest.fixture
def here(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a home of its own; machine code, which takes seconds to make, is shared by all of them."""
    compiled = tmp_path_factory.getbasetemp().parent / "compiled"
    compiled.mkdir(exist_ok=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "compiled").symlink_to(compiled)
    monkeypatch.setenv("LFM_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("id", OURS)
def test_it_uses_the_access_it_declares_and_no_other(id: str, here: Path) -> None:
    contract.uses_what_it_declares(id, contract.case_of(id)(here), here)


@pytest.mark.parametrize("id", OURS)
def test_it_leaves_its_inputs_as_they_were(id: str, here: Path) -> None:
    contract.leaves_inputs_alone(id, contract.case_of(id)(here), here)


@pytest.mark.parametrize("id", OURS)
def test_the_same_seed_gives_the_same_digest(id: str, here: Path) -> None:
    contract.same_seed_same_digest(id, contract.case_of(id)(here), here)


@pytest.mark.parametrize("id", OURS)
def test_what_it_saves_is_what_it_made(id: str, here: Path) -> None:
    contract.saves_what_it_made(id, contract.case_of(id)(here), here)


@pytest.mark.parametrize("id", OURS)
def test_an_unmet_slot_fails_before_anything_is_opened(id: str, here: Path) -> None:
    contract.refuses_before_loading(id, contract.case_of(id)(here), here)


@pytest.mark.parametrize("id", OURS)
def test_interrupted_and_resumed_it_gives_the_same_digest(id: str, here: Path) -> None:
    contract.resumes_to_the_same_digest(id, contract.case_of(id)(here), here)


@pytest.mark.parametrize("id", OURS)
def test_the_example_in_its_docstring_runs(id: str, here: Path) -> None:
    from lfm import cli

    contract.example_runs(id, contract.case_of(id)(here), here, cli.run)
