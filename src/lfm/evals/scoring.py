"""Losses of records, token by token under a task, summed by record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lfm.core.heavy import F, np
from lfm.core.interfaces import Codec
from lfm.data.records import Record
from lfm.data.task import Task
from lfm.evals.setting import Setting
from lfm.train.examine import counts

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Losses(NamedTuple):
    """(n,) each: summed loss in nats, tokens that it is over, and whether all of them are the model's first choice."""

    loss: NDArray[Any]
    tokens: NDArray[Any]
    first: NDArray[Any]


def losses(setting: Setting, task: Task, records: Sequence[Record]) -> Losses:
    """What a language model loses on each record.

    An end token after the answer is not counted: a model that tells only the probabilities of texts cannot tell it, and
    one model should score the same by either access.
    """
    end = setting.model.ask(Codec).tokenizer.eos_token_id
    loss, tokens, first = np.zeros(len(records)), np.zeros(len(records)), np.zeros(len(records))
    for places, logits, batch in setting.logits(task, records):
        scored, labels = task.scored(logits, batch)
        each = F.cross_entropy(scored, labels, reduction="none").double().cpu().numpy()
        right = (scored.argmax(-1) == labels).cpu().numpy()
        told = labels.cpu().numpy()
        stops = np.cumsum(counts(batch["labels"], len(labels)))
        for i, start, stop in zip(places, [0, *stops[:-1]], stops, strict=True):
            stop -= int(stop - start > 1 and told[stop - 1] == end)
            loss[i], tokens[i], first[i] = each[start:stop].sum(), stop - start, right[start:stop].all()
    return Losses(loss, tokens, first)
