"""A student's loss against its teacher, through its head: whole logits, TRL's, Liger's, DistillKit's, and ours.

Each side computes the loss and the gradients of the student's hidden states and head, fp32, on one thread. What the
teacher tells is one of three: `head`, its hidden states and its head; `logits`, whole logits that lie there; `best`,
its 64 likeliest tokens. Sides run turn about in one process, in CPU seconds; a ratio is the median of the turns' own,
with the least and the greatest. Extra memory is what a process of its own grows by at its peak beyond what it was
given, gradients included (they are told beside it).

    python benchmarks/distill_loss.py [--peers DIR …] [--widths 64 256 768] [--turns 5] [--told head logits best]

--peers: directories that trl, liger_kernel and distillkit can be imported from (`pip install --target`, or a clone's
root); those that cannot are named and left out. Liger's runs uncompiled too (`torch.compile` needs a C++ compiler and
is measured where there is one), and with chunks as small as ours besides its own default.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from lfm.models.headless import Headless
from lfm.train.headed import Best, headed
from lfm.train.losses import kd, kd_topk

PLACES, VOCABULARY, K = 1024, 50257, 64
Side = Callable[[Any, Any, Any], Any]
"""(hidden, weight, what the teacher tells) → the mean loss."""


def given(told: str, width: int) -> tuple[Any, Any, Any]:
    """A student's hidden states and head, and a teacher that is nearly of its mind, with answers as sharp as a trained
    model's (a few nats of entropy)."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(PLACES, width, generator=draw)
    weight = torch.randn(VOCABULARY, width, generator=draw) * (3 / width**0.5)
    if told == "head":
        theirs: Any = Headless(hidden + 0.3 * torch.randn(hidden.shape, generator=draw), weight.clone())
    else:
        logits = torch.empty(PLACES, VOCABULARY)
        for rows in range(0, PLACES, 64):  # so that nothing large was there before
            mine = hidden[rows : rows + 64]
            logits[rows : rows + 64] = (mine + 0.3 * torch.randn(mine.shape, generator=draw)) @ weight.T
        theirs = logits
        if told == "best":
            for rows in range(0, PLACES, 64):
                logits[rows : rows + 64] = logits[rows : rows + 64].log_softmax(-1)
            best = logits.topk(K, -1)
            theirs = Best(best.indices.clone(), best.values.clone())
    return hidden.requires_grad_(), weight.requires_grad_(), theirs


def _whole(theirs: Any) -> Any:
    with torch.no_grad():
        return F.linear(*theirs) if isinstance(theirs, Headless) else theirs


def _plain(hidden: Any, weight: Any, theirs: Any) -> Any:
    logits = hidden @ weight.T
    if isinstance(theirs, Best):
        return kd_topk(logits, theirs.ids, theirs.logprobs)
    return kd(logits, _whole(theirs))


def _torchs(hidden: Any, weight: Any, theirs: Any) -> Any:
    student, teacher = (hidden @ weight.T).log_softmax(-1), _whole(theirs).log_softmax(-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def sides(told: str) -> tuple[dict[str, Side], list[str]]:
    """What can run here, and what cannot and why."""
    found: dict[str, Side] = {"lfm": lambda h, w, t: headed(Headless(h, w), t), "plain": _plain}
    absent: list[str] = []
    if told != "best":
        found["F.kl_div"] = _torchs

    def add(name: str, make: Callable[[], Side]) -> None:
        try:
            found[name] = make()
        except ImportError as error:
            absent.append(f"{name}: {error}")

    if told != "best":
        add("TRL gkd", _trl_whole)
        add("DistillKit", _distillkit_whole)
    if told == "head":
        add("TRL chunked", _trl_chunked)
        for name, chunk in (("Liger 1024", 1024), ("Liger 128", 128)):
            add(name, lambda chunk=chunk: _liger(chunk))
    if told == "best":
        add("DistillKit", lambda: _distillkit(None))
        add("DistillKit 128", lambda: _distillkit(128))
    return found, absent


def _trl_whole() -> Side:
    from trl.experimental.gkd.gkd_trainer import GKDTrainer  # type: ignore[import-not-found]

    loss = GKDTrainer.generalized_jsd_loss
    return lambda h, w, t: loss((h @ w.T)[None], _whole(t)[None], beta=0.0) / len(h)


def _trl_chunked() -> Side:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction  # type: ignore[import-not-found]

    return lambda h, w, t: ChunkedDivergenceFunction.apply(h, w, None, t.hidden, t.weight, None, 0.0)[0].mean()


def _liger(chunk: int) -> Side:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # type: ignore[import-not-found]

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False, chunk_size=chunk
    )
    labels = torch.zeros(PLACES, dtype=torch.long)
    return lambda h, w, t: loss(h, w, t.hidden, t.weight, labels)


