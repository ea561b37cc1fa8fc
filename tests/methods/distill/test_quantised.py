"""Weights of few bits: what lies on the grid, the slopes of rounding, and that training beats rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from case import Case
from lfm.core import Gradients, Model
from lfm.core.errors import ConfigError, MismatchError
from lfm.data import records as data
from lfm.data.files import write
from lfm.distilling import quantising
from lfm.methods.distill import quantised
from lfm.models import layers, load
from teaching import accuracy, answers, made, means, mute, still

LABELS = [data.Label(text=f"the {w} sat on the mat", label=w) for w in ("cats", "dogs", "birds") * 4]
TEXTS = [data.Text(text=line) for line in tiny.CORPUS]


def case(here: Path) -> Case:
    tiny.classifier(here / "base")
    write(LABELS, here / "texts.jsonl")
    settings = {"steps": 6, "batch_size": 4, "checkpoint_every": 0.0}
    return Case({"model": ("base",)}, {"train": "texts.jsonl"}, settings)


def rounded(model: Model, records: Any, work: Path, **settings: Any) -> Any:
    return made(quantised.METHOD, {"model": [model]}, {"train": records}, work, **{"lr": 1e-3, **settings})


def only_rounded(model: Model, bits: int, group: int = 0) -> Model:
    """What rounding alone makes of it, with the step sizes that lose least."""
    module = model.ask(Gradients).module()
    names = layers.projections(module)
    quantising.put_on(module, names, bits, group)
    quantising.settled(module, names)
    return model.ask(Gradients).rewrap(module)


ROWS = st.integers(0, 2**32 - 1).map(
    lambda seed: torch.from_numpy(np.random.default_rng(seed).standard_t(3, (3, 16)).astype("f4"))
)


@given(ROWS, st.integers(2, 8))
@settings(max_examples=30, deadline=None)
def test_the_step_found_is_no_worse_than_the_largest_weights(rows: torch.Tensor, bits: int) -> None:
    most = 2 ** (bits - 1) - 1
    step, naive = quantising.best_step(rows, most), rows.abs().amax(-1, keepdim=True) / most
    missed, worse = ((quantising.on_grid(rows, s, most) - rows).square().sum(-1) for s in (step, naive))
    assert bool((missed <= worse * (1 + 1e-4)).all())
    places = quantising.on_grid(rows, step, most) / step
    assert bool((places.round() - places).abs().max() < 1e-4) and float(places.abs().max()) <= most + 1e-4


def test_the_step_found_is_the_one_of_least_error() -> None:
    """Of fifteen halves and a one on −s, 0, s, with s from ½ up, 15 (s − ½)² + (1 − s)² is lost: least at 17/32."""
    row = torch.tensor([[0.5] * 15 + [1.0]])
    assert float(quantising.best_step(row, 1)) == pytest.approx(17 / 32, abs=0.5 / 31 / 2)


def test_the_slopes_of_rounding_are_lsqs() -> None:
    """∂ŵ/∂w is 1 inside, 0 where cut off; ∂ŵ/∂s is round(w/s) − w/s inside, ±q where cut off (1902.08153, eq. 3)."""
    weight = torch.tensor([[0.2, -0.7, 1.4, 9.0, -9.0]], requires_grad=True)
    step = torch.tensor([[0.5]], requires_grad=True)
    made = quantising.on_grid(weight, step, 3)
    torch.testing.assert_close(made, torch.tensor([[0.0, -0.5, 1.5, 1.5, -1.5]]))
    slopes = []
    for place in range(5):
        by_weight, by_step = torch.autograd.grad(made[0, place], (weight, step), retain_graph=True)
        slopes.append((by_weight[0, place].item(), by_step.item()))
    expected = [(1, 0 - 0.4), (1, -1 + 1.4), (1, 3 - 2.8), (0, 3), (0, -3)]
    assert slopes == [pytest.approx(one, abs=1e-6) for one in expected]


@pytest.mark.parametrize("make", [tiny.causal, tiny.conv1d, tiny.vit, tiny.seq2seq])
@pytest.mark.parametrize(("bits", "group"), [(4, 0), (2, 16), (8, 0)])
def test_what_comes_out_lies_on_the_grid_and_the_rest_is_whole(
    make: Any, bits: int, group: int, tmp_path: Path
) -> None:
    model = load(make(tmp_path / "m"))
    plain = model.ask(Gradients).module()
    names = layers.projections(plain)
    after = only_rounded(model, bits, group).ask(Gradients).module()
    layer: Any
    for name, layer in after.named_modules():
        if name not in names:
            continue
        by_output = layer.weight if isinstance(layer, torch.nn.Linear) else layer.weight.T
        for row in by_output.unflatten(1, (-1, group or by_output.shape[1])).flatten(0, 1):
            values = row.unique()
            assert len(values) <= 2**bits - 1
            step = values.diff().min() if len(values) > 1 else values.abs().max()
            places = row / step
            if bits < 8:  # neighbouring integers are both used, as a rule
                assert bool(((places * 6).round() - places * 6).abs().max() < 1e-2)
    stored = dict(plain.named_parameters())
    rest = [n for n, _ in after.named_parameters() if n.rsplit(".", 1)[0] not in names or n.endswith("bias")]
    assert rest and all(torch.equal(after.get_parameter(n), stored[n]) for n in rest)


def test_the_same_integers_are_found_again(tmp_path: Path) -> None:
    """A packer that rounds by a row's largest weight finds the grid, where the row uses its largest integer."""
    model = load(tiny.causal(tmp_path / "m"))
    made, run = rounded(model, TEXTS, tmp_path / "w")
    module = made.ask(Gradients).module()
    found = every = 0
    for name in layers.projections(module):
        weight = module.get_parameter(f"{name}.weight").detach()
        step = weight.abs().amax(-1, keepdim=True) / 7
        again = ((weight / step).round() * step - weight).abs().amax(-1) < 1e-5
        found, every = found + int(again.sum()), every + len(again)
    assert found / every >= run.notes["largest_used"] > 0.5


