"""Classes by name: whether two classifiers tell the same, and a classifier with more of them than it had."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lfm.core.errors import MismatchError, ModelError
from lfm.core.heavy import nn, torch
from lfm.models import layers

if TYPE_CHECKING:
    from torch import Generator


def same(teacher: Sequence[str], student: Sequence[str]) -> None:
    """MismatchError where they are not the same classes, in any order, or are none."""
    if set(teacher) != set(student) or not student:
        shown = ["; ".join(labels[:5]) or "none" for labels in (teacher, student)]
        raise MismatchError(
            "teacher and student have different classes",
            why=f"the teacher's: {shown[0]}; the student's: {shown[1]}",
            fix="rename the classes in one config (id2label)",
        )


def widened(module: nn.Module, labels: Sequence[str], more: Sequence[str], random: Generator) -> nn.Module:
    """The module of transformers, changed in place, with a row of its last layer for each class more, after its own.

    The new rows are drawn around the mean of its own, as far from it as they are. ModelError where the last layer has
    not a row a class, or the module names no config.
    """
    place = layers.last_linear(module)
    head, described = module.get_submodule(place), getattr(module, "config", None)
    if not isinstance(head, nn.Linear) or head.out_features != len(labels) or described is None:
        raise ModelError(
            f"{type(module).__name__} cannot be given new classes",
            why=f"its last linear layer, {place}, has not one row for each of its {len(labels)} classes",
            fix="give a model that names the new classes already",
        )
    wider = nn.Linear(head.in_features, len(labels) + len(more), bias=head.bias is not None)
    with torch.no_grad():
        for name, own in head.named_parameters():
            drawn = torch.randn((len(more), *own.shape[1:]), generator=random)
            drawn = own.mean(0) + drawn * (own.std(0) if len(own) > 1 else own.std())
            getattr(wider, name).copy_(torch.cat([own, drawn]))
    owner, _, leaf = place.rpartition(".")
    setattr(module.get_submodule(owner), leaf, wider)
    names = [*labels, *more]
    settings: Any = described
    settings.id2label, settings.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    whole: Any = module
    if hasattr(whole, "num_labels"):
        whole.num_labels = len(names)
    return module
