"""Tiny random models as Hugging Face directories: one a task, with a tokenizer or what prepares images or sounds.

Each function writes into `path` (made if absent) and returns it; one seed gives the same bytes everywhere. Weights are
spread wider than usual (std 0.2) so that a random model's first choice stands clear of its second.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Path])

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


KEPT = 2**20
"""Bytes of a model that are kept in memory, to be written again."""


def _kept(make: F) -> F:
    """Many tests begin with the same few models: of the same arguments, one is made once a process."""
    known: dict[str, dict[str, bytes]] = {}

    @wraps(make)
    def written(path: Path, **how: Any) -> Path:
        key = repr(sorted(how.items()))
        if key in known:
            path.mkdir(parents=True, exist_ok=True)
            for name, content in known[key].items():
                (path / name).write_bytes(content)
            return path
        alone = not path.exists() or not any(path.iterdir())
        make(path, **how)
        files = [file for file in path.iterdir() if file.is_file()]
        if alone and sum(file.stat().st_size for file in files) <= KEPT:
            known[key] = {file.name: file.read_bytes() for file in files}
        return path

    return cast(F, written)


@_kept
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


@_kept
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


@_kept
def masked(path: Path, *, seed: int = 0, **config: Any) -> Path:
    """A BERT-shaped masked LM."""
    from transformers import BertForMaskedLM

    tokenizer = word_piece()
    return _write(path, seed, lambda: BertForMaskedLM(_bert(tokenizer, config)), tokenizer)


@_kept
def classifier(path: Path, *, seed: int = 0, labels: tuple[str, ...] = LABELS, **config: Any) -> Path:
    """A BERT-shaped text classifier over `labels`."""
    from transformers import BertForSequenceClassification

    tokenizer = word_piece()
    shape = _bert(tokenizer, _labelled(labels) | config)
    return _write(path, seed, lambda: BertForSequenceClassification(shape), tokenizer)


@_kept
def encoder(path: Path, *, seed: int = 0, **config: Any) -> Path:
    """A BERT-shaped text encoder without a head."""
    from transformers import BertModel

    tokenizer = word_piece()
    return _write(path, seed, lambda: BertModel(_bert(tokenizer, config)), tokenizer)


@_kept
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


@_kept
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


TONES = ("low", "middle", "high")
RATE = 16000


@_kept
def hearer(path: Path, *, seed: int = 0, labels: tuple[str, ...] = TONES, **config: Any) -> Path:
    """A wav2vec2-shaped classifier of sounds: convolutions over samples, then 2 blocks."""
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForSequenceClassification

    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "conv_dim": (16, 16),
        "conv_stride": (10, 8),
        "conv_kernel": (20, 8),
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 4,
        "classifier_proj_size": 16,
        "feat_extract_norm": "layer",
        "do_stable_layer_norm": True,
        "vocab_size": 8,
    }
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=True)
    made = Wav2Vec2Config(**(shape | _labelled(labels) | config))
    return _write(path, seed, lambda: Wav2Vec2ForSequenceClassification(made), extractor)


@_kept
def spectral(path: Path, *, seed: int = 0, labels: tuple[str, ...] = TONES, **config: Any) -> Path:
    """An AST-shaped classifier of sounds: patches of a spectrum of 16 bands, 2 blocks."""
    from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_mel_bins": 16,
        "max_length": 32,
        "patch_size": 8,
        "frequency_stride": 8,
        "time_stride": 8,
        "initializer_range": 0.2,
    }
    made = ASTConfig(**(shape | _labelled(labels) | config))
    extractor = ASTFeatureExtractor(num_mel_bins=16, max_length=32, sampling_rate=RATE)
    return _write(path, seed, lambda: ASTForAudioClassification(made), extractor)


@_kept
def listener(path: Path, *, seed: int = 0, labels: tuple[str, ...] = TONES, **config: Any) -> Path:
    """A whisper-shaped encoder with classes: spectra of half a second, 2 blocks."""
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForAudioClassification

    shape = {
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_layers": 1,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 64,
        "num_mel_bins": 16,
        "max_source_positions": 50,
        "vocab_size": 8,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
        "classifier_proj_size": 16,
        "init_std": 0.2,
    }
    made = WhisperConfig(**(shape | _labelled(labels) | config))
    extractor = WhisperFeatureExtractor(feature_size=16, sampling_rate=RATE, chunk_length=1)
    return _write(path, seed, lambda: WhisperForAudioClassification(made), extractor)


def tones(count: int = 4, *, seconds: float = 0.1, rate: int = RATE) -> list[Any]:
    """Audio records of sines, `count` of each class, an octave and more apart, at drawn pitches, phases and noise."""
    import numpy as np

    from lfm.data.records import Audio

    draw = np.random.default_rng(0)
    time = np.arange(round(seconds * rate)) / rate

    def tone(pitch: float) -> Any:
        wave = np.sin(2 * np.pi * (pitch * draw.uniform(0.9, 1.1) * time + draw.random()))
        return (0.5 * wave + 0.01 * draw.standard_normal(len(time))).astype(np.float32)

    pitches = dict(zip(TONES, (200.0, 800.0, 3200.0), strict=True))
    return [Audio(audio=(tone(pitch), rate), label=name) for _ in range(count) for name, pitch in pitches.items()]


def _labelled(labels: tuple[str, ...]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