def _distillkit_whole() -> Side:
    from distillkit.lossfuncs.kl import dense_kl_div  # type: ignore[import-not-found]

    return lambda h, w, t: dense_kl_div((h @ w.T)[None], _whole(t)[None]) / len(h)


def _distillkit(chunk: int | None) -> Side:
    from distillkit.lossfuncs.kl import sparse_kl_div  # type: ignore[import-not-found]
    from distillkit.missing_probability import MissingProbabilityHandling  # type: ignore[import-not-found]

    how: dict[str, Any] = {"missing": MissingProbabilityHandling.SYMMETRIC_UNIFORM, "chunk_length": chunk}
    return lambda h, w, t: sparse_kl_div((h @ w.T)[None], t.ids[None], t.logprobs[None], **how) / len(h)


def once(side: Side, inputs: Any) -> tuple[float, Any, Any]:
    hidden, weight, theirs = inputs
    hidden.grad = weight.grad = None
    loss = side(hidden, weight, theirs)
    loss.backward()
    return loss.item(), hidden.grad, weight.grad


def compare(told: str, width: int, turns: int, peers: Sequence[str]) -> None:
    found, absent = sides(told)
    inputs = given(told, width)
    took: dict[str, list[float]] = {name: [] for name in found}
    expected = once(found["plain"], inputs)
    apart = {}
    for name, side in found.items():  # which warms caches too
        value, *slopes = once(side, inputs)
        worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(slopes, expected[1:], strict=True))
        apart[name] = abs(value - expected[0]) / expected[0], worst
    for _ in range(turns):
        for name, side in found.items():
            inputs[0].grad = inputs[1].grad = None
            began = time.process_time()
            side(*inputs).backward()
            took[name].append(time.process_time() - began)
    peaks = {name: _peak_of(told, width, name, peers) for name in found}
    own = (PLACES + VOCABULARY) * width * 4 / 1e6
    best = min((statistics.median(times), name) for name, times in took.items() if name != "lfm")[1]
    print(f"\nteacher's {told}, width {width}: the gradients are {own:.0f} MB; the quickest peer is {best}")
    print("| side | CPU s | lfm / side | extra MB | lfm / side | loss apart | gradients apart |")
    print("|---|---|---|---|---|---|---|")
    for name, times in took.items():
        each = sorted(a / b for a, b in zip(took["lfm"], times, strict=True))
        print(
            f"| {name} | {statistics.median(times):.2f} | {statistics.median(each):.2f} ({each[0]:.2f}–{each[-1]:.2f})"
            f" | {peaks[name]:.0f} | {peaks['lfm'] / peaks[name]:.3f} | {apart[name][0]:.0e} | {apart[name][1]:.0e} |",
            flush=True,
        )
    for line in absent:
        print(f"not here: {line}")


def _peak_of(told: str, width: int, name: str, peers: Sequence[str]) -> float:
    command = [sys.executable, __file__, "--peak", told, str(width), name, "--peers", *peers]
    out = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(out.stdout.split()[-1])


def peak(told: str, width: int, name: str) -> None:
    side = sides(told)[0][name]
    inputs = given(told, width)
    hidden, weight, theirs = inputs
    few = (
        theirs._replace(hidden=theirs.hidden[:2]) if told == "head"
        else Best(*(part[:2] for part in theirs)) if told == "best"
        else theirs[:2]
    )  # fmt: skip
    if "Liger" not in name:  # kernels and their workspaces
        once(side, (hidden[:2].detach().requires_grad_(), weight[:].detach().requires_grad_(), few))
    ctypes.CDLL(None).malloc_trim(0)  # what was freed and kept would be taken again, and not be seen
    before = _resident(reset=True)
    once(side, inputs)
    print((_resident() - before) / 1e3)


def _resident(*, reset: bool = False) -> int:
    """kB that this process holds; the most that it held, once it was reset (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peers", nargs="*", default=[], metavar="DIR")
    parser.add_argument("--widths", nargs="+", type=int, default=[64, 256, 768])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--told", nargs="+", default=["head", "logits", "best"], choices=("head", "logits", "best"))
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    sys.path += asked.peers
    if asked.peak:
        told, width, name = asked.peak
        return peak(told, int(width), name)
    print(f"{PLACES} places, {VOCABULARY} words, forward KL, fp32, one thread; torch {torch.__version__}")
    for width in asked.widths:
        for told in asked.told:
            compare(told, width, asked.turns, asked.peers)


if __name__ == "__main__":
    main()
