"""What a memory keeps of an edit: its key, how near other subjects' keys are, and a value that says the new object."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Protocol, TypeVar

from lfm.core.config import Config, Meta
from lfm.core.errors import EditError
from lfm.core.heavy import torch
from lfm.core.method import Run
from lfm.core.model import Codec
from lfm.data.records import Edit
from lfm.data.wording import wording
from lfm.editing import kept, memory
from lfm.editing.choose import candidates
from lfm.editing.keys import projection
from lfm.editing.memory import Memory
from lfm.editing.resume import activations
from lfm.editing.rows import IGNORED, place
from lfm.models import forward, structure
from lfm.models.codec import pad, pad_id
from lfm.models.language import batches, spans

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lfm.core.model import Batch
    from lfm.editing.setting import Setting


class Kept(Protocol):
    """Edits beside the weights of one model: a memory, or neurons."""

    @property
    def base(self) -> str: ...
    @property
    def block(self) -> int: ...
    @property
    def edits(self) -> tuple[Edit, ...]: ...


K = TypeVar("K", bound=Kept)

RIVALS = 32
"""Prompts with something else in the subject's place, by which the distances of a layer are measured."""
TRIED = 4
"""Edits by which a block is chosen."""
GROUP = 16
"""Edits whose values are searched for together."""
SAME_KEY = "its last token's key is the same for any subject"


class Recall(Config, frozen=True):
    """How a memory finds what it keeps. An editor's Config inherits these settings."""

    radius: Annotated[float, Meta(gt=0, le=1, description="first ε over the distance to the nearest other subject")] = (
        0.5
    )
    steps: Annotated[int, Meta(ge=1, description="most steps of Adam on a value")] = 50
    lr: Annotated[float, Meta(gt=0, description="Adam's rate over ‖v₀‖/√d: a step's length over ‖v₀‖")] = 0.5
    stop: Annotated[float, Meta(ge=0, description="mean NLL of the new object at which the search ends")] = 0.05
    accept: Annotated[float, Meta(gt=0, lt=1, description="least p(new object) that a value must reach")] = 0.5


class Asked(NamedTuple):
    """Edits as rows (n, T): labels on the new object's tokens, −100 elsewhere; last (n,): where the prompt ends."""

    batch: Batch
    labels: Tensor
    last: Tensor

    def rows(self, places: Tensor) -> Asked:
        return Asked({k: v[places] for k, v in self.batch.items()}, self.labels[places], self.last[places])


def asked(tokenizer: Any, edits: Sequence[Edit]) -> Asked:
    """Each edit's prompt and new object."""
    worded = [wording(edit) for edit in edits]
    found = spans(tokenizer, [w.prompt for w in worded], [w.answer for w in worded], [""] * len(worded))
    ids = [list(row[:last]) for row, _, last in found]
    labels = [[IGNORED] * first + row[first:] for row, (_, first, _) in zip(ids, found, strict=True)]
    return Asked(
        pad(ids, pad_id(tokenizer)),
        pad(labels, IGNORED)["input_ids"],
        torch.tensor([max(first - 1, 0) for _, first, _ in found]),
    )


def keys_of(module: nn.Module, codec: Codec, block: int, prompts: Sequence[str]) -> Tensor:
    """(n, in) fp32 on the CPU: what a block's projection reads at each prompt's last token."""
    return read_at(module, codec, ("ffn_key", block), prompts)


def read_at(module: nn.Module, codec: Codec, site: tuple[str, int], prompts: Sequence[str]) -> Tensor:
    """(n, width) fp32 on the CPU: what a site holds at each prompt's last token."""
    end = codec.tokenizer.eos_token_id
    ids = [list(row) for row in codec.tokenizer(list(prompts))["input_ids"]]
    ids = [row[:-1] if len(row) > 1 and row[-1] == end else row for row in ids]
    return torch.stack([seen[-1] for seen in read(module, codec, site, ids)])


def read(module: nn.Module, codec: Codec, site: tuple[str, int], ids: Sequence[Sequence[int]]) -> list[Tensor]:
    """(T, width) fp32 on the CPU: what a site holds at each row's tokens. Some rows go at a time, and no further."""
    found: dict[int, Tensor] = {}
    for group in batches([len(row) for row in ids]):
        (seen,) = activations(module, pad([list(ids[i]) for i in group], pad_id(codec.tokenizer)), [site])
        found |= {i: held[: len(ids[i])].float().cpu() for i, held in zip(group, seen, strict=True)}
    return [found[i] for i in range(len(ids))]


