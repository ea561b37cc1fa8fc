"""What is kept beside a model's weights is kept only if the model then says it, and goes on saying the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, TypeVar

from lfm.core.errors import EditError, MismatchError
from lfm.core.method import Run
from lfm.core.model import Model
from lfm.data.records import Edit
from lfm.editing import memory, outcome, recall, sequence
from lfm.editing.recall import K

if TYPE_CHECKING:
    from torch import nn

    from lfm.editing.setting import Setting


class Based(Protocol):
    """What was made over a model, known by its digest."""

    @property
    def base(self) -> str: ...


B = TypeVar("B", bound=Based)


class Held(Protocol):
    """As lfm.editing.outcome.Held and .Trained have it."""

    @property
    def collapse(self) -> float: ...
    @property
    def on_failure(self) -> str: ...


class Kind(NamedTuple, Generic[K]):
    """How edits are kept beside weights: as what, by which interface a program gives it, and what is done with it."""

    type: type[K]
    empty: Callable[[nn.Module, str, int], K]
    """(module, the model's digest, block) → with no edits."""
    learn: Callable[[K, K], K]
    forget: Callable[..., K]
    attach: Callable[[nn.Module, K], Callable[[], None]]


def earlier(model: Model, given: Sequence[Model], kind: type[B]) -> B | None:
    """What was kept before, None where nothing was given. MismatchError where it is another model's."""
    kept = next((each.ask(kind) for each in given), None)
    if kept and kept.base != model.digest:
        raise MismatchError(
            "the memory is of another model",
            why=f"it was made over {kept.base[:12]}, this is {model.digest[:12]}",
            fix="give the model that it was made over",
        )
    return kept


def settled(
    here: Setting,
    kept: K,
    edits: Sequence[Edit],
    failures: list[EditError],
    held: Held,
    run: Run,
    kind: Kind[K],
    *,
    fix: str,
) -> K:
    """What is kept, less the new edits that greedy text does not show, once nothing else suffers; notes say what was
    measured.

    EditError where one failed (on_failure "refuse"), where all did, or where perplexity on other text rose too far.
    """
    around = run.step("before", lambda: sequence.kept_around(here, edits))
    first = here.perplexity()
    kept = _said(here, kept, edits, failures, kind)
    made = [edit for edit in edits if any(memory.same(edit, known) for known in kept.edits)]
    if failures and (held.on_failure == "refuse" or not made):
        raise failures[0]
    off = kind.attach(here.module, kept)
    try:
        after = here.perplexity()
        if error := outcome.collapsed("the memory", first, after, held.collapse, fix):
            raise error
        run.note(
            layer=kept.block,
            edits=len(kept.edits),
            **outcome.skipped([failure.what for failure in failures]),
            perplexity_before=first,
            perplexity_after=after,
            **(run.step("measured", lambda: sequence.measured(here, made, edits, around)) if made else {}),
            **({"efficacy_of_all": run.step("all", lambda: sequence.efficacy(here, kept.edits))} if kept.edits else {}),
        )
    finally:
        off()
    return kept


def _said(here: Setting, kept: K, edits: Sequence[Edit], failures: list[EditError], kind: Kind[K]) -> K:
    """What is kept less the new edits that greedy text does not show with it; of those it had before none goes."""
    while True:
        off = kind.attach(here.module, kept)
        new = [known for known in kept.edits if known in edits]
        told = here.says(outcome.wanted(new))
        off()
        silent = [edit for edit, said in zip(new, told, strict=True) if not said]
        if not silent:
            return kept
        why = "its value would, but greedy text says otherwise: another edit's key is nearer, or it takes another way"
        failures += [recall.failure(edit, kept.block, why) for edit in silent]
        kept = kind.forget(kept, *silent)
