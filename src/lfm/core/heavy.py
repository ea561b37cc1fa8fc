"""Lazy names for libraries that take long to import.

A method file is read whenever methods are listed, so nothing at its top level may load torch. It writes
`from lfm.core.heavy import torch, F` and the library loads at the first attribute asked of it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import cmaes as cmaes
    import numpy as np
    import peft as peft
    import safetensors as safetensors
    import safetensors.torch as safetensors_torch
    import sklearn as sklearn
    import torch as torch
    import torch.nn as nn
    import torch.nn.functional as F
    import transformers as transformers
else:

    class _Lazy:
        def __init__(self, name: str) -> None:
            self.__dict__["_name"] = name

        def __getattr__(self, attribute: str) -> Any:
            module = importlib.import_module(self.__dict__["_name"])
            value = getattr(module, attribute)
            self.__dict__[attribute] = value
            return value

        def __repr__(self) -> str:
            return f"<lazy {self.__dict__['_name']}>"

    cmaes = _Lazy("cmaes")
    np = _Lazy("numpy")
    peft = _Lazy("peft")
    safetensors = _Lazy("safetensors")
    safetensors_torch = _Lazy("safetensors.torch")
    sklearn = _Lazy("sklearn")
    torch = _Lazy("torch")
    nn = _Lazy("torch.nn")
    F = _Lazy("torch.nn.functional")
    transformers = _Lazy("transformers")