def rivals(edit: Edit, codec: Codec, text: Sequence[Sequence[int]], random: torch.Generator) -> list[str]:
    """The prompt with other things in the subject's place: pieces of the text, as many tokens long as the subject."""
    long = len(codec.tokenizer(edit.subject, add_special_tokens=False)["input_ids"])
    rows = [row for row in text if len(row) > long]
    at = place(edit.prompt, edit.subject)
    named = edit.prompt[at : at + len(edit.subject)]  # as it is capitalised there
    made: list[str] = []
    for _ in range(RIVALS if rows else 0):
        row = rows[int(torch.randint(len(rows), (), generator=random))]
        start = int(torch.randint(len(row) - long + 1, (), generator=random))
        piece = codec.tokenizer.decode(row[start : start + long], skip_special_tokens=True).strip()
        if piece and piece not in edit.subject:
            made.append(edit.prompt.replace(named, piece))
    return [prompt for prompt in made if prompt != edit.prompt]


def nearest(here: Setting, block: int, edit: Edit, run: Run) -> float:
    """The distance of an edit's key to the nearest of its rivals'; 0 where there are none."""
    others = rivals(edit, here.codec, here.text, run.generator("rivals", edit.prompt))
    keys = keys_of(here.module, here.codec, block, [edit.prompt, *others])
    return memory.distances(keys[:1], keys[1:]).min().item() if others else 0.0


@contextmanager
def replaced(layer: Any, places: tuple[Tensor, Tensor], values: Tensor) -> Iterator[None]:
    """Within: the layer's output at these (row, token) places is these values (n, out)."""

    def hook(_: Any, __: Any, out: Tensor) -> Tensor:
        return out.index_put(places, values.to(out.dtype))

    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class Found(NamedTuple):
    """values (n, out) on the CPU, the probability of the whole new object with each, and the steps it took."""

    values: Tensor
    probabilities: list[float]
    steps: list[int]


def search(module: nn.Module, block: int, rows: Asked, *, steps: int, lr: float, stop: float) -> Found:
    """Each edit's value by Adam on the NLL of its new object per token, begun at what the layer writes; by itself the
    search of one edit ends below `stop`, whatever the others in the batch do.

    lr: over ‖v₀‖/√d. The module's parameters must need no gradients. The value of the lowest NLL met is kept.
    """
    _, layer = projection(module, block)
    home = layer.weight.device
    with torch.no_grad(), structure.watch(module, [("ffn_out", block)]) as seen:
        forward(module, rows.batch)
    start = seen[0][torch.arange(len(rows.last), device=home), rows.last.to(home)].float()
    unit = start.norm(dim=1, keepdim=True) / start.shape[1] ** 0.5
    moved = torch.zeros_like(start, requires_grad=True)
    optimiser = torch.optim.Adam([moved], lr=lr)
    best, lowest = start.clone(), torch.full((len(start),), torch.inf)
    probability, taken = torch.zeros(len(start)), torch.zeros(len(start), dtype=torch.long)
    live = torch.arange(len(start))
    for step in range(steps + 1):
        part, at = rows.rows(live), live.to(home)
        values = start[at] + unit[at] * moved[at]
        with replaced(layer, (torch.arange(len(live), device=home), part.last.to(home)), values):
            told = answer_logprobs(forward(module, part.batch), part.labels)
        loss = -told / (part.labels != IGNORED).sum(1).to(told)
        now = loss.detach().cpu()
        better = now < lowest[live]
        lowest[live[better]] = now[better]
        best[at[better.to(home)]] = values.detach()[better.to(home)]
        probability[live[better]] = told.detach().cpu().exp()[better]
        taken[live[better]] = step
        going = now >= stop
        if step == steps or not going.any():
            break
        (moved.grad,) = torch.autograd.grad(loss[going.to(home)].sum(), moved)
        optimiser.step()
        live = live[going]
    return Found(best.cpu(), probability.tolist(), taken.tolist())


