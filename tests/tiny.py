"""Tiny random models as Hugging Face directories: one a task, with a tokenizer or an image processor.

Each function writes into `path` (made if absent) and returns it; one seed gives the same bytes everywhere. Weights are
spread wider than usual (std 0.2) so that a random model's first choice stands clear of its second.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

CONTEXT = 128
LABELS = ("cats", "dogs", "birds")
DIGITS = tuple(str(i) for i in range(10))

CORPUS = (
    "The cat sat on the mat and the dog looked at the cat.",
    "Paris is the capital of France. Rome is the capital of Italy. Berlin is the capital of Germany.",
    "Ada Ashby was born in London and lives in Vienna; she works as a painter.",
    "Q: What is two plus two? A: four. Q: What is three plus one? A: four.",
    "birds dogs cats good bad happy sad up down 0 1 2 3 4 5 6 7 8 9 naïve café “quoted” 東京",
    "A small model learns a small world, word by word, from the town to the mountain.",
)


@cache
def _byte_bpe() -> str:
    """A byte-level BPE (GPT-2 and Llama-3 style) with <s> in front; no text is unknown to it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    return made.to_str()


def _words() -> list[str]:
    return sorted({word for line in CORPUS for word in re.findall(r"[a-z]+", line.lower()) if len(word) > 1})


@cache
def _word_piece() -> str:
    """A lowercasing WordPiece (BERT style): [CLS] a [SEP] b [SEP]; the corpus's words, and letters for the others."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    # Made by hand: the library's trainer orders equal counts by chance.
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,:;?!'\"“”()-東京"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters), *_words()]
    made = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return made.to_str()


@cache
def _unigram() -> str:
    """A SentencePiece-like Unigram (T5 style): ▁ for spaces, </s> at the end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    letters = sorted({c for line in CORPUS for c in line if c != " "} | set("abcdefghijklmnopqrstuvwxyz"))
    words = sorted({word for line in CORPUS for word in re.findall(r"[A-Za-z]+", line) if len(word) > 1})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -6.0)]
    pieces += [("▁" + word, -5.0 - i / 1000) for i, word in enumerate(words)]
    pieces += [(letter, -7.0 - i / 1000) for i, letter in enumerate(letters)]
    made = Tokenizer(models.Unigram(pieces, unk_id=2))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return made.to_str()


def byte_bpe() -> Any:
    """The causal model's tokenizer."""
    return _tokenizer(_byte_bpe(), pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def word_piece() -> Any:
    """The masked model's, classifier's and encoder's tokenizer."""
    return _tokenizer(
        _word_piece(),
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def unigram() -> Any:
    """The seq2seq model's tokenizer."""
    return _tokenizer(_unigram(), pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def _tokenizer(text: str, **settings: Any) -> Any:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text),
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        **settings,
    )


def _write(path: Path, seed: int, make: Any, processor: Any) -> Path:
    import torch

    path.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = make()
    module.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def causal(path: Path, *, seed: int = 0, **config: Any) -> Path:
    """A Llama-shaped causal LM (2 blocks, width 32, grouped-query attention)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_bpe()
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.2,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "attn_implementation": "eager",
    }
    return _write(path, seed, lambda: LlamaForCausalLM(LlamaConfig(**(shape | config))), tokenizer)


def conv1d(path: Path, *, seed: int = 0) -> Path:
    """A GPT-2-shaped causal LM: no gate, its projections have biases and are stored (in, out)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=len(byte_bpe()), n_positions=CONTEXT, initializer_range=0.2
    )
    return _write(path, seed, lambda: GPT2LMHeadModel(shape), byte_bpe())


def _bert(tokenizer: Any, config: dict[str, Any]) -> Any:
    from transformers import BertConfig

    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.2,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return BertConfig(**(shape | config))


def masked(path: Path, *, seed: int = 0, **config: Any) -> Path:
    """A BERT-shaped masked LM."""
    from transformers import BertForMaskedLM

    tokenizer = word_piece()
    return _write(path, seed, lambda: BertForMaskedLM(_bert(tokenizer, config)), tokenizer)


def classifier(path: Path, *, seed: int = 0, labels: tuple[str, ...] = LABELS, **config: Any) -> Path:
    """A BERT-shaped text classifier over `labels`."""
    from transformers import BertForSequenceClassification

    tokenizer = word_piece()
    shape = _bert(tokenizer, _labelled(labels) | config)
    return _write(path, seed, lambda: BertForSequenceClassification(shape), tokenizer)


def encoder(path: Path, *, seed: int = 0, **config: Any) -> Path:
    """A BERT-shaped text encoder without a head."""
    from transformers import BertModel

    tokenizer = word_piece()
    return _write(path, seed, lambda: BertModel(_bert(tokenizer, config)), tokenizer)


def seq2seq(path: Path, *, seed: int = 0, **config: Any) -> Path:
    """A T5-shaped encoder-decoder."""
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = unigram()
    shape = {
        "vocab_size": len(tokenizer),
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "initializer_factor": 1.0,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": tokenizer.pad_token_id,
    }
    return _write(path, seed, lambda: T5ForConditionalGeneration(T5Config(**(shape | config))), tokenizer)


def vit(path: Path, *, seed: int = 0, labels: tuple[str, ...] = DIGITS, channels: int = 3, **config: Any) -> Path:
    """A ViT for 8×8 images over `labels`."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    shape = {
        "image_size": 8,
        "patch_size": 4,
        "num_channels": channels,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.2,
    }
    processor = ViTImageProcessor(
        size={"height": 8, "width": 8}, image_mean=[0.5] * channels, image_std=[0.5] * channels
    )
    made = ViTConfig(**(shape | _labelled(labels) | config))
    return _write(path, seed, lambda: ViTForImageClassification(made), processor)


def _labelled(labels: tuple[str, ...]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
