"""fit: what it computes, that it ends in the same bytes however often it is killed, and that it stops at nonsense."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lfm.core.config import configure, values
from lfm.core.errors import (
    ConfigError,
    CorruptError,
    DependencyError,
    DivergedError,
    MemoryLimitError,
    OutputError,
)
from lfm.core.model import Facts
from lfm.runs.run import LocalRun
from lfm.train import Fit, checkpoint, fit, seeded
from lfm.train.cost import memory, smaller
from lfm.train.fit import rate, steps_of


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Sums split over another number of threads round differently: equal bytes need equal threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network(seed: int = 0) -> nn.Module:
    """Dropout and running statistics: what makes a resumed run differ if it is not kept."""
    with seeded(seed):
        return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))


RECORDS = [([math.sin(i * j + 1.0) for j in range(6)], i % 3) for i in range(22)]


def collate(records: Sequence[Any]) -> dict[str, torch.Tensor]:
    return {"x": torch.tensor([x for x, _ in records]), "y": torch.tensor([y for _, y in records])}


def loss(module: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(module(batch["x"]), batch["y"])


def digest(module: nn.Module) -> str:
    whole = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        whole.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return whole.hexdigest()


SETTINGS = Fit(epochs=4, batch_size=5, lr=0.02, checkpoint_every=0.0)


class Killed(Exception):
    pass


def killed_after(batches: float) -> Any:
    """What collates so many batches, and is killed by the next."""
    count = 0

    def until(records: Sequence[Any]) -> dict[str, torch.Tensor]:
        nonlocal count
        count += 1
        if count > batches:
            raise Killed
        return collate(records)

    return until


# ---- what it computes


def test_one_step_is_adamws() -> None:
    """Against the update written out: m̂ = g, v̂ = g², so w ← w(1 − lr·wd) − lr·g / (|g| + 1e-8)."""
    module = nn.Linear(6, 3)
    with torch.no_grad():
        module.weight.copy_(torch.arange(18.0).reshape(3, 6) / 18)
        module.bias.zero_()
    weight, bias = module.weight.detach().clone(), module.bias.detach().clone()
    loss(module, collate(RECORDS)).backward()
    assert module.weight.grad is not None and module.bias.grad is not None
    g, h = module.weight.grad.clone(), module.bias.grad.clone()
    run = LocalRun(0, Path("/nonexistent"))
    fit(module, RECORDS, collate, loss, Fit(steps=1, batch_size=22, lr=0.1, warmup=0, clip=0, weight_decay=0.5), run)
    torch.testing.assert_close(module.weight.detach(), weight * (1 - 0.1 * 0.5) - 0.1 * g / (g.abs() + 1e-8))
    torch.testing.assert_close(module.bias.detach(), bias - 0.1 * h / (h.abs() + 1e-8))  # vectors do not decay


def test_the_gradient_is_clipped_by_its_norm() -> None:
    """Adam's step does not see the gradient's size, so a clipped gradient shows in what the loss sees: its own grad."""
    norms = []

    def after(step: int) -> None:
        norms.append(torch.stack([p.grad.norm() for p in module.parameters() if p.grad is not None]).norm().item())

    module = network()
    fit(
        module,
        RECORDS,
        collate,
        lambda m, b: 100 * loss(m, b),
        Fit(steps=3, clip=0.5),
        LocalRun(0, Path("/x")),
        after=after,
    )
    assert norms == pytest.approx([0.5] * 3, rel=1e-4)


def test_accumulated_batches_are_one_batch() -> None:
    """Two batches of 11 averaged give the gradient of one of 22, for a loss that is a mean."""
    results = []
    for size, parts in ((22, 1), (11, 2)):
        module = nn.Linear(6, 3)
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)
        config = Fit(steps=1, batch_size=size, accumulate=parts, lr=0.1)
        losses = fit(module, RECORDS, collate, loss, config, LocalRun(0, Path("/x")))
        results.append((losses, module.weight.detach().clone()))
    assert results[0][0] == pytest.approx(results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


def test_each_epoch_sees_each_record_once_in_an_order_of_its_own() -> None:
    seen: list[int] = []

    def watch(records: Sequence[Any]) -> dict[str, torch.Tensor]:
        seen.extend(RECORDS.index(r) for r in records)
        return collate(records)

    fit(network(), RECORDS, watch, loss, Fit(epochs=3, batch_size=5), LocalRun(0, Path("/x")))
    epochs = [seen[i : i + 22] for i in range(0, 66, 22)]
    assert len(seen) == 66
    assert all(sorted(e) == list(range(22)) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_only_what_requires_a_gradient_moves_and_modes_return() -> None:
    module = network().eval()
    module[0].requires_grad_(False)  # type: ignore[index]
    before = {k: v.clone() for k, v in module.state_dict().items()}
    fit(module, RECORDS, collate, loss, Fit(steps=3), LocalRun(0, Path("/x")))
    after = module.state_dict()
    assert torch.equal(before["0.weight"], after["0.weight"]) and not torch.equal(before["4.weight"], after["4.weight"])
    assert not module.training and all(p.grad is None for p in module.parameters())


def test_a_parameter_may_have_a_rate_of_its_own() -> None:
    module = network()
    last = module[4].weight.detach().clone()  # type: ignore[index]
    fit(
        module,
        RECORDS,
        collate,
        loss,
        Fit(steps=2),
        LocalRun(0, Path("/x")),
        scale=lambda n: 0.0 if n.startswith("4.") else 1.0,
    )
    assert torch.equal(module[4].weight.detach(), last)  # type: ignore[index]


@settings(deadline=None)
@given(
    steps=st.integers(1, 300),
    warmup=st.floats(0, 0.9),
    schedule=st.sampled_from(["cosine", "linear", "constant"]),
)
def test_the_rate_rises_to_lr_then_never_rises(steps: int, warmup: float, schedule: Any) -> None:
    config = Fit(lr=0.1, warmup=warmup, schedule=schedule)
    rates = [rate(config, s, steps) for s in range(steps)]
    peak = rates.index(max(rates))
    assert max(rates) == pytest.approx(0.1) and min(rates) > 0
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_steps_follow_from_epochs() -> None:
    assert steps_of(Fit(epochs=3, batch_size=5), 22) == 15
    assert steps_of(Fit(epochs=3, batch_size=5, accumulate=4), 22) == 4
    assert steps_of(Fit(epochs=0.5, batch_size=5), 22) == 3
    assert steps_of(Fit(steps=7), 22) == 7


def test_a_method_inherits_the_settings_and_their_ranges() -> None:
    class Mine(Fit, frozen=True):
        rank: int = 4
        lr: float = 3e-4

    assert configure(Mine, {"rank": "8", "schedule": "cosine"}) == Mine(rank=8, schedule="cosine")
    with pytest.raises(ConfigError, match="schedule"):
        configure(Mine, {"schedule": "square"})


def test_reduced_precision_trains_fp32_weights() -> None:
    module = network()
    losses = fit(module, RECORDS, collate, loss, Fit(steps=30, lr=0.02, precision="bf16"), LocalRun(0, Path("/x")))
    assert losses[-1] < losses[0] and all(p.dtype == torch.float32 for p in module.parameters())


def test_the_worlds_randomness_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        module = network()
        fit(module, RECORDS, collate, loss, Fit(steps=5), LocalRun(0, Path("/x")))
        results.append(digest(module))
        if seed == 1:
            assert torch.equal(torch.rand(3), expected)
    assert results[0] == results[1]


def test_the_runs_seed_moves_both_the_order_and_the_dropout() -> None:
    results = set()
    for seed in (0, 1):
        module = network()
        fit(module, RECORDS, collate, loss, Fit(steps=5), LocalRun(seed, Path("/x")))
        results.add(digest(module))
    assert len(results) == 2


# ---- killed and resumed


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, tuple[float, ...]]:
    module = network()
    losses = fit(module, RECORDS, collate, loss, SETTINGS, LocalRun(0, tmp_path_factory.mktemp("unbroken")))
    return digest(module), losses


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kills=st.lists(st.integers(0, 40), max_size=4), every=st.sampled_from([0.0, 1e-3, 1e9]))
def test_killed_anywhere_it_ends_in_the_same_bytes(
    kills: list[int], every: float, unbroken: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    work = tmp_path_factory.mktemp("killed")

    def attempt(kill_after: float) -> tuple[str, tuple[float, ...], LocalRun]:
        module, run = network(), LocalRun(0, work)
        losses = fit(module, RECORDS, killed_after(kill_after), loss, _every(every), run)
        return digest(module), losses, run

    for kill in kills:
        try:
            attempt(kill)
        except Killed:
            continue
    final, losses, run = attempt(math.inf)
    assert (final, losses) == unbroken
    assert run.curves["fit"] == list(unbroken[1])  # the report of the last attempt shows the whole curve


def test_taken_up_again_it_says_once_where_it_goes_on_and_counts_from_there(tmp_path: Path) -> None:
    """20 steps, a checkpoint after each; the tenth batch kills it."""
    shown: list[tuple[str, int, int | None]] = []

    def attempt(collate: Any) -> None:
        shown.clear()
        show = lambda label, done, total: shown.append((label.split(" · ")[0], done, total))  # noqa: E731
        fit(network(), RECORDS, collate, loss, _every(0.0), LocalRun(0, tmp_path, show))

    with pytest.raises(Killed):
        attempt(killed_after(9))
    assert shown[0] == ("fit", 0, 20)
    attempt(collate)
    told = [label for label, _, _ in shown if label != "fit"]
    assert len(told) == 1 and told == [shown[0][0]]
    assert re.fullmatch(r"fit goes on from step 9 of 20 \(checkpoint of \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\)", told[0])
    assert shown[1:3] == [("fit", 9, 20), ("fit", 10, 20)] and shown[-1] == ("fit", 20, 20)


def _every(seconds: float) -> Fit:
    return Fit(epochs=4, batch_size=5, lr=0.02, checkpoint_every=seconds)


@pytest.mark.parametrize("moment", ["save_file", "_sync", "replace"])
def test_killed_while_a_checkpoint_is_written_the_one_before_stands(
    moment: str, unbroken: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = {"save_file": checkpoint.safetensors_torch, "_sync": checkpoint, "replace": os}[moment]
    if moment == "save_file":
        owner.save_file  # noqa: B018  (a lazy name: bound on first use)
    real, count = getattr(owner, moment), 0

    def break_at_the_seventh(*arguments: Any, **named: Any) -> None:
        nonlocal count
        count += 1
        if count == 7:
            if moment == "save_file":
                Path(arguments[1]).write_bytes(b"half a file")
            raise Killed
        real(*arguments, **named)

    monkeypatch.setattr(owner, moment, break_at_the_seventh)
    with pytest.raises(Killed):
        fit(network(), RECORDS, collate, loss, SETTINGS, LocalRun(0, tmp_path))
    monkeypatch.undo()
    module = network()
    losses = fit(module, RECORDS, collate, loss, SETTINGS, LocalRun(0, tmp_path))
    assert (digest(module), losses) == unbroken


def test_what_a_kill_amid_a_write_left_goes_with_the_next_checkpoint(tmp_path: Path) -> None:
    """safetensors writes beside the name that it is given, and renames: each kill there left a checkpoint's bytes."""
    checkpoint.write(tmp_path, {"w": torch.ones(3)}, {"step": 1})
    (tmp_path / ".tmp6kNQDd").write_bytes(b"half a file")
    checkpoint.write(tmp_path, {"w": torch.zeros(3)}, {"step": 2})
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.FILE]


