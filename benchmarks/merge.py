"""Merging beside mergekit: wall time, CPU time and anonymous memory of whole processes, on the same files in turn.

    python benchmarks/merge.py --mergekit /path/to/its/venv/bin/mergekit-yaml
    python benchmarks/merge.py --scaling

Makes Llama-shaped bf16 checkpoints (a base and models that differ from it a little; --blocks and --width set their
size, --shards how many files each has), then runs `mergekit-yaml RECIPE OUT -j 2 --quiet` and `lfm merge RECIPE OUT` on
the same recipe in turn. The first turn warms caches (and compiles lfm's kernels, and keeps digests) and is not counted;
ratios are medians over the others, with the smallest and the largest. `net` is the ratio less what each tool takes for
a model of one small block, its start-up. Anonymous memory is the largest RssAnon seen in /proc (mapped files are not
in it). A plain copy reads the same inputs and writes one output of the same size. Results are held against numpy in
fp64, on some tensors: errors are in units in the last place of the output, and exact rounding gives 0.5. For random
methods the fraction of changed entries is shown. --scaling shows lfm alone: by number of models, size and cores.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

TARGETS = {"linear": 5.0, "task_arithmetic": 5.0, "slerp": 6.0, "dare_ties": 10.0, "ties": 20.0}
"""mergekit's wall time by lfm's, to be reached."""

DENSITY = 0.2
MEMORY = 0.25


class Shape(NamedTuple):
    """A checkpoint's size."""

    blocks: int
    width: int
    vocabulary: int = 32000

    @property
    def inner(self) -> int:
        return self.width * 11 // 4

    def tensors(self) -> dict[str, tuple[int, ...]]:
        w, kv = self.width, self.width // 4
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, w)}
        for i in range(self.blocks):
            block = f"model.layers.{i}."
            found |= {
                f"{block}self_attn.q_proj.weight": (w, w),
                f"{block}self_attn.k_proj.weight": (kv, w),
                f"{block}self_attn.v_proj.weight": (kv, w),
                f"{block}self_attn.o_proj.weight": (w, w),
                f"{block}mlp.gate_proj.weight": (self.inner, w),
                f"{block}mlp.up_proj.weight": (self.inner, w),
                f"{block}mlp.down_proj.weight": (w, self.inner),
                f"{block}input_layernorm.weight": (w,),
                f"{block}post_attention_layernorm.weight": (w,),
            }
        return found | {"model.norm.weight": (w,), "lm_head.weight": (self.vocabulary, w)}

    def config(self) -> dict[str, object]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.width,
            "intermediate_size": self.inner,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "num_hidden_layers": self.blocks,
            "vocab_size": self.vocabulary,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }


def bf16(values: np.ndarray) -> np.ndarray:
    """fp32 to the bits of bf16, to nearest even."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def wide(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def make(path: Path, shape: Shape, seed: int, shards: int) -> None:
    """The base's numbers by their tensor; model `seed` > 0 has the base's and noise of a tenth of their size."""
    path.mkdir(parents=True)
    names = list(shape.tensors())
    groups = [names[i * len(names) // shards : (i + 1) * len(names) // shards] for i in range(shards)]
    files = (
        ["model.safetensors"]
        if shards == 1
        else [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    )
    for file, group in zip(files, groups):
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name in group:
            size = 2 * int(np.prod(shape.tensors()[name]))
            header[name] = {"dtype": "BF16", "shape": list(shape.tensors()[name]), "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (path / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name in group:
                size = int(np.prod(shape.tensors()[name]))
                place = names.index(name)
                values = np.random.default_rng([0, place]).standard_normal(size, dtype=np.float32) * 0.02
                if seed:
                    values += np.random.default_rng([seed, place]).standard_normal(size, dtype=np.float32) * 0.002
                out.write(bf16(values).tobytes())
    if shards > 1:
        index = {"metadata": {}, "weight_map": {name: file for file, group in zip(files, groups) for name in group}}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps(shape.config()))


def read(path: Path, name: str) -> np.ndarray:
    """A tensor's bits, flat."""
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
            if name in header:
                begin, end = header[name]["data_offsets"]
                opened.seek(8 + length + begin)
                return np.frombuffer(opened.read(end - begin), dtype=np.uint16)
    raise KeyError(name)


class Used(NamedTuple):
    """What a process took: seconds, seconds of CPU, bytes of anonymous memory at most."""

    wall: float
    cpu: float
    anonymous: int


