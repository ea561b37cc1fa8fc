"""tune.sweep: the tuners that fit are tried, the best is kept, and what is told of it is measured beside."""

from __future__ import annotations

import html
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch

import lfm.core
import tiny
import tunings
from case import Case
from lfm import report, runs
from lfm.core import Codec, Gradients, Inputs, Meta, Method, Slot, finding, registry
from lfm.core.errors import ConfigError, DataError, DivergedError, MismatchError
from lfm.data.files import write
from lfm.data.records import Label
from lfm.methods.tune import sweep
from lfm.models import load
from lfm.runs.run import LocalRun
from lfm.search import Trial
from lfm.train import Fit
from lfm.tuners import candidates

QUICK: dict[str, Any] = {
    "methods": ["tune.lora", "tune.bitfit"],
    "trials": 4,
    "settings": {"epochs": 2, "checkpoint_every": 0.0},
}
LABELS = [Label(text=f"the {w} {v} on the mat", label=w) for v in ("sat", "looked", "was", "is") for w in tunings.WORDS]


def case(here: Path) -> Case:
    tiny.classifier(here / "base")
    write(LABELS, here / "train.jsonl")
    return Case({"model": ("base",)}, {"train": "train.jsonl"}, QUICK)


def order(here: Path, out: str = "out", **settings: Any) -> runs.Order:
    if not (here / "files").exists():
        (here / "files").mkdir()
        case(here / "files")
    return runs.Order(
        id="tune.sweep",
        models={"model": [here / "files" / "base"]},
        data={"train": here / "files" / "train.jsonl"},
        settings=QUICK | settings,
        out=here / out,
    )


def test_the_run_directory_holds_the_best_model_and_all_tries(tmp_path: Path) -> None:
    done = runs.execute(order(tmp_path))
    out = tmp_path / "out"
    found = finding.read(out)
    assert {row["method"] for row in found.rows} == set(QUICK["methods"])
    assert found.title.startswith(f"For your data: {done.notes['method']} (lr ")
    assert len(found.scatters) == 2 and (out / "table.csv").exists()
    whole = [row for row in found.rows if row["length"] == 1]
    assert max(row["dev"] for row in whole) == next(r["dev"] for r in whole if r["method"] == done.notes["method"])
    chosen = registry.get(str(done.notes["method"])).method
    settings = json.loads(str(done.notes["settings"])) | QUICK["settings"]
    records = sweep.parted(sweep.Config(), Inputs({}, {"train": LABELS}), LocalRun(0, tmp_path).seed_for("held out"))
    inputs = Inputs({"model": (load(tmp_path / "files" / "base"),)}, {"train": records["train"]})
    alone = chosen.run(lfm.core.config.configure(chosen.config, settings), inputs, LocalRun(0, tmp_path / "alone"))
    assert isinstance(alone, lfm.core.Model)
    (tmp_path / "saved").mkdir()
    alone.save(tmp_path / "saved")
    assert runs.model(out).digest == runs.model(tmp_path / "saved").digest


@pytest.mark.slow
def test_nothing_is_trained_twice_and_after_a_kill_no_finished_try_again_but_the_winner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    trained: list[str] = []
    real = sweep.cut

    def cut(config: Any, share: float) -> Any:
        trained.append(f"{type(config).__module__} {share} {config}")
        if len(trained) == limit:
            raise Killed
        return real(config, share)

    monkeypatch.setattr(sweep, "cut", cut)
    limit = 0
    left_alone = runs.execute(order(tmp_path, "alone"))
    once = sorted(trained)
    assert len(set(once)) == len(once)
    trained.clear()
    limit = 4
    with pytest.raises(Killed):
        runs.execute(order(tmp_path))
    limit = 0
    assert runs.execute(order(tmp_path)).output.digest == left_alone.output.digest
    again = Counter(trained) - Counter(once)
    assert set(trained) == set(once) and again.total() <= 2 and again[trained[3]] == 1


