"""The public API: what `import lfm` gives, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import lfm
import tiny


def test_what_it_names_is_there() -> None:
    assert dir(lfm) == sorted(lfm.__all__) and all(hasattr(lfm, name) for name in lfm.__all__)


def test_methods_stays_a_function_whatever_was_imported() -> None:
    code = (
        "import lfm, lfm.methods.edit.rome, lfm.core.registry\n"
        "assert lfm.core.registry.ids() and lfm.methods(have=[lfm.Text], data=lfm.Data.FEW_SHOT) is not None\n"
        "import sys; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_model_says_what_it_is_in_a_line(tmp_path: Path) -> None:
    shown = repr(lfm.load(tiny.causal(tmp_path / "cat")))
    assert "cat" in shown and "weights" in shown and len(shown) < 300


def test_its_errors_are_of_one_kind(tmp_path: Path) -> None:
    text = lfm.load(tiny.causal(tmp_path / "cat")).ask(lfm.Text)
    for wrong in (
        lambda: lfm.load("nowhere"),
        lambda: text.generate("one text"),
        lambda: text.generate(["a"], max_tokens=0),
    ):
        with pytest.raises(lfm.LfmError):
            wrong()
    assert text.generate([]) == []
