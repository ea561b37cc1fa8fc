"""Machine code of generated loops, kept under lfm's home: compiled once by numba, and loaded from then on without it.

A kept file is the object code with its own sha256 before it, named by all that decides it: the source, the compiler's
version and the processor. One that was cut short or changed is compiled again.
"""

from __future__ import annotations

import ctypes
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path
from threading import Lock
from typing import Any

from lfm.core.home import home, keep
from lfm.tensors import bits

ENTRY = "kernel"
SIGNATURE = (
    ("raw_", "bytes"),
    ("stride", "whole"),
    ("out", "bytes"),
    ("codes_", "wholes"),
    ("params_", "reals"),
    ("keys_", "bits"),
    ("scratch_", "reals"),
    ("flags_", "wholes"),
    ("width", "whole"),
    ("start", "whole"),
    ("count", "whole"),
)
"""What every kernel takes: pointers and whole numbers."""

DIGEST = 32
UNCALLED = (
    "NRT_Free",
    "NRT_MemInfo_call_dtor",
    "numba_do_raise",
    "numba_gil_ensure",
    "numba_gil_release",
    "numba_runtime_build_excinfo_struct",
    "numba_unpickle",
)
"""Named by object code for errors and for memory of its own; kernels have neither. All are told to the linker: at one
that it cannot find it stops, and calls of the C library (exp, log) are left at address 0."""

_lock = Lock()


def load(source: str, *, reassociate: bool = False) -> Callable[..., None]:
    """The function `kernel` of a source text, which defines it with the arguments of SIGNATURE. Releases the GIL.

    It may name math, np, carray, njit and the functions of bits. reassociate: its own sums may be taken in another
    order (several at a time), the same each time.
    """
    with _lock:
        return _load(source, reassociate)


@cache
def _load(source: str, reassociate: bool) -> Callable[..., None]:
    import llvmlite.binding as llvm

    _start()
    versions = ",".join(metadata.version(name) for name in ("numba", "llvmlite"))
    identity = "\n".join(
        (versions, llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten(), str(reassociate), _given(), source)
    )
    place = home() / "compiled" / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.o"
    symbol, code = _kept(place) or _compile(source, place, reassociate)
    engine = llvm.create_mcjit_compiler(
        llvm.parse_assembly(""), llvm.Target.from_default_triple().create_target_machine(jit=True)
    )
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)  # its memory holds the code
    kinds = [ctypes.c_int64 if kind == "whole" else ctypes.c_void_p for _, kind in SIGNATURE]
    return ctypes.CFUNCTYPE(None, *kinds)(engine.get_function_address(symbol))


_engines: list[Any] = []


@cache
def _start() -> None:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    stop = ctypes.cast(ctypes.CDLL(None).abort, ctypes.c_void_p).value
    for name in UNCALLED:
        llvm.add_symbol(name, stop)


def _kept(place: Path) -> tuple[str, bytes] | None:
    try:
        content = place.read_bytes()
    except OSError:
        return None
    digest, rest = content[:DIGEST], content[DIGEST:]
    if hashlib.sha256(rest).digest() != digest:
        return None
    symbol, _, code = rest.partition(b"\n")
    return symbol.decode(), code


def _compile(source: str, place: Path, reassociate: bool) -> tuple[str, bytes]:
    """Symbol and object code of a source text; kept, unless the disk refuses."""
    from numba import cfunc, types

    kinds = {
        "bytes": types.CPointer(types.uint8),
        "wholes": types.CPointer(types.int64),
        "bits": types.CPointer(types.uint64),
        "reals": types.CPointer(types.float64),
        "whole": types.int64,
    }
    names = dict(_names())
    exec(compile(source, f"<lfm {place.stem}>", "exec"), names)
    signature = types.void(*(kinds[kind] for _, kind in SIGNATURE))
    fast = {"contract", "reassoc"} if reassociate else {"contract"}
    made: Any = cfunc(signature, error_model="numpy", fastmath=fast)(names[ENTRY])
    symbol, code = made.native_name, made._library._get_compiled_object()
    rest = symbol.encode() + b"\n" + code
    keep(place, hashlib.sha256(rest).digest() + rest)
    return symbol, code


@cache
def _names() -> dict[str, Any]:
    """What sources may name. The compiler turns each of bits' functions to code once a process, not once a source."""
    names: dict[str, Any] = {}
    exec(compile(_given(), "<lfm bits>", "exec"), names)
    return names


@cache
def _given() -> str:
    heads = ["import math", "import numpy as np", "from numba import carray, njit"]
    return "\n\n".join([*heads, *map(inlined, (bits.decode, bits.odd, bits.encode, bits.uniform))])


def inlined(function: Any, name: str = "") -> str:
    """The source text of a function that loops call, to be compiled with them; under another name, if one is given."""
    text = textwrap.dedent(inspect.getsource(function))
    assert text.startswith("def "), function
    renamed = f"\n{name} = {function.__name__}" if name and name != function.__name__ else ""
    return f'@njit(error_model="numpy", fastmath={{"contract"}})\n{text}{renamed}'
