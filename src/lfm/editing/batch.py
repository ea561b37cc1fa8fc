"""Many edits at once, their changes spread over several blocks; each batch held to its word before the next begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from lfm.core.config import Meta, values
from lfm.core.errors import EditError, MismatchError
from lfm.core.heavy import torch
from lfm.core.interfaces import Codec, Gradients, Weights
from lfm.core.method import Cost, Data, DataSlot, Inputs, Run, Sizes, Slot
from lfm.core.model import Model
from lfm.editing import choose, form, keys, outcome, rows, sequence, setting, value
from lfm.editing.covariance import ENOUGH, loaded, moments, notes
from lfm.editing.form import at, reading
from lfm.editing.keys import Changes, Projections
from lfm.models import structure
from lfm.models.resume import activations

if TYPE_CHECKING:
    from torch import Tensor

    from lfm.data.records import Edit
    from lfm.editing.rows import Rows
    from lfm.editing.setting import Setting
    from lfm.editing.value import Found

SAME = 1e-2
"""How much of a change may be lost on its way to a block's output."""
ROOM = 4 << 30
"""Bytes of matrices of keys that are kept at a time."""


class Batched(sequence.Guard, frozen=True):
    """What editors of batches share. Values are of a block's output, which is long beside what its last layer adds to
    it: rate and reach are smaller than a single layer's."""

    lr: Annotated[float, Meta(gt=0, description="length of the first step over ‖h‖")] = 0.3
    reach: Annotated[float, Meta(gt=0, description="largest ‖δ‖/‖h‖")] = 1.5
    layers: Annotated[
        tuple[int, ...], Meta(description="blocks to edit, from 0; none: try them on the first edits")
    ] = ()
    spread: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="how many blocks share a change where `layers` names none; none: a sixth of them"),
    ] = None
    batch_size: Annotated[
        Annotated[int, Meta(ge=1)] | None, Meta(description="facts edited at a time; none: all at once")
    ] = None
    prefixes: Annotated[int, Meta(ge=0, description="texts of the model's own put before the prompt")] = 5
    tokens: Annotated[
        Annotated[int, Meta(ge=1)] | None, Meta(description="most tokens for C; none: ten a dimension of the key")
    ] = None
    ridge: Annotated[float, Meta(ge=0, description="added to C, in units of its mean diagonal")] = 0.001


class Editor(NamedTuple):
    """What makes an editor of batches its own.

    site: what a value is of, at the last block. find: (last block, edits) → their values. solve: (block, K (in, n)) →
    A (n, in), of the change R A. share: how many blocks are left, this one included → what the residual is divided by.
    kept: told of the blocks, and of the edits that were kept, once they are in the module.
    """

    site: str
    find: Callable[[int, Sequence[Rows]], list[Found]]
    solve: Callable[[int, Tensor], Tensor]
    share: Callable[[int], float] = float
    kept: Callable[[Sequence[int], Sequence[Rows]], None] = lambda blocks, reads: None


def site_of(here: Setting, block: int = 0) -> str:
    """What a value is of: a block's output, to which its projection's is added as it is; or the projection's own,
    where a norm comes after the sum (in BERT, and what is built as it is)."""
    read = reading(here.form, here.codec.tokenizer, here.probe[:1])
    hidden, out = (at(here.module, site, block) for site in ("hidden", "ffn_out"))
    layer = here.module.get_submodule(structure.site(here.module, out)[0])
    (before,) = activations(here.module, read.batch, [hidden])
    (wrote,) = activations(here.module, read.batch, [out])
    nowhere = torch.zeros(1, dtype=torch.long, device=wrote.device)
    delta = wrote[0, 0].norm() / wrote.shape[-1] ** 0.5 * torch.ones_like(wrote[0, 0])
    with value.added(layer, (nowhere, nowhere), delta):
        (after,) = activations(here.module, read.batch, [hidden])
    moved = (after - before)[0, 0] - delta
    return "hidden" if moved.norm() <= SAME * delta.norm() else "ffn_out"


class Shifter(NamedTuple):
    """An editor that needs no values. begin: told of each batch before it is made, again where a run is resumed. write:
    places in that batch → what brings these edits in."""

    begin: Callable[[Sequence[Rows], Sequence[Edit]], None]
    write: Callable[[Sequence[int]], Changes]


def spread(
    here: Setting, projections: Projections, reads: Sequence[Rows], found: Sequence[Found], how: Editor
) -> Changes:
    """What brings each edit's site to its value: block after block, a share of what is still missing at the last.

    The module is left with it.
    """
    last = projections.blocks[-1]
    wanted = torch.stack([each.before + each.delta for each in found])
    changes: Changes = {}
    for place, block in enumerate(projections.blocks):
        key, now = keys.of_all(here.module, block, (how.site, last), reads)
        missing = (wanted - now).T / how.share(len(projections.blocks) - place)
        changes[block] = missing.float(), how.solve(block, key.T.contiguous()).float()
        projections.show(changes)
    return changes


