"""How much worse the models between two models are: the loss along the path that joins them, and its barrier.

    barrier = max_α [L(θ_α) − ((1 − α) L(θ₀) + α L(θ₁))],    θ_α = (1 − α) θ₀ + α θ₁

Paper: linear mode connectivity, arXiv 1912.05671, which takes the ends' mean where this takes the line between their
losses. path=bezier bends the path through a control point θ_c trained to keep the loss low all along it (1802.10026):
θ_t = (1 − t)² θ₀ + 2t(1 − t) θ_c + t² θ₁, with t drawn uniformly at each step. With `triangle` the mixtures of the
first three models are measured too, on a grid, against the mixture of their losses: is all that lies between as good?

Models: two or more, equal in architecture and vocabulary; every pair is joined. Data: held-out records, any kind with a
task; `train` for a bent path. The finding has a row a pair (loss in nats, accuracy of classes or tokens as a share), a
curve of loss and of accuracy for each, and every measured point as evidence. Models of one fine-tuning have barriers
about zero and can be averaged; models trained apart have high ones, and their mean is useless. Running statistics of
normalization are mixed as weights are, not measured anew. Errors: MismatchError before any weight is read.

    lfm run probe.barrier models=a models=b data=held-out.jsonl --set points=11 --out between
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from lfm.core import Codec, Cost, Data, DataSlot, Gradients, Inputs, Meta, Method, Run, Sizes, Slot, Weights
from lfm.core.errors import ConfigError, SlotError
from lfm.core.finding import Curve, Finding
from lfm.core.heavy import torch
from lfm.data import task as tasks
from lfm.models import device, forward
from lfm.models.mixing import forward_with, load_into, matched, parameters_of
from lfm.tensors import match
from lfm.tensors.match import floating, same
from lfm.train import Fit, fit, once
from lfm.train.examine import Score, examiner
from lfm.train.fit import steps_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lfm.core.interfaces import Batch

Named = dict[str, "Tensor"]
Measure = Callable[[str, Callable[[], Named]], Score]


class Config(Fit, frozen=True):
    points: Annotated[int, Meta(ge=3, description="points on each path, both ends counted")] = 11
    path: Annotated[Literal["line", "bezier"], Meta(description="straight, or bent to keep the loss low")] = "line"
    triangle: Annotated[int, Meta(ge=0, description="steps a side of the first three models' triangle; 0: none")] = 0
    steps: Annotated[int, Meta(ge=0, description="bezier: steps of the control point; 0: by `epochs`")] = 0
    lr: Annotated[float, Meta(gt=0, description="bezier: peak learning rate of the control point")] = 1e-3


class Barrier(NamedTuple):
    """The most that a path rises above the line between its ends' losses, and where; falls below their accuracies'."""

    loss: float
    at: float
    accuracy: float


def run(config: Config, inputs: Inputs, run: Run) -> Finding:
    models = inputs.all("models")
    stored = models[0].ask(Weights).tensors()
    same(stored.keys() - set(floating(stored)), models)
    shell = models[0].ask(Gradients).module().to(device()).requires_grad_(False)
    like = {name: value.cpu().clone() for name, value in parameters_of(shell).items()}
    exam = examiner(inputs.records("data"), models[0])

    def read(place: int) -> Named:
        return matched(models[place].ask(Gradients).module(), like, models[place].ref)

    def measure(name: str, tensors: Callable[[], Named]) -> Score:
        told = run.step(name, lambda: list(exam(lambda batch: forward(load_into(shell, tensors()), batch))))
        return Score(*told)

    alphas = [i / (config.points - 1) for i in range(config.points)]
    rows, evidence, curves = [], [], []
    pairs = list(combinations(range(len(models)), 2))
    for first, second in run.track(pairs, "pairs"):
        a, b, label = read(first), read(second), f"{first + 1} to {second + 1}"
        control = _control(config, inputs, run, shell, a, b, label) if config.path == "bezier" else None
        scores = [
            measure(f"{label} at {alpha:.6f}", lambda a=a, b=b, c=control, t=alpha: between(a, b, t, c))
            for alpha in run.track(alphas, label)
        ]
        found = barrier(alphas, scores)
        rows.append(
            {
                "from": models[first].ref,
                "to": models[second].ref,
                "barrier": found.loss,
                "at": found.at,
                "accuracy_barrier": found.accuracy,
                **_ends("loss", scores),
                **_ends("accuracy", scores),
            }
        )
        evidence += [{"path": label, "at": [t], **s._asdict()} for t, s in zip(alphas, scores)]
        for quantity in ("loss", "accuracy"):
            ys = tuple(getattr(score, quantity) for score in scores)
            curves.append(Curve(name=f"{quantity}, {label}", x=tuple(alphas), y=ys, x_label="α", y_label=quantity))
    metrics = {"barrier": max(row["barrier"] for row in rows), "pairs": float(len(pairs))}
    metrics["accuracy_barrier"] = max(row["accuracy_barrier"] for row in rows)
    if config.triangle:
        inside = _triangle(config.triangle, [read(place) for place in range(3)], measure)
        metrics["triangle_barrier"] = max(point["above"] for point in inside)
        evidence += inside
    return Finding(
        title=f"Between {len(models)} models: a barrier of {metrics['barrier']:.3g} nats on the worst path",
        columns=tuple(rows[0]),
        rows=tuple(rows),
        metrics=metrics,
        evidence=tuple(evidence),
        curves=tuple(curves),
    )


def between(a: Named, b: Named, t: float, control: Named | None = None) -> Named:
    """The point t of the straight path, or of the quadratic Bézier curve through the control point's pull."""
    if control is None:
        return {name: value.lerp(b[name], t) for name, value in a.items()}
    return {n: (1 - t) ** 2 * value + 2 * t * (1 - t) * control[n] + t**2 * b[n] for n, value in a.items()}


