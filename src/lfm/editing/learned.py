"""Learned editors: a network turns an edit's gradient into a change of the weights, and is trained to do that well.

Of a layer that reads x and writes z, the gradient of an edit's loss is Σ_t δ_t x_tᵀ with δ = ∂loss/∂z. An editor turns
these factors into others, so that every change is of low rank. A change is never written while it trains: each row of a
batch is answered with its own edit's factors beside the layer's weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from lfm.core.errors import EditError, MismatchError
from lfm.core.heavy import torch
from lfm.core.interfaces import LowRank, Weights
from lfm.core.method import Inputs, Run
from lfm.core.model import Model
from lfm.data import language
from lfm.data.records import Edit
from lfm.editing import forgetting, keys, lessons, outcome, setting
from lfm.editing.editor import Editor, programmed
from lfm.editing.form import IGNORED, SEQ2SEQ_LM, reading
from lfm.models import forward, structure
from lfm.models.codec import pad
from lfm.models.program import Open
from lfm.train import Fit, fit
from lfm.train.losses import kl

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lfm.core.interfaces import Batch
    from lfm.data.task import Task
    from lfm.editing.lessons import Lesson
    from lfm.editing.practice import Practised

EDIT, AGAIN, STAY = "edit/", "again/", "stay/"
"""How a batch of lessons names its tensors: what is edited, what must follow, what must stay."""
SEEN = 512
"""Lessons by which the factors are measured before an editor trains."""
GROUP = 16
MOST = 32
"""Edits at most that are practised as one change where no number is set."""

Factors = list[tuple["Tensor", "Tensor"]]
"""Of each layer (a (B, n, in), b (B, n, out)): row B's change of the layer's weight (out, in) is bᵀ a."""


class Bench(NamedTuple):
    """What an editor works on: a module whose parameters are frozen, the layers that change, and how a fact is read."""

    here: setting.Setting
    task: Task
    layers: tuple[str, ...]

    @property
    def module(self) -> nn.Module:
        return self.here.module

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of each layer."""
        return tuple((w.shape[1], w.shape[0]) for w in map(self.weight, self.layers))

    @property
    def units(self) -> list[float]:
        """rms(W) / √in of each layer: what an update by factors of unit entries is measured by."""
        return [float(w.square().mean().sqrt()) / w.shape[1] ** 0.5 for w in map(self.weight, self.layers)]

    def weight(self, name: str) -> Tensor:
        return keys.weight(self.module.get_submodule(name))

    def told(self, logits: Tensor, batch: Batch) -> Tensor:
        """(B,) mean NLL of a token of each row's new object."""
        said, counts = forgetting.told(self.task, logits, batch, shifted=self.here.form.causal)
        return -said / counts.clamp(min=1)


def layers_of(module: nn.Module, blocks: int) -> tuple[str, ...]:
    """The feed-forward projections, up and down, of the last blocks of the stack that tells."""
    found = [structure.feed_forward(module, block) for block in structure.stacks(module)[-1][-blocks:]]
    return tuple(name for ffn in found for name in (ffn.up, ffn.down))


def factors(bench: Bench, batch: Batch) -> Factors:
    """(x, δ) of each layer at each token, δ of the row's own mean NLL. Both are 0 where no gradient comes."""
    held: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str, _: Any, args: tuple[Any, ...], out: Tensor) -> Tensor:
        out = out if out.requires_grad else out.detach().requires_grad_(True)
        held[name] = args[0].detach(), out
        return out

    handles = [bench.module.get_submodule(n).register_forward_hook(partial(keep, n)) for n in bench.layers]
    try:
        with torch.enable_grad():
            loss = bench.told(forward(bench.module, batch), batch).sum()
    finally:
        for handle in handles:
            handle.remove()
    slopes = torch.autograd.grad(loss, [held[name][1] for name in bench.layers])
    found = []
    for name, slope in zip(bench.layers, slopes, strict=True):
        slope = slope.detach().float()
        reached = (slope != 0).any(-1, keepdim=True)
        found.append((torch.where(reached, held[name][0].float(), 0.0), slope))
    return found


