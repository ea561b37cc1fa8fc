"""What training takes, for a method's `cost`: arithmetic, steps, memory and disk, before a weight is read."""

from __future__ import annotations

from lfm.core.method import Amount, Cost
from lfm.core.model import Facts
from lfm.train.fit import Fit, steps_of

ACTIVATIONS = 16
"""Numbers kept for the backward pass, per token, layer and unit of width: inputs of norms, projections and products."""


def training(config: Fit, facts: Facts, amount: Amount, *, share: float = 1.0, forwards: float = 0.0) -> Cost:
    """Of `fit` on so many records. share: of the parameters that train. forwards: other models' parameters run beside.

    A forward pass is 2 operations a parameter and token, the backward pass 2 for activations and 2 for trained weights.
    """
    steps = steps_of(config, max(amount.records, 1))
    length = max(1.0, amount.tokens / max(amount.records, 1))
    tokens = steps * config.accumulate * min(config.batch_size, max(amount.records, 1)) * length
    trained = facts.parameters * share
    activations = config.batch_size * length * max(facts.layers, 1) * max(facts.width, 1) * ACTIVATIONS
    return Cost(
        flops=tokens * (4 * facts.parameters + 2 * trained + 2 * forwards),
        steps=steps * config.accumulate,
        memory=int(4 * (facts.parameters + forwards) + 16 * trained + 4 * activations),
        disk=int(12 * trained),
    )