def test_labels_alone_need_no_teacher(tmp_path: Path) -> None:
    model = load(tiny.classifier(tmp_path / "m"))
    one, other = (
        rounded(asked, LABELS, tmp_path / name, alpha=0.0)[0] for name, asked in (("a", model), ("b", mute(model)))
    )
    assert one.digest == other.digest


def test_eight_bits_change_little_and_two_bits_much(tmp_path: Path) -> None:
    model = load(still(tiny.causal(tmp_path / "m")))
    told = answers(model, TEXTS)[0].log_softmax(-1)

    def apart(other: Model) -> float:
        return torch.nn.functional.kl_div(
            answers(other, TEXTS)[0].log_softmax(-1), told, log_target=True, reduction="batchmean"
        ).item()

    lost = [apart(only_rounded(model, bits)) for bits in (8, 4, 2)]
    assert lost[0] < 0.01 < lost[1] < lost[2]
    trained, _ = rounded(model, TEXTS, tmp_path / "w", bits=4, steps=60)
    assert apart(trained) < 0.7 * lost[1], (apart(trained), lost)


def test_the_first_loss_is_what_rounding_costs(tmp_path: Path) -> None:
    model = load(still(tiny.classifier(tmp_path / "m")))
    _, run = rounded(model, LABELS[:4], tmp_path / "w", steps=1, bits=3, group=8)
    p, q = (answers(m, LABELS[:4])[0].log_softmax(-1) for m in (model, only_rounded(model, 3, 8)))
    assert run.notes["loss_before"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3)


def test_it_is_saved_and_its_errors_are_clear(tmp_path: Path) -> None:
    model = load(tiny.classifier(tmp_path / "m"))
    made_, _ = rounded(model, LABELS, tmp_path / "w", steps=2)
    (tmp_path / "out").mkdir()
    made_.save(tmp_path / "out")
    assert load(tmp_path / "out").digest == made_.digest
    with pytest.raises(ConfigError, match="groups of 24 do not divide"):
        rounded(model, LABELS, tmp_path / "x", group=24)
    with pytest.raises(MismatchError, match="cannot learn the answers"):
        models = {"model": [model], "teacher": [load(tiny.causal(tmp_path / "c"))]}
        made(quantised.METHOD, models, {"train": LABELS}, tmp_path / "y")


@pytest.mark.slow
def test_trained_while_rounded_beats_rounded_afterwards(tmp_path: Path) -> None:
    """The zoo's ViT at 4, 3 and 2 bits: rounded alone, trained rounded on labels, and taught by itself; three seeds."""
    from lfm import zoo
    from lfm.zoo.vision import images

    model, train, test = load(zoo.model("vit")), images("identity", "train"), images("identity", "test")
    scores: dict[str, list[float]] = {}
    for bits in (4, 3, 2):
        scores[f"{bits} rounded"] = [accuracy(only_rounded(model, bits), test)] * 2
        for seed in range(3):
            for kind, alpha in (("taught", 1.0), ("labels", 0.0)):
                work = tmp_path / f"{bits}-{kind}-{seed}"
                fit: dict[str, Any] = {"steps": 90, "batch_size": 32, "lr": 5e-4}
                after, _ = rounded(model, train, work, seed=seed, bits=bits, alpha=alpha, **fit)
                scores.setdefault(f"{bits} {kind}", []).append(accuracy(after, test))
    mean = means({"whole": [accuracy(model, test)] * 2, **scores})
    assert mean["4 taught"] >= mean["4 rounded"] and mean["3 taught"] > mean["3 rounded"]
    assert mean["2 taught"] > mean["2 rounded"] + 0.03
