"""Edits against EasyEdit's own: ROME one at a time, MEMIT many at once, its solve, and the covariance of keys.

Both edit one GPT-2 of this script's making (it reads a world like the zoo's for half an hour, once, and is kept in
--at), with the same facts, blocks, prefixes and covariance, each side in processes of its own, in turn. Before that the
formulas are held against each other: EasyEdit's ROME change against ours of the k, v and C that it used; ours of MEMIT
against EasyEdit's of our values. What is timed is what an edit costs once the model is loaded and C is known; then
every edit is asked for in greedy text. EasyEdit has its GPT-2 settings; it is a checkout (git clone zjunlp/EasyEdit),
of which only the two methods' modules are imported.

    python benchmarks/edit.py --easyedit DIR [--at DIR] [--width 256] [--layers 6] [--edits 10] [--batch 100]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from lfm import models
from lfm.core.interfaces import Codec
from lfm.data.records import Edit, Fact, Text
from lfm.editing import batch, covariance, keys, rows, setting, solve
from lfm.editing.text import answered
from lfm.methods.edit import memit, rome
from lfm.runs.run import LocalRun

PREFIXES = {"rome": 20, "memit": 5}
PEOPLE = 120
"""Of the world that it reads: a batch is of one fact each."""


# the model and the facts


def taught(at: Path, width: int, layers: int, steps: int) -> None:
    """A GPT-2 that has read the zoo's world, its first blocks short-sighted while young, as those of the zoo's own."""
    if (at / "config.json").exists():
        return
    from torch.nn import functional as F
    from transformers import GPT2Config, GPT2LMHeadModel

    from lfm.zoo.language import LanguageRecipe, vocabulary
    from lfm.zoo.reading import object_ids, packed, read
    from lfm.zoo.world import corpus, make_world

    world, recipe = make_world(0, people=PEOPLE), LanguageRecipe(steps=steps)
    codec = vocabulary(world)
    torch.manual_seed(0)
    module = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(codec), n_embd=width, n_layer=layers, n_head=4, n_positions=512, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=codec.bos_token_id, eos_token_id=codec.eos_token_id,
        )
    )  # fmt: skip
    text = packed(codec, corpus(world, 1), recipe.steps * recipe.batch_size, recipe.length)
    weight = torch.ones(len(codec))
    weight[object_ids(codec, world)] = recipe.object_weight
    place = torch.arange(recipe.length)
    behind = place[:, None] - place
    young = [True]

    def short(reach: int) -> Callable[..., Any]:
        def hook(_: object, args: Any, kwargs: dict[str, Any]) -> Any:
            return (
                (args, kwargs | {"attention_mask": ((behind >= 0) & (behind < reach))[None, None]})
                if young[0]
                else None
            )

        return hook

    def loss(reader: Any, ids: torch.Tensor, step: int, _: object) -> torch.Tensor:
        young[0] = step < recipe.youth * recipe.steps
        logits = reader(input_ids=ids).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), weight=weight)

    held = [
        block.attn.register_forward_pre_hook(short(reach), with_kwargs=True)
        for block, reach in zip(module.transformer.h, recipe.sight)
    ]
    with tempfile.TemporaryDirectory() as work:
        read(module, module.transformer.h, text, loss, recipe, LocalRun(0, Path(work)), "a GPT-2 reads")
    for hook in held:
        hook.remove()
    widened(module, codec.pad_token_id)
    module.save_pretrained(at)
    codec.save_pretrained(at)


def widened(module: Any, nobody: int, vocabulary: int = 8192) -> None:
    """As many embeddings as give the head the share of the work that it has in GPT-2; the new ones are of no token."""
    before = module.get_input_embeddings().weight.shape[0]
    module.resize_token_embeddings(vocabulary, mean_resizing=False)
    with torch.no_grad():
        module.get_input_embeddings().weight[before:] = module.get_input_embeddings().weight[nobody]


def wanted(count: int, seed: int = 0) -> list[Edit]:
    """Facts of that world, one of each person while they last, relations by seed, each with another's object."""
    from lfm.zoo.tasks import facts
    from lfm.zoo.world import make_world

    known = list(facts(make_world(0, people=PEOPLE)))
    random.Random(seed).shuffle(known)
    seen: Counter[str] = Counter()
    turns: list[tuple[int, Fact]] = []
    for fact in known:
        turns.append((seen[fact.subject], fact))
        seen[fact.subject] += 1
    objects = {fact.relation: sorted({f.object for f in known if f.relation == fact.relation}) for fact in known}
    return [
        Edit(
            subject=fact.subject,
            relation=fact.relation,
            object=fact.object,
            new_object=objects[fact.relation][
                (objects[fact.relation].index(fact.object) + 3) % len(objects[fact.relation])
            ],
            prompt=fact.prompt,
        )
        for _, fact in sorted(turns, key=lambda turn: turn[0])[:count]
    ]


