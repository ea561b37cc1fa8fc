"""Where lfm keeps what outlives a command."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """LFM_HOME, or the user's cache directory: the ledger, the zoo and cached answers lie under it."""
    chosen = os.environ.get("LFM_HOME")
    base = Path(os.environ.get("XDG_CACHE_HOME", "") or Path.home() / ".cache")
    return Path(chosen).expanduser() if chosen else base / "lfm"