@contextmanager
def beside(bench: Bench, changes: Factors, owner: Tensor) -> Iterator[None]:
    """Within: row r of a batch is read with the change number owner[r] (R,) of every layer."""

    def add(a: Tensor, b: Tensor, _: Any, args: tuple[Any, ...], out: Tensor) -> Tensor:
        return out + ((args[0].float() @ a[owner].transpose(1, 2)) @ b[owner]).to(out)

    handles = [
        bench.module.get_submodule(name).register_forward_hook(partial(add, a, b))
        for name, (a, b) in zip(bench.layers, changes, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def collate(bench: Bench, drawn: Sequence[Lesson], groups: Sequence[Sequence[int]]) -> Callable[[Sequence[int]], Batch]:
    """Groups of lessons by number, each group one change: owner names the change that each row is read with."""

    def collated(numbers: Sequence[int]) -> Batch:
        chosen = [drawn[i] for number in numbers for i in groups[number]]
        own = torch.tensor([place for place, number in enumerate(numbers) for _ in groups[number]])
        edits = [lesson.edit for lesson in chosen]
        texts = [text for lesson in chosen for text in lesson.stay]
        parts = {
            EDIT: worded(bench, edits),
            AGAIN: bench.task.collate([*edits, *(l.again for l in chosen)]),
            STAY: staying(bench.here, texts),
        }
        made = {key + name: tensor for key, part in parts.items() for name, tensor in part.items()}
        each = len(texts) // len(chosen)
        owners = {"owner/edit": own, "owner/again": own.repeat(2), "owner/stay": own.repeat_interleave(each)}
        return made | owners

    return collated


def worded(bench: Bench, edits: Sequence[Edit]) -> Batch:
    """The edits as they are asked, and beside it their words (B, T) and how many (B,): what is read, and the new object
    in its place or, where a decoder tells it, behind."""
    batch = bench.task.collate(edits)
    ids, labels, counts = batch["input_ids"], batch["labels"], batch["attention_mask"].sum(1)
    if bench.here.form.task != SEQ2SEQ_LM:
        return {**batch, "words": torch.where(labels == IGNORED, ids, labels), "counts": counts}
    rows = [torch.cat([row[:n], said[said != IGNORED]]) for row, n, said in zip(ids, counts, labels, strict=True)]
    words = pad([row.tolist() for row in rows], 0)
    return {**batch, "words": words["input_ids"], "counts": words["attention_mask"].sum(1)}


def staying(here: setting.Setting, texts: Sequence[str]) -> Batch:
    """Running text, and beside it which places (B, T) are told of; of an encoder-decoder those of the second halves."""
    if here.form.task != SEQ2SEQ_LM:
        batch = here.codec.texts(texts, max_length=lessons.PIECE)
        return {**batch, "real": batch["attention_mask"]}
    rows = here.codec.tokenizer(list(texts), truncation=True, max_length=lessons.PIECE)["input_ids"]
    read = reading(here.form, here.codec.tokenizer, rows)
    return {**read.batch, "real": (read.labels != IGNORED).long()}


def together_as(changes: Factors, owner: Tensor) -> Factors:
    """The rows of each owner (R,), which stand together, as one change: that of the sum."""
    counts = torch.bincount(owner)
    if int(counts.max()) == 1:
        return changes
    row = torch.arange(len(owner), device=owner.device) - (counts.cumsum(0) - counts)[owner]
    joined = []
    for a, b in changes:
        made = [t.new_zeros(len(counts), int(counts.max()), *t.shape[1:]).index_put((owner, row), t) for t in (a, b)]
        joined.append(tuple(t.flatten(1, 2) for t in made))
    return joined


Net = Callable[[Factors, "Batch"], Factors]
"""An editor's network: an edit's factors, and the edit as a batch (its tensors' names begin with EDIT) → its change."""


def losses(bench: Bench, net: Net, batch: Batch) -> tuple[Tensor, Tensor]:
    """(mean NLL of what the edits must bring about, mean KL a token from the model before on what must stay)."""
    changes = together_as(net(factors(bench, forgetting.part(batch, EDIT)), batch), batch["owner/edit"])
    again, stay = forgetting.part(batch, AGAIN), forgetting.part(batch, STAY)
    with torch.no_grad():
        before = forward(bench.module, stay).log_softmax(-1)
    with beside(bench, changes, batch["owner/again"]):
        edited = bench.told(forward(bench.module, again), again).mean()
    with beside(bench, changes, batch["owner/stay"]):
        after = forward(bench.module, stay).log_softmax(-1)
    real = stay["real"].bool().to(after.device)
    return edited, kl(before, after)[real].mean()


def trained(
    bench: Bench,
    net: nn.Module,
    drawn: Sequence[Lesson],
    weigh: Callable[[nn.Module, Tensor, Tensor], Tensor],
    config: Fit,
    run: Run,
    *,
    together: int = 1,
    scale: Callable[[str], float] = lambda name: 1.0,
    after: Callable[[int], None] | None = None,
) -> None:
    """Train a network in place on lessons, `together` of them one change. weigh: (net, edit loss, locality loss) →
    the loss."""
    groups = lessons.grouped(drawn, together, run)
    config = msgspec.structs.replace(config, batch_size=max(1, config.batch_size // together))

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        return weigh(net, *losses(bench, net, batch))

    made = collate(bench, drawn, groups)
    fit(net, range(len(groups)), made, loss, config, run, name="editor", scale=scale, after=after)


def measured(bench: Bench, drawn: Sequence[Lesson]) -> list[tuple[Tensor, Tensor]]:
    """(x (N, in), δ (N, out)) of each layer at every token that a gradient comes to, over the first lessons."""
    parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in bench.layers]
    for start in range(0, min(SEEN, len(drawn)), GROUP):
        batch = bench.task.collate([lesson.edit for lesson in drawn[start : start + GROUP]])
        for place, (x, d) in enumerate(factors(bench, batch)):
            reached = (d != 0).any(-1)
            parts[place].append((x[reached].cpu(), d[reached].cpu()))
    return [tuple(torch.cat(each) for each in zip(*part, strict=True)) for part in parts]  # type: ignore[misc]


def changes_of(bench: Bench, net: Net, edits: Sequence[Edit]) -> list[list[tuple[Tensor, Tensor]]]:
    """Of each edit, of each layer: (b (out, n), a (n, in)), whatever the others are."""
    found = []
    for edit in edits:
        batch = worded(bench, [edit])
        named = {EDIT + name: tensor for name, tensor in batch.items()}
        with torch.no_grad():
            made = net(factors(bench, batch), named)
        found.append([(b[0].T.cpu().float().contiguous(), a[0].cpu().float().contiguous()) for a, b in made])
    return found


def begun(id: str, inputs: Inputs, run: Run, *, blocks: int, tokens: int) -> tuple[Bench, Editor | None, list[Edit]]:
    """The bench, the editor that was given (of this method, for this model and these layers), and the edits."""
    model, edits = inputs.model("model"), list(inputs.records("edits"))
    given = next((each.ask(Editor) for each in inputs.all("editor")), None)
    if given and given.method != id:
        raise MismatchError(f"the editor is one of {given.method}", fix=f"give one that {id} made, or use that method")
    if given and model.digest not in given.bases:
        raise MismatchError(
            "the editor is of another model",
            why=f"it was trained over {given.bases[0][:12]}, this is {model.digest[:12]}",
            fix="give the model that it was trained over, or what it made of it; or train one here: leave editor out",
        )
    here = setting.opened(model, inputs.records("text"), run, prefixes=0, tokens=tokens)
    layers = given.layers if given else layers_of(here.module, blocks)
    task = language.answers(here.codec, model.facts)
    return Bench(here, task, layers), given, edits


def made(
    bench: Bench, model: Model, net: Net, edits: Sequence[Edit], held: Any, run: Run
) -> tuple[dict[str, LowRank], list[Edit]]:
    """The change of the weights that makes the edits, and the edits that held. Notes say what was measured.

    EditError where one does not hold (on_failure "refuse"), none does, or other text suffers. An edit that is left out
    takes its own change with it; those of the others stay as they are. What disturbs each other goes half by half.
    """
    stored = model.ask(Weights).tensors()
    layers = [bench.module.get_submodule(name) for name in bench.layers]
    bases = [bench.weight(name) for name in bench.layers]
    dtypes = [stored[f"{n}.weight"].dtype if f"{n}.weight" in stored else torch.float32 for n in bench.layers]
    around, first = run.step("before", lambda: outcome.around(bench.here.says, edits)), bench.here.perplexity()

    def put(chosen: Sequence[int]) -> list[int]:
        """The weights with these edits' changes; those of them that greedy text does not show."""
        for place, (layer, base, dtype) in enumerate(zip(layers, bases, dtypes, strict=True)):
            b, a = _summed(changes, chosen, place)
            keys.keep(layer, base + b.double() @ a.double(), dtype)
        told = bench.here.says(outcome.wanted([edits[i] for i in chosen]))
        return [i for i, said in zip(chosen, told, strict=True) if not said]

    chosen, failed = list(range(len(edits))), []
    changes = run.step("changes", lambda: changes_of(bench, net, edits))
    silent = put(chosen)
    while silent:
        if held.on_failure == "refuse" or len(silent) == len(chosen) == 1:
            raise EditError(
                f"{len(failed) + len(silent)} of {len(edits)} edits do not hold; {edits[silent[0]].prompt!r} does not "
                f"go on with {edits[silent[0]].new_object!r}",
                why="the editor's change was made, and what the model then says by itself is another",
                fix="more practice, more steps, fewer edits at once, or on_failure=skip",
            )
        gone = _unlikeliest(bench, edits, silent)
        chosen, failed = [i for i in chosen if i not in gone], failed + gone
        silent = put(chosen)
    after = bench.here.perplexity()
    refused = outcome.collapsed(f"{len(chosen)} edits", first, after, held.collapse, "fewer edits, or a larger c_loc")
    if refused:
        raise refused
    kept = [edits[i] for i in chosen]
    run.note(
        edits=len(kept),
        **outcome.skipped([outcome.unsaid(edits[i]) for i in failed]),
        perplexity_before=first,
        perplexity_after=after,
        **run.step("measured", lambda: outcome.measured(bench.here.says, kept, edits, around)),
    )
    low = {}
    for place, (name, layer) in enumerate(zip(bench.layers, layers, strict=True)):
        b, a = keys.of_least_rank(*_summed(changes, chosen, place))
        low[name] = LowRank(b, a, structure.transposed(layer))
    return low, kept


def _unlikeliest(bench: Bench, edits: Sequence[Edit], silent: Sequence[int]) -> list[int]:
    """The half of those not said that are furthest from it: without their changes the others may be said."""
    lost = {}
    for i in silent:
        batch = bench.task.collate([edits[i]])
        with torch.no_grad():
            lost[i] = float(bench.told(forward(bench.module, batch), batch))
    return sorted(sorted(silent, key=lambda i: (-lost[i], i))[: (len(silent) + 1) // 2])


def _summed(changes: Sequence[Any], chosen: Sequence[int], place: int) -> tuple[Tensor, Tensor]:
    """The change of one layer by all chosen edits: (b (out, n), a (n, in))."""
    return (
        torch.cat([changes[i][place][0] for i in chosen], 1),
        torch.cat([changes[i][place][1] for i in chosen]),
    )


def edit(
    id: str,
    config: Practised,
    inputs: Inputs,
    run: Run,
    untrained: Callable[[Any, Bench, Run], nn.Module],
    train: Callable[[Any, Bench, Any, Inputs, Run], None],
    open: Open,
) -> Model:
    """A learned editor's whole run. untrained: its network; train: what practises it, where none was given."""
    model = inputs.model("model")
    bench, given, edits = begun(id, inputs, run, blocks=config.blocks, tokens=config.tokens)
    net: Any = untrained(config, bench, run)
    if given:
        net.load_state_dict(given.tensors)
    else:
        train(config, bench, net, inputs, run)
    net.requires_grad_(False).eval()
    changes, kept = made(bench, model, net, edits, config, run)
    editor = Editor(id, (model.digest,), bench.layers, net.state_dict(), tuple(kept))
    return programmed(id, config, model, editor, changes, open)


def practised(
    config: Practised,
    bench: Bench,
    net: Any,
    inputs: Inputs,
    run: Run,
    weigh: Callable[[Any, Tensor, Tensor], Tensor],
    scale: Callable[[str], float],
    after: Callable[[int], None] | None = None,
) -> None:
    """Train a network in place on the facts that were given, or on text. weigh: (net, edit loss, locality loss) → the
    loss. An editor is as good at many edits together as it has practised: they are one change here too."""
    edits = inputs.records("edits")
    drawn = lessons.drawn(bench.here, inputs.records("practice"), edits, run)
    net.measure(measured(bench, drawn))
    together = config.together or min(len(edits), MOST)
    run.note(together=together)
    trained(bench, net, drawn, weigh, config, run, together=together, scale=scale, after=after)
