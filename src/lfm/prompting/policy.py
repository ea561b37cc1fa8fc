"""Who writes prompts and learns to: a frozen language model, and a small network before its head."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, final

from lfm.core import Codec, Gradients, Model
from lfm.core.heavy import nn, torch
from lfm.train import seeded
from lfm.train.softq import path_consistency

if TYPE_CHECKING:
    from torch import Tensor

BEGIN = 1e-4
"""Gain of the first weights, and minus the first biases."""
CLIP = 5.0
"""Of the gradient's norm."""
NEVER = -1e4
"""Value of a token that is not drawn."""


@final
class Policy:
    """π(z_t | z_{<t}) = softmax(W_head · MLP_θ(h_t)) of a causal language model, of which θ alone learns; and its
    target θ̄ ← θ̄ + follow · (θ − θ̄). Tokens that are special, no text, or that hold a brace are never written.

    Source: RLPrompt, arXiv 2205.12548, and its code (mingkaid/rl-prompt).
    """

    def __init__(self, model: Model, *, length: int, hidden: int, lr: float, follow: float, seed: int) -> None:
        self._length, self._follow = length, follow
        self._tokenizer = model.ask(Codec).tokenizer
        self._module: Any = model.ask(Gradients).module().requires_grad_(False)
        self._head: Any = self._module.get_output_embeddings()
        size, width = self._head.weight.shape
        self._device = self._head.weight.device
        with seeded(seed):
            self._mlp = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))
            for layer in (self._mlp[0], self._mlp[2]):
                nn.init.xavier_uniform_(layer.weight, gain=BEGIN)  # type: ignore[arg-type]
                nn.init.constant_(layer.bias, -BEGIN)  # type: ignore[arg-type]
        self._mlp.to(self._device)
        self._target = copy.deepcopy(self._mlp).requires_grad_(False)
        self._adam = torch.optim.Adam(self._mlp.parameters(), lr=lr)
        self._barred = torch.tensor([self._bars(i) for i in range(size)], device=self._device)

    def draw(self, count: int, top_k: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """(tokens (count, length), states before each (count, length, width)), each among its top_k."""

        def chosen(values: Tensor) -> Tensor:
            best, places = values.topk(min(top_k, values.shape[-1]))
            drawn = torch.multinomial(best.softmax(-1).cpu(), 1, generator=random)  # alike on every device
            return places.gather(1, drawn.to(places.device))

        return self._walk(count, chosen)

    def greedy(self) -> Tensor:
        """The likeliest tokens, (length,)."""
        return self._walk(1, lambda values: values.argmax(-1, keepdim=True))[0][0]

    def text(self, tokens: Tensor) -> str:
        return str(self._tokenizer.decode(tokens.tolist())).strip()

    def learn(self, actions: Tensor, seen: Tensor, rewards: Sequence[float]) -> None:
        """One step by path consistency on what was drawn and its rewards."""
        with torch.no_grad():
            for slow, fast in zip(self._target.parameters(), self._mlp.parameters(), strict=True):
                slow.lerp_(fast, self._follow)
            target = self._values(self._target, seen)
        reward = torch.tensor(list(rewards), device=self._device)
        loss = path_consistency(self._values(self._mlp, seen), target, actions, reward)
        self._adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self._mlp.parameters(), CLIP)
        self._adam.step()

    def _bars(self, token: int) -> bool:
        if token >= len(self._tokenizer) or token in self._tokenizer.all_special_ids:
            return True
        text = self._tokenizer.decode([token])
        return not text.strip() or "{" in text or "}" in text or "\ufffd" in text

    def _values(self, mlp: Any, seen: Tensor) -> Tensor:
        return self._head(mlp(seen)).masked_fill(self._barred, NEVER)

    def _hidden(self, ids: Tensor) -> Tensor:
        """The last state (B, width) after each row."""
        with torch.no_grad():
            return self._module(input_ids=ids, output_hidden_states=True).hidden_states[-1][:, -1]

    def _walk(self, count: int, choose: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        tokenizer = self._tokenizer
        opening = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        ids = torch.full((count, 1), opening if opening is not None else 0, device=self._device)
        seen = []
        for _ in range(self._length):
            seen.append(self._hidden(ids))
            with torch.no_grad():
                ids = torch.cat([ids, choose(self._values(self._mlp, seen[-1]))], 1)
        return ids[:, 1:], torch.stack(seen, 1)