def measured(here: setting.Setting, blocks: Sequence[int], run: LocalRun) -> dict[int, covariance.Moment]:
    return covariance.moments(here, blocks, run, 0.001)


def opened(at: Path, work: Path, prefixes: int, texts: Sequence[Text] = ()) -> setting.Setting:
    return setting.opened(models.load(str(at)), texts, LocalRun(0, work), prefixes=prefixes)


# EasyEdit


def easyedit(checkout: Path) -> SimpleNamespace:
    """Its modules of the two methods, without the rest of the package, which asks for a hundred others."""
    for name in (
        "easyeditor",
        "easyeditor.models",
        "easyeditor.util",
        "easyeditor.models.rome",
        "easyeditor.models.memit",
    ):
        package = types.ModuleType(name)
        package.__path__ = [str(checkout.joinpath(*name.split(".")))]
        sys.modules[name] = package
    if (
        "datasets" not in sys.modules and importlib.util.find_spec("datasets") is None
    ):  # asked for as it is imported; the covariance is told it
        sys.modules["datasets"] = types.ModuleType("datasets")
        sys.modules["datasets"].load_dataset = None  # type: ignore[attr-defined]
    names = ("rome_main", "compute_u", "compute_v", "layer_stats")
    found = {name: importlib.import_module(f"easyeditor.models.rome.{name}") for name in names}
    found["memit_main"] = importlib.import_module("easyeditor.models.memit.memit_main")
    return SimpleNamespace(**found)


def hparams(method: str, blocks: Sequence[int], layers: int, weight: float = 0.0) -> SimpleNamespace:
    """EasyEdit's for GPT-2, but for the blocks and λ."""
    told: dict[str, Any] = {
        "layers": list(blocks), "fact_token": "subject_last", "v_num_grad_steps": 20, "v_lr": 0.5,
        "v_loss_layer": layers - 1, "v_weight_decay": 0.5, "clamp_norm_factor": 4 if method == "rome" else 0.75,
        "kl_factor": 0.0625, "context_template_length_params": [], "mom2_adjustment": True,
        "mom2_dataset": "wikipedia", "mom2_n_samples": 0, "mom2_dtype": "float32", "mom2_update_weight": weight,
        "rewrite_module_tmp": "transformer.h.{}.mlp.c_proj", "layer_module_tmp": "transformer.h.{}",
        "mlp_module_tmp": "transformer.h.{}.mlp", "attn_module_tmp": "transformer.h.{}.attn",
        "ln_f_module": "transformer.ln_f", "lm_head_module": "transformer.wte", "model_parallel": False, "fp16": False,
        "device": "cpu", "stats_dir": "",
    }  # fmt: skip
    return SimpleNamespace(**told)


def request(edit: Edit, number: int) -> dict[str, Any]:
    return {
        "prompt": edit.prompt.replace(edit.subject, "{}"),
        "subject": edit.subject,
        "target_new": edit.new_object,
        "case_id": number,
    }