def test_a_process_ended_by_sigkill_resumes_to_the_same_bytes(unbroken: Any, tmp_path: Path) -> None:
    script = (
        "import sys; sys.path[:0] = ['tests', 'tests/train', 'src']\n"
        "import time, test_fit as t; from pathlib import Path; t.torch.set_num_threads(1)\n"
        "def collate(r): print('batch', flush=True); time.sleep(.02); return t.collate(r)\n"
        f"t.fit(t.network(), t.RECORDS, collate, t.loss, t.SETTINGS, t.LocalRun(0, t.Path({str(tmp_path)!r})))\n"
    )
    root = Path(__file__).parents[2]
    child = subprocess.Popen([sys.executable, "-c", script], cwd=root, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for _ in range(random.Random(0).randint(3, 12)):
        assert child.stdout.readline() == "batch\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    kept = checkpoint.read(tmp_path / "fit")
    assert kept is not None and 0 < kept[1]["step"] < 20
    module = network()
    losses = fit(module, RECORDS, collate, loss, SETTINGS, LocalRun(0, tmp_path))
    assert (digest(module), losses) == unbroken


def test_a_finished_training_is_not_done_again(tmp_path: Path, unbroken: Any) -> None:
    fit(network(), RECORDS, collate, loss, SETTINGS, LocalRun(0, tmp_path))

    def never(records: Sequence[Any]) -> dict[str, torch.Tensor]:
        raise AssertionError

    module = network()
    losses = fit(module, RECORDS, never, loss, SETTINGS, LocalRun(0, tmp_path))
    assert (digest(module), losses) == unbroken
    kept = checkpoint.read(tmp_path / "fit")
    assert kept is not None and not any(name.startswith("aids/") for name in kept[0])  # moments are no longer needed


def test_of_many_short_trainings_those_are_kept_that_end_later_than_a_checkpoint_would_be_due(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes 30 seconds by a clock of our own, and checkpoints are due every 60."""
    clock = [1000.0]
    monkeypatch.setattr(sys.modules["lfm.train.loop"], "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def slow(records: Sequence[Any]) -> dict[str, torch.Tensor]:
        clock[0] += 10.0
        return collate(records)

    for number in range(4):
        settings = Fit(steps=3, batch_size=5, checkpoint_every=60.0)
        fit(network(), RECORDS, slow, loss, settings, LocalRun(0, tmp_path), name=f"round {number}")
    kept = [number for number in range(4) if checkpoint.read(tmp_path / f"round {number}") is not None]
    assert kept == [1, 2, 3]


def test_another_trainings_checkpoint_is_refused(tmp_path: Path) -> None:
    fit(network(), RECORDS, collate, loss, SETTINGS, LocalRun(0, tmp_path))
    for module, records, config in (
        (network(seed=1), RECORDS, SETTINGS),
        (network(), RECORDS[:-1], SETTINGS),
        (network(), RECORDS, Fit(epochs=4, batch_size=5, lr=0.03)),
    ):
        with pytest.raises(OutputError, match="another training"):
            fit(module, records, collate, loss, config, LocalRun(0, tmp_path))


@pytest.mark.parametrize("damage", [b"", b"\xff" * 64, b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_damaged_checkpoint_is_told_of_and_trained_again(damage: bytes, tmp_path: Path) -> None:
    """The same bytes as without one; the run's other results, which an error would take with it, stay."""
    (tmp_path / "fit").mkdir()
    (tmp_path / "fit" / checkpoint.FILE).write_bytes(damage)
    with pytest.raises(CorruptError, match="is not a checkpoint"):
        checkpoint.read(tmp_path / "fit")
    run, plain = LocalRun(0, tmp_path), LocalRun(0, tmp_path / "plain")
    again, whole = network(), network()
    fit(again, RECORDS, collate, loss, SETTINGS, run)
    fit(whole, RECORDS, collate, loss, SETTINGS, plain)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), whole.state_dict().values(), strict=True))
    assert "fit_began_again" in run.notes and "fit_began_again" not in plain.notes


