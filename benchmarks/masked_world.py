"""A masked model that can be edited at the subject: the zoo's, read twice as long and short-sighted when young.

    python benchmarks/masked_world.py OUT [--steps 480]
    python benchmarks/edit_table.py --model OUT --text zoo:stories --counts 10 --methods rome memit alpha_edit ultra ft

zoo:mlm looks its facts up at the blank. As in the zoo's language model, the first blocks here see but the words beside
them for most of the training, so that who somebody is must be worked out at the name.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch

from lfm.zoo import masked
from lfm.zoo.exhibit import Making
from lfm.zoo.language import Age
from lfm.zoo.reading import read
from lfm.zoo.world import make_world

SIGHT, YOUTH = (3, 2), 0.7
"""How far block i sees when young: 1 is the word itself, 2 also those beside it. Share of the steps."""


@contextmanager
def short_sighted(blocks: Any, age: Age) -> Iterator[None]:
    hooks = [
        block.attn.register_forward_pre_hook(_within(reach, age), with_kwargs=True)
        for block, reach in zip(blocks, SIGHT, strict=False)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _within(reach: int, age: Age) -> Callable[..., Any]:
    def hook(_: object, args: Any, kwargs: dict[str, Any]) -> Any:
        if not age.young:
            return None
        place = torch.arange((args[0] if args else kwargs["hidden_states"]).shape[1])
        far = (place[:, None] - place).abs() >= reach
        return args, kwargs | {"attention_mask": torch.zeros(far.shape).masked_fill(far, -torch.inf)[None, None]}

    return hook


def reading(module: Any, blocks: Any, text: Any, loss: Any, recipe: Any, run: Any, name: str) -> None:
    """The zoo's way of reading, short-sighted when young."""
    age = Age()

    def aged(reader: Any, rows: Any, step: int, randomness: Any) -> Any:
        age.young = step < YOUTH * recipe.steps
        return loss(reader, rows, step, randomness)

    with short_sighted(blocks, age):
        read(module, blocks, text, aged, recipe, run, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=480)
    args = parser.parse_args()
    recipe = msgspec.structs.replace(masked.RECIPE, steps=args.steps)
    masked.read = reading  # the zoo's own training otherwise
    began = time.process_time()
    with tempfile.TemporaryDirectory() as work:
        module, codec = masked.train(make_world(0), recipe, Making(Path(work)))
    print(f"{time.process_time() - began:.0f} CPU seconds")
    module.save_pretrained(args.out)
    codec.save_pretrained(args.out)


if __name__ == "__main__":
    main()
