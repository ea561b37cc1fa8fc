"""The value that makes a model say the new object: gradient descent on what is added at the subject."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, final

from lfm.core.config import Config, Meta
from lfm.core.heavy import F, torch
from lfm.core.model import Batch
from lfm.editing.behind import Behind, continued, cut
from lfm.editing.form import at, in_decoder
from lfm.editing.resume import Begun, agrees, logits_at, recording, resumed
from lfm.editing.rows import IGNORED, Joined, Rows, groups, together
from lfm.models import structure

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn

BETAS, TINY = (0.9, 0.999), 1e-8
"""Adam's own."""


class Search(Config, frozen=True):
    """How a value is searched for. An editor's Config inherits these settings.

    Rate and decay are relative to ‖v₀‖, which differs a hundredfold between models; ROME's (rate .5, decay
    .5·‖δ‖/‖v₀‖², 20 steps) suit one model's. essence, stop and reach are ROME's own.
    """

    steps: Annotated[int, Meta(ge=1, description="most steps of Adam on the value")] = 40
    lr: Annotated[float, Meta(gt=0, description="Adam's rate over ‖v₀‖/√d: a step's length over ‖v₀‖")] = 0.5
    essence: Annotated[float, Meta(ge=0, description="weight of KL on what follows “{subject} is a”")] = 0.0625
    decay: Annotated[float, Meta(ge=0, description="weight of ‖δ‖/‖v₀‖")] = 0.1
    stop: Annotated[float, Meta(ge=0, description="mean NLL of the new object at which the search ends")] = 0.05
    reach: Annotated[float, Meta(gt=0, description="largest ‖δ‖/‖v₀‖")] = 4.0


class Found(NamedTuple):
    """The best value met: δ (out,) fp64 is what is added to the (last) site's output at the subject's last token.

    before: v₀ (out,) fp64, that output behind the bare prompt. probability: of the whole new object, after the bare
    prompt or in the mean over the others, whichever is less. reach: ‖δ‖/‖v₀‖. steps: how many were taken to it.
    """

    delta: Tensor
    probability: float
    reach: float
    loss: float
    steps: int
    before: Tensor


@contextmanager
def added(layer: Any, places: tuple[Tensor, Tensor], delta: Tensor) -> Iterator[None]:
    """Within: the layer's output (the first, where it gives several) is δ more at these (row, token) places."""

    def hook(_: Any, __: Any, out: Any) -> Any:
        hidden = (out[0] if isinstance(out, tuple) else out).clone()
        hidden[places] = hidden[places] + delta.to(hidden.dtype)
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def search(module: nn.Module, block: int, rows: Rows, settings: Search) -> Found:
    """The value of one edit, written by a block's last projection."""
    return search_all(module, block, [rows], settings)[0]


def search_all(
    module: nn.Module, block: int, reads: Sequence[Rows], settings: Search, sites: Sequence[str] = ("ffn_out",)
) -> list[Found]:
    """Each edit's own: minimise NLL(new object) + essence·KL(after ‖ before, on the last row) + decay·Σ ‖δ‖/‖v₀‖,
    ‖δ‖ ≤ reach·‖v₀‖, with one δ for each site. The module's parameters must need no gradients.

    NLL is per token; the first context, the bare prompt, weighs as much in it as the others together (in ROME as one
    of them, and a δ that suits all but the prompt itself then passes). Of all steps the δ of the lowest loss is kept.
    Edits share forward passes and nothing else: each leaves when its own search ends.
    """
    found: dict[int, Found] = {}
    for group in groups(reads):
        found |= zip(group, _Together(module, block, [reads[i] for i in group], settings, sites).run(), strict=True)
    return [found[i] for i in range(len(reads))]


def both(told: Tensor) -> Tensor:
    """(2,) of (n,) over contexts: the bare prompt's, and the mean over the others; (1,) where there are no others."""
    return torch.stack([told[0], told[1:].mean()]) if len(told) > 1 else told