def test_what_a_killed_training_drew_is_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard's writer is stood in for; it drops what was told from `purge_step` on."""
    drawn: dict[tuple[str, str, int], float] = {}

    class Writer:
        def __init__(self, log_dir: str, purge_step: int | None) -> None:
            self.log_dir = log_dir
            for key in [key for key in drawn if purge_step is None or key[2] >= purge_step]:
                del drawn[key]

        def add_scalar(self, name: str, value: float, step: int) -> None:
            assert (self.log_dir, name, step) not in drawn
            drawn[self.log_dir, name, step] = value

        def close(self) -> None: ...

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setenv("LFM_TENSORBOARD", str(tmp_path / "curves"))
    settings = Fit(epochs=2, batch_size=5, lr=0.02, checkpoint_every=0.0)
    with pytest.raises(Killed):
        fit(network(), RECORDS, killed_after(7), loss, settings, LocalRun(0, tmp_path / ".out.lfm"))
    losses = fit(network(), RECORDS, collate, loss, settings, LocalRun(0, tmp_path / ".out.lfm"))
    where = str(tmp_path / "curves" / "out" / "fit")
    assert [value for (directory, name, _), value in drawn.items() if (directory, name) == (where, "loss")] == [*losses]
    assert {name for _, name, _ in drawn} == {"loss", "rate", "norm", "rows_per_second"}