def measured(argv: Sequence[str], environment: Mapping[str, str], cores: int = 0) -> Used:
    """Run a command, on so many cores (0: all). SystemExit with its output if it fails."""
    few = sorted(os.sched_getaffinity(0))[:cores]
    with tempfile.TemporaryFile() as output:
        began = time.perf_counter()
        child = subprocess.Popen(
            argv,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            preexec_fn=(lambda: os.sched_setaffinity(0, few)) if few else None,
        )
        largest = [0]
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.01):
                try:
                    text = Path(f"/proc/{child.pid}/status").read_text()
                except OSError:
                    return
                anonymous = [line.split()[1] for line in text.splitlines() if line.startswith("RssAnon")]
                largest[0] = max(largest[0], *(int(kilobytes) * 1024 for kilobytes in anonymous), 0)

        watcher = threading.Thread(target=watch)
        watcher.start()
        _, status, used = os.wait4(child.pid, 0)
        wall = time.perf_counter() - began
        done.set()
        watcher.join()
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            output.seek(0)
            raise SystemExit(f"{' '.join(argv)} failed:\n{output.read().decode(errors='replace')[-4000:]}")
    return Used(wall, used.ru_utime + used.ru_stime, largest[0])


def copied(inputs: Sequence[Path], out: Path) -> float:
    """Seconds to read all inputs and write one output, in pieces of a megabyte."""
    began = time.perf_counter()
    buffer = memoryview(bytearray(1 << 20))
    with out.open("wb") as written:
        for place, path in enumerate(inputs):
            for file in sorted(path.glob("*.safetensors")):
                with file.open("rb", buffering=0) as opened:
                    while got := opened.readinto(buffer):
                        if place == 0:
                            written.write(buffer[:got])
    took = time.perf_counter() - began
    out.unlink()
    return took


class Merge(NamedTuple):
    """One method's recipe, for both tools, and its equation in fp64 (None for random ones)."""

    recipe: Callable[[Path], dict[str, object]]
    exact: Callable[[list[np.ndarray]], np.ndarray] | None
    base: bool = True


def parts(where: Path, count: int = 2, **each: float) -> list[dict[str, object]]:
    return [{"model": str(where / f"m{i + 1}"), "parameters": each} for i in range(count)]


def trimmed(change: np.ndarray) -> np.ndarray:
    single = np.abs(change.astype(np.float32))
    keep = max(1, int(DENSITY * len(single)))
    return np.where(single >= np.partition(single, len(single) - keep)[len(single) - keep], change, 0.0)


def by_ties(m: list[np.ndarray]) -> np.ndarray:
    changes = [trimmed(x - m[0]) for x in m[1:]]
    total = sum(changes)
    kept = [np.where(np.sign(c) == np.sign(total), c, 0.0) for c in changes]
    merged = m[0] + sum(kept) / np.maximum(sum((k != 0).astype(float) for k in kept), 1)
    return np.where(
        (total == 0) & (changes[0] != 0), np.nan, merged
    )  # where signs cancel out, the tools differ by intent


def by_slerp(m: list[np.ndarray]) -> np.ndarray:
    dot = (m[0] @ m[1]) / np.sqrt((m[0] @ m[0]) * (m[1] @ m[1]))
    if abs(dot) > 0.9995:
        return (m[0] + m[1]) / 2
    return (m[0] + m[1]) * np.sin(np.arccos(dot) / 2) / np.sin(np.arccos(dot))


MERGES = {
    "linear": Merge(
        lambda w: {"merge_method": "linear", "models": parts(w, weight=1.0)},
        lambda m: (m[1] + m[2]) / 2,
        base=False,
    ),
    "task_arithmetic": Merge(
        lambda w: {"merge_method": "task_arithmetic", "base_model": str(w / "m0"), "models": parts(w, weight=0.5)},
        lambda m: m[0] + 0.5 * (m[1] - m[0]) + 0.5 * (m[2] - m[0]),
    ),
    "slerp": Merge(
        lambda w: {
            "merge_method": "slerp",
            "base_model": str(w / "m0"),
            "models": [{"model": str(w / "m0")}, {"model": str(w / "m1")}],
            "parameters": {"t": 0.5},
        },
        by_slerp,
        base=False,
    ),
    "dare_ties": Merge(
        lambda w: {
            "merge_method": "dare_ties",
            "base_model": str(w / "m0"),
            "models": parts(w, weight=0.5, density=DENSITY),
        },
        None,
    ),
    "ties": Merge(
        lambda w: {
            "merge_method": "ties",
            "base_model": str(w / "m0"),
            "models": parts(w, weight=1.0, density=DENSITY),
        },
        by_ties,
    ),
}


