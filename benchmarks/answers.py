"""What keeping a teacher's answers costs: bytes a token, what is lost, tokens a second; beside DistillKit's codec.

    git clone https://github.com/arcee-ai/DistillKit /path/to/DistillKit
    python benchmarks/answers.py --peer /path/to/DistillKit --model MODEL --text TEXT --tokens 20000

The answers are those of a real model to a text (--model, --text), and of a made-up teacher of --vocabulary ids: logits
1.6 (−log(rank + 2.7) + 2 z), z normal and anew for each token and id, whose likeliest ids are therefore frequent ones
more often than others. Buckets are weighed by half of the tokens, and all is measured on the other half.

error: Σ p |Δ log p| over the k ids told, mean over tokens. left: mean |Δ(1 − Σ p)|. KL: DistillKit's own measure of its
codecs (kld_fwd of test_compression.py): KL(what comes back, scaled to add up to 1 ‖ teacher), −log Σ p at least. It has
no measure called "probability-weighted error": `error` is what we take that for. Speeds are tokens by a second of CPU
time of this process, one thread, the median of --repeat, the codecs in turn; DistillKit's work in torch, from the k
likeliest ids to bytes and back, as ours does.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

from lfm.core import Codec, Logits
from lfm.models import load
from lfm.models.answers.codec import code_for, decode, encode

K = 64
CHUNK = 256


class Told(NamedTuple):
    """The likeliest ids (n, k), best first, with their log-probabilities, of V."""

    name: str
    ids: torch.Tensor
    logprobs: torch.Tensor
    vocabulary: int


class Codec_(NamedTuple):
    """A codec: its k, bytes of ids and log-probabilities, and back; how many bytes they are."""

    name: str
    k: int
    there: Callable[[torch.Tensor, torch.Tensor], Any]
    back: Callable[[Any], tuple[torch.Tensor, torch.Tensor]]
    size: Callable[[Any], int]


def asked(model: str, text: str, count: int) -> Told:
    """What a causal model tells of a text, window by window."""
    teacher = load(model)
    tokenizer = teacher.ask(Codec).tokenizer
    every = tokenizer(Path(text).read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    ids = torch.tensor(every[: count // CHUNK * CHUNK]).view(-1, CHUNK)
    found = []
    for part in ids.split(8):
        logits = teacher.ask(Logits).logits({"input_ids": part, "attention_mask": torch.ones_like(part)})
        found.append(logits.flatten(0, 1).log_softmax(-1).topk(K))
    vocabulary = teacher.facts.vocabulary
    ids, logprobs = (torch.cat([part[i] for part in found]) for i in (1, 0))
    return _shuffled(Told(Path(model).name, ids, logprobs, vocabulary))


def made_up(vocabulary: int, count: int) -> Told:
    chance = torch.Generator().manual_seed(0)
    base = -torch.log(torch.arange(1, vocabulary + 1) + 2.7)
    found = []
    for _ in range(0, count, CHUNK):
        logits = 1.6 * (base + 2 * torch.randn(CHUNK, vocabulary, generator=chance))
        found.append(logits.log_softmax(-1).topk(K))
    ids, logprobs = (torch.cat([part[i] for part in found]) for i in (1, 0))
    return Told(f"made up, V = {vocabulary}", ids, logprobs, vocabulary)


def _shuffled(told: Told) -> Told:
    order = torch.randperm(len(told.ids), generator=torch.Generator().manual_seed(0))
    return told._replace(ids=told.ids[order], logprobs=told.logprobs[order])


def ours(sample: Told) -> Codec_:
    code = code_for(K, np.bincount(sample.ids.numpy().reshape(-1), minlength=sample.vocabulary))

    def there(ids: torch.Tensor, logprobs: torch.Tensor) -> Any:
        return encode(code, ids.numpy(), logprobs.numpy()), len(ids)

    def back(packed: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ids, told = decode(code, *packed)
        return torch.from_numpy(ids), torch.from_numpy(told)

    return Codec_("lfm", K, there, back, lambda packed: len(packed[0]))


def theirs(name: str, k: int, vocabulary: int, **settings: Any) -> Codec_:
    """A configuration of DistillKit's, from the directory that is on the path."""
    from distillkit.compression.compressor import LogprobCompressor  # type: ignore[import-not-found]
    from distillkit.compression.config import DistributionQuantizationConfig  # type: ignore[import-not-found]

    whole = {"residual_bins": [], "delta_encoding": False, "error_diffusion": False, "exact_dtype": "bfloat16"}
    made = LogprobCompressor(DistributionQuantizationConfig(d=vocabulary, k=k, **{**whole, **settings}))

    def there(ids: torch.Tensor, logprobs: torch.Tensor) -> Any:
        return made.compress_from_sparse(ids[:, :k].long(), logprobs[:, :k])

    return Codec_(name, k, there, made.decompress_to_sparse, lambda packed: sum(t.nbytes for t in packed.values()))


