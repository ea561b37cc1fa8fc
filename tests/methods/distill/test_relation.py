"""Relations between records: the papers' losses written out, what leaves them alone, and a student that takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from case import Case
from lfm.core import Codec, Features, Inputs, Model
from lfm.core.errors import AccessError, ConfigError
from lfm.core.method import check
from lfm.data import records as data
from lfm.data.files import write
from lfm.distilling import inside, relations
from lfm.methods.distill import relation
from lfm.models import load
from lfm.runs.run import LocalRun

LABELS = [data.Label(text=f"the {w} sat on the mat", label=w) for w in ("cats", "dogs", "birds") * 4]


def distill(teacher: Model, student: Model, records: Any, work: Path, seed: int = 0, **settings: Any) -> Any:
    inputs = Inputs({"teacher": (teacher,), "student": (student,)}, {"train": records})
    config = relation.Config(**({"steps": 20, "lr": 5e-3, "batch_size": 4} | settings))
    relation.agree(config, inputs)
    run = LocalRun(seed, work)
    made = relation.run(config, check("distill.relation", relation.METHOD, inputs), run)
    assert isinstance(made, Model)
    return made, run


def case(here: Path) -> Case:
    tiny.classifier(here / "big", hidden_size=48)
    tiny.classifier(here / "small", seed=1)
    write(LABELS, here / "texts.jsonl")
    settings = {"steps": 6, "batch_size": 4, "checkpoint_every": 0.0, "similarity": 10.0}
    return Case({"teacher": ("big",), "student": ("small",)}, {"train": "texts.jsonl"}, settings)


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def huber(x: float) -> float:
    return x * x / 2 if abs(x) < 1 else abs(x) - 0.5


def test_distances_and_angles_written_out_one_by_one() -> None:
    s, t = 4 * rows(5, 3), rows(5, 6, seed=1)
    n = len(s)
    scale = [
        sum(float((x[i] - x[j]).norm()) for i in range(n) for j in range(n) if i != j) / (n * (n - 1)) for x in (s, t)
    ]
    pairs, triples = 0.0, 0.0
    for i in range(n):
        for j in range(n):
            pairs += huber(float((s[i] - s[j]).norm()) / scale[0] - float((t[i] - t[j]).norm()) / scale[1]) / n**2
            for k in range(n):
                told = []
                for x in (s, t):
                    one, other = x[i] - x[j], x[k] - x[j]
                    size = float(one.norm() * other.norm())
                    told.append(float(one @ other) / size if size else 0.0)
                triples += huber(told[0] - told[1]) / n**3
    assert relations.distances(s, t).item() == pytest.approx(pairs, rel=1e-4)
    assert relations.angles(s, t).item() == pytest.approx(triples, rel=1e-4)


def test_rows_moved_turned_and_scaled_are_related_as_before() -> None:
    t = rows(6, 8)
    turn = torch.linalg.qr(rows(8, 8, seed=1)).Q
    s = 3 * t @ turn + 7
    assert relations.distances(s, t).item() == pytest.approx(0, abs=1e-9)
    assert relations.angles(s, t).item() == pytest.approx(0, abs=1e-9)
    assert relations.similarities(3 * t @ turn, t).item() == pytest.approx(0, abs=1e-9)
    bent = s.clone()
    bent[0] *= 2
    assert relations.distances(bent, t) > 1e-3 and relations.angles(bent, t) > 1e-3


def test_similarities_of_two_rows_in_closed_form() -> None:
    """Two rows of length one at angle θ: G's rows are (1, cos θ) and (cos θ, 1), over √(1 + cos² θ)."""
    turned = lambda a: torch.tensor([[1.0, 0.0], [torch.cos(a), torch.sin(a)]])  # noqa: E731
    s, t = torch.tensor(0.3), torch.tensor(1.1)
    expected = 0.0
    for one, other in ((torch.ones(()), torch.ones(())), (s.cos(), t.cos())):
        expected += 2 * float(one / (1 + s.cos() ** 2).sqrt() - other / (1 + t.cos() ** 2).sqrt()) ** 2 / 4
    assert relations.similarities(turned(s), turned(t)).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_rows_and_equal_rows_have_finite_gradients(count: int) -> None:
    s = torch.ones(count, 4, requires_grad=True)
    config = relation.Config(similarity=1.0)
    relation.related(config, s * torch.arange(1, 5), rows(count, 5)).backward()
    assert s.grad is not None and torch.isfinite(s.grad).all()