def answer_logprobs(logits: Tensor, rows: Rows) -> Tensor:
    """(n,) log-probability of the whole new object in each context."""
    labels = rows.told.to(logits.device)
    asked = labels != IGNORED
    told = logits[:-1].log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    return (told * asked).sum(1)


class _View(NamedTuple):
    """What the module reads: the batch, the subject's last token in it (R,), and how far its places are moved (R,)."""

    batch: Batch
    subject: Tensor
    shift: Tensor


class _Start(NamedTuple):
    """What no δ changes: what stands before the subjects, and what the blocks before the site put out."""

    behind: Behind | None
    begun: Begun | None
    reads: str = "input_ids"  # what of the batch the site's stack reads

    def view(self, joined: Joined) -> _View:
        still = torch.zeros_like(joined.subject)
        if self.behind is None:
            return _View(joined.batch, joined.subject, still)
        return _View(self.behind.batch, still, self.behind.start)

    def of(self, rows: Tensor, joined: Joined) -> _Start:
        """Of these rows alone, joined anew."""
        behind, begun = self.behind and self.behind.of(rows), self.begun
        if begun:
            hidden = begun.hidden[rows.to(begun.hidden.device)]
            wide = hidden.shape[1] if behind else joined.batch[self.reads].shape[1]
            begun = begun._replace(hidden=hidden[:, :wide])
        return self._replace(behind=behind, begun=begun)


