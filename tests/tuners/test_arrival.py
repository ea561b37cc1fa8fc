"""peft knows the tuners as soon as lfm and it are both there, whichever comes first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import peft
import pytest

import bodies
from lfm import tuners

SCRIPT = """
import sys
{first}
import torch, transformers
base = transformers.AutoModelForCausalLM.from_pretrained({base!r})
adapted = peft.PeftModel.from_pretrained(base, {adapter!r}).eval()
print(type(adapted.base_model).__name__, float(adapted(torch.tensor([[5, 6, 7]])).logits.double().abs().sum()))
"""
LFM_FIRST = """
import importlib.util, lfm
assert not {'torch', 'peft', 'transformers'} & set(sys.modules)
importlib.util.find_spec('peft')  # as transformers does, long before it imports it: it changes nothing
assert 'peft' not in sys.modules
import peft
assert peft.PeftType.HOULSBY == 'HOULSBY' and 'HOULSBY' in list(peft.PeftType)
assert not [f for f in sys.meta_path if type(f).__module__.startswith('lfm')]
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, float]:
    root = tmp_path_factory.mktemp("arrival")
    module, _ = bodies.body("llama")
    module.save_pretrained(root / "base")  # type: ignore[operator]
    adapted = peft.get_peft_model(module, tuners.HoulsbyConfig(width=4)).eval()  # type: ignore[arg-type]
    for key, parameter in adapted.named_parameters():
        if "_adapter." in key:
            parameter.data.fill_(0.1)
    adapted.save_pretrained(str(root / "adapter"))
    import torch

    with torch.no_grad():
        total = float(adapted(torch.tensor([[5, 6, 7]])).logits.double().abs().sum())
    return root / "base", root / "adapter", total


@pytest.mark.parametrize(
    "first",
    [LFM_FIRST, pytest.param("import peft\nimport lfm", marks=pytest.mark.slow)],
    ids=["lfm first", "peft first"],
)
def test_a_plain_peft_script_loads_what_was_saved(first: str, places: tuple[Path, Path, float]) -> None:
    base, adapter, total = places
    script = SCRIPT.format(first=first, base=str(base), adapter=str(adapter))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kind, told = done.stdout.split()
    assert kind == "HoulsbyTuner" and float(told) == pytest.approx(total, rel=1e-6)


def test_a_tuner_named_before_peft_is_imported_brings_it() -> None:
    script = "from lfm.tuners.kinds.houlsby import HoulsbyConfig; print(HoulsbyConfig(width=3).peft_type.value)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "HOULSBY", done.stderr
