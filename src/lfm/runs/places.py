"""What lies in a ledger of edits, a patch or their sum, as other commands meet it."""

from __future__ import annotations

import re
from pathlib import Path

from lfm.core.errors import OutputError, VerifyError
from lfm.record import Verified
from lfm.runs.committing import HEAD, HEADS, LEDGER, Ledger, Patch, base_of, head_of, held_by, read


def of(directory: Path) -> tuple[Path, Ledger, tuple[Patch, ...]] | None:
    """The ledger that a directory is or lies in, and which of its patches it is: all of them, one, or none, where it is
    their sum. None where it is of no ledger."""
    place = directory.absolute()
    if (place / LEDGER).is_file():
        ledger = read(place)
        return place, ledger, ledger.patches
    one, sum = re.fullmatch(r"\d{4,}", place.name), place.name == HEAD or place.parent.name == HEADS
    above = place.parent.parent if place.parent.name == HEADS else place.parent
    if not (one or sum) or not (above / LEDGER).is_file():
        return None
    ledger = read(above)
    if sum:
        return above, ledger, ()
    found = tuple(patch for patch in ledger.patches if patch.place == place.name)
    return (above, ledger, found) if found else None


def verified(directory: Path) -> Verified | None:
    """Hold a ledger, a patch or the sum of patches against what was committed. None for what is of no ledger.

    VerifyError where the sum is not what it was, CorruptError where a patch is not.
    """
    found = of(directory)
    if found is None:
        return None
    place, ledger, patches = found
    base = base_of(place, ledger)
    for patch in patches:
        held_by(place, ledger, patch, base)
    whole = not patches or directory.absolute() == place
    if whole and ledger.head and head_of(place, ledger, base) is None:
        raise VerifyError(
            f"{place / HEAD} is not the sum that was committed",
            why=f"its digest does not begin with {ledger.head}, or it cannot be read",
            fix="the next `lfm edit add` or `lfm edit revert` makes it anew of the patches",
        )
    told = [f"{len(patches)} patch{'es' if len(patches) > 1 else ''}"] if patches else []
    told += ["their sum" if told else "the sum of the patches"] if whole and ledger.head else []
    return Verified(quantity="weight", max_abs=0.0, on=f"{' and '.join(told) or 'the base'}, by digest")


def not_undone(directory: Path) -> None:
    """OutputError for what lies in a ledger of edits: it comes off there."""
    found = of(directory)
    if found is None:
        return
    place, ledger, patches = found
    one = patches[0] if len(patches) == 1 and directory.absolute() != place else None
    raise OutputError(
        f"{directory} is {f'patch {one.number}' if one else 'made of the patches'} of a ledger of edits",
        why=f"the model beneath it, {ledger.base}, was never written",
        fix=f"`lfm edit revert {place} {one.number if one else 'N'}` takes {'it' if one else 'a patch'} off",
    )
