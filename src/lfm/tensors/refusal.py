"""Whether weights that are not finite numbers are refused: a run decides it as a whole, for tensors that it sets up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

MEND = "mend or leave out that model; --allow-nonfinite lets such values through"
"""What works where such a weight is met."""

_refused: ContextVar[bool] = ContextVar("nonfinite_refused", default=True)


def nonfinite_refused() -> bool:
    """Asked when a lazy tensor is made, and kept by it: whichever thread reads it later, the answer is the same."""
    return _refused.get()


@contextmanager
def accepting_nonfinite(accept: bool) -> Iterator[None]:
    """Inside, NaN and infinities of weights go through elementwise arithmetic as IEEE 754 has it, if `accept`."""
    token = _refused.set(not accept)
    try:
        yield
    finally:
        _refused.reset(token)