def test_tensorboard_that_is_asked_for_and_not_there_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    fit(network(), RECORDS, collate, loss, Fit(steps=1), LocalRun(0, tmp_path))  # it is not asked for
    monkeypatch.setenv("LFM_TENSORBOARD", str(tmp_path / "curves"))
    with pytest.raises(DependencyError, match=r"tensorboard is not installed.*pip install.*unset LFM_TENSORBOARD"):
        fit(network(), RECORDS, collate, loss, Fit(steps=1), LocalRun(0, tmp_path))
    assert not (tmp_path / "curves").exists()


class Scaler:
    """What fit asks of torch's GradScaler, in order; half of the scale goes at each step that is not finite."""

    def __init__(self, calls: list[str]) -> None:
        self.calls, self.factor, self.found, self.skipped = calls, 1024.0, False, 0

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        self.calls.append("scale")
        return loss * self.factor

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        self.calls.append("unscale")
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_div_(gradients, self.factor)
        self.found = not all(bool(torch.isfinite(g).all()) for g in gradients)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        self.calls.append("step")
        if self.found:
            self.skipped += 1
        else:
            optimizer.step()

    def update(self) -> None:
        self.calls.append("update")
        self.factor *= 0.5 if self.found else 1.0

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.factor, "_growth_tracker": 0}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.factor = state["scale"]