def barrier(alphas: Sequence[float], scores: Sequence[Score]) -> Barrier:
    """Of a path's scores; 0 at least, which is what the ends have."""
    first, last = scores[0], scores[-1]
    rises = [s.loss - (1 - t) * first.loss - t * last.loss for t, s in zip(alphas, scores)]
    falls = [(1 - t) * first.accuracy + t * last.accuracy - s.accuracy for t, s in zip(alphas, scores)]
    rises[0] = rises[-1] = 0.0
    worst = max(range(len(rises)), key=lambda i: rises[i])
    return Barrier(rises[worst], alphas[worst], max(0.0, *falls[1:-1]))


def _ends(quantity: str, scores: Sequence[Score]) -> dict[str, float]:
    values = [getattr(score, quantity) for score in scores]
    worst = max(values) if quantity == "loss" else min(values)
    return {f"{quantity}_from": values[0], f"{quantity}_worst": worst, f"{quantity}_to": values[-1]}


def _triangle(steps: int, corners: Sequence[Named], measure: Measure) -> list[dict[str, Any]]:
    """Every mixture (i, j, k) / steps of three models, with how far its loss lies above the mixture of their losses."""
    grid = [(i, j, steps - i - j) for i in range(steps + 1) for j in range(steps + 1 - i)]
    scores = {}
    for weights in grid:

        def mixture(weights: tuple[int, ...] = weights) -> Named:
            shares = [weight / steps for weight in weights]
            return {n: sum(s * c[n] for s, c in zip(shares, corners)) for n in corners[0]}  # type: ignore[misc]

        scores[weights] = measure(f"triangle {weights}", mixture)
    ends = [scores[tuple(steps * (place == corner) for place in range(3))].loss for corner in range(3)]
    return [
        {
            "path": "triangle",
            "at": [weight / steps for weight in weights],
            **score._asdict(),
            "above": score.loss - sum(weight / steps * end for weight, end in zip(weights, ends)),
        }
        for weights, score in scores.items()
    ]


def _control(config: Config, inputs: Inputs, run: Run, shell: nn.Module, a: Named, b: Named, label: str) -> Named:
    """The control point: begun midway, trained so that the loss is low at a random point of the curve."""
    model = inputs.model("models")
    codec = model.ask(Codec)
    records = tasks.fit(inputs.records("train"), codec, model.facts)
    task = tasks.task_for(records, codec, model.facts)
    numbers, collate = once(records, task.collate)
    ends = [{name: value.to(device()) for name, value in end.items()} for end in (a, b)]
    bent = load_into(model.ask(Gradients).module(), between(a, b, 0.5))

    def loss(bent: nn.Module, batch: Batch) -> Tensor:
        own = dict([*bent.named_parameters(), *bent.named_buffers()])
        t = float(torch.rand(()))
        return task.loss(forward_with(shell, between(ends[0], ends[1], t, own), batch), batch)

    fit(bent, numbers, collate, loss, config, run, name=f"control, {label}")
    return {name: value.cpu() for name, value in parameters_of(bent).items()}


def agree(config: Config, inputs: Inputs) -> None:
    if config.path == "bezier" and not inputs.records("train"):
        raise SlotError("a bent path is trained", why="there are no records for 'train'", fix="add train=FILE")
    if config.triangle and len(inputs.all("models")) < 3:
        raise ConfigError("a triangle has three corners", why=f"there are {len(inputs.all('models'))} models")
    match.agree(inputs.all("models"))


def cost(config: Config, sizes: Sizes) -> Cost:
    models, amount = sizes.models["models"], sizes.data["data"]
    model, pairs = models[0], len(models) * (len(models) - 1) // 2
    times = pairs * config.points + (config.triangle + 1) * (config.triangle + 2) // 2
    flops, steps = 2.0 * times * model.parameters * amount.tokens, times * (1 + amount.records // 64)
    if config.path == "bezier" and "train" in sizes.data:
        train = sizes.data["train"]
        more = pairs * steps_of(config, max(train.records, 1))
        flops += 6.0 * more * config.batch_size * train.tokens / max(train.records, 1) * model.parameters
        steps += more
    return Cost(flops=flops, steps=steps, memory=4 * 8 * model.parameters)


RECORDS = ("text", "completion", "label", "pair", "image", "fact")

METHOD = Method(
    paper="arXiv:1912.05671",
    config=Config,
    models={"models": Slot((Weights, Gradients, Codec), min=2, max=None, help="models of one architecture")},
    data={
        "data": DataSlot(Data.FEW_SHOT, RECORDS, help="held-out records that the loss is measured on"),
        "train": DataSlot(Data.LABELED, RECORDS, optional=True, help="bezier: what the control point is trained on"),
    },
    run=run,
    cost=cost,
    agree=agree,
    gives="finding",
)
