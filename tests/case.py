"""What the contract suite needs of a method's test file: a function `case(here: Path) -> Case`.

It lays tiny models and data files into `here` under the names that the method's docstring example uses, and tells how
to fill the method's roles with them. Everything is tiny, random and offline: seconds at most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """Role → names in the case's directory; settings that make the method quick."""

    models: Mapping[str, tuple[str, ...]]
    data: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
