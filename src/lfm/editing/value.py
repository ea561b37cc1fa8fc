"""The value that makes a model say the new object: gradient descent on what is added at the subject."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, final

from lfm.core.config import Config, Meta
from lfm.core.heavy import F, torch
from lfm.core.interfaces import Batch
from lfm.editing.behind import Behind, continued, cut
from lfm.editing.form import at, in_decoder
from lfm.editing.rows import IGNORED, Joined, Rows, alike, brief, groups, together, unlike
from lfm.models import structure
from lfm.models.activations import in_one_step
from lfm.models.resume import Begun, activations, agrees, ending_at, logits_at, recording, resumed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn

BETAS, TINY = (0.5, 0.999), 1e-8
"""Of Adam with one second moment a value: steps go along the gradient, not along its signs, and remember less of where
they began; the same NLL is met by a third shorter δ."""
PATIENCE, GAIN = 6, 0.03
"""A search ends whose loss has not fallen by this share in so many steps."""


LONGER = 2.0
"""How many times as long as one fact's a value of several may be."""


class Search(Config, frozen=True):
    """How a value is searched for. An editor's Config inherits these settings.

    Rate and decay are relative to ‖v₀‖, which differs a hundredfold between models; ROME's (Adam at .5, decay
    .5·‖δ‖/‖v₀‖², 20 steps) suit one model's. essence, stop and reach are ROME's own.
    """

    steps: Annotated[int, Meta(ge=1, description="most steps of gradient descent on the value")] = 40
    lr: Annotated[float, Meta(gt=0, description="length of the first step over ‖v₀‖")] = 1.0
    essence: Annotated[float, Meta(ge=0, description="weight of KL on what follows “{subject} is a”")] = 0.0625
    decay: Annotated[float, Meta(ge=0, description="weight of ‖δ‖/‖v₀‖")] = 0.05
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
    """Within: the layer's output (the first, where it gives several) is δ more at these (row, token) places, one of
    each row."""

    def hook(_: Any, __: Any, out: Any) -> Any:
        given = out[0] if isinstance(out, tuple) else out
        hidden = structure.in_rows(given, len(places[0])).clone()
        hidden[places] = hidden[places] + delta.to(hidden.dtype)
        hidden = hidden.view(given.shape)
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def search(module: nn.Module, block: int, rows: Rows, settings: Search, earlier: Sequence[Rows] = ()) -> Found:
    """The value of one edit, written by a block's last projection, such that earlier ones at its place hold too."""
    reads = [rows, *earlier]
    return search_all(module, block, [reads[i] for i in alike(reads)[0]], settings)[0]


def search_all(
    module: nn.Module, block: int, reads: Sequence[Rows], settings: Search, sites: Sequence[str] = ("ffn_out",)
) -> list[Found]:
    """Each edit's own: minimise NLL(new object) + essence·KL(after ‖ before, on the last row) + decay·Σ ‖δ‖/‖v₀‖,
    ‖δ‖ ≤ reach·‖v₀‖, with one δ for each site. The module's parameters must need no gradients.

    NLL is per token; the first context, the bare prompt, weighs as much in it as the others together (in ROME as one
    of them, and a δ that suits all but the prompt itself then passes). Of all steps the δ of the lowest loss is kept.
    Edits share forward passes, and those that a model has the same place for (a subject's, read after the same tokens)
    one δ, which may be √n as long for n of them (at most LONGER) and says them all: of δs found apart a solve would
    take the mean. A search leaves the passes when it ends.
    """
    if not reads:
        return []
    found: dict[int, Found] = {}
    units = alike(reads)
    with in_one_step(module):
        tried = [[brief(read)] for read in unlike(reads)]
        spared = next(w for w in WAYS if w == WAYS[-1] or _Together(module, block, tried, settings, sites, w).agrees())
        for group in groups(reads, parted=spared.behind, units=units):
            searched = _Together(module, block, [[reads[i] for i in units[u]] for u in group], settings, sites, spared)
            for unit, each in zip(group, searched.run(), strict=True):
                found |= zip(units[unit], each, strict=True)
    return [found[i] for i in range(len(reads))]


def _still(lowest: Sequence[float]) -> bool:
    """Whether the lowest loss met so far is as good as what it was PATIENCE steps ago."""
    return len(lowest) > PATIENCE and lowest[-1] > (1 - GAIN) * lowest[-1 - PATIENCE]


