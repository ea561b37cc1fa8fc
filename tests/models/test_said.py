"""Whatever gives text tells why an answer ended: the model did, a stop string did, or its room for new tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

import tiny
from lfm.core import Codec, Gradients, Logits, Model, Text
from lfm.core.interfaces import Said, said_by
from lfm.editing.scope import Routed
from lfm.methods.prompt.self_consistency import vote
from lfm.models import adapter, load, prefixed
from lfm.models.dispatch import PromptedText
from lfm.models.language import CausalText
from lfm.models.mixed import mixed
from lfm.models.prompted import prompted
from lfm.retrieval.demonstrations import END, ToldText

PROMPTS = ("The cat", "Paris is the", "Q: What")


def ending(here: Path, end: float) -> Model:
    """A GPT-2 whose hidden state is one vector everywhere, by its last norm's bias; end: the logit of its end."""
    tiny.conv1d(here)
    module: Any = transformers.AutoModelForCausalLM.from_pretrained(here)
    with torch.no_grad():
        module.transformer.ln_f.weight.zero_()
        module.transformer.ln_f.bias.copy_(torch.eye(32)[0])
        module.lm_head.weight[:, 0] = torch.linspace(0, 1, len(module.lm_head.weight))
        module.lm_head.weight[tiny.byte_bpe().eos_token_id, 0] = end
    module.save_pretrained(here)
    return load(here)


def mixture(model: Model) -> Any:
    module: Any = get_peft_model(
        model.ask(Gradients).module(), LoraConfig(target_modules=["c_fc"], fan_in_fan_out=True)
    )
    return mixed(model, {"one": adapter.over(model, module)}).model("one").ask(Text)


def dispatched(model: Model) -> Any:
    module = model.ask(Gradients).module().eval()
    here = SimpleNamespace(by_prompt=lambda prompts, ask: ask(module, range(len(prompts))))
    return PromptedText(cast("Any", here), model.ask(Codec))


def told(model: Model) -> Any:
    parts = SimpleNamespace(model=lambda _: model)
    return ToldText(cast("Any", SimpleNamespace(parts=parts, before=lambda prompt: "so: " if "cat" in prompt else "")))


def routed(model: Model) -> Any:
    """Every prompt to the model itself: what chooses between it and its edit is not asked."""
    here: Any = object.__new__(Routed)
    here._both = lambda kind, prompts, ask: ask(model.ask(kind), prompts, None)
    return here


SPEAKERS: dict[str, Callable[[Model], Any]] = {
    "routed": routed,
    "a program of logits": lambda model: CausalText(model.ask(Logits).logits, model.ask(Codec)),
    "a text before": lambda model: prefixed.interfaces(model, "A dog. ")[Text](),
    "a soft prompt": lambda model: prompted(model, torch.zeros(2, 32))[Text](),
    "one of many adapters": mixture,
    "adapters by prompt": dispatched,
    "examples before": told,
}


@pytest.mark.parametrize("speaker", SPEAKERS)
def test_it_tells_whether_it_was_cut(speaker: str, tmp_path: Path) -> None:
    never, always = ending(tmp_path / "never", -9.0), ending(tmp_path / "always", 9.0)
    endless = SPEAKERS[speaker](never)
    cut = endless.said(PROMPTS, max_tokens=3)
    assert [one.cut for one in cut] == [True] * 3 and all(one.text for one in cut)
    assert endless.generate(PROMPTS, max_tokens=3) == [one.text for one in cut]
    first = cut[0].text[0]
    assert endless.said(PROMPTS, max_tokens=3, stop=(first,)) == [Said("")] * 3
    assert SPEAKERS[speaker](always).said(PROMPTS, max_tokens=3) == [Said("")] * 3


def test_an_answer_that_goes_on_to_the_next_example_is_not_cut() -> None:
    """It is what comes before the end of an example, wherever the room for more tokens was."""

    class Endless:
        def said(self, prompts: Sequence[str], **_: Any) -> list[Said]:
            return [Said(f"so.{END}New" if "cat" in prompt else "so", True) for prompt in prompts]

    speaker = told(Model("endless", "api", {Text: Endless}, str))
    assert speaker.said(["a cat", "a dog"]) == [Said("so."), Said("so", True)]


def test_of_a_vote_an_answer_is_cut_that_none_gave_whole() -> None:
    assert vote([Said("four", True), Said("Four."), Said("five")]) == Said("four", False)
    assert vote([Said("four", True), Said("Four.", True), Said("five")]) == Said("four", True)
    assert vote([Said("", True), Said("", False)]) == Said("", False)


def test_of_a_text_that_does_not_tell_none_is_cut() -> None:
    class Silent:
        def generate(self, prompts: Sequence[str], **_: Any) -> list[str]:
            return ["so"] * len(prompts)

    assert said_by(Silent(), PROMPTS) == [Said("so")] * 3
