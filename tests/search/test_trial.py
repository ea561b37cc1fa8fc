"""lfm.search.trial: what is tried leaves no trace in the run, and draws what the run draws."""

from __future__ import annotations

from pathlib import Path

import torch

from lfm.runs.run import LocalRun
from lfm.search import Trial


def test_steps_of_the_same_name_do_not_collide_and_nothing_is_kept(tmp_path: Path) -> None:
    run = LocalRun(3, tmp_path)
    found = []
    for name in ("a", "b"):
        trial = Trial(run, name)
        found.append(trial.step("norms", lambda name=name: name))
        trial.note(best=1.0)
        trial.curve("loss", 2.0)
        assert list(trial.track([1, 2], "items")) == [1, 2]
    assert found == ["a", "b"]
    assert not run.notes and not run.curves and not list(tmp_path.rglob("*.json"))
    assert Trial(run, "a").work != Trial(run, "b").work


def test_every_trial_draws_the_same_numbers(tmp_path: Path) -> None:
    run = LocalRun(3, tmp_path)
    drawn = [torch.rand(3, generator=Trial(run, name).generator("mask")).tolist() for name in ("a", "b")]
    assert drawn[0] == drawn[1] == torch.rand(3, generator=run.generator("mask")).tolist()
    assert Trial(run, "a").seed == 3 and Trial(run, "a").seed_for("x") == run.seed_for("x")
