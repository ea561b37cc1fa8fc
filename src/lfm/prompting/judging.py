"""Which records a prompted model tells right, by whatever it gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lfm.core.interfaces import Classes
from lfm.core.model import Model
from lfm.data.records import Label, Pair
from lfm.prompting.classifier import Prompt, read, verbalizer
from lfm.prompting.reading import Reader


def judged(model: Model, records: Sequence[Label | Pair], labels: Sequence[str], config: Any) -> list[float]:
    """1 for each record whose likeliest class is its label, else 0.

    By the classes that the model gives; where it gives none, by its words after the `template` of the settings that
    made it, the labels' `words` of theirs.
    """
    if model.can(Classes):
        classes = model.ask(Classes)
        names, logp = classes.labels, classes.tell(records)
    else:
        said: Mapping[str, Any] = getattr(config, "words", {})
        words = verbalizer(labels, {label: (one,) if isinstance(one, str) else one for label, one in said.items()})
        prompt = Prompt(words=words, template=getattr(config, "template", ""))
        names, logp = labels, read(Reader(model), prompt, records).logp
    return [float(names[i] == record.label) for i, record in zip(logp.argmax(1), records, strict=True)]
