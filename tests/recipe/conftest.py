from __future__ import annotations

import pytest

from planted import plant
from workshop import workshop as workshop


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six stand-in methods in place of the real ones."""
    plant(monkeypatch)