def apply(
    here: Setting,
    projections: Projections,
    edits: Sequence[Edit],
    how: Editor | Shifter,
    guard: sequence.Guard,
    run: Run,
    size: int | None = None,
    earlier: Sequence[Edit] = (),
) -> None:
    """Put all edits that hold into the projections, `size` at a time; none: all at once. Within a batch their order
    does not matter. earlier: edits that the model holds already, and is to go on holding.

    EditError where one failed (on_failure "refuse"), or all did. Notes and curves say what was measured.
    """
    around = run.step("before", lambda: sequence.kept_around(here, edits))
    first = now = here.perplexity()
    run.curve("perplexity by batch", first)
    made: list[Edit] = []
    failures: list[str] = []
    size = size or len(edits)
    starts = range(0, len(edits), size)
    checks = {round((i + 1) * len(starts) / sequence.CHECKS) for i in range(sequence.CHECKS)}
    for number, start in enumerate(run.track(starts, "editing"), start=1):
        batch = sorted(edits[start : start + size], key=lambda edit: (edit.prompt, edit.new_object))
        if isinstance(how, Shifter):
            how.begin([here.read(edit, projections.blocks[-1]) for edit in batch], batch)
        kept = run.step(f"batch {number}", partial(_try, here, projections, batch, [*earlier, *made], now, how, guard))
        failures += kept["failures"]
        held = [batch[i] for i in kept["held"]]
        projections.keep({int(block): (each["b"], each["a"]) for block, each in kept["changes"].items()})
        if held and isinstance(how, Editor):
            how.kept(projections.blocks, [here.read(edit, projections.blocks[-1]) for edit in held])
        made, now = made + held, kept["perplexity"]
        run.curve("perplexity by batch", now)
        for probability in kept["probabilities"]:
            run.curve("p(new object) with the value found", probability)
        if len(starts) > 1 and number in checks and made:
            told = run.step(f"after {number}", partial(sequence.efficacy, here, made))
            run.curve("efficacy of the edits so far", told)
    if not made:
        raise EditError("no edit held", why=failures[0], fix="set layers, steps or reach otherwise")
    run.note(
        edits=len(made),
        **outcome.skipped(failures),
        perplexity_before=first,
        perplexity_after=now,
        **sequence.enough(run.step("measured", lambda: sequence.measured(here, made, edits, around)), guard),
    )


def _try(
    here: Setting,
    projections: Projections,
    batch: Sequence[Edit],
    made: Sequence[Edit],
    before: float,
    how: Editor | Shifter,
    guard: sequence.Guard,
) -> dict[str, Any]:
    """The batch's changes once all that is in them holds; what does not is refused, or left out and the rest solved
    anew. Values are such that edits made before of the same subjects hold too."""
    last = projections.blocks[-1]
    reads = [here.read(edit, last) for edit in batch]
    near = sequence.near(made, batch)
    earlier = [here.read(edit, last) for edit in near] if isinstance(how, Editor) else []
    found = _values(how, last, reads, earlier) if isinstance(how, Editor) else []
    stood = sequence.standing(here, near)
    units = rows.alike(reads)
    failures: list[str] = []
    says = [True] * len(batch)
    undone = [""] * len(batch)

    def failure(place: int) -> EditError | None:
        if not found:
            if undone[place]:
                return sequence.undoes(f"{batch[place].prompt!r} cannot be edited", undone[place])
            return None if says[place] else _unsaid(batch[place])
        told = found[place]._asdict() | {"perplexity": before, "says": says[place], "undone": undone[place]}
        return sequence.failure(batch[place], last, told, before, guard)

    def held(places: Sequence[int]) -> list[int]:
        """Of these edits, those that nothing speaks against; of several that share a value only the worst goes."""
        errors = {place: error for place in places if (error := failure(place))}
        if errors and guard.on_failure == "refuse":
            raise _refusal(list(errors.values()), len(batch))
        for unit in units if found else []:
            failed = sorted((found[i].probability, i) for i in unit if i in errors)
            for _, place in failed[1:]:
                del errors[place]
        failures.extend(error.what for error in errors.values())
        return [place for place in places if place not in errors]

    def anew(places: Sequence[int]) -> list[int]:
        """Of these edits, those that hold once values that were shared with others than these are found again."""
        going, known = list(places), list(range(len(batch)))
        while isinstance(how, Editor) and len(going) < len(known):
            projections.show({})
            gone = set(known) - set(going)
            stale = [i for unit in units if gone & set(unit) for i in unit if i in going]
            for place, each in zip(stale, _values(how, last, [reads[i] for i in stale], earlier), strict=True):
                found[place], says[place], undone[place] = each, True, ""
            known, going = going, held(going)
        return going

    going, changes, after = anew(held(range(len(batch)))), Changes(), before
    while going:
        projections.show({})
        if isinstance(how, Shifter):
            changes = how.write(going)
            projections.show(changes)
        else:
            changes = spread(here, projections, [reads[i] for i in going], [found[i] for i in going], how)
        after = here.perplexity()
        if not after <= guard.collapse * before:
            error = _broken(len(going), before, after)
            if guard.on_failure == "refuse":
                raise error
            failures += [f"{batch[place].prompt!r}: {error.what}" for place in going]
            going = []
            break
        for place, told in zip(going, here.says(outcome.wanted([batch[place] for place in going])), strict=True):
            says[place] = told
        lost = sequence.undone(here, stood)
        for place in going:
            undone[place] = next((edit.prompt for edit in sequence.near(lost, [batch[place]])), "")
        stay = held(going)
        if stay == going:
            break
        going = anew(stay)
    return {
        "held": going,
        "failures": failures,
        "probabilities": [each.probability for each in found],
        "changes": {str(block): {"b": b, "a": a} for block, (b, a) in changes.items()} if going else {},
        "perplexity": after if going else before,
    }