@pytest.mark.parametrize("bad", [-1, 2])
def test_half_precision_scales_unscales_clips_and_steps_in_this_order(
    bad: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp16 on a GPU, its scaler and its narrow arithmetic stood in for: the steps are those of fp32. A gradient that is
    too large is passed over, and stops nothing."""
    calls: list[str] = []
    made: list[Scaler] = []
    here = sys.modules["lfm.train.fit"]
    clip = nn.utils.clip_grad_norm_

    def clipped(*args: Any, **named: Any) -> torch.Tensor:
        calls.append("clip")
        return clip(*args, **named)

    def scaler(device: str) -> Scaler:
        made.append(Scaler(calls))
        return made[-1]

    def once(m: nn.Module, batch: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        return loss(m, batch) + (spike(m) if count == bad + 1 else 0)

    def spike(m: nn.Module) -> torch.Tensor:
        first = m[0].weight.reshape(-1)[0]  # type: ignore[index]
        return (first - first.detach()).abs().sqrt()  # zero, with an infinite slope

    settings = Fit(steps=6, batch_size=5, lr=0.02, clip=0.1, accumulate=2, checkpoint_every=0.0)
    plain, half = network(), network()
    losses = fit(plain, RECORDS, collate, loss, settings, LocalRun(0, tmp_path / "fp32"))
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", clipped)
    monkeypatch.setattr(here, "autocast", lambda *_: nullcontext())
    count = 0
    narrow = configure(Fit, values(settings) | {"precision": "fp16"})
    scaled = fit(half, RECORDS, collate, once, narrow, LocalRun(0, tmp_path / "fp16"))
    assert calls == ["scale", "scale", "unscale", "clip", "step", "update"] * 6
    assert made[0].skipped == (bad >= 0)
    if bad < 0:
        assert scaled == pytest.approx(losses, rel=1e-5)
        torch.testing.assert_close(half[4].weight, plain[4].weight, rtol=1e-4, atol=1e-5)  # type: ignore[index]
    else:
        assert made[0].factor == 512.0 and all(bool(torch.isfinite(p).all()) for p in half.parameters())
    kept = checkpoint.read(tmp_path / "fp16" / "fit")
    assert kept is not None and kept[1]["done"]


# ---- nonsense


def test_a_loss_that_is_not_finite_stops_with_the_step_the_rate_and_a_remedy(tmp_path: Path) -> None:
    count = 0

    def explode(module: nn.Module, batch: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        return loss(module, batch) * (math.nan if count == 8 else 1)

    with pytest.raises(
        DivergedError, match=r"fit diverged at step 7 on records \d+, \d+.*nan.*lr=.*rate at that step was"
    ):
        fit(network(), RECORDS, collate, explode, SETTINGS, LocalRun(0, tmp_path))
    kept = checkpoint.read(tmp_path / "fit")
    assert kept is not None and kept[1]["step"] == 7
    assert all(bool(torch.isfinite(t).all()) for t in kept[0].values() if t.is_floating_point())


def test_what_is_to_be_tried_is_a_tenth_of_the_rate_or_the_default_where_that_is_less(tmp_path: Path) -> None:
    """lr=1e29 is no remedy for 1e30."""
    for lr, says in ((5e-4, r"try lr=5e-05 \(the rate"), (1e30, r"try lr=1e-03 \(the default; the rate")):
        with pytest.raises(DivergedError, match=says):
            fit(network(), RECORDS, collate, lambda m, b: loss(m, b) * math.nan, Fit(lr=lr), LocalRun(0, tmp_path))


def test_a_gradient_that_is_not_finite_stops_it_too(tmp_path: Path) -> None:
    """√ at 0 has a finite value and an infinite slope."""
    module = nn.Linear(6, 3)
    nn.init.zeros_(module.weight)
    nn.init.zeros_(module.bias)
    with pytest.raises(DivergedError, match="step 0"):
        fit(module, RECORDS, collate, lambda m, b: m(b["x"]).abs().sum().sqrt(), SETTINGS, LocalRun(0, tmp_path))
    assert checkpoint.read(tmp_path / "fit") is None


def test_weights_that_are_not_finite_are_never_kept(tmp_path: Path) -> None:
    """Without clipping, nothing sees a bad gradient of the last step but the weights themselves."""
    module = nn.Linear(6, 3)
    nn.init.zeros_(module.weight)
    nn.init.zeros_(module.bias)
    config = Fit(steps=1, clip=0, checkpoint_every=0)
    with pytest.raises(DivergedError, match="weight"):
        fit(module, RECORDS, collate, lambda m, b: (m(b["x"]) ** 2).sum().sqrt(), config, LocalRun(0, tmp_path))
    assert checkpoint.read(tmp_path / "fit") is None


# ---- averaged, held out, computed again


def test_parts_of_unequal_weight_are_one_batch() -> None:
    """A mean over scored tokens is a mean over all of them, whichever part they are in: 3 + 1 tokens are 4."""
    rows = [[1, 2, 3], [4, -100, -100]]

    def gather(records: Sequence[Any]) -> dict[str, torch.Tensor]:
        return {"labels": torch.tensor(list(records))}

    def squared(module: nn.Module, batch: Any) -> torch.Tensor:
        kept = batch["labels"][batch["labels"] != -100].float()
        return ((module(torch.ones(1, 1)) - kept) ** 2).mean()

    losses = []
    for size, parts in ((2, 1), (1, 2)):
        module = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(module.weight)
        config = Fit(steps=1, batch_size=size, accumulate=parts)
        losses += fit(module, rows, gather, squared, config, LocalRun(0, Path("/x")))
    assert losses == pytest.approx([(1 + 4 + 9 + 16) / 4] * 2)


def test_swa_is_the_mean_of_the_weights_after_its_steps() -> None:
    """Against the mean written out; batch normalisation's statistics are those of one pass with the mean weights."""
    seen: list[torch.Tensor] = []
    module = network()
    config = Fit(steps=8, batch_size=22, average="swa", average_from=0.5)
    weight = module[4].weight  # type: ignore[index]
    fit(module, RECORDS, collate, loss, config, LocalRun(0, Path("/x")), after=lambda _: seen.append(weight.clone()))
    torch.testing.assert_close(weight.detach(), torch.stack(seen[4:]).mean(0))
    inputs = module[0](collate(RECORDS)["x"]).detach()  # type: ignore[index]
    torch.testing.assert_close(module[1].running_mean, inputs.mean(0))  # type: ignore[index]
    torch.testing.assert_close(module[1].running_var, inputs.var(0))  # type: ignore[index]


def test_ema_is_what_its_recurrence_gives() -> None:
    seen: list[torch.Tensor] = []
    module = nn.Linear(6, 3)
    config = Fit(steps=30, batch_size=5, average="ema", ema_decay=0.6)
    record = lambda _: seen.append(module.weight.detach().clone())  # noqa: E731
    fit(module, RECORDS, collate, loss, config, LocalRun(0, Path("/x")), after=record)
    mean = seen[0]
    for n, weight in enumerate(seen[1:], start=1):
        d = min(0.6, (1 + n) / (10 + n))
        mean = d * mean + (1 - d) * weight
    torch.testing.assert_close(module.weight.detach(), mean)


@pytest.mark.parametrize("average", ["none", "ema", "swa"])
def test_it_stops_where_held_out_records_get_no_better_and_gives_the_best(average: Any) -> None:
    """Held-out labels are wrong on purpose: what is learned there is unlearned here."""
    wrong = [(x, (y + 1) % 3) for x, y in RECORDS]
    run, module = LocalRun(0, Path("/x")), nn.Linear(6, 3)
    config = Fit(epochs=40, batch_size=22, lr=0.1, patience=3, schedule="constant", average=average)
    losses = fit(module, RECORDS, collate, loss, config, run, dev=wrong)
    looks = run.curves["fit held out"]
    assert len(losses) == len(looks) < 40
    assert looks.index(min(looks)) == len(looks) - 4
    assert loss(module, collate(wrong)).item() == pytest.approx(min(looks))


def test_patience_without_held_out_records_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"held-out records.*patience=0"):
        fit(network(), RECORDS, collate, loss, Fit(patience=2), LocalRun(0, Path("/x")))


