"""The tensors of a model's files: one .safetensors file, or shards with an index."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from lfm.core.errors import CorruptError, ModelError, UnsafeError
from lfm.tensors.safetensors_file import StoredTensor, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def weight_files(path: Path) -> tuple[Path, ...]:
    """The files that open_tensors(path) reads: the index first, if there is one, then the shards by name."""
    found = _find(path)
    if found.suffix == ".safetensors":
        return (found,)
    return (found, *(found.parent / shard for shard in sorted(set(_read_index(found).values()))))


def open_tensors(path: Path) -> Mapping[str, StoredTensor]:
    """The tensors of a .safetensors file, of an index, or of a directory that holds either; only headers are read.

    In the order of the files' names and of the bytes in each. ModelError where there are none, UnsafeError where there
    are only pickled ones, CorruptError where header, index and files contradict each other.
    """
    found = _find(path)
    return read_header(found).tensors if found.suffix == ".safetensors" else _sharded(found)


def _find(path: Path) -> Path:
    if path.suffix in PICKLED:
        _refuse_pickled(path)
    if path.is_file():
        if path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json"):
            return path
        raise ModelError(f"{path} is not a .safetensors file", fix="name a .safetensors file, its index or a directory")
    if not path.is_dir():
        raise ModelError(f"{path} does not exist")
    single, index = path / SINGLE, path / INDEX
    if single.exists() and index.exists():
        raise ModelError(
            f"{path} holds both {SINGLE} and {INDEX}",
            why="they may be two different models",
            fix="name the one you mean, or delete the other",
        )
    if single.exists() or index.exists():
        return single if single.exists() else index
    others = sorted(file.name for file in path.glob("*.safetensors"))
    if others:
        raise ModelError(
            f"{path} holds neither {SINGLE} nor {INDEX}",
            why=f"it holds {', '.join(others[:3])}{', …' if len(others) > 3 else ''}",
            fix="name the file itself" if len(others) == 1 else "its index is missing: fetch it again",
        )
    pickled = sorted(file for file in path.iterdir() if file.suffix in PICKLED and file.name != "training_args.bin")
    if pickled:
        _refuse_pickled(pickled[0])
    raise ModelError(f"{path} holds no weights", why=f"there is no {SINGLE} and no {INDEX}")


def _sharded(index: Path) -> dict[str, StoredTensor]:
    weight_map = _read_index(index)
    found: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        file = index.parent / shard
        if not file.is_file():
            missing = [name for name, where in weight_map.items() if where == shard]
            _corrupt(
                index, f"it names {shard}, which is missing", f"{len(missing)} tensors are in it, {missing[0]!r} first"
            )
        for name, tensor in read_header(file).tensors.items():
            if weight_map.get(name) != shard:
                where = f"it says {weight_map[name]}" if name in weight_map else "it does not name it"
                _corrupt(index, f"{shard} holds {name!r}", where)
            found[name] = tensor
    for name, shard in weight_map.items():
        if name not in found:
            _corrupt(index, f"{shard} does not hold {name!r}", "the index says so")
    return found


def _read_index(index: Path) -> dict[str, str]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for name, value in pairs:
            if name in seen:
                _corrupt(index, f"it has {name!r} twice")
            seen[name] = value
        return seen

    try:
        content = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except CorruptError:
        raise
    except OSError as error:
        raise ModelError(f"{index} cannot be read", why=error.strerror or "") from None
    except (ValueError, RecursionError) as error:
        _corrupt(index, "it is not JSON", str(error))
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        _corrupt(index, "it has no weight_map from tensor names to file names")
    for name, shard in weight_map.items():
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            _corrupt(index, f"{name!r} is said to be in {shard!r}", "a shard is a .safetensors file beside the index")
    return weight_map


def _refuse_pickled(path: Path) -> NoReturn:
    code = (
        "import sys, torch; from safetensors.torch import save_file; "
        "tensors = torch.load(sys.argv[1], weights_only=True); "
        "save_file({k: v.clone().contiguous() for k, v in tensors.items()}, sys.argv[2], {'format': 'pt'})"
    )
    raise UnsafeError(
        f"{path} is pickled",
        why="reading it can run any code that its author put there, so lfm never does",
        fix=f'if you trust it, convert it yourself: python -c "{code}" {path} {path.parent / SINGLE}',
    )


def _corrupt(index: Path, what: str, why: str = "") -> NoReturn:
    raise CorruptError(f"{index} is corrupt: {what}", why=why, fix="fetch or save the model again")