def _values(how: Editor, last: int, reads: Sequence[Rows], earlier: Sequence[Rows]) -> list[Found]:
    """Of the reads, beside those of the earlier ones that a value is shared with."""
    asked = [*reads, *earlier]
    beside = sorted(i for unit in rows.alike(asked) if unit[0] < len(reads) for i in unit if i >= len(reads))
    return how.find(last, [*reads, *(asked[i] for i in beside)])[: len(reads)]


def _unsaid(edit: Edit) -> EditError:
    return EditError(
        f"{edit.prompt!r} cannot be made to say {edit.new_object!r}",
        why="after the update greedy text says otherwise",
        fix="try other layers, a larger strength, fewer at a time (batch_size), or on_failure=skip",
    )


def _refusal(errors: Sequence[EditError], count: int) -> EditError:
    first = errors[0]
    if len(errors) == 1:
        return first
    return EditError(f"{len(errors)} of {count} edits fail; the first: {first.what}", why=first.why, fix=first.fix)


def _broken(count: int, before: float, after: float) -> EditError:
    return EditError(
        f"{count} edit{'s at once' if count > 1 else ''} would break the model",
        why=f"perplexity on other text from {before:.3g} to {after:.3g}",
        fix="try other layers, fewer at a time (batch_size), a smaller reach, or on_failure=skip",
    )


class Known(NamedTuple):
    """get: block → what an editor makes of its C, kept once made. ready: make it for some blocks, in one pass over the
    text, and for others that are soon asked for too while they fit in ROOM. text: the tokens that each took, and the
    excess."""

    get: Callable[[int], Any]
    ready: Callable[[Sequence[int], Sequence[int]], None]
    text: Mapping[int, tuple[int, float]]


def known(here: Setting, ridge: float, run: Run, made: Callable[[Tensor], Any]) -> Known:
    kept: dict[int, Any] = {}
    text: dict[int, tuple[int, float]] = {}

    def ready(blocks: Sequence[int], soon: Sequence[int]) -> None:
        if set(blocks) <= kept.keys():
            return
        width = keys.weight(keys.projection(here.module, blocks[0])[1]).shape[1]
        every = sorted({*blocks, *soon})
        asked = every if len(every) * 8 * width**2 <= ROOM else sorted(blocks)
        kept.clear()
        for block, moment in moments(here, asked, run, ridge).items():
            kept[block] = made(loaded(moment.matrix, ridge))
            text[block] = moment.tokens, moment.excess

    def get(block: int) -> Any:
        ready([block], [])
        return kept[block]

    return Known(get, ready, text)


def window(last: int, count: int, stacks: Sequence[Sequence[str]] = ()) -> tuple[int, ...]:
    """The blocks that share a change: so many of one stack, up to the last."""
    begin = len(stacks[0]) if len(stacks) > 1 and last >= len(stacks[0]) else 0
    return tuple(range(max(begin, last - count + 1), last + 1))


