"""Every discovered method keeps the same promises."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import contract
from lfm.core import registry

OURS = sorted(id for id, module in registry.ids().items() if module.startswith("lfm.methods."))


@pytest.fixture(scope="module", params=OURS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[contract.Made]:
    """A method's run in a directory with a home of its own: what its promises are about."""
    with pytest.MonkeyPatch.context() as patch:
        here = tmp_path_factory.mktemp("made")
        patch.setenv("LFM_HOME", str(here / "home"))
        patch.chdir(here)
        yield contract.made(request.param, contract.case_of(request.param)(here), here)


def test_it_uses_the_access_it_declares_and_no_other(made: contract.Made) -> None:
    contract.uses_what_it_declares(made)


def test_it_leaves_its_inputs_as_they_were(made: contract.Made) -> None:
    contract.leaves_inputs_alone(made)


@pytest.mark.slow  # what is interrupted makes everything anew, with the same seed
def test_the_same_seed_gives_the_same_digest(made: contract.Made) -> None:
    contract.same_seed_same_digest(made)


def test_what_it_saves_is_what_it_made(made: contract.Made) -> None:
    contract.saves_what_it_made(made)


def test_interrupted_and_resumed_it_gives_the_same_digest(made: contract.Made) -> None:
    contract.resumes_to_the_same_digest(made)


def test_an_unmet_slot_fails_before_anything_is_opened(made: contract.Made) -> None:
    contract.refuses_before_loading(made)


def test_the_example_in_its_docstring_runs(made: contract.Made, monkeypatch: pytest.MonkeyPatch) -> None:
    from lfm import cli

    monkeypatch.setenv("LFM_HOME", str(made.here / "another home"))  # nothing that was kept before helps it
    contract.example_runs(made.id, cli.run)
