"""What is kept beside a model's weights is kept only if the model then says it, and goes on saying the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from lfm.core.errors import EditError, MismatchError
from lfm.core.method import Run
from lfm.core.model import Model
from lfm.data.records import Edit
from lfm.editing import memory, outcome, recall, sequence
from lfm.editing.recall import K
from lfm.editing.text import perplexity

if TYPE_CHECKING:
    from torch import nn

    from lfm.editing.setting import Setting


class Based(Protocol):
    """What was made over a model, known by its digest."""

    @property
    def base(self) -> str: ...


B = TypeVar("B", bound=Based)


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
    guard: outcome.Held,
    run: Run,
    *,
    attach: Callable[[nn.Module, K], Callable[[], None]],
    forget: Callable[..., K],
    fix: str,
) -> K:
    """What is kept, less the new edits that greedy text does not show, once nothing else suffers; notes say what was
    measured.

    EditError where one failed (on_failure "refuse"), where all did, or where perplexity on other text rose too far.
    """
    around = run.step("before", lambda: sequence.kept_around(here, edits))
    first = perplexity(here.module, here.codec, here.probe)
    kept = recall.held(here, kept, edits, failures, attach=attach, forget=forget)
    made = [edit for edit in edits if any(memory.same(edit, known) for known in kept.edits)]
    if failures and (guard.on_failure == "refuse" or not made):
        raise failures[0]
    off = attach(here.module, kept)
    try:
        after = perplexity(here.module, here.codec, here.probe)
        if error := outcome.collapsed("the memory", first, after, guard.collapse, fix):
            raise error
        skipped: dict[str, Any] = {"skipped": len(failures)}
        if failures:
            skipped["skipped_because"] = "; ".join(failure.what for failure in failures)
        run.note(
            layer=kept.block,
            edits=len(kept.edits),
            **skipped,
            perplexity_before=first,
            perplexity_after=after,
            **(run.step("measured", lambda: sequence.measured(here, made, edits, around)) if made else {}),
            **({"efficacy_of_all": run.step("all", lambda: sequence.efficacy(here, kept.edits))} if kept.edits else {}),
        )
    finally:
        off()
    return kept