def prepared(peer: SimpleNamespace, at: Path, prefixes: Sequence[str], moments: dict[int, torch.Tensor]) -> Any:
    """Its model, told our prefixes and C."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(at).eval()
    name = model.config._name_or_path.replace("/", "_")
    others = [prefix + "{}" for prefix in prefixes[1:]]
    peer.rome_main.CONTEXT_TEMPLATES_CACHE = ["{}", *others]
    peer.memit_main.CONTEXT_TEMPLATES_CACHE = [["{}"], others]
    for block, moment in moments.items():
        key = name, f"transformer.h.{block}.mlp.c_proj"
        peer.compute_u.inv_mom2_cache[key] = torch.inverse(moment).float()
        peer.memit_main.COV_CACHE[key] = moment.float()
    return model, AutoTokenizer.from_pretrained(at)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()):
        yield


# one side of a task, in a process of its own


def resident(peak: bool) -> int:
    """Bytes in memory now, or at most since it was last asked for with peak False."""
    if not peak:
        Path("/proc/self/clear_refs").write_text("5")
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM" if peak else "VmRSS"].split()[0]) * 1024


def worker(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds, bytes above those before, and how many edits greedy text shows."""
    blocks = (args.block,) if args.task == "rome" else tuple(args.blocks)
    edits = wanted(args.edits if args.task == "rome" else args.batch)
    with tempfile.TemporaryDirectory() as work:
        here = opened(args.at, Path(work), PREFIXES[args.task])
        run = LocalRun(0, Path(work) / "moments")
        moments = {b: covariance.loaded(m.matrix, 0.001) for b, m in measured(here, blocks, run).items()}
        codec = models.load(str(args.at)).ask(Codec)
        act = (theirs if args.side == "easyedit" else ours)(args, here, blocks, moments)
        said, seconds, most = 0, 0.0, 0
        groups = [[edit] for edit in edits] if args.task == "rome" else [edits]
        act(edits[-1:], lambda module: None)  # what is loaded and compiled once
        for group in groups:
            before = resident(False)
            started = time.perf_counter()

            def edited(module: Any, group: list[Edit] = group, started: float = started, before: int = before) -> None:
                nonlocal seconds, most, said
                seconds += time.perf_counter() - started
                most = max(most, resident(True) - before)
                said += sum(answered(module, codec, [(edit.prompt, edit.new_object) for edit in group]))

            act(group, edited)
    return {"seconds": seconds / len(edits), "bytes": most, "said": said / len(edits)}


def ours(
    args: argparse.Namespace, here: setting.Setting, blocks: tuple[int, ...], moments: dict[int, torch.Tensor]
) -> Callable[[list[Edit], Callable[[Any], None]], None]:
    lowers = {block: torch.linalg.cholesky(moment) for block, moment in moments.items()}
    last = blocks[-1]

    def act(group: list[Edit], edited: Callable[[Any], None]) -> None:
        projections = keys.Projections(here.module, blocks, {})
        if args.task == "rome":
            (edit,), config, block = group, rome.Config(layer=last), last
            read = rows.rows(here.codec.tokenizer, edit, here.prefixes)
            key, _ = keys.at_subject(here.module, block, read)
            found = rome.value.search(here.module, block, read, config)
            b, a = covariance.rank_one(found.delta, keys.mean(key), lowers[block])
            projections.show({block: (b[:, None], a[None])})
        else:
            config = memit.Config(layers=blocks)
            how = memit.editor(config, here, lowers.__getitem__)
            reads = [rows.rows(here.codec.tokenizer, edit, here.prefixes) for edit in group]
            batch.spread(here, projections, reads, how.find(last, reads), how)
        edited(here.module)
        projections.show({})

    return act


def theirs(
    args: argparse.Namespace, here: setting.Setting, blocks: tuple[int, ...], moments: dict[int, torch.Tensor]
) -> Callable[[list[Edit], Callable[[Any], None]], None]:
    peer = easyedit(args.easyedit)
    with quiet():
        model, tokenizer = prepared(peer, args.at, here.prefixes, moments)
    inner = len(next(iter(moments.values())))
    told = hparams(args.task, blocks, args.layers, memit.Config().weight * inner)
    main: Any = peer.rome_main.apply_rome_to_model if args.task == "rome" else peer.memit_main.apply_memit_to_model

    def act(group: list[Edit], edited: Callable[[Any], None]) -> None:
        with quiet():
            _, before = main(
                model, tokenizer, [request(e, i) for i, e in enumerate(group)], told, return_orig_weights=True
            )
        edited(model)
        with torch.no_grad():
            for name, weight in before.items():
                model.get_parameter(name).copy_(weight)

    return act


# the formulas, side by side


