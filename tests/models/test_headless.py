"""Hidden states and a head give the logits that the module gives, for whatever a module does after its head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch.nn import functional as F

from lfm.models import forward
from lfm.models.headless import headless

SMALL: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
}
START: dict[str, Any] = {"decoder_start_token_id": 0}
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": 48, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "pad_token_id": 0,
    "decoder_start_token_id": 0,
}  # fmt: skip
PLAIN: dict[str, Any] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)),
    "tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=48, n_embd=16, n_layer=1, n_head=2)),
    "scaled": lambda: hf.CohereForCausalLM(hf.CohereConfig(**SMALL, logit_scale=0.0625)),
    "scaled and biased": lambda: hf.CohereForCausalLM(hf.CohereConfig(**SMALL, logit_scale=0.0625)),
    "divided": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**SMALL, logits_scaling=3.0)),
    "bert": lambda: hf.BertForMaskedLM(
        hf.BertConfig(vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    ),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=48, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, **START)
    ),
    "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**SEQ2SEQ)),
}


def made(name: str) -> Any:
    torch.manual_seed(0)
    module = PLAIN[name]()
    if name == "bart":
        module.final_logits_bias += torch.randn(48)
    if name == "scaled and biased":
        module.lm_head = torch.nn.Linear(16, 48)
    if name == "bert":
        torch.nn.init.normal_(module.cls.predictions.decoder.bias)
    return module


def batch(rows: int = 3, length: int = 12) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 48, (rows, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


@pytest.mark.parametrize("name", PLAIN)
def test_the_head_on_the_hidden_states_gives_the_logits_and_their_gradients(name: str) -> None:
    module = made(name).eval()
    body = headless(module, batch())
    assert body is not None
    expected, found = forward(module, batch()), F.linear(*body(module, batch()))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    weights = [p for p in module.parameters() if p.requires_grad]
    slopes = [torch.autograd.grad(logits.square().sum(), weights, allow_unused=True) for logits in (found, expected)]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-4, atol=1e-4)


def test_logits_that_are_bent_are_left_to_the_module() -> None:
    """Gemma 2's tanh, which is nearly straight where a random model's logits are."""
    module = hf.Gemma2ForCausalLM(hf.Gemma2Config(**SMALL, final_logit_softcapping=30.0))
    assert headless(module, batch()) is None
    module = hf.Gemma2ForCausalLM(hf.Gemma2Config(**SMALL, final_logit_softcapping=None))
    assert headless(module, batch()) is not None


def test_a_head_with_an_adapter_is_left_to_the_module() -> None:
    from peft import LoraConfig, get_peft_model

    def adapted(*targets: str) -> Any:
        return get_peft_model(made("llama"), LoraConfig(r=2, target_modules=list(targets)))

    assert headless(adapted("q_proj", "lm_head"), batch()) is None
    module = adapted("q_proj")
    body = headless(module, batch())
    assert body is not None
    torch.testing.assert_close(F.linear(*body(module, batch())), forward(module, batch()), rtol=1e-5, atol=1e-6)


def test_looking_leaves_the_module_and_the_randomness_as_they_were() -> None:
    module = made("gpt2")
    expected = forward(module.eval(), batch())
    state = torch.get_rng_state()
    module.train()  # with dropout
    body = headless(module, batch())
    assert body is not None and module.training
    assert torch.equal(torch.get_rng_state(), state)
    body(module, batch())
    assert not torch.equal(torch.get_rng_state(), state)
    assert torch.equal(forward(module.eval(), batch()), expected)