def both(told: Tensor) -> Tensor:
    """(2,) of (n,) over contexts: the bare prompt's, and the mean over the others; (1,) where there are no others."""
    return torch.stack([told[0], told[1:].mean()]) if len(told) > 1 else told


def answer_logprobs(logits: Tensor, rows: Rows) -> Tensor:
    """(n,) log-probability of the whole new object in each context."""
    labels = rows.told.to(logits.device)
    asked = labels != IGNORED
    told = logits[:-1].log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    return (told * asked).sum(1)


class Spared(NamedTuple):
    """What a search computes once, or not. behind: what stands before the subjects; begun: the blocks before the site,
    and of the last block what is not asked for."""

    behind: bool
    begun: bool


WAYS = (Spared(True, True), Spared(False, True), Spared(True, False), Spared(False, False))
"""The most first; the first that changes nothing is taken, as is tried on two edits."""


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
    """One search for several values (N), each of one edit or several (E in all). Of their δ (sites, N, width)."""

    def __init__(
        self,
        module: nn.Module,
        block: int,
        values: Sequence[Sequence[Rows]],
        settings: Search,
        sites: Sequence[str],
        spared: Spared,
    ) -> None:
        self._module, self._block, self._values, self._settings, self._sites = module, block, values, settings, sites
        self._spared = spared
        names = [structure.site(module, at(module, site, block))[0] for site in sites]
        self._layers = [module.get_submodule(name) for name in names]
        count = len(structure.all_blocks(module))
        self._ending = spared.begun and block % count < count - 1
        self._home = next(module.parameters()).device

    def run(self) -> list[list[Found]]:
        """Of each value what it is for each of its edits."""
        settings = self._settings
        live = list(range(len(self._values)))
        joined, of = self._joined(live)
        start, before = self._begin(joined, of)
        norm = before.norm(dim=-1)
        reach = settings.reach * norm * torch.bincount(of).sqrt().clamp(max=LONGER)
        delta, first, second = torch.zeros_like(before), torch.zeros_like(before), torch.zeros_like(before[..., :1])
        rate = (settings.lr * norm)[..., None]
        best: list[list[Found]] = [[] for _ in live]
        lowest: list[list[float]] = [[] for _ in live]
        essence: Tensor | None = None
        for step in range(settings.steps + 1):
            at = torch.tensor(live, device=self._home)
            here = delta[:, at].requires_grad_(True)
            unsaid, surest, now = self._told(joined, start, here[:, of])
            essence = now.detach() if essence is None else essence
            drift = F.kl_div(essence, now, log_target=True, reduction="none").sum(1)
            share = here.norm(dim=-1) / norm[:, at]
            zero = torch.zeros(len(live), device=unsaid.device)
            each = unsaid + settings.essence * drift / torch.bincount(of)[of]
            loss = zero.index_add(0, of, each) + settings.decay * share.sum(0)
            left = zero.scatter_reduce(0, of, unsaid.detach(), "amax").cpu()
            sure = surest.detach().cpu().double().split(torch.bincount(of).tolist())
            shown = torch.stack([loss, share[-1]]).detach().cpu().double()
            for place, number in enumerate(live):
                if not best[number] or shown[0, place] < best[number][0].loss:
                    value, was = (x[-1].detach().cpu().double() for x in (here[:, place], before[:, number]))
                    cost, far = (float(shown[i, place]) for i in range(2))
                    best[number] = [Found(value, float(p), far, cost, step, was) for p in sure[place]]
            for number in live:
                lowest[number].append(best[number][0].loss)
            going = [
                number
                for place, number in enumerate(live)
                if left[place] >= settings.stop and not _still(lowest[number])
            ]
            if not going or step == settings.steps:
                break
            (slope,) = torch.autograd.grad(loss.sum(), here)
            first[:, at] = BETAS[0] * first[:, at] + (1 - BETAS[0]) * slope
            second[:, at] = BETAS[1] * second[:, at] + (1 - BETAS[1]) * slope.square().sum(-1, keepdim=True)
            scale = (second[:, at] / (1 - BETAS[1] ** (step + 1))).sqrt() + TINY
            moved = here.detach() - rate[:, at] / (1 - BETAS[0] ** (step + 1)) * first[:, at] / scale
            most = reach[:, at] / moved.norm(dim=-1).clamp(min=1e-30)
            delta[:, at] = moved * most.clamp(max=1.0)[..., None]
            if len(going) < len(live):
                stay = torch.isin(of, torch.tensor([live.index(n) for n in going], device=self._home))
                essence, rows, live = essence[stay], stay[joined.owner], going
                joined, of = self._joined(live)
                start = start.of(rows, joined)
        return best

    def _joined(self, live: Sequence[int]) -> tuple[Joined, Tensor]:
        """All edits of these values, and (E,) which of the values each is of."""
        of = torch.tensor([place for place, number in enumerate(live) for _ in self._values[number]])
        return together([read for number in live for read in self._values[number]], self._home), of.to(self._home)

    def agrees(self) -> bool:
        """Whether what is spared changes no logits; what the module cannot spare is no part of that."""
        joined, of = self._joined(range(len(self._values)))
        rows, places = self._asked(joined)
        with torch.no_grad():
            whole = logits_at(self._module, joined.batch, rows, places)
            start, before = self._begin(joined, of)
            return agrees(whole, self._logits(joined, start, torch.zeros_like(before)[:, of]))

    def _begin(self, joined: Joined, of: Tensor) -> tuple[_Start, Tensor]:
        """What no δ changes, and v₀ (sites, N, width) behind the first bare prompt of each value."""
        upto = self._block % len(structure.all_blocks(self._module)) + (tuple(self._sites) == ("hidden",))
        where = [at(self._module, site, self._block) for site in self._sites]
        reads = "decoder_input_ids" if in_decoder(self._module, self._block) else "input_ids"
        start = _Start(cut(self._module, joined) if self._spared.behind and joined.causal else None, None, reads)
        view = start.view(joined)
        with continued(self._module, start.behind), recording(self._module, upto) as begun:
            seen = activations(self._module, view.batch, where)
        bare = joined.bare[torch.stack([(of == number).int().argmax() for number in range(len(self._values))])]
        before = torch.stack([x[bare, view.subject[bare]].float() for x in seen])
        return start._replace(begun=begun[0] if begun and self._spared.begun else None), before

    def _told(self, joined: Joined, start: _Start, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(E,) NLL and (E,) p(new object), as `both` weighs contexts; (E, V) log-probabilities of what comes last."""
        asked, _, ids = joined.asked
        logs = self._logits(joined, start, delta).log_softmax(-1)
        tokens = logs[: len(asked)].gather(1, ids[:, None])[:, 0]
        zero = torch.zeros(len(joined.owner), device=logs.device)
        told = zero.index_add(0, asked, tokens)
        lengths = zero.index_add(0, asked, torch.ones_like(tokens)).clamp(min=1)
        unsaid, surest = self._both(joined, -told / lengths), self._both(joined, told.exp())
        return unsaid.mean(0), surest.min(0).values, logs[len(asked) :]

    def _logits(self, joined: Joined, start: _Start, delta: Tensor) -> Tensor:
        """(n + E, V) fp32: of the new objects' tokens and what comes last, with δ (sites, E, width)."""
        view = start.view(joined)
        everywhere = torch.arange(len(joined.owner), device=self._home)
        rows, places = self._asked(joined)
        with ExitStack() as held:
            held.enter_context(continued(self._module, start.behind))
            held.enter_context(resumed(self._module, start.begun))
            if self._ending:
                held.enter_context(ending_at(self._module, rows, places - view.shift[rows]))
            for layer, change in zip(self._layers, delta, strict=True):
                held.enter_context(added(layer, (everywhere, view.subject), change[joined.owner]))
            return logits_at(self._module, view.batch, rows, places - view.shift[rows])

    def _asked(self, joined: Joined) -> tuple[Tensor, Tensor]:
        """(n + E,) rows and places."""
        return torch.cat([joined.asked[0], joined.essence]), torch.cat([joined.asked[1], joined.after])

    def _both(self, joined: Joined, each: Tensor) -> Tensor:
        """(2, E) of (R,): the bare prompts', and the mean over the other contexts (where there are none, the same)."""
        others = torch.ones(len(each), device=each.device)
        others[joined.bare] = others[joined.essence] = 0.0
        zero = torch.zeros(len(joined.bare), device=each.device)
        count = zero.index_add(0, joined.owner, others)
        bare = each[joined.bare]
        mean = zero.index_add(0, joined.owner, others * each) / count.clamp(min=1)
        return torch.stack([bare, torch.where(count > 0, mean, bare)])