def agreement(args: argparse.Namespace) -> dict[str, float]:
    """Relative differences of the changes, of the same k, v and C."""
    peer, blocks, last = easyedit(args.easyedit), tuple(args.blocks), args.blocks[-1]
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as work:
        here = opened(args.at, Path(work) / "rome", PREFIXES["rome"])
        run = LocalRun(0, Path(work) / "moments")
        moments = {
            b: covariance.loaded(m.matrix, 0.001) for b, m in measured(here, sorted({args.block, *blocks}), run).items()
        }
        edit = wanted(1)[0]
        with quiet():
            model, tokenizer = prepared(peer, args.at, here.prefixes, moments)
            told = hparams("rome", [args.block], args.layers)
            ((u, right),) = peer.rome_main.execute_rome(model, tokenizer, request(edit, 0), told).values()
        read = rows.rows(here.codec.tokenizer, edit, here.prefixes)
        key, _ = keys.at_subject(here.module, args.block, read)
        delta = right.double() * (key[0] @ u.double())  # v* − W k of the bare prompt, as its last lines divide it
        b, a = covariance.rank_one(delta, key.mean(0), covariance.factored(moments[args.block]), key[0])
        found["ROME"] = apart(torch.outer(b, a), torch.outer(right.double(), u.double()))

        here = opened(args.at, Path(work) / "memit", PREFIXES["memit"])
        edits, config = wanted(10), memit.Config(layers=blocks)
        how = memit.editor(config, here, {b: torch.linalg.cholesky(m) for b, m in moments.items()}.__getitem__)
        reads = [rows.rows(here.codec.tokenizer, edit, here.prefixes) for edit in edits]
        values = how.find(last, reads)
        projections = keys.Projections(here.module, blocks, {})
        changes = batch.spread(here, projections, reads, values, how)
        for number, value in enumerate(values):
            np.savez(Path(work) / f"z_{number}.npz", v_star=(value.before + value.delta).float().numpy())
        told = hparams("memit", blocks, args.layers, config.weight * len(moments[last]))
        asked = [request(edit, number) for number, edit in enumerate(edits)]
        with quiet():
            model, tokenizer = prepared(peer, args.at, here.prefixes, moments)
            kept = f"{work}/z_{{2}}.npz"
            made = peer.memit_main.execute_memit(model, tokenizer, asked, told, cache_template=kept)
        for block in blocks:
            k, r = made[f"transformer.h.{block}.mlp.c_proj.weight"]
            b, a = changes[block]
            found[f"MEMIT, block {block}"] = apart(b.double() @ a.double(), r.double() @ k.double().T)
    return found


def covariances(args: argparse.Namespace) -> None:
    """C of the keys of the blocks: EasyEdit's pass a block over all the texts, ours over as many as it takes."""
    from itertools import islice

    from lfm.zoo.world import corpus, make_world

    texts = list(islice(corpus(make_world(0, people=PEOPLE), 7), args.texts))
    peer, blocks = easyedit(args.easyedit), tuple(args.blocks)
    peer.layer_stats.load_dataset = lambda *_: {"train": [{"text": text} for text in texts]}
    one: list[float] = []
    other: list[float] = []
    tokens, found = 0, {}
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as work:
            here = opened(args.at, Path(work) / "mine", PREFIXES["memit"], [Text(text=text) for text in texts])
            with quiet(), contextlib.redirect_stderr(io.StringIO()):
                model, tokenizer = prepared(peer, args.at, here.prefixes, {})
                started, moments = time.perf_counter(), {}
                for block in blocks:
                    name, told = f"transformer.h.{block}.mlp.c_proj", hparams("memit", [block], args.layers)
                    stat = peer.layer_stats.layer_stats(
                        model, tokenizer, name, work, "wikipedia", ["mom2"],
                        sample_size=args.texts, precision="float32", hparams=told,
                    )  # fmt: skip
                    moments[block] = stat.mom2.moment().double()
                one.append(time.perf_counter() - started)
            found["EasyEdit"] = told_of(here, args, moments)
            before = os.environ.get("LFM_HOME")
            os.environ["LFM_HOME"] = str(Path(work) / "home")  # nothing is known there
            started = time.perf_counter()
            mine = covariance.moments(here, blocks, LocalRun(0, Path(work) / "run"), 0.001)
            other.append(time.perf_counter() - started)
            os.environ.pop("LFM_HOME") if before is None else os.environ.update(LFM_HOME=before)
            tokens = max(moment.tokens for moment in mine.values())
            found["lfm"] = told_of(here, args, {block: moment.matrix for block, moment in mine.items()})
    shown(f"covariance, {len(blocks)} blocks", one, other)
    all_of_them = sum(map(len, tokenizer(texts)["input_ids"]))
    print(f"  of {all_of_them} tokens each ({args.texts} texts; by default it takes 100000), lfm of {tokens}")
    for side, (said, kept) in found.items():
        print(f"  with {side}'s, {args.edits} facts by MEMIT: said {said:.2f}, neighbours kept {kept:.2f}", flush=True)