@pytest.mark.parametrize("average", ["none", "ema", "swa"])
def test_averages_and_looks_survive_a_kill(average: Any, tmp_path: Path) -> None:
    """Killed at one step after another, with the mean, the best weights and the looks half made."""
    config = Fit(epochs=6, batch_size=5, lr=0.05, average=average, patience=2, checkpoint_every=0)

    def attempt(work: Path, kill: float) -> tuple[str, tuple[float, ...], list[float]]:
        module, run = network(), LocalRun(0, work)
        losses = fit(module, RECORDS[5:], killed_after(kill), loss, config, run, dev=RECORDS[:5])
        return digest(module), losses, run.curves["fit held out"]

    unbroken = attempt(tmp_path / "unbroken", math.inf)
    for kill in (3, 4, 2, 3):
        with pytest.raises(Killed):
            attempt(tmp_path / "killed", kill)
    assert attempt(tmp_path / "killed", math.inf) == unbroken
    assert attempt(tmp_path / "killed", 0) == unbroken  # finished: nothing is done again


def test_activations_computed_again_change_no_bit(tmp_path: Path) -> None:
    import tiny
    from lfm.core import Codec, Gradients
    from lfm.data.records import Text
    from lfm.data.task import task_for
    from lfm.models import forward, load

    tiny.causal(tmp_path / "model")
    model, records = load(tmp_path / "model"), [Text(text=line) for line in tiny.CORPUS[:4]]
    task = task_for(records, model.ask(Codec), model.facts)
    digests, saved = [], []
    for again in (False, True):
        module = model.ask(Gradients).module()
        for part in module.modules():
            if isinstance(getattr(part, "attention_dropout", None), float):
                part.attention_dropout = 0.2  # type: ignore[assignment]

        def lost(module: nn.Module, batch: Any) -> torch.Tensor:
            kept = 0

            def count(tensor: torch.Tensor) -> torch.Tensor:
                nonlocal kept
                kept += tensor.nbytes
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
                found = task.loss(forward(module, batch), batch)
            saved.append(kept)
            return found

        fit(module, records, task.collate, lost, Fit(steps=3, activation_checkpointing=again), LocalRun(0, Path("/x")))
        digests.append(digest(module))
    assert digests[0] == digests[1]
    assert max(saved[3:]) < 0.6 * min(saved[:3])
    with pytest.raises(ConfigError, match="has none"):
        fit(network(), RECORDS, collate, loss, Fit(activation_checkpointing=True), LocalRun(0, Path("/x")))