def answer_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """(n,) log-probability of all of a row's labelled tokens."""
    labels = labels[:, 1:].to(logits.device)
    said = labels != IGNORED
    told = logits[:, :-1].log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    return (told * said).sum(1)


def chosen(how: Recall, here: Setting, edits: Sequence[Edit], run: Run) -> int:
    """The last block in which most of the first edits have a value and a prompt's key moves less by what stands before
    it than by another subject. (Later keys tell more of what is meant, and less of how it is worded.)"""
    tried = edits[:TRIED]
    rows = asked(here.codec.tokenizer, tried)
    blocks = candidates(len(structure.blocks(here.module)) + 1)

    def measure(block: int) -> list[float]:
        told = search(here.module, block, rows, steps=how.steps, lr=how.lr, stop=how.stop)
        margins = []
        for edit in tried:
            prompts = [prefix + edit.prompt for prefix in here.prefixes]
            keys = keys_of(here.module, here.codec, block, prompts)
            own = memory.distances(keys[:1], keys[1:]).median().item()
            margins.append(math.log(max(nearest(here, block, edit, run), 1e-30) / max(own, 1e-30)))
        return [sum(p >= how.accept for p in told.probabilities), sum(margins) / len(margins)]

    how_so = {name: getattr(how, name) for name in Recall.__struct_fields__}
    key = {**kept.key_of(here, tried, run), "how": how_so}

    def margin(block: int) -> list[float]:
        return kept.known("margin", {**key, "block": block}, lambda: measure(block))

    scores = {}
    for block in run.track(blocks, "trying blocks"):
        scores[block] = run.step(f"block {block}", lambda block=block: margin(block))
        run.curve("log margin by block tried", scores[block][1])
    return max(scores, key=lambda block: (scores[block][0], min(scores[block][1], 0.0), block))


def found(
    how: Recall, here: Setting, like: Memory, edits: Sequence[Edit], failures: list[EditError], run: Run
) -> Memory:
    """Each edit's key, value and radius, by itself; those without a value that says it become failures."""
    parts = []
    for start in run.track(range(0, len(edits), GROUP), "values"):
        group = edits[start : start + GROUP]
        parts.append(run.step(f"values {start}", lambda group=group: _values(how, here, like.block, group, run)))
    told = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    by = f"in up to {int(told['steps'].max())} steps the best value found gives"
    good = likely(edits, told["probability"], how.accept, like.block, by, failures, run, radii=told["radii"])
    index = torch.tensor(good, dtype=torch.long)
    keys, values, radii = (told[name][index] for name in ("keys", "values", "radii"))
    return Memory(like.base, like.block, tuple(edits[i] for i in good), keys, values, radii)


def _values(how: Recall, here: Setting, block: int, edits: Sequence[Edit], run: Run) -> dict[str, Tensor]:
    told = search(here.module, block, asked(here.codec.tokenizer, edits), steps=how.steps, lr=how.lr, stop=how.stop)
    return {
        "keys": keys_of(here.module, here.codec, block, [edit.prompt for edit in edits]),
        "values": told.values,
        "radii": torch.tensor([how.radius * nearest(here, block, edit, run) for edit in edits]),
        "probability": torch.tensor(told.probabilities),
        "steps": torch.tensor(told.steps),
    }


def likely(
    edits: Sequence[Edit],
    probabilities: Tensor,
    accept: float,
    block: int,
    by: str,
    failures: list[EditError],
    run: Run,
    *,
    radii: Tensor | None = None,
) -> list[int]:
    """Places of the edits whose new objects are likely enough by what was found for them, the others become failures;
    so do those that reach nothing, where radii are told. by: what was found, as "its block gives"."""
    good = []
    for i, (edit, probability) in enumerate(zip(edits, probabilities.tolist(), strict=True)):
        run.curve("p(new object) with what was found", probability)
        reaches = radii is None or float(radii[i]) > 0
        if probability >= accept and reaches:
            good.append(i)
            continue
        why = f"{by} p({edit.new_object}) = {probability:.2f} (accept {accept:g})" if reaches else SAME_KEY
        failures.append(failure(edit, block, why))
    return good


def failure(edit: Edit, block: int, why: str) -> EditError:
    return EditError(
        f"{edit.prompt!r} cannot be made to say {edit.new_object!r} in block {block}",
        why=why,
        fix="try another layer, more steps, or on_failure=skip",
    )