def edit(
    config: Batched,
    inputs: Inputs,
    run: Run,
    made: Callable[[Tensor], Any],
    editor: Callable[[Setting, Callable[[int], Any]], Editor],
    *,
    alone: bool = False,
) -> Model:
    """A method's whole run. made: what is kept of a C; editor: made from the setting and block → what was kept.

    alone: one block, unless `spread` says otherwise.
    """
    model = inputs.model("model")
    edits: list[Edit] = list(inputs.records("edits"))
    here = setting.opened(
        model,
        inputs.records("text"),
        run,
        prefixes=config.prefixes,
        tokens=config.tokens,
        token=config.token,
    )
    matrices = known(here, config.ridge, run, made)
    stack = len(structure.all_blocks(here.module))
    for layer in config.layers:
        if not -stack <= layer < stack:
            raise MismatchError(f"there is no block {layer}", why=f"the model has {stack}, counted from 0")
    if config.layers:
        blocks = tuple(sorted({block % stack for block in config.layers}))
    else:
        count = config.spread or (1 if alone else max(1, round(stack / 6)))
        blocks = _chosen(config, here, edits, run, count, matrices, editor(choose.brief(here), matrices.get))
    matrices.ready(blocks, ())
    stored = model.ask(Weights).tensors()
    projections = keys.Projections(here.module, blocks, {name: each.dtype for name, each in stored.items()})
    run.note(
        layers=", ".join(map(str, blocks)),
        modules=", ".join(projections.names.values()),
        **notes(matrices.text[block] for block in blocks),
    )
    how, earlier = editor(here, matrices.get), inputs.records("earlier")
    apply(here, projections, edits, how, config, run, config.batch_size, earlier)
    return edited(model, here, projections)


def edited(model: Model, here: Setting, projections: Projections) -> Model:
    """The model with what was added: as changes of low rank, unless its files hold a weight under another name."""
    weights, gradients = model.ask(Weights), model.ask(Gradients)
    changes = projections.low_rank()
    if any(f"{name}.weight" not in weights.tensors() for name in changes):
        return gradients.rewrap(here.module)
    return weights.update(changes)


def _chosen(
    config: Batched, here: Setting, edits: Sequence[Edit], run: Run, count: int, matrices: Known, how: Editor
) -> tuple[int, ...]:
    brief = choose.brief(here)
    shared = partial(window, count=count, stacks=structure.stacks(here.module))
    soon = sorted({block for last in choose.tried(here) for block in shared(last)})

    def made(last: int, edits: Sequence[Edit]) -> tuple[list[Rows], Changes]:
        matrices.ready(shared(last), soon)
        reads = [brief.read(edit, last) for edit in edits]
        projections = keys.Projections(here.module, shared(last), {})
        changes = spread(brief, projections, reads, how.find(last, reads), how)
        projections.show({})
        return reads, changes

    method = {"id": type(config).__module__, "spread": count, **values(config)}
    # many crowd a block that a few suit: the trials together may cost what the batch does
    share = len(edits[: config.batch_size]) // len(choose.tried(here))
    together = [edit for group in choose.first(edits, share) for edit in group]
    return shared(choose.block(brief, [together], run, made, method))


def agree(id: str, config: Any, inputs: Inputs, tasks: Sequence[str] = tuple(form.KINDS)) -> None:
    """config: one with `layers`. tasks: of the models that can be edited."""
    rows.agree(inputs.records("edits"), inputs.model("model"))
    form.editable(id, inputs.model("model"), inputs.records("text"), config.layers, tasks)


def cost(config: Batched, sizes: Sizes) -> Cost:
    facts, edits = sizes.model("model"), sizes.data["edits"]
    inner = 4 * facts.width  # of the key, not known before the weights are
    tokens = config.tokens or ENOUGH * inner
    tried = len(choose.candidates(facts.layers)) if not config.layers and facts.layers else 0
    blocks = len(config.layers) or config.spread or max(1, round(facts.layers / 6))
    prompt = setting.PREFIX + edits.tokens // max(1, edits.records)
    once = min(config.batch_size or edits.records, edits.records)
    searches = edits.records + (max(tried * min(choose.SUBJECTS, edits.records), once) if tried else 0)
    search = 4.0 * facts.parameters * config.steps * (config.prefixes + 2) * prompt
    moments = 2.0 * tokens * (facts.parameters + (tried + blocks) * inner**2) + (tried + blocks) * inner**3 / 3
    solves = blocks * 2.0 * edits.records * (inner**2 + edits.records * inner)
    return Cost(
        flops=searches * search + moments + solves + 2.5 * facts.parameters * tokens,
        steps=searches * 2 * config.steps,
        memory=4 * facts.parameters + 8 * inner**2 * (tried + 2 * blocks) + 34 * rows.TOGETHER * facts.width,
        disk=facts.bytes,
    )


MODELS = {"model": Slot((Gradients, Weights, Codec), help="the language model to edit")}
DATA = {
    "edits": DataSlot(Data.FEW_SHOT, ("edit",), help="facts to change"),
    "text": DataSlot(Data.UNLABELED, ("text",), optional=True, help="running text, whose keys should not change"),
    "earlier": sequence.EARLIER,
}
