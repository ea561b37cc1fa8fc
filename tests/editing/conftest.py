"""What several tests of editing are about."""

from __future__ import annotations

from pathlib import Path

import pytest

from forms import all_taught


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny masked models and encoder-decoders that tell who has what, by their names."""
    return all_taught(tmp_path_factory.mktemp("taught"))