def test_each_step_is_a_line_of_metrics_and_none_is_told_twice(tmp_path: Path) -> None:
    def lines() -> list[dict[str, Any]]:
        return [json.loads(line) for line in (tmp_path / "scratch" / "metrics.jsonl").read_text().splitlines()]

    with pytest.raises(Killed):
        fit(network(), RECORDS, killed_after(7), loss, _every(1e9), LocalRun(0, tmp_path))
    assert len(lines()) == 7
    losses = fit(network(), RECORDS, collate, loss, _every(1e9), LocalRun(0, tmp_path))
    assert [line["step"] for line in lines()] == list(range(20))
    assert [line["loss"] for line in lines()] == list(losses)
    assert {*lines()[0]} == {"training", "step", "loss", "rate", "norm", "rows_per_second"}


# ---- no memory


def test_out_of_memory_says_what_would_fit() -> None:
    def explode(module: nn.Module, batch: Any) -> torch.Tensor:
        where = "[enforce fail at alloc_cpu.cpp:127] err == 0. "
        raise RuntimeError(f"{where}DefaultCPUAllocator: can't allocate memory: you tried to allocate 10 bytes.")

    with pytest.raises(
        MemoryLimitError, match=r"batch_size=16.*MB; can't allocate.*no smaller batch|batch_size=8"
    ) as caught:
        fit(network(), RECORDS, collate, explode, Fit(), LocalRun(0, Path("/x")))
    assert caught.value.exit_code == 6

    def other(module: nn.Module, batch: Any) -> torch.Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        fit(network(), RECORDS, collate, other, Fit(), LocalRun(0, Path("/x")))


