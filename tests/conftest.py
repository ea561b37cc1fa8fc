"""What every test runs under: one thread a process (tiny models gain nothing from more), no example by the clock."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything loads torch

from hypothesis import settings

settings.register_profile("lfm", deadline=None)
settings.load_profile("lfm")
