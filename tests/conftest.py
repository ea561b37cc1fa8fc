"""What every test runs under: one thread a process (tiny models gain nothing from more), no example by the clock,
nobody waiting for the disk, and machine code of loops, which takes seconds to make, made once for all of them."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything loads torch
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator

import pytest
from hypothesis import settings

from lfm.tensors import compiled

settings.register_profile("lfm", deadline=None)
settings.load_profile("lfm")


@pytest.fixture(scope="session", autouse=True)
def machine_code(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Kept in this run's own directory, where all its workers find it, whatever home a test has."""
    with pytest.MonkeyPatch.context() as patch:
        own = tmp_path_factory.getbasetemp()
        shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
        (shared / "compiled").mkdir(exist_ok=True)
        patch.setattr(compiled, "home", lambda: shared)
        yield


@pytest.fixture(scope="session", autouse=True)
def unsynced() -> Iterator[None]:
    """What a killed process wrote is the kernel's, and there; a test can pull no plug."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)  # still an error for what is not open
        yield