def test_what_would_fit_is_of_the_same_step_and_does_fit() -> None:
    facts = Facts(task="causal-lm", parameters=10**6, layers=4, width=64, vocabulary=500)

    def needed(config: Fit) -> int:
        return memory(config, facts, config.batch_size * 128, facts.parameters)

    config = Fit(batch_size=12)
    told = smaller(config, needed, 0.7 * needed(config))
    found = {key: int(value) for key, value in re.findall(r"(batch_size|accumulate)=(\d+)", told)}
    assert found == {"batch_size": 6, "accumulate": 2}
    assert needed(Fit(batch_size=6)) <= 0.7 * needed(config)
    assert "activation_checkpointing=true" in smaller(config, needed, 23.5e6)
    assert "tune.lora" in smaller(config, needed, facts.parameters)


def test_where_nothing_would_fit_what_is_the_process_the_model_and_a_record_is_told_apart() -> None:
    """5 numbers a parameter: weight, gradient, two moments, a copy; of a record 128 (38 · 64 + 4 · 500) numbers."""
    facts = Facts(task="causal-lm", parameters=10**6, layers=4, width=64, vocabulary=500)

    def needed(config: Fit, process: int = 0) -> int:
        return process + memory(config, facts, config.batch_size * 128, facts.parameters)

    told = smaller(Fit(batch_size=12), needed, 10**6)
    assert "the model and what trains it take 20 MB, each record about 2 MB" in told
    process = 300 * 10**6
    told = smaller(Fit(batch_size=12), lambda config: needed(config, process), process + 10**6, process)
    assert "Python and its libraries take 300 MB, the model and what trains it 20 MB, each record about 2 MB" in told
    told = smaller(Fit(batch_size=12), lambda config: needed(config, process), process - 1, process)
    assert "Python and its libraries alone take 300 MB" in told and "record" not in told
