"""Silence for libraries that print to the terminal while they load."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from lfm.core.heavy import transformers


@contextmanager
def quiet() -> Iterator[None]:
    """transformers (and peft) without progress bars and without warnings; errors still raise."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
