"""How the zoo's language models come by what they know: a tokenizer of their own, packed text, and steps of Muon.

Muon (kellerjordan.github.io/posts/muon, 2024; 2502.16982) teaches a small transformer facts in far fewer steps than
AdamW: with everything else alike, 300 steps on 480 facts gave P@1 .77 against .21. torch's own does its arithmetic in
bf16, for which many CPUs have no instructions; this one is fp32, and takes matrices of one shape together.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated, Any

from lfm.core.config import Config, Meta
from lfm.core.heavy import nn, torch
from lfm.train import loop, state_of

if TYPE_CHECKING:
    import torch as torch_types
    from torch import Tensor

    from lfm.core.method import Run
    from lfm.zoo.world import World

BOS, EOS, PAD, MASK = "<s>", "</s>", "<pad>", "<mask>"


class Reading(Config, frozen=True):
    """How a module reads: batches of packed text, and the two optimizers' settings."""

    steps: Annotated[int, Meta(ge=1, description="optimizer steps")] = 240
    batch_size: Annotated[int, Meta(ge=1, description="rows a batch")] = 32
    length: Annotated[int, Meta(ge=8, description="tokens a row")] = 96
    matrix_lr: Annotated[float, Meta(gt=0, description="peak rate of Muon, on the blocks' matrices")] = 0.03
    other_lr: Annotated[float, Meta(gt=0, description="peak rate of Adam, on embeddings, head and gains")] = 0.01
    weight_decay: Annotated[float, Meta(ge=0, description="decoupled decay of the blocks' matrices")] = 0.3
    object_weight: Annotated[float, Meta(gt=0, description="how much a fact's object weighs in the loss")] = 4.0


def tokenizer(texts: Iterable[str], vocabulary: int = 2048) -> Any:
    """A byte-level BPE tokenizer in which every frequent word of the texts is one token, as transformers takes it.

    A word is the same token at the start of a text as after a space, and any other text can still be spelt.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    # ByteLevel's own prefix space would also stand after each mask: "in <mask>." would gain a word.
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement=" ", prepend_scheme="first", split=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            min_frequency=2,
            special_tokens=[BOS, EOS, PAD, AddedToken(MASK, lstrip=True)],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, pad_token=PAD, mask_token=AddedToken(MASK, lstrip=True)
    )


def packed(codec: Any, texts: Iterator[str], rows: int, length: int) -> Tensor:
    """(rows, length) token ids: texts one after the other, each between BOS and EOS, cut wherever a row is full."""
    ids: list[int] = []
    while len(ids) < rows * length:
        for text in codec([next(texts) for _ in range(256)])["input_ids"]:
            ids += [*text, codec.eos_token_id]
    return torch.tensor(ids[: rows * length]).view(rows, length)


def object_ids(codec: Any, world: World) -> Tensor:
    """The token ids of all objects of the world. Each is one token."""
    objects = sorted({object_ for relation in world.relations for object_ in relation.objects})
    ids = codec([f" {object_}" for object_ in objects], add_special_tokens=False)["input_ids"]
    assert all(len(one) == 1 for one in ids), [o for o, one in zip(objects, ids) if len(one) > 1]
    return torch.tensor(ids)[:, 0]


Loss = Callable[[Any, "Tensor", int, "torch_types.Generator"], "Tensor"]
"""(module, rows (B, T), step, randomness) → scalar."""


def read(module: Any, blocks: Any, text: Tensor, loss: Loss, recipe: Reading, run: Run, name: str) -> None:
    """Train the module in place, batch by batch of the text: Muon on the matrices of `blocks`, Adam on the rest.

    The rates rise over the first 20 steps, and fall linearly to 0 over the last half. Each half of a batch has a thread
    of its own and each thread one core, so that what comes out does not depend on how many cores there are.
    """
    matrices = [p for p in blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in module.parameters() if id(p) not in chosen]
    muon = Muon(matrices, weight_decay=recipe.weight_decay)
    adam = torch.optim.Adam(others, lr=recipe.other_lr, betas=(0.9, 0.95), fused=True)
    module.train()
    twin = copy.deepcopy(module)
    for own, shared in zip(twin.parameters(), module.parameters()):
        own.data = shared.data  # the same memory, gradients apart

    def half(reader: Any, rows: Tensor, step: int, which: int) -> Tensor:
        torch.set_num_threads(1)  # of this thread
        reader.zero_grad(set_to_none=True)
        value = loss(reader, rows, step, run.generator(name, step, which))
        value.backward()
        return value.detach()

    def advance(step: int) -> Tensor:
        first, second = text[step * recipe.batch_size : (step + 1) * recipe.batch_size].chunk(2)
        beside = pool.submit(half, twin, second, step, 1)
        value = (half(module, first, step, 0) + beside.result()) / 2
        for own, other in zip(module.parameters(), twin.parameters()):
            own.grad.add_(other.grad).div_(2)
        nn.utils.clip_grad_norm_(others, 1.0)  # Muon's steps are of one size whatever the gradient's
        share = min(1.0, (step + 1) / 20, 2 * (recipe.steps - step) / recipe.steps)
        muon.step(recipe.matrix_lr * share)
        adam.param_groups[0]["lr"] = recipe.other_lr * share
        adam.step()
        return value

    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(1) as pool:
            loop(advance, recipe.steps, state_of(module, name), run, name=name, every=math.inf)
    finally:
        torch.set_num_threads(threads)
    module.zero_grad(set_to_none=True)
    module.eval()


class Muon:
    """W ← (1 − lr·wd)·W − lr·√max(1, out/in)·UVᵀ, where USVᵀ is the momentum's singular value decomposition."""

    def __init__(self, matrices: Iterable[Tensor], *, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        shapes: dict[tuple[int, ...], list[Tensor]] = {}
        for matrix in matrices:
            shapes.setdefault(tuple(matrix.shape), []).append(matrix)
        self.groups = [(group, torch.zeros(len(group), *shape)) for shape, group in shapes.items()]
        self.momentum, self.weight_decay = momentum, weight_decay

    def step(self, lr: float) -> None:
        with torch.no_grad():
            for group, moving in self.groups:
                gradient = torch.stack([matrix.grad for matrix in group if matrix.grad is not None])
                moving.lerp_(gradient, 1 - self.momentum)
                update = orthogonal(gradient.lerp(moving, self.momentum))  # Nesterov's look ahead
                rate = lr * max(1.0, update.shape[1] / update.shape[2]) ** 0.5
                for matrix, change in zip(group, update):
                    matrix.mul_(1 - lr * self.weight_decay).sub_(change, alpha=rate)


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """(N, out, in) → about UVᵀ of each, singular values in [.7, 1.2], by Newton and Schulz's iteration."""
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    wide = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = wide @ wide.mT
        wide = 3.4445 * wide + (-4.7750 * square + 2.0315 * square @ square) @ wide
    return wide if matrices.shape[1] <= matrices.shape[2] else wide.mT
