"""One base with several LoRA adapters beside it, and every input answered with the one that it is sent to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, final

from lfm.core.heavy import peft, torch
from lfm.core.interfaces import Batch, Codec, Gradients, Logits, Logprobs, Ranked, Said, Score, Text
from lfm.core.model import Model
from lfm.models import layers, structure
from lfm.models.device import device, forward
from lfm.models.language import CausalLogprobs, MaskedLogprobs, Seq2SeqLogprobs, limit_of
from lfm.models.local import LocalText
from lfm.models.quiet import quiet
from lfm.models.routed import token_mean

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")

READ = 32
"""Prompts that are read at once to tell where they belong."""


class Beside(NamedTuple):
    """An adapter. settings: what peft's LoraConfig takes; tensors: by the names that PEFT files have."""

    settings: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def lora(module: nn.Module, rank: int, alpha: int, *, heads: bool) -> dict[str, Any]:
    """Settings of an adapter on all linear layers of the blocks, with a head of its own where the base has one."""
    names = layers.projections(module)
    turned = any(structure.transposed(module.get_submodule(name)) for name in names)
    own = (layers.heads(module) or None) if heads else None
    return {"r": rank, "lora_alpha": alpha, "target_modules": names, "modules_to_save": own, "fan_in_fan_out": turned}


def adapted(module: nn.Module, settings: Mapping[str, Any]) -> Any:
    """The peft module of one new adapter, to be trained."""
    with quiet():
        return peft.get_peft_model(module, peft.LoraConfig(**settings))  # type: ignore[arg-type]


def taken(module: Any) -> dict[str, Tensor]:
    """The tensors of a peft module's adapter."""
    state = peft.get_peft_model_state_dict(module, save_embedding_layers=False)
    return {key: value.detach().to("cpu", copy=True).contiguous() for key, value in state.items()}


def features(module: nn.Module, batch: Batch) -> Tensor:
    """(n, width) on the CPU: what the last block (of an encoder-decoder, of the encoder) puts out, its tokens' mean."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with torch.no_grad():
        if getattr(module.config, "is_encoder_decoder", False):
            where = next(module.parameters()).device
            given = {name: inputs[name].to(where) for name in ("input_ids", "attention_mask")}
            hidden = module.get_encoder()(**given).last_hidden_state  # type: ignore[operator]
        else:
            with structure.watch(module, [("hidden", -1)]) as seen:
                forward(module, inputs)
            hidden = structure.in_rows(seen[0], len(next(iter(inputs.values()))))
    mask = inputs["attention_mask"].to(hidden.device) if "attention_mask" in inputs else None
    return token_mean(hidden.float(), mask).cpu()


@final
class Dispatch:
    """The base, opened once, with the adapters. choose: features (n, width) → the place of each row's adapter (n,)."""

    def __init__(self, base: Model, adapters: Sequence[Beside], choose: Callable[[Tensor], Tensor]) -> None:
        self._base, self._adapters, self._choose = base, adapters, choose

    @cached_property
    def _module(self) -> Any:
        module: Any = self._base.ask(Gradients).module()
        with quiet(), torch.random.fork_rng(devices=[]):
            for place, one in enumerate(self._adapters):
                config = peft.LoraConfig(**one.settings)
                if place:
                    module.add_adapter(f"a{place}", config)
                else:
                    module = peft.get_peft_model(module, config, adapter_name="a0")  # type: ignore[arg-type]
        for place, one in enumerate(self._adapters):
            peft.set_peft_model_state_dict(module, dict(one.tensors), adapter_name=f"a{place}")
        return module.to(device()).eval().requires_grad_(False)

    def context(self) -> int:
        return self._base.facts.context

    @contextmanager
    def acting(self, place: int) -> Iterator[Any]:
        """Within: the module answers with that adapter."""
        module = self._module
        module.set_adapter(f"a{place}")
        module.requires_grad_(False)  # set_adapter would have it trained
        yield module

    def places(self, batch: Batch) -> Tensor:
        """Where each row goes, by what the base alone makes of it."""
        with self._module.disable_adapter():
            return self._choose(features(self._module.get_base_model(), batch))

    def logits(self, batch: Batch) -> Tensor:
        """Every row's logits with the adapter that it goes to."""
        places = self.places(batch)
        found: Tensor | None = None
        for place in places.unique().tolist():
            rows = (places == place).nonzero()[:, 0]
            with torch.no_grad(), self.acting(place) as module:
                told = forward(module, {name: tensor[rows.to(tensor.device)] for name, tensor in batch.items()})
            found = told.new_zeros(len(places), *told.shape[1:]) if found is None else found
            found[rows.to(found.device)] = told
        assert found is not None
        return found

    def by_prompt(self, prompts: Sequence[str], ask: Callable[[Any, Sequence[int]], Sequence[T]]) -> list[T]:
        """What `ask` gives for prompts, told by number, and the module as it answers them; in the prompts' order."""
        codec = self._base.ask(Codec)
        limit = limit_of(codec.tokenizer, self.context()) or None
        parts = [[text or " " for text in prompts[i : i + READ]] for i in range(0, len(prompts), READ)]
        read = [codec.texts(part, max_length=limit) for part in parts]
        places = torch.cat([self.places(batch) for batch in read]) if read else torch.zeros(0)
        found: dict[int, T] = {}
        for place in places.unique().tolist():
            rows = (places == place).nonzero()[:, 0].tolist()
            with self.acting(int(place)) as module:
                found |= zip(rows, ask(module, rows), strict=True)
        return [found[i] for i in range(len(prompts))]