@pytest.mark.parametrize("places", [1, 2])
def test_the_first_loss_is_that_of_both_models_rows(tmp_path: Path, places: int) -> None:
    teacher, student = load(tiny.causal(tmp_path / "t")), load(tiny.causal(tmp_path / "s", seed=1))
    records = [data.Text(text=line) for line in tiny.CORPUS[:4]]
    weights: tuple[dict[str, Any], ...] = ({"similarity": 30.0}, {"distance": 0.0, "angle": 0.0})
    losses = [
        distill(teacher, student, records, tmp_path / str(i), steps=1, places=places, precision="fp32", **other)[
            1
        ].notes["loss_before"]
        for i, other in enumerate(weights)
    ]
    batch = student.ask(Codec).texts([r.text for r in records])
    mask = batch["attention_mask"][..., None]
    expected = 0.0
    for level in range(2)[-places:]:
        s, t = (
            (m.ask(Features).features(batch, [("level", level)])[0] * mask).sum(1) / mask.sum(1)
            for m in (student, teacher)
        )
        apart = 25 * relations.distances(s, t) + 50 * relations.angles(s, t) + 30 * relations.similarities(s, t)
        expected += float(apart) / places
    assert losses[0] - losses[1] == pytest.approx(expected, rel=1e-4)


def test_the_students_records_come_to_lie_as_the_teachers(tmp_path: Path) -> None:
    teacher = load(tiny.vit(tmp_path / "t", hidden_size=48))
    student = load(tiny.vit(tmp_path / "s", seed=1, patch_size=2, num_hidden_layers=1))
    drawn = torch.randint(0, 255, (12, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    records = [data.Image(image=x.numpy(), label=str(i % 10)) for i, x in enumerate(drawn)]
    made, _ = distill(teacher, student, records, tmp_path / "w", steps=40, batch_size=12, alpha=1.0)

    def apart(model: Model) -> float:
        seen = []
        for one in (model, teacher):
            batch = one.ask(Codec).images([r.image for r in records])
            seen.append(inside.pooled(one.ask(Features).features(batch, [("hidden", -1)])[0]))
        return float(relations.distances(*seen) + relations.angles(*seen))

    assert apart(made) < 0.3 * apart(student)


def test_a_teacher_without_answers_may_still_relate(tmp_path: Path) -> None:
    teacher, student = load(tiny.classifier(tmp_path / "t")), load(tiny.classifier(tmp_path / "s", seed=1))
    silent = teacher.only((Features, Codec))
    with pytest.raises(AccessError, match="does not give logits"):
        distill(silent, student, LABELS, tmp_path / "a")
    _, run = distill(silent, student, LABELS, tmp_path / "b", alpha=0.0, steps=4)
    assert run.notes["loss_after"] > 0


@pytest.mark.parametrize(
    ("settings", "what"),
    [({"batch_size": 2}, "no angles(.|\n)*angle=0"), ({"batch_size": 1, "angle": 0.0}, "no pairs(.|\n)*batch_size=2")],
)
def test_a_batch_too_small_to_relate_anything_is_refused(settings: Any, what: str, tmp_path: Path) -> None:
    model = load(tiny.classifier(tmp_path / "big"))
    with pytest.raises(ConfigError, match=what):
        distill(model, model, LABELS, tmp_path, **settings)
    with pytest.raises(ConfigError, match=r"a batch of 2 has no angles(.|\n)*3 records or more, or angle=0"):
        distill(model, model, LABELS[:2], tmp_path)
    distill(model, model, LABELS, tmp_path, steps=1, batch_size=1, angle=0.0, distance=0.0)