def error(merge: Merge, where: Path, out: Path) -> float:
    """The largest error on some tensors, in units in the last place; of a random method, the fraction that it kept."""
    names = [n for n in Shape(1, 0).tensors() if "layers" in n]
    worst, kept, count = 0.0, 0, 0
    for name in names:
        inputs, found = [wide(read(where / f"m{i}", name)) for i in range(3)], wide(read(out, name))
        if merge.exact is None:
            either = (inputs[1] != inputs[0]) | (inputs[2] != inputs[0])
            kept, count = kept + int((found != inputs[0])[either].sum()), count + int(either.sum())
            continue
        exact = merge.exact(inputs)
        place = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(exact), 1e-6))) - 7)
        worst = max(worst, float(np.nanmax(np.abs(found - exact) / place)))
    return worst if merge.exact else kept / count


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--mergekit", metavar="FILE", help="mergekit-yaml of mergekit 0.1.5; without it lfm runs alone")
    parser.add_argument("--methods", default=",".join(MERGES), metavar="NAME,…")
    parser.add_argument("--blocks", type=int, default=14)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="counted turns (default 3)")
    parser.add_argument("--dtype", default="bfloat16", help="mergekit's arithmetic: bfloat16, or float32")
    parser.add_argument("--work", metavar="DIR", help="where checkpoints are made, and kept if they are there")
    parser.add_argument("--scaling", action="store_true", help="lfm alone, by models, size and cores")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    keep = asked.work is not None
    where = Path(asked.work or tempfile.mkdtemp(prefix="lfm-merge-"))
    shape = Shape(asked.blocks, asked.width)
    try:
        if asked.scaling:
            scaling(where, asked)
            return 0
        ready(where, shape, 2, asked.shards)
        ready(where / "small", Shape(1, 64, 256), 2, 1)
        count = sum(int(np.prod(s)) for s in shape.tensors().values())
        rows = [compared(name, where, asked) for name in asked.methods.split(",")]
    finally:
        if not keep:
            shutil.rmtree(where, ignore_errors=True)
    if asked.json:
        print(json.dumps({"parameters": count, "rows": rows}, indent=1))
    else:
        shown(rows, count)
    return 0


def ready(where: Path, shape: Shape, models: int, shards: int) -> None:
    """A base and so many models, unless they are there."""
    for seed in range(models + 1):
        if not (where / f"m{seed}").exists():
            make(where / f"m{seed}", shape, seed, shards)


def commands(merge: Merge, where: Path, asked: argparse.Namespace) -> dict[str, tuple[list[str], Path]]:
    """What each tool is told, and where its result goes."""
    recipe, lfm = where / "recipe.yml", Path(sys.executable).with_name("lfm")
    told = {**merge.recipe(where), "dtype": asked.dtype, "out_dtype": "bfloat16"}
    recipe.write_text(json.dumps(told))  # JSON is YAML
    ours, theirs = where / "lfm-out", where / "mergekit-out"
    found = {"lfm": ([str(lfm), "merge", str(recipe), str(ours), "--json"], ours)}
    if asked.mergekit:
        found["mergekit"] = ([asked.mergekit, str(recipe), str(theirs), "-j", "2", "--quiet"], theirs)
    return found


def taken(command: tuple[list[str], Path], cores: int = 0) -> Used:
    argv, out = command
    shutil.rmtree(out, ignore_errors=True)
    return measured(argv, {"HF_HUB_OFFLINE": "1"}, cores)


def compared(name: str, where: Path, asked: argparse.Namespace) -> dict[str, object]:
    merge = MERGES[name]
    starts: dict[str, list[Used]] = {}
    for turn in range(asked.repeat + 1):
        for tool, command in commands(merge, where / "small", asked).items():
            used = taken(command)
            starts.setdefault(tool, []).extend([used] if turn else [])
    both = commands(merge, where, asked)
    took: dict[str, list[Used]] = {tool: [] for tool in both}
    copies, errors = [], {}
    for turn in range(asked.repeat + 1):
        for tool, command in both.items():
            used = taken(command)
            if turn:
                took[tool].append(used)
            else:
                errors[tool] = error(merge, where, command[1])
            shutil.rmtree(command[1])
        read_ = (0, 1, 2) if merge.base else (1, 2)
        copies.append(copied([where / f"m{i}" for i in read_], where / "copy"))
    return {
        "method": name,
        "copy": median(copies[1:] or copies),
        **{tool: [list(used) for used in each] for tool, each in took.items()},
        "start": {tool: median(used.wall for used in each) for tool, each in starts.items()},
        "error": errors,
        "random": merge.exact is None,
    }


