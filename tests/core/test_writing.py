"""What a full or closed disk says."""

from __future__ import annotations

import errno
import os

import pytest

from lfm.core.errors import OutputError
from lfm.core.writing import writing


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.ENAMETOOLONG])
def test_a_disk_that_refuses_is_told_of_with_its_reason(code: int) -> None:
    with (
        pytest.raises(OutputError, match=f"out cannot be written. {os.strerror(code)}"),
        writing("out cannot be written"),
    ):
        raise OSError(code, "x")


def test_a_full_disk_is_known_also_from_a_library_that_tells_it_in_words() -> None:
    with pytest.raises(OutputError, match="free some space"), writing("out cannot be written"):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_what_is_not_about_writing_goes_on_as_it_is() -> None:
    for error in (KeyError("x"), FileNotFoundError(errno.ENOENT, "x"), ConnectionResetError(errno.ECONNRESET, "x")):
        with pytest.raises(type(error)), writing("out cannot be written"):
            raise error
