"""Two processes train what one does: shared batches, sharded weights, one run directory, one end."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from launching import both
from lfm import runs
from lfm.core import Codec, Gradients, launched
from lfm.core.errors import ConfigError, OutputError
from lfm.data.files import write
from lfm.data.records import Text
from lfm.data.task import task_for
from lfm.models import forward, load
from lfm.runs.run import LocalRun
from lfm.train import Fit, fit, world

TEXTS = [
    Text(text=text)
    for text in (
        "the cats",
        "the cats sat on the mat and looked at the birds",
        "dogs",
        "birds are happy",
        "a",
        "the mat",
    )
]
SETTINGS: dict[str, Any] = {"steps": 5, "batch_size": 3, "accumulate": 2, "lr": 1e-3, "average": "ema", "patience": 9}


def trained(directory: Path, work: Path, **more: Any) -> tuple[tuple[float, ...], dict[str, torch.Tensor], list[float]]:
    """Texts of unequal lengths, batches of 3 in two parts and a last one of fewer, averaged and looked at."""
    model = load(directory)
    task = task_for(TEXTS, model.ask(Codec), model.facts)
    module, run = model.ask(Gradients).module(), LocalRun(0, work)
    config = Fit(**SETTINGS | more)
    losses = fit(module, TEXTS, task.collate, lambda m, b: task.loss(forward(m, b), b), config, run, dev=TEXTS[:5])
    return losses, {name: p.detach().clone() for name, p in module.named_parameters()}, run.curves["fit held out"]


def order(here: Path, out: str, **settings: Any) -> runs.Order:
    chosen = {"steps": 4, "batch_size": 3, "lr": 0.01} | settings
    data = {"train": here / "train.jsonl"}
    return runs.Order(id="tune.lora", models={"model": [here / "base"]}, data=data, settings=chosen, out=here / out)


def child(here: Path) -> None:
    """What each of the two does; what it found goes into files by its rank."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for kind in ("shared", "sharded"):
        os.environ.update({"ACCELERATE_USE_FSDP": str(kind == "sharded").lower(), "FSDP_VERSION": "2"})
        assert world.sharded() is (kind == "sharded")
        (here / kind).mkdir(exist_ok=True)
        losses, weights, looks = trained(here / "base", here / kind, checkpoint_every=0.0)
        # from the last checkpoint again: it is read by both
        again, *_ = trained(here / "base", here / kind, checkpoint_every=0.0)
        found[kind] = [losses, looks, again]
        save_file(weights, here / f"{kind}.{launched.rank()}.safetensors")
    os.environ["ACCELERATE_USE_FSDP"] = "false"
    found["digest"] = runs.execute(order(here, "both")).output.digest
    try:
        runs.execute(order(here, "both"))
    except OutputError as error:
        found["refused"] = str(error)
    (here / f"{launched.rank()}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("world")
    tiny.causal(place / "base")
    write(TEXTS, place / "train.jsonl")
    both(child, place)
    return place


@pytest.mark.parametrize("kind", ["shared", "sharded"])
def test_two_processes_give_what_one_gives_to_rounding(kind: str, here: Path, tmp_path: Path) -> None:
    """Losses, held-out losses and weights; means are over all tokens of a step, which the parts have unequally."""
    losses, weights, looks = trained(here / "base", tmp_path)
    for rank in range(2):
        theirs, their_looks, again = json.loads((here / f"{rank}.json").read_text())[kind]
        assert theirs == pytest.approx(losses, rel=1e-5)
        assert their_looks == pytest.approx(looks, rel=1e-5)
        assert again == theirs
        for name, tensor in load_file(here / f"{kind}.{rank}.safetensors").items():
            torch.testing.assert_close(tensor, weights[name], rtol=1e-4, atol=2e-5)


def test_one_directory_is_made_and_both_know_it(here: Path) -> None:
    found = [json.loads((here / f"{rank}.json").read_text()) for rank in range(2)]
    assert found[0]["digest"] == found[1]["digest"] == runs.model(here / "both").digest
    assert found[0]["refused"] == found[1]["refused"] and "exists" in found[0]["refused"]
    assert runs.verify(here / "both").max_abs == 0
    steps = [json.loads(line)["step"] for line in (here / "both" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3]
    assert not [path for path in here.iterdir() if path.name.startswith(".")]


def test_a_process_that_was_not_launched_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (launched.size(), launched.rank(), launched.leads(), world.sharded()) == (1, 0, True, False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ConfigError, match="fsdp_version 2"):
        world.sharded()
