"""What a memory keeps of an edit: its key, how near other subjects' keys are, and a value that says the new object."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Protocol, TypeVar

from msgspec.structs import replace

from lfm.core.config import Config, Meta
from lfm.core.errors import EditError
from lfm.core.heavy import torch
from lfm.core.interfaces import Codec
from lfm.core.method import Run
from lfm.data.records import Edit
from lfm.editing import asking, form, kept, memory
from lfm.editing.asking import answer_logprobs
from lfm.editing.choose import candidates
from lfm.editing.keys import projection
from lfm.editing.memory import Memory
from lfm.editing.rows import place
from lfm.models import forward, structure
from lfm.models.language import batches
from lfm.models.resume import activations

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lfm.editing.asking import Asked
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


def read(here: Setting, kind: str, block: int, ids: Sequence[Sequence[int]]) -> list[Tensor]:
    """(T, width) fp32 on the CPU of each row: what a block's site holds at its tokens, as the model reads running text.
    Some rows go at a time, and no further."""
    found: dict[int, Tensor] = {}
    decoder = form.in_decoder(here.module, block)
    for group in batches([len(row) for row in ids]):
        text = form.reading(here.form, here.codec.tokenizer, [ids[i] for i in group])
        (seen,) = activations(here.module, text.batch, [form.at(here.module, kind, block)])
        tokens = text.tokens(decoder)
        parts = seen.cpu()[tokens].float().split(tokens.sum(1).tolist())
        found |= dict(zip(group, parts, strict=True))
    return [found[i] for i in range(len(ids))]


def rivals(edit: Edit, codec: Codec, text: Sequence[Sequence[int]], random: torch.Generator) -> list[Edit]:
    """The edit of other subjects: pieces of the text, as many tokens long as its own."""
    long = len(codec.tokenizer(edit.subject, add_special_tokens=False)["input_ids"])
    rows = [row for row in text if len(row) > long]
    at = place(edit.prompt, edit.subject)
    named = edit.prompt[at : at + len(edit.subject)]  # as it is capitalised there
    made: list[Edit] = []
    for _ in range(RIVALS if rows else 0):
        row = rows[int(torch.randint(len(rows), (), generator=random))]
        start = int(torch.randint(len(row) - long + 1, (), generator=random))
        piece = codec.tokenizer.decode(row[start : start + long], skip_special_tokens=True).strip()
        if piece and piece not in edit.subject:
            made.append(replace(edit, subject=piece, prompt=edit.prompt.replace(named, piece)))
    return [rival for rival in made if rival.prompt != edit.prompt]


def others_of(here: Setting, edit: Edit, run: Run) -> list[Edit]:
    """The same of a setting's own text."""
    return rivals(edit, here.codec, here.text, run.generator("rivals", edit.prompt))


def nearest(here: Setting, block: int, edit: Edit, run: Run) -> Tensor:
    """(spots,) the distance of each of an edit's keys to the nearest of its rivals'; 0 where there are none."""
    own, *others = asking.read_at(here, "ffn_key", block, [edit, *others_of(here, edit, run)])
    return memory.distances(own, torch.cat(others)).amin(1) if others else torch.zeros(len(own))


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
    """values (spots, out) on the CPU, the probability of each edit's whole new object with its own, and the steps."""

    values: Tensor
    probabilities: list[float]
    steps: list[int]