@final
class _Together:
    """One search for several edits. States of edits (E,), of their δ (sites, E, width)."""

    def __init__(
        self, module: nn.Module, block: int, reads: Sequence[Rows], settings: Search, sites: Sequence[str]
    ) -> None:
        self._module, self._block, self._reads, self._settings, self._sites = module, block, reads, settings, sites
        names = [structure.site(module, at(module, site, block))[0] for site in sites]
        self._layers = [module.get_submodule(name) for name in names]
        self._home = next(module.parameters()).device

    def run(self) -> list[Found]:
        settings = self._settings
        joined = together(self._reads, self._home)
        start, before = self._begin(joined)
        norm = before.norm(dim=-1)
        delta, first, second = (torch.zeros_like(before) for _ in range(3))
        rate = (settings.lr * norm / before.shape[-1] ** 0.5)[..., None]
        live = list(range(len(self._reads)))
        best: list[Found | None] = [None] * len(live)
        essence: Tensor | None = None
        for step in range(settings.steps + 1):
            at = torch.tensor(live, device=self._home)
            here = delta[:, at].requires_grad_(True)
            unsaid, surest, now = self._told(joined, start, here)
            essence = now.detach() if essence is None else essence
            drift = F.kl_div(essence[at], now, log_target=True, reduction="none").sum(1)
            share = here.norm(dim=-1) / norm[:, at]
            loss = unsaid + settings.essence * drift + settings.decay * share.sum(0)
            shown = torch.stack([loss, surest, share[-1], unsaid]).detach().cpu().double()
            for place, number in enumerate(live):
                kept = best[number]
                if kept is None or shown[0, place] < kept.loss:
                    value = here[-1, place].detach().cpu().double()
                    cost, sure, far = (float(shown[i, place]) for i in range(3))
                    best[number] = Found(value, sure, far, cost, step, before[-1, number].cpu().double())
            going = [number for place, number in enumerate(live) if not shown[3, place] < settings.stop]
            if not going or step == settings.steps:
                break
            (slope,) = torch.autograd.grad(loss.sum(), here)
            first[:, at] = BETAS[0] * first[:, at] + (1 - BETAS[0]) * slope
            second[:, at] = BETAS[1] * second[:, at] + (1 - BETAS[1]) * slope * slope
            scale = (second[:, at] / (1 - BETAS[1] ** (step + 1))).sqrt() + TINY
            moved = here.detach() - rate[:, at] / (1 - BETAS[0] ** (step + 1)) * first[:, at] / scale
            most = settings.reach * norm[:, at] / moved.norm(dim=-1).clamp(min=1e-30)
            delta[:, at] = moved * most.clamp(max=1.0)[..., None]
            if len(going) < len(live):
                stay = torch.isin(joined.owner, torch.tensor(sorted(live.index(n) for n in going), device=self._home))
                live = going
                joined = together([self._reads[number] for number in live], self._home)
                start = start.of(stay, joined)
        return [found for found in best if found]

    def _begin(self, joined: Joined) -> tuple[_Start, Tensor]:
        """What no δ changes, and v₀ (sites, E, width) behind the bare prompts."""
        upto = self._block % len(structure.all_blocks(self._module)) + (tuple(self._sites) == ("hidden",))
        where = [at(self._module, site, self._block) for site in self._sites]
        reads = "decoder_input_ids" if in_decoder(self._module, self._block) else "input_ids"
        start = _Start(self._cut(joined), None, reads)
        view = start.view(joined)
        asked, places = joined.asked[0], joined.asked[1] - view.shift[joined.asked[0]]
        with torch.no_grad(), continued(self._module, start.behind):
            with recording(self._module, upto) as begun, structure.watch(self._module, where) as seen:
                logits = logits_at(self._module, view.batch, asked, places)
            before = torch.stack([x[joined.bare, view.subject[joined.bare]].float() for x in seen])
            if not begun:
                return start, before
            with resumed(self._module, begun[0]):
                again = logits_at(self._module, view.batch, asked, places)
        return (start._replace(begun=begun[0]) if agrees(logits, again) else start), before

    def _cut(self, joined: Joined) -> Behind | None:
        """The rows cut, where that changes nothing: tried on the bare prompts and the last rows."""
        behind = cut(self._module, joined) if joined.causal else None
        if behind is None:
            return None
        rows = torch.cat([joined.bare, joined.essence])
        some, each, last = behind.of(rows), torch.arange(len(rows), device=self._home), joined.last[rows]
        with torch.no_grad():
            whole = logits_at(self._module, {name: x[rows] for name, x in joined.batch.items()}, each, last)
            with continued(self._module, some):
                parted = logits_at(self._module, some.batch, each, last - some.start)
        return behind if agrees(whole, parted) else None

    def _told(self, joined: Joined, start: _Start, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(E,) NLL and (E,) p(new object), as `both` weighs contexts; (E, V) log-probabilities of what comes last."""
        rows = torch.arange(len(joined.owner), device=self._home)
        view = start.view(joined)
        asked, places, ids = joined.asked
        with ExitStack() as held:
            held.enter_context(continued(self._module, start.behind))
            held.enter_context(resumed(self._module, start.begun))
            for layer, change in zip(self._layers, delta, strict=True):
                held.enter_context(added(layer, (rows, view.subject), change[joined.owner]))
            which = torch.cat([asked, joined.essence])
            where = torch.cat([places, joined.after])
            logits = logits_at(self._module, view.batch, which, where - view.shift[which])
        logs = logits.log_softmax(-1)
        tokens = logs[: len(asked)].gather(1, ids[:, None])[:, 0]
        zero = torch.zeros(len(rows), device=logs.device)
        told = zero.index_add(0, asked, tokens)
        lengths = zero.index_add(0, asked, torch.ones_like(tokens)).clamp(min=1)
        unsaid, surest = self._both(joined, -told / lengths), self._both(joined, told.exp())
        return unsaid.mean(0), surest.min(0).values, logs[len(asked) :]

    def _both(self, joined: Joined, each: Tensor) -> Tensor:
        """(2, E) of (R,): the bare prompts', and the mean over the other contexts (where there are none, the same)."""
        others = torch.ones(len(each), device=each.device)
        others[joined.bare] = others[joined.essence] = 0.0
        zero = torch.zeros(len(joined.bare), device=each.device)
        count = zero.index_add(0, joined.owner, others)
        bare = each[joined.bare]
        mean = zero.index_add(0, joined.owner, others * each) / count.clamp(min=1)
        return torch.stack([bare, torch.where(count > 0, mean, bare)])
