"""Is the region between fine-tuned models as good as they are, and where does another model lie to it?

    inside    θ = Σᵢ wᵢ θᵢ, w drawn evenly from the simplex;   centre: wᵢ = 1/N;   outside: c + t (θᵢ − c), t > 1

Paper: Knowledge is a region in weight space, arXiv 2302.04863: models of one task lie close together, what lies between
them performs as they do or better, what lies beyond does not; the centre is a good place to start a fine-tuning from
(make it with reuse.linear). Differs: models share a head, where the paper trains a new one for each; points outside are
taken from the centre through each model.

Models: two or more that span the region, and optionally a `model` to be placed: its nearest mixture of them, and how
far off that is, also against the region's spread (mean distance from the centre). All of one architecture.
Data: held-out records, any kind with a task; loss in nats, accuracy of classes or tokens. The finding has a row a kind
of point, and every point as evidence. The models are in memory in fp32; the geometry is streamed. Errors: MismatchError
before any weight is read; CorruptError for a NaN or an infinity.

    lfm run reuse.region models=a models=b models=c data=held-out.jsonl --set samples=8 --out region
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import lfm.core
from lfm.core import Codec, Cost, Data, DataSlot, Gradients, Inputs, Meta, Method, Run, Sizes, Slot, Weights
from lfm.core.finding import Finding
from lfm.core.heavy import torch
from lfm.models import device, forward
from lfm.models.mixing import load_into, mixed, parameters_of, stacked
from lfm.subspaces.geometry import distances, products, within
from lfm.tensors import match
from lfm.train.examine import Score, examiner

if TYPE_CHECKING:
    from torch import Tensor


class Config(lfm.core.Config, frozen=True):
    samples: Annotated[int, Meta(ge=1, description="mixtures drawn from inside the region")] = 16
    beyond: Annotated[float, Meta(gt=1, description="t, how far past each model a point outside lies")] = 2.0


def run(config: Config, inputs: Inputs, run: Run) -> Finding:
    models, placed = inputs.all("models"), inputs.all("model")
    count = len(models)
    shell = models[0].ask(Gradients).module().to(device()).requires_grad_(False)
    like = {name: value.cpu().clone() for name, value in parameters_of(shell).items()}
    stack = stacked(models, like)
    exam = examiner(inputs.records("data"), models[0])
    points: list[tuple[str, str, Tensor]] = []
    for place, model in enumerate(models):
        points.append(("model", model.ref, torch.eye(count)[place]))
    centre = torch.full((count,), 1 / count)
    points.append(("centre", "centre", centre))
    draws = torch.empty(config.samples, count).exponential_(generator=run.generator("inside"))
    points += [("inside", f"inside {i + 1}", w / w.sum()) for i, w in enumerate(draws)]
    for place, model in enumerate(models):
        far = centre + config.beyond * (torch.eye(count)[place] - centre)
        points.append(("outside", f"beyond {model.ref}", far))

    def measure(weights: Tensor) -> list[float]:
        point = mixed(stack, lambda _, name: weights)
        return list(exam(lambda batch: forward(load_into(shell, point), batch)))

    found: list[tuple[str, str, Tensor, Score]] = []
    for number, (kind, name, weights) in enumerate(run.track(points, "points")):
        found.append((kind, name, weights, Score(*run.step(f"point-{number}", lambda w=weights: measure(w)))))
    inner = run.step("geometry", lambda: {"products": products([*models, *placed])})["products"]
    metrics = _geometry(inner, count) | _better(found)
    evidence: list[dict[str, Any]] = [
        {"kind": kind, "point": name, "shares": [round(w, 6) for w in weights.tolist()], **score._asdict()}
        for kind, name, weights, score in found
    ]
    if placed:
        shares, off = within(inner, count, range(count))
        told = {"kind": "placed", "point": placed[0].ref, "shares": [round(s, 6) for s in shares.tolist()]}
        evidence.append(told | {"distance_to_region": off})
    rows = [_row(kind, [s for k, _, _, s in found if k == kind]) for kind in ("model", "centre", "inside", "outside")]
    return Finding(
        title=f"The region between {count} models: inside, {100 * metrics['inside_beats_models']:.0f} % of points "
        "have a lower loss than the models have on average",
        columns=tuple(rows[0]),
        rows=tuple(rows),
        metrics=metrics,
        evidence=tuple(evidence),
    )


def _row(kind: str, scores: Sequence[Score]) -> dict[str, Any]:
    losses, right = [s.loss for s in scores], [s.accuracy for s in scores]
    return {
        "points": kind,
        "count": len(scores),
        "loss": sum(losses) / len(losses),
        "lowest_loss": min(losses),
        "highest_loss": max(losses),
        "accuracy": sum(right) / len(right),
        "best_accuracy": max(right),
    }


def _better(found: Sequence[tuple[str, str, Any, Score]]) -> dict[str, float]:
    """How often a point of a kind has a lower loss than the models' mean."""
    models = [score.loss for kind, _, _, score in found if kind == "model"]
    usual = sum(models) / len(models)
    out = {}
    for kind in ("centre", "inside", "outside"):
        losses = [score.loss for k, _, _, score in found if k == kind]
        out[f"{kind}_beats_models"] = sum(loss < usual for loss in losses) / len(losses)
    return out


def _geometry(inner: Tensor, count: int) -> dict[str, float]:
    """spread: mean distance of the models from their centre; and of the placed model, if one is there."""
    corners = inner[:count, :count]
    centre = corners.mean()
    spread = float((corners.diagonal() - 2 * corners.mean(1) + centre).clamp(min=0).sqrt().mean())
    apart = distances(corners)
    out = {"spread": spread, "diameter": float(apart.max())}
    if len(inner) > count:
        shares, off = within(inner, count, range(count))
        own = float((inner[count, count] - 2 * inner[count, :count].mean() + centre).clamp(min=0).sqrt())
        out |= {"distance_to_region": off, "distance_to_centre": own, "off_by_spread": off / (spread or 1.0)}
        out |= {
            "nearest_model": float(distances(inner)[count, :count].argmin()) + 1,
            "largest_share": float(shares.max()),
        }
    return out


def agree(config: Config, inputs: Inputs) -> None:
    match.agree([*inputs.all("models"), *inputs.all("model")])


def cost(config: Config, sizes: Sizes) -> Cost:
    models, amount = sizes.models["models"], sizes.data["data"]
    model, count = models[0], len(models)
    points = 2 * count + 1 + config.samples
    return Cost(
        flops=points * model.parameters * (2.0 * amount.tokens + 2.0 * count),
        steps=points * (1 + amount.records // 64),
        memory=4 * (count + 5) * model.parameters,
    )


METHOD = Method(
    paper="arXiv:2302.04863",
    config=Config,
    models={
        "models": Slot((Weights, Gradients, Codec), min=2, max=None, help="fine-tuned models that span the region"),
        "model": Slot((Weights,), min=0, help="a model to be placed"),
    },
    data={
        "data": DataSlot(
            Data.FEW_SHOT,
            ("text", "completion", "label", "pair", "image", "fact"),
            help="held-out records that points are measured on",
        )
    },
    run=run,
    cost=cost,
    agree=agree,
    gives="finding",
)