def shown(rows: Sequence[Mapping[str, object]], count: int) -> None:
    print(f"{count / 1e9:.2f} B parameters, bf16\n")
    heads = ("wall s", "start", "CPU s", "MB anon.", "error")
    print(
        f"{'':<16}{'':<10}"
        + "".join(f"{head:>10}" for head in heads)
        + f"{'wall':>9}{'':>15}{'net':>8}{'CPU':>8}{'mem.':>8}{'of copy':>9}  target"
    )
    for row in rows:
        for tool in ("mergekit", "lfm"):
            if tool not in row:
                continue
            each: list[list[float]] = row[tool]  # type: ignore[assignment]
            wall, cpu, memory = (median(values) for values in zip(*each))
            told, start = row["error"][tool], row["start"]  # type: ignore[index]
            text = f"{row['method'] if tool == 'mergekit' or 'mergekit' not in row else '':<16}{tool:<10}"
            text += f"{wall:>10.2f}{start[tool]:>10.2f}{cpu:>10.2f}{memory / 1e6:>10.0f}"  # type: ignore[index]
            text += f"{told:>9.1%} " if row["random"] else f"{told:>10.2f}"
            if tool == "lfm":
                text += ratios(row) if "mergekit" in row else " " * 48
                text += f"{row['copy'] / wall:>9.2f}  ≥ {TARGETS.get(str(row['method']), 0):.0f}×"  # type: ignore[operator]
            print(text)
    print("\nerror: units in the last place against fp64 (0.5: exact rounding); random methods: the fraction changed")


def ratios(row: Mapping[str, object]) -> str:
    """mergekit's by lfm's, turn by turn: wall time with its spread, net of start-ups, CPU time; lfm's memory by its."""
    pairs = list(zip(row["mergekit"], row["lfm"]))  # type: ignore[call-overload]
    start: dict[str, float] = row["start"]  # type: ignore[assignment]
    wall = [a[0] / b[0] for a, b in pairs]
    net = median((a[0] - start["mergekit"]) / max(1e-3, b[0] - start["lfm"]) for a, b in pairs)
    spread = f"({min(wall):.1f}–{max(wall):.1f})"
    cpu, memory = median(a[1] / b[1] for a, b in pairs), median(b[2] / a[2] for a, b in pairs)
    return f"{median(wall):>8.1f}×{spread:>15}{net:>7.1f}×{cpu:>7.1f}×{memory:>8.2f}"


def scaling(where: Path, asked: argparse.Namespace) -> None:
    """lfm's cost as models, size and cores grow."""
    print(f"{'':<10}{'models':>8}{'B param.':>10}{'cores':>7}{'wall s':>9}{'CPU s':>9}{'MB anon.':>10}")
    sizes = [asked.blocks // 2, asked.blocks, asked.blocks * 2, asked.blocks * 4]
    cases = [(models, asked.blocks, 0) for models in (2, 4, 8)] + [(2, blocks, 0) for blocks in sizes]
    for name in ("linear", "ties"):
        for models, blocks, cores in dict.fromkeys([*cases, (2, asked.blocks, 1)]):
            shape, here = Shape(blocks, asked.width), where / f"blocks-{blocks}"
            ready(here, shape, models, 1)
            told = {"weight": 1.0} | ({"density": DENSITY} if name == "ties" else {})
            recipe = {"merge_method": name, "models": parts(here, models, **told)}
            recipe |= {"base_model": str(here / "m0")} if name == "ties" else {}
            merge = Merge(lambda w, recipe=recipe: recipe, None)
            each = [taken(commands(merge, here, asked)["lfm"], cores) for _ in range(asked.repeat + 1)][1:]
            wall, cpu, memory = (median(values) for values in zip(*each))
            count = sum(int(np.prod(s)) for s in shape.tensors().values())
            used = cores or len(os.sched_getaffinity(0))
            print(f"{name:<10}{models:>8}{count / 1e9:>10.2f}{used:>7}{wall:>9.2f}{cpu:>9.2f}{memory / 1e6:>10.0f}")
            shutil.rmtree(here / "lfm-out")


if __name__ == "__main__":
    sys.exit(main())
