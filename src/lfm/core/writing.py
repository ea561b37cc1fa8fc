"""Writing to a disk that may be full, read-only or gone."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from lfm.core.errors import OutputError

SPACE = (errno.ENOSPC, errno.EDQUOT)
DISK = (*SPACE, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG, errno.ENAMETOOLONG, errno.ENOTDIR)
"""What a disk refuses with; an OSError of another kind was not about writing."""


@contextmanager
def writing(what: str, fix: str = "") -> Iterator[None]:
    """Inside, what the disk refuses becomes an OutputError: `what`, the disk's reason, and a fix."""
    try:
        yield
    except Exception as error:
        code = _code(error)
        if code not in DISK:
            raise
        free = "free some space, or choose a place on another disk" if code in SPACE else "choose a place to write to"
        raise OutputError(what, why=os.strerror(code), fix=fix or free) from error


def _code(error: Exception) -> int | None:
    """The errno of an error; safetensors and other Rust libraries tell it in their message only."""
    if isinstance(error, OSError):
        return error.errno
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told[1]) if told else None
