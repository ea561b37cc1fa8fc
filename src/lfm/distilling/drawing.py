"""Words drawn while training: what a student says of prompts, alone or with its teacher's hand in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lfm.core.heavy import F, torch
from lfm.models import virtual
from lfm.models.device import forward, taken

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lfm.core.interfaces import Batch

Speaker = Callable[["Tensor"], "Tensor"]
"""What comes next: the tokens (B, n) that follow those told before → logits (B, V) after the last of them."""

Choose = Callable[["Tensor", "Tensor"], "Tensor"]
"""(the tokens (B, n) since the last choice, two numbers a row in [0, 1) (B, 2)) → each row's next token (B,)."""

BLOCK = 256


@contextmanager
def still(module: nn.Module) -> Iterator[nn.Module]:
    """Inside, no dropout and no gradients."""
    was = module.training
    try:
        with torch.no_grad():
            yield module.eval()
    finally:
        module.train(was)


def remembering(module: nn.Module) -> Speaker:
    """A causal module that keeps its keys and values; one that has none to keep reads all again each time."""
    takes = taken(type(module)) or taken(type(_inner(module))) or frozenset()
    if "past_key_values" not in takes or virtual.room(module):
        return rereading(lambda batch: forward(module, batch))
    last: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
    where = next(module.parameters()).device
    cache: Any = None

    def next_after(tokens: Tensor) -> Tensor:
        nonlocal cache
        told = module(input_ids=tokens.to(where), past_key_values=cache, use_cache=True, **last)
        cache = told.past_key_values
        return told.logits[:, -1].float()

    return next_after


def rereading(logits: Callable[[Batch], Tensor]) -> Speaker:
    """Any function that gives logits (B, T, V) of input_ids (B, T): each token costs a pass over all before it."""
    seen: list[Tensor] = []

    def next_after(tokens: Tensor) -> Tensor:
        seen.append(tokens)
        ids = torch.cat(seen, 1)
        return logits({"input_ids": ids, "attention_mask": torch.ones_like(ids)})[:, -1].float()

    return next_after


def _inner(module: Any) -> Any:
    return module.get_base_model() if hasattr(module, "get_base_model") else module


def alone(student: Speaker, width: int, temperature: float = 1.0) -> Choose:
    """Each token from the student, of the first `width` of its vocabulary."""
    return lambda tokens, noise: pick(_told(student, tokens, width, temperature), noise[:, 0])


def mixed(student: Speaker, teacher: Speaker, share: float, width: int, temperature: float = 1.0) -> Choose:
    """Each token from share · p_teacher + (1 − share) · p_student (MiniLLM, 2306.08543, 2.2)."""

    def choose(tokens: Tensor, noise: Tensor) -> Tensor:
        s, t = (_told(who, tokens, width, temperature) for who in (student, teacher))
        return pick((1 - share) * s + share * t.to(s.device), noise[:, 0])

    return choose


def proposed(student: Speaker, teacher: Speaker, top: int, width: int, temperature: float = 1.0) -> Choose:
    """Each token from the student where it is of the teacher's `top` likeliest, else from the teacher (2410.11325).

    The paper lets the student go on for several tokens before its teacher looks, and throws away what follows the first
    that is replaced; looked at token by token, what is drawn has the same distribution.
    """

    def choose(tokens: Tensor, noise: Tensor) -> Tensor:
        s, t = (_told(who, tokens, width, temperature) for who in (student, teacher))
        t = t.to(s.device)
        token = pick(s, noise[:, 0])
        least = t.topk(min(top, t.shape[-1])).values[:, -1]
        kept = t.gather(-1, token[:, None])[:, 0] >= least
        return torch.where(kept, token, pick(t, noise[:, 1]))

    return choose


def _told(speaker: Speaker, tokens: Tensor, width: int, temperature: float) -> Tensor:
    return F.softmax(speaker(tokens)[:, :width] / temperature, -1)


def pick(probabilities: Tensor, noise: Tensor) -> Tensor:
    """The token (B,) at which the running sum of probabilities (B, V) passes the noise (B,) in [0, 1)."""
    sums = _running(probabilities)
    wanted = noise.to(sums.device)[:, None] * sums[:, -1:]
    return torch.searchsorted(sums, wanted, right=True)[:, 0].clamp(max=probabilities.shape[-1] - 1)


def _running(values: Tensor) -> Tensor:
    """Running sums (B, V′ ≥ V) in fp32, by products: a GPU's own running sum adds in another order each time."""
    with torch.autocast(values.device.type, enabled=False):  # near 1, bf16 tells few numbers apart
        padded = F.pad(values.float(), (0, -values.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
        inner = padded @ torch.ones(BLOCK, BLOCK, device=values.device).triu()
        count = padded.shape[1]
        before = inner[..., -1] @ torch.ones(count, count, device=values.device).triu(1)
        return (inner + before[..., None]).flatten(1).contiguous()


def noise(seed: int, numbers: Sequence[int], new: int) -> Tensor:
    """(B, 2, new) in [0, 1), each row by (seed, its record's number) alone: the same in any batch and any process."""
    rows = [torch.Generator().manual_seed((seed + n * 0x9E3779B97F4A7C15) % 2**63) for n in numbers]
    return torch.stack([torch.rand(2, new, generator=row) for row in rows])


def draw(
    prompts: Sequence[Sequence[int]], choose: Choose, noise: Tensor, room: Sequence[int], end: int | None
) -> list[list[int]]:
    """What is said after each prompt: at least one token, at most room[i], `end` being the last where it comes sooner.

    Rows begin together and a longer prompt's tokens are given as they come, so nothing is padded on the left: places
    are those of the model, whatever its positions are. noise: (B, 2, ≥ max(room)).
    """
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    first, longest = int(lengths.min()), int(lengths.max())
    given = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts])
    last = lengths + torch.tensor(list(room))
    over = torch.zeros(len(prompts), dtype=torch.bool)
    said = [given[:, :first]]
    for place in range(first, int(last.max())):
        mine = (place - lengths).clamp(0, noise.shape[-1] - 1)
        told = choose(said[-1], noise.gather(2, mine[:, None, None].expand(-1, 2, 1))[..., 0]).cpu()
        if place < longest:
            told = torch.where(place < lengths, given[:, place], told)
        said.append(told[:, None])
        over |= (place + 1 >= last) | ((place >= lengths) & (told == (-1 if end is None else end)))
        if bool(over.all()):
            break
    rows = torch.cat(said, 1).tolist()
    made = [row[len(prompt) :][:most] for row, prompt, most in zip(rows, prompts, room, strict=True)]
    return [row[: row.index(end) + 1] if end in row else row for row in made]
