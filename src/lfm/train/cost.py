"""What training takes, for a method's `cost`: arithmetic, steps, memory and disk, before a weight is read."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from lfm.core.method import Amount, Cost
from lfm.core.model import Facts
from lfm.train.setting import Fit, steps_of

ACTIVATIONS = 34
"""Numbers kept for the backward pass, per token, layer and unit of width: inputs of norms, projections and products."""
LOGITS = 4
"""Numbers per token and word of the vocabulary: logits, their fp32 form, their log-probabilities, the gradient."""


def training(
    config: Fit, facts: Facts, amount: Amount, *, share: float = 1.0, forwards: float = 0.0, logits: float = LOGITS
) -> Cost:
    """Of `fit` on so many records. share: of the parameters that train. forwards: other models' parameters run beside.
    logits: numbers that a language model keeps for each token and word; 0 where its loss makes them in parts.

    A forward pass is 2 operations a parameter and token, the backward pass 2 for activations and 2 for trained weights.
    """
    steps = steps_of(config, max(amount.records, 1))
    length = max(1.0, amount.tokens / max(amount.records, 1))
    rows = min(config.batch_size, max(amount.records, 1))
    tokens = steps * config.accumulate * rows * length
    trained = facts.parameters * share
    again = 2 * facts.parameters if config.activation_checkpointing else 0
    return Cost(
        flops=tokens * (4 * facts.parameters + 2 * trained + 2 * forwards + again),
        steps=steps * config.accumulate,
        memory=memory(config, facts, rows * length, trained, logits) + int(4 * forwards),
        disk=int(12 * trained),
    )


def memory(config: Fit, facts: Facts, tokens: float, trained: float, logits: float = LOGITS) -> int:
    """Bytes of a step at its peak: weights, gradients, AdamW's moments, activations of a batch of so many tokens.

    fp32: in bf16 the activations are about half. An average or the best weights so far are one more copy each.
    """
    copies = 4 + (config.average != "none") + (config.patience > 0)
    deep = max(facts.layers, 1)
    kept = deep + ACTIVATIONS if config.activation_checkpointing else deep * ACTIVATIONS
    vocabulary = facts.vocabulary if facts.task.endswith("-lm") else 0
    return int(4 * (facts.parameters + copies * trained + tokens * (kept * max(facts.width, 1) + logits * vocabulary)))


def smaller(config: Fit, needed: Callable[[Fit], int], limit: float, process: int = 0) -> str:
    """The settings, of the same batch a step, that would fit into so many bytes; what else would help where none do.

    First more and smaller batches a step, which cost little time; then activation checkpointing too, a third more.
    process: what of the bytes needed is there before any model.
    """
    for again in sorted({config.activation_checkpointing, True}):
        size, parts = config.batch_size, config.accumulate
        while True:
            tried = msgspec.structs.replace(config, batch_size=size, accumulate=parts, activation_checkpointing=again)
            if tried != config and needed(tried) <= limit:
                more = ", activation_checkpointing=true" if again and not config.activation_checkpointing else ""
                return f"batch_size={size}, accumulate={parts}{more} (about {_said(needed(tried))})"
            if size == 1:
                break
            size, parts = -(-size // 2), parts * 2
    least = msgspec.structs.replace(
        config, batch_size=1, accumulate=config.batch_size * config.accumulate, activation_checkpointing=True
    )
    if process >= limit:
        return f"no settings would: Python and its libraries alone take {_said(process)}; allow it more"
    one = needed(least)
    record = max(needed(msgspec.structs.replace(least, batch_size=2)) - one, 0)
    own = f"Python and its libraries take {_said(process)}, " if process else ""
    return (
        f"no smaller batch would fit: {own}the model and what trains it {'' if process else 'take '}"
        f"{_said(one - record - process)}, each record about {_said(record)}; shorter records, fewer trained "
        "parameters (tune.lora), a smaller model, or more memory"
    )


def _said(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{max(size / 1e6, 1):.0f} MB"
