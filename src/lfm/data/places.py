"""How often a model that is asked in text is asked, where each token that another is scored on is a question."""

from __future__ import annotations

from collections.abc import Sequence

from lfm.core.interfaces import Codec
from lfm.core.model import Model
from lfm.data import files
from lfm.data import task as tasks
from lfm.data.language import IGNORED
from lfm.data.records import Record

SAMPLE = 512
"""Records that are cut into tokens; of more, so many spread over all of them stand for the others."""


def questions(records: Sequence[Record], model: Model) -> tuple[int, int]:
    """How many different questions these records put to who tells this model's tokens, one for each token that it is
    scored on with some text before it; and how many tokens are read and told for all of them.

    A question is all that stands before: it is answered once, however often it comes. DataError where the records set
    the model no task.
    """
    some = records[:: -(-len(records) // SAMPLE)]
    codec = model.ask(Codec)
    read = tasks.fit(some, codec, model.facts)
    task = tasks.task_for(read, codec, model.facts)
    special = set(codec.tokenizer.all_special_ids)
    seen: set[int] = set()
    tokens = 0
    for record in read:
        batch = task.collate([record])
        before, words = 0, False
        for place, (token, label) in enumerate(zip(batch["input_ids"][0].tolist(), batch["labels"][0].tolist())):
            if label != IGNORED and words and before not in seen:
                seen.add(before)
                tokens += place + 1
            before, words = hash((before, token)), words or token not in special
    share = files.amount(records).tokens / max(files.amount(some).tokens, 1)
    return round(len(seen) * share), round(tokens * share)