def lost(codec: Codec_, told: Told) -> tuple[float, float, float, float]:
    """Bytes a token, error, what is left, KL."""
    packed = codec.there(told.ids, told.logprobs)
    ids, back = codec.back(packed)
    order, other = told.ids[:, : codec.k].long().sort(1), ids.long().sort(1)
    assert torch.equal(order.values, other.values)
    x = told.logprobs[:, : codec.k].gather(1, order.indices).double()
    y = back.double().gather(1, other.indices)
    error = (x.exp() * (x - y).abs()).sum(1).mean()
    left = (x.exp().sum(1) - y.exp().sum(1)).abs().mean()
    scaled = y.log_softmax(1)
    kl = (scaled.exp() * (scaled - x)).sum(1).mean()
    return codec.size(packed) / len(told.ids), float(error), float(left), float(kl)


def speeds(codecs: list[Codec_], told: Told, repeat: int) -> list[tuple[float, float]]:
    """Tokens a second, there and back."""
    took: list[tuple[list[float], list[float]]] = [([], []) for _ in codecs]
    for _ in range(repeat):
        for codec, (there, back) in zip(codecs, took):
            many = max(1, 200_000 // len(told.ids)) if codec.name == "lfm" else 1
            ids, logprobs = told.ids.int().repeat(many, 1), told.logprobs.repeat(many, 1)
            start = time.process_time()
            packed = codec.there(ids, logprobs)
            middle = time.process_time()
            codec.back(packed)
            there.append(len(ids) / (middle - start))
            back.append(len(ids) / (time.process_time() - middle))
    return [(median(there), median(back)) for there, back in took]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", default="", help="a checkout of DistillKit")
    parser.add_argument("--model", default="", help="a causal model")
    parser.add_argument("--text", default="", help="a text that it is asked about")
    parser.add_argument("--vocabulary", type=int, nargs="*", default=[50257], help="of made-up teachers")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--repeat", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.peer:
        sys.path.insert(0, given.peer)
    sets = [asked(given.model, given.text, given.tokens)] if given.model else []
    sets += [made_up(vocabulary, given.tokens) for vocabulary in given.vocabulary]
    for told in sets:
        half = len(told.ids) // 2
        sample, rest = (told._replace(ids=told.ids[part], logprobs=told.logprobs[part])
                        for part in (slice(half), slice(half, None)))  # fmt: skip
        codecs = [ours(sample)]
        if given.peer:
            poly = {"polynomial_terms": [0, 1, "sqrt"], "exact_k": 1}
            codecs += [
                theirs("DistillKit, budget", 50, told.vocabulary, **poly),
                theirs("DistillKit, budget, k = 64", K, told.vocabulary, **poly),
                theirs("DistillKit, k = 64, 16 exact", K, told.vocabulary, exact_k=16,
                       polynomial_terms=[0, 1, 2, 3, 4, "sqrt"]),
            ]  # fmt: skip
        mass = rest.logprobs.exp().sum(1).mean()
        best = rest.logprobs[:, 0].exp().mean()
        print(f"\n{told.name}: {len(rest.ids)} tokens, p of the best {best:.2f}, of {K} {mass:.3f}")
        print(f"{'':30}{'B/token':>9}{'error':>10}{'left':>10}{'KL':>10}{'there/s':>12}{'back/s':>12}")
        for codec, speed in zip(codecs, speeds(codecs, rest, given.repeat)):
            size, error, left, kl = lost(codec, rest)
            print(f"{codec.name:30}{size:9.1f}{error:10.5f}{left:10.5f}{kl:10.5f}{speed[0]:12,.0f}{speed[1]:12,.0f}")


if __name__ == "__main__":
    main()
