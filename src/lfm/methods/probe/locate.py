"""Where a fact is looked up: which layer's state, at which token, brings it back once its subject is made unreadable.

    effect(state) = p(object | subject disturbed, state as it was) − p(object | subject disturbed)

Paper: causal tracing, ROME, arXiv 2202.05262, section 2. The embeddings of the subject's tokens get Gaussian noise of
`noise` times the standard deviation of the embeddings of all the facts' subjects; then the output of one block at one
token, or what the feed-forward layers or the attention of `window` blocks around one add there, is set to what it is
without noise. Means are over facts and `samples` noises of the same place by its part in the prompt (the subject's last
token, the last token of all, …), of several such tokens in one fact the mean. What differs: intervals, 95 % by drawing
facts and each fact's noises anew (`draws` times); objects of several tokens count as a whole; masked models are traced
likewise, at the blank; the window is a fifth of the blocks (the paper's 10 of 48). A fact that the model does not say
is left out and counted. Where a fact is traced to does not tell where an edit of it holds (2301.04213).

Models: a causal or a masked language model, its layers found by structure. Data: facts or edits (of which `object` is
traced), each naming its subject. The finding has a row for each kind of state and part of the prompt, at the block
where the effect is largest, maps of all blocks, and a map of each token of the first fact. Probabilities, not logs.
Errors: DataError for a prompt that does not name its subject, or where the model says none of the facts.

    lfm run probe.locate model=model facts=facts.jsonl --out traced
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import lfm.core
from lfm.core import Codec, Cost, Data, DataSlot, Finding, Gradients, Inputs, Map, Meta, Method, Run, Sizes, Slot
from lfm.core.errors import DataError
from lfm.core.heavy import torch
from lfm.editing import tracing
from lfm.editing.cloze import Cloze, cloze, first_choice, is_masked, readable
from lfm.editing.rows import place
from lfm.editing.tracing import PARTS, STATES, by_part, part_of
from lfm.models import device, forward

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lfm.data.records import Edit, Fact

Cells = tuple[tuple[float | None, ...], ...]


class Config(lfm.core.Config, frozen=True):
    noise: Annotated[
        float, Meta(gt=0, description="of the subject, in standard deviations of subjects' embeddings")
    ] = 3.0
    samples: Annotated[int, Meta(ge=1, description="noises a fact")] = 10
    most: Annotated[int, Meta(ge=1, description="facts traced, evenly spread over those that the model says")] = 50
    window: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="blocks whose feed-forward or attention is put back together; none: a fifth of them"),
    ] = None
    draws: Annotated[int, Meta(ge=1, description="draws for the intervals")] = 1000


def run(config: Config, inputs: Inputs, run: Run) -> Finding:
    model = inputs.model("model")
    codec, masked = model.ask(Codec), is_masked(model.facts)
    module = model.ask(Gradients).module().to(device()).requires_grad_(False)
    given: list[Any] = list(inputs.records("facts"))
    read = [cloze(codec.tokenizer, (f.prompt, f.object, f.suffix), masked=masked, subject=f.subject) for f in given]
    said = run.step("said", lambda: [_says(module, one) for one in run.track(read, "asking")])
    known = [i for i, right in enumerate(said) if right]
    if not known:
        raise DataError(
            f"the model says none of the {len(given)} facts", why="what it does not say cannot be traced in it"
        )
    chosen = known if len(known) <= config.most else [known[i * len(known) // config.most] for i in range(config.most)]
    size = config.noise * tracing.embedding_spread(module, read)
    traced = []

    def trace(i: int) -> dict[str, Any]:
        noise = tracing.noises(module, read[i], size, config.samples, run.generator("noise", str(i)))
        return tracing.trace(module, read[i], noise, config.window)._asdict()

    for number, i in enumerate(run.track(chosen, "tracing"), start=1):
        traced.append(run.step(f"fact {number}", lambda i=i: trace(i)))
    left = len(given) - len(known)
    return _finding(config, [given[i] for i in chosen], [read[i] for i in chosen], traced, codec, left, run)


def _says(module: nn.Module, read: Cloze) -> bool:
    with torch.no_grad():
        return first_choice(forward(module, {"input_ids": torch.tensor([read.ids])})[0], read)


def _finding(
    config: Config,
    facts: Sequence[Fact | Edit],
    read: Sequence[Cloze],
    traced: Sequence[dict[str, Any]],
    codec: Codec,
    left: int,
    run: Run,
) -> Finding:
    effects = torch.stack([by_part(one, told["effects"]) for one, told in zip(read, traced, strict=True)])
    mean, low, high = tracing.intervals(effects, config.draws, run.generator("intervals"))
    rows, maps = [], []
    for k, kind in enumerate(STATES):
        held = [p for p in range(len(PARTS)) if not bool(mean[k, p].isnan().all())]
        for p in held:
            best = int(mean[k, p].argmax())
            ends = {"effect": mean, "low": low, "high": high}
            told = {name: float(values[k, p, best]) for name, values in ends.items()}
            rows.append({"state": kind, "token": PARTS[p], "block": best, **told})
        cells = [_plain(values[k][held]) for values in (mean, low, high)]
        maps.append(_map(f"{kind}: effect on p(object)", [PARTS[p] for p in held], *cells))
    tokens = [
        codec.tokenizer.decode([token]) + (" *" if i in read[0].subject else "") for i, token in enumerate(read[0].ids)
    ]
    first = f"{facts[0].prompt} … {facts[0].object}"
    for k, kind in enumerate(STATES):
        maps.append(_map(f"{kind}: {first}", tokens, _plain(traced[0]["effects"][k].mean(-1).T)))
    clean = torch.tensor([[told["clean"]] * config.samples for told in traced], dtype=torch.double)
    lost = torch.stack([torch.as_tensor(told["disturbed"]).double() for told in traced])
    total = [float(x) for x in tracing.intervals(clean - lost, config.draws, run.generator("total"))]
    return Finding(
        title=f"Where {len(facts)} facts are looked up",
        columns=tuple(rows[0]),
        rows=tuple(sorted(rows, key=lambda row: -row["effect"])),
        metrics={
            "facts": float(len(facts)),
            "left_out": float(left),
            "p_clean": float(clean.mean()),
            "p_disturbed": float(lost.mean()),
            **dict(zip(("total_effect", "total_effect_low", "total_effect_high"), total, strict=True)),
        },
        evidence=tuple(_told(*one) for one in zip(facts, read, traced, strict=True)),
        maps=tuple(maps),
    )


def _map(name: str, rows: Sequence[str], values: Cells, low: Cells = (), high: Cells = ()) -> Map:
    columns = tuple(str(i) for i in range(len(values[0])))
    return Map(name=name, rows=tuple(rows), columns=columns, values=values, low=low, high=high, x_label="block")


def _plain(values: Tensor) -> Cells:
    return tuple(tuple(None if v != v else v for v in row) for row in values.tolist())


def _told(fact: Fact | Edit, read: Cloze, told: dict[str, Any]) -> dict[str, Any]:
    hidden = torch.as_tensor(told["effects"])[0].mean(-1)
    block, token = divmod(int(hidden.argmax()), hidden.shape[1])
    return {
        "subject": fact.subject,
        "prompt": fact.prompt,
        "object": fact.object,
        "p_clean": told["clean"],
        "p_disturbed": float(torch.as_tensor(told["disturbed"]).mean()),
        "most_effect": float(hidden.max()),
        "block": block,
        "token": part_of(read, token),
    }


def agree(config: Config, inputs: Inputs) -> None:
    readable("probe.locate", inputs.model("model"))
    for number, fact in enumerate(inputs.records("facts"), start=1):
        if not fact.subject or place(fact.prompt, fact.subject) < 0:
            raise DataError(
                f"fact {number}: {fact.prompt!r} does not name its subject {fact.subject!r}",
                why="the subject's embeddings are what is disturbed",
                fix="write the prompt with the subject as it is spelled",
            )


def cost(config: Config, sizes: Sizes) -> Cost:
    facts, given = sizes.model("model"), sizes.data["facts"]
    each, count = given.tokens / max(1, given.records), min(config.most, given.records)
    passes = len(STATES) * max(1, facts.layers) * each * config.samples
    return Cost(
        flops=2.0 * facts.parameters * each * (given.records + count * passes),
        steps=int(given.records + count * passes * each / 4096),
        memory=int(4 * facts.parameters + 24 * 4096 * facts.vocabulary),
    )


METHOD = Method(
    paper="arXiv:2202.05262",
    config=Config,
    models={"model": Slot((Gradients, Codec), help="the causal or masked language model to look into")},
    data={"facts": DataSlot(Data.FEW_SHOT, ("fact", "edit"), help="facts, each with its subject in its prompt")},
    run=run,
    cost=cost,
    agree=agree,
    gives="finding",
)