class Unlucky(RuntimeError):
    pass


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (Unlucky("a bug\nof many lines"), r"unexpected Unlucky, test_sweep\.py:\d+: a bug"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            "OutOfMemoryError, .*CUDA out of memory",
        ),
        (MemoryError(), "MemoryError, .*no message"),
        (AssertionError("shapes"), "AssertionError, .*shapes"),
        (DivergedError("fit diverged at step 3", why="the loss is nan"), r"^tune.bitfit: fit diverged .*loss is nan\)"),
    ],
)
def test_a_try_that_fails_says_so_and_the_others_go_on(
    error: Exception, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sweep.cut

    def cut(config: Any, share: float) -> Any:
        if type(config).__module__.endswith("bitfit"):
            raise error
        return real(config, share)

    monkeypatch.setattr(sweep, "cut", cut)
    done = runs.execute(order(tmp_path))
    assert done.notes["method"] == "tune.lora" and re.search(says, str(done.notes["failed"]))
    rows = finding.read(tmp_path / "out").rows
    assert {row["method"] for row in rows if not row["why not"]} == {"tune.lora"}
    failed = [row for row in rows if row["why not"]]
    assert failed and {row["method"] for row in failed} == {"tune.bitfit"} and failed[0]["dev"] is None
    assert re.search(says.removeprefix("^tune.bitfit: "), str(failed[0]["why not"]))
    report.write(tmp_path / "out")
    assert str(failed[0]["why not"]) in html.unescape((tmp_path / "out" / "report.html").read_text())


def test_a_loss_that_is_no_number_is_a_failure_and_where_all_fail_that_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sweep.marked

    def marked(records: Any, model: Any) -> Any:
        found = real(records, model)
        return found._replace(loss=[math.nan] * len(found.loss))

    monkeypatch.setattr(sweep, "marked", marked)
    with pytest.raises(MismatchError, match=r"no method could.*tune.lora: its loss on dev is nan; tune.bitfit: its"):
        runs.execute(order(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["files"]


def test_an_interruption_ends_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(config: Any, share: float) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "cut", cut)
    with pytest.raises(KeyboardInterrupt):
        runs.execute(order(tmp_path))


def test_of_several_processes_an_unexpected_error_ends_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them would go on to the next try while the others wait for it in this one."""

    def cut(config: Any, share: float) -> Any:
        raise Unlucky

    monkeypatch.setattr(sweep, "cut", cut)
    here = order(tmp_path)
    inputs = Inputs({"model": (load(tmp_path / "files" / "base"),)}, {"train": LABELS})
    config, run = lfm.core.config.configure(sweep.Config, here.settings), Trial(LocalRun(0, tmp_path / "work"), "sweep")
    with pytest.raises(MismatchError, match="unexpected Unlucky"):
        sweep.run(config, inputs, run)
    monkeypatch.setattr(sweep.launched, "size", lambda: 2)
    with pytest.raises(Unlucky):
        sweep.run(config, inputs, run)


def test_methods_are_found_by_what_they_declare(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = Inputs({}, {"train": LABELS})
    found = sweep.asked(sweep.Config(), inputs)
    assert {"tune.lora", "tune.full", "tune.bitfit", "tune.houlsby"} <= set(found)
    assert not {"tune.sweep", "tune.remind", "tune.adapter_fusion", "tune.wsbert", "tune.sfda"} & set(found)

    class Own(Fit, frozen=True):
        width: Annotated[int, Meta(ge=1)] = 12
        lr: Annotated[float, Meta(gt=0)] = 1e-2

    new = registry.get("tune.lora").method
    new = Method(
        paper="", config=Own, models={"model": Slot((Gradients, Codec))}, data=new.data, run=new.run, cost=new.cost
    )
    assert candidates.fits(new, "label") and not candidates.fits(new, "edit")
    assert [(k.name, k.low, k.high, k.whole) for k in candidates.knobs(new, {})] == [
        ("lr", 1e-3, 1e-1, False),
        ("width", 3, 48, True),
    ]
    assert [k.name for k in candidates.knobs(new, {"lr": 1e-2})] == ["width"]


def test_parts_share_no_record_and_what_is_given_stays(tmp_path: Path) -> None:
    parts = sweep.parted(sweep.Config(), Inputs({}, {"train": LABELS}), 5)
    assert sorted(map(repr, [record for part in parts.values() for record in part])) == sorted(map(repr, LABELS))
    assert parts == sweep.parted(sweep.Config(), Inputs({}, {"train": LABELS}), 5) and all(parts.values())
    given = sweep.parted(sweep.Config(), Inputs({}, {"train": LABELS, "dev": LABELS[:4], "valid": LABELS[4:6]}), 5)
    assert given == {"train": LABELS, "dev": LABELS[:4], "valid": LABELS[4:6]}


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"methods": ["tune.wsbert"]}, ConfigError, "these can: .*tune.lora"),
        ({"settings": {"epoch": 2}}, ConfigError, "no method that is tried has epoch"),
        ({"settings": {"epochs": -2}}, ConfigError, "epochs"),
        ({"methods": ["tune.mvp"]}, MismatchError, "language model's head"),
    ],
)
def test_what_cannot_be_tried_is_refused_and_leaves_nothing(
    settings: dict[str, Any], error: type[Exception], says: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=says):
        runs.execute(order(tmp_path, **settings))
    assert [p.name for p in tmp_path.iterdir()] == ["files"]


def test_too_few_records_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="too few records"):
        sweep.agree(sweep.Config(), Inputs({}, {"train": LABELS[:2]}))