@final
class PromptedText:
    """Text, each prompt continued with the adapter that it goes to."""

    def __init__(self, dispatch: Dispatch, codec: Codec) -> None:
        self._dispatch, self._codec = dispatch, codec

    def generate(self, prompts: Sequence[str], **how: Any) -> list[str]:
        return [one.text for one in self.said(prompts, **how)]

    def said(self, prompts: Sequence[str], **how: Any) -> list[Said]:
        def ask(module: Any, rows: Sequence[int]) -> list[Said]:
            return LocalText(lambda: module, self._codec).said([prompts[i] for i in rows], **how)

        return self._dispatch.by_prompt(prompts, ask)


@final
class PromptedLogprobs:
    """Log-probabilities, each continuation scored with the adapter that its prompt goes to."""

    def __init__(self, dispatch: Dispatch, codec: Codec, start: int | None) -> None:
        self._dispatch, self._codec, self._start = dispatch, codec, start

    def _of(self, module: nn.Module) -> CausalLogprobs | Seq2SeqLogprobs:
        def logits(batch: Batch) -> Tensor:
            with torch.no_grad():
                return forward(module, batch)

        if self._start is None:
            return CausalLogprobs(logits, self._codec, context=self._dispatch.context)
        return Seq2SeqLogprobs(logits, self._codec, self._start, context=self._dispatch.context)

    def score(self, prompts: Sequence[str], continuations: Sequence[str], suffixes: Sequence[str] = ()) -> list[Score]:
        def ask(module: Any, rows: Sequence[int]) -> list[Score]:
            return self._of(module).score([prompts[i] for i in rows], [continuations[i] for i in rows])

        return self._dispatch.by_prompt(prompts, ask)

    def top(self, prompts: Sequence[str], k: int, suffixes: Sequence[str] = ()) -> list[Ranked]:
        return self._dispatch.by_prompt(
            prompts, lambda module, rows: self._of(module).top([prompts[i] for i in rows], k)
        )


def interfaces(base: Model, dispatch: Dispatch) -> dict[type, Callable[[], Any]]:
    """What the base and its adapters give together. A decoder is asked by prompt, so that no later token is seen."""
    codec = base.ask(Codec)
    gives: dict[type, Callable[[], Any]] = {Codec: lambda: codec}
    match base.facts.task:
        case "causal-lm":
            gives |= {Text: lambda: PromptedText(dispatch, codec)}
            gives |= {Logprobs: lambda: PromptedLogprobs(dispatch, codec, None)}
        case "seq2seq-lm":
            gives |= {Logits: lambda: dispatch, Text: lambda: PromptedText(dispatch, codec)}
            gives |= {Logprobs: lambda: PromptedLogprobs(dispatch, codec, _start(base))}
        case "masked-lm":
            gives |= {
                Logits: lambda: dispatch,
                Logprobs: lambda: MaskedLogprobs(dispatch.logits, codec, context=dispatch.context),
            }
        case _:
            gives |= {Logits: lambda: dispatch}
    return gives


def _start(base: Model) -> int:
    config: Any = base.ask(Gradients).module().config
    return int(config.decoder_start_token_id)