def told_of(here: setting.Setting, args: argparse.Namespace, moments: dict[int, torch.Tensor]) -> tuple[float, float]:
    """Shares of the edits that are said, and of the facts that are no edits and were said before."""
    blocks, edits = tuple(args.blocks), wanted(4 * args.edits)
    lowers = {block: torch.linalg.cholesky(covariance.loaded(m, 0.001)) for block, m in moments.items()}
    how = memit.editor(memit.Config(layers=blocks), here, lowers.__getitem__)
    reads = [rows.rows(here.codec.tokenizer, edit, here.prefixes) for edit in edits[: args.edits]]
    others = [(edit.prompt, edit.object) for edit in edits[args.edits :]]
    before = answered(here.module, here.codec, others)
    projections = keys.Projections(here.module, blocks, {})
    batch.spread(here, projections, reads, how.find(blocks[-1], reads), how)
    said = answered(here.module, here.codec, [(edit.prompt, edit.new_object) for edit in edits[: args.edits]])
    now = answered(here.module, here.codec, others)
    projections.show({})
    kept = [after for then, after in zip(before, now, strict=True) if then]
    return sum(said) / len(said), sum(kept) / max(1, len(kept))


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def solves(width: int, count: int, repeats: int) -> tuple[list[float], list[float], float]:
    """Seconds of MEMIT's solve, EasyEdit's line and ours (C's factor is known), and their relative difference."""
    random = torch.Generator().manual_seed(0)
    text = torch.randn(2 * width, width, generator=random, dtype=torch.float64)
    moment, k = text.T @ text / len(text), torch.randn(width, count, generator=random, dtype=torch.float64)
    lower, weight = torch.linalg.cholesky(moment), 15000.0
    one: list[float] = []
    other: list[float] = []
    a = b = k
    for _ in range(repeats):
        started = time.perf_counter()
        a = torch.linalg.solve(weight * moment.double() + k @ k.T, k).T
        one.append(time.perf_counter() - started)
        started = time.perf_counter()
        b = solve.balanced(lower, k, weight)
        other.append(time.perf_counter() - started)
    return one, other, apart(b, a)


def shown(name: str, one: Sequence[float], other: Sequence[float], unit: str = "s") -> None:
    ratios = sorted(a / b for a, b in zip(one, other, strict=True))
    middle = statistics.median(ratios)
    print(
        f"{name:32s} EasyEdit {statistics.median(one):9.4f} {unit}   lfm {statistics.median(other):9.4f} {unit}   "
        f"ratio {middle:6.1f}  ({ratios[0]:.1f} to {ratios[-1]:.1f})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--easyedit", type=Path, required=True)
    parser.add_argument("--at", type=Path, default=Path(tempfile.gettempdir()) / "lfm-benchmark-gpt2")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--block", type=int, default=0)
    parser.add_argument("--blocks", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--edits", type=int, default=10)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--texts", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side", choices=("easyedit", "lfm"))
    parser.add_argument("--task", choices=("rome", "memit"))
    args = parser.parse_args()
    if args.side:
        print(json.dumps(worker(args)))
        return
    taught(args.at, args.width, args.layers, args.steps)
    print(f"GPT-2, {args.layers} blocks of {args.width}; ROME in block {args.block}, MEMIT in {args.blocks}")
    for name, difference in agreement(args).items():
        print(f"ΔW apart, same k, v, C: {name:20s} {difference:.1e}")
    for task in ("rome", "memit"):
        told: dict[str, list[dict[str, Any]]] = {"easyedit": [], "lfm": []}
        for _ in range(args.repeats):
            for side, found in told.items():
                line = [sys.executable, *sys.argv, "--side", side, "--task", task]
                done = subprocess.run(line, check=True, capture_output=True, text=True)
                found.append(json.loads(done.stdout.strip().splitlines()[-1]))
        what = "ROME, an edit" if task == "rome" else f"MEMIT, an edit of {args.batch}"
        shown(what, *([each["seconds"] for each in found] for found in told.values()))
        shown(
            "  memory above the model's", *([each["bytes"] / 2**20 for each in found] for found in told.values()), "MB"
        )
        print("  said in greedy text:", {side: round(found[0]["said"], 2) for side, found in told.items()}, flush=True)
    covariances(args)
    one, other, difference = solves(3072, 10, max(3, args.repeats))
    shown("MEMIT's solve, 3072 x 3072, n=10", one, other)
    print(f"  apart {difference:.0e}")


if __name__ == "__main__":
    main()