def search(module: nn.Module, block: int, rows: Asked, *, steps: int, lr: float, stop: float) -> Found:
    """Each edit's values by Adam on the NLL of its new object per token, begun at what the layer writes; by itself the
    search of one edit ends below `stop`, whatever the others in the batch do.

    lr: over ‖v₀‖/√d. The module's parameters must need no gradients. The values of the lowest NLL met are kept.
    """
    _, layer = projection(module, block)
    home = layer.weight.device
    owner, place = (each.to(home) for each in rows.spots)
    (written,) = activations(module, rows.batch, [form.at(module, "ffn_out", block)])
    start = written[owner, place].float()
    unit = start.norm(dim=1, keepdim=True) / start.shape[1] ** 0.5
    moved = torch.zeros_like(start, requires_grad=True)
    optimiser = torch.optim.Adam([moved], lr=lr)
    count = len(rows.labels)
    best, lowest = start.clone(), torch.full((count,), torch.inf)
    probability, taken = torch.zeros(count), torch.zeros(count, dtype=torch.long)
    live = torch.arange(count)
    for step in range(steps + 1):
        part, mine = rows.rows(live), torch.isin(owner, live.to(home))
        values = start[mine] + unit[mine] * moved[mine]
        with replaced(layer, part.spots, values):
            told = answer_logprobs(forward(module, part.batch), part.labels)
        loss = -told / part.lengths.to(told)
        now = loss.detach().cpu()
        better = now < lowest[live]
        lowest[live[better]] = now[better]
        spots = torch.isin(owner, live[better].to(home))
        best[spots] = values.detach()[spots[mine]]
        probability[live[better]] = told.detach().cpu().exp()[better]
        taken[live[better]] = step
        going = now >= stop
        if step == steps or not going.any():
            break
        (moved.grad,) = torch.autograd.grad(loss[going.to(home)].sum(), moved)
        optimiser.step()
        live = live[going]
    return Found(best.cpu(), probability.tolist(), taken.tolist())


def chosen(how: Recall, here: Setting, edits: Sequence[Edit], run: Run) -> int:
    """The last block in which most of the first edits have a value and a prompt's key moves less by what stands before
    it than by another subject. (Later keys tell more of what is meant, and less of how it is worded.)"""
    tried = edits[:TRIED]
    blocks = candidates(len(structure.all_blocks(here.module)) + 1)

    def measure(block: int) -> list[float]:
        told = search(here.module, block, asking.of(here, block, tried), steps=how.steps, lr=how.lr, stop=how.stop)
        margins = []
        for edit in tried:
            asked = [replace(edit, prompt=prefix + edit.prompt) for prefix in here.prefixes]
            keys = torch.stack([own[0] for own in asking.read_at(here, "ffn_key", block, asked)])
            own = memory.distances(keys[:1], keys[1:]).median().item()
            margins.append(math.log(max(float(nearest(here, block, edit, run)[0]), 1e-30) / max(own, 1e-30)))
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


class Keys(NamedTuple):
    """Of n edits, row by row: owner (m,) whose a key is, keys (m, in), radii (m,)."""

    owner: Tensor
    keys: Tensor
    radii: Tensor


def keyed(how: Recall, here: Setting, block: int, edits: Sequence[Edit], run: Run) -> Keys:
    """What edits are found by."""
    own = asking.read_at(here, "ffn_key", block, edits)
    owner = torch.arange(len(edits)).repeat_interleave(torch.tensor([len(each) for each in own]))
    return Keys(owner, torch.cat(own), how.radius * torch.cat([nearest(here, block, edit, run) for edit in edits]))


def least(owner: Tensor, radii: Tensor, count: int) -> Tensor:
    """(n,) how far an edit's key reaches that reaches least."""
    return torch.full((count,), torch.inf).scatter_reduce(0, owner, radii.float(), "amin")


def found(
    how: Recall, here: Setting, made: Memory, edits: Sequence[Edit], failures: list[EditError], run: Run
) -> Memory:
    """The memory with each edit's keys, values and radii, found by itself; those without values that say it become
    failures."""
    base, block = made.base, made.block
    for start in run.track(range(0, len(edits), GROUP), "values"):
        group = edits[start : start + GROUP]
        told = run.step(f"values {start}", lambda group=group: _values(how, here, block, group, run))
        by = f"in up to {int(told.pop('steps').max())} steps the best value found gives"
        chances, reach = told.pop("probability"), least(told["owner"], told["radii"], len(group))
        good = likely(group, chances, how.accept, block, by, failures, run, radii=reach)
        made = memory.learn(made, memory.taken(Memory(base, block, tuple(group), **told), good))
    return made


def _values(how: Recall, here: Setting, block: int, edits: Sequence[Edit], run: Run) -> dict[str, Tensor]:
    told = search(here.module, block, asking.of(here, block, edits), steps=how.steps, lr=how.lr, stop=how.stop)
    return {
        **keyed(how, here, block, edits, run)._asdict(),
        "values": told.values,
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
