"""Our kernels for the CPU, in C: built by the system's compiler at first use, kept in a cache, loaded into the process.

Knows no kernel: who calls one, checks it.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import torch

_FOLDER: Final = Path(__file__).parent
_SOURCES: Final = tuple(sorted(_FOLDER.glob("*.c")))
_HEADERS: Final = tuple(sorted(_FOLDER.glob("*.h")))
_FLAGS: Final = ("-O3", "-march=native", "-fopenmp", "-fPIC")
_BUILD_TIMEOUT_S: Final = 120.0
_NO_TILES: Final = ("-DNO_TILES",)
_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_TILEDATA = 158, 0x1023, 18
"""How a process on x86-64 Linux asks to use AMX's tiles, for all its threads."""


class NativeUnavailable(Exception):
    """There are no kernels to be had here; the message says why."""


def load_native(flags: Sequence[str] = ()) -> ctypes.CDLL:
    """Build the kernels, unless the cache has them, and load them; `flags` go to the compiler besides.

    Raises NativeUnavailable: without a C compiler, or where torch runs on another OpenMP than GNU's.
    """
    try:
        openmp = _openmp_of_torch()
        library = ctypes.CDLL(str(_library(openmp, (*_FLAGS, *(() if _may_use_amx() else _NO_TILES), *flags))))
        if _openmp_of_torch() != openmp:  # two teams that wait spinning would starve each other
            raise NativeUnavailable("it brought another OpenMP runtime than torch's")
    except (OSError, subprocess.SubprocessError) as error:
        raise NativeUnavailable(str(error)) from error
    return library


def _may_use_amx() -> bool:
    """Whether the kernel lets this process use the tiles, which it must be asked. A CPU without them says no too."""
    if os.uname().machine != "x86_64":
        return False
    refused: int = ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_TILEDATA)
    return refused == 0


def _openmp_of_torch() -> Path:
    """The OpenMP runtime that torch uses. Others, which packages bring for themselves, are not its business."""
    mapped = {line.split(maxsplit=5)[5].strip() for line in _lines("/proc/self/maps") if "/" in line}
    runtimes = [path for path in mapped if any(name in Path(path).name for name in ("libgomp", "libomp", "libiomp"))]
    beside_torch = Path(torch.__file__).parent
    runtimes = [path for path in runtimes if beside_torch in Path(path).parents] or runtimes
    if len(runtimes) != 1 or "libgomp" not in Path(runtimes[0]).name:
        raise NativeUnavailable(f"needs GNU's OpenMP runtime as torch's, found {runtimes or 'none'}")
    return Path(runtimes[0])


def _library(openmp: Path, flags: Sequence[str]) -> Path:
    """The library for these sources, flags and machine, from the cache or built. Processes may race: the last stays."""
    kinds = ("model name", "flags", "CPU part", "Features")
    cpu = sorted({line for line in _lines("/proc/cpuinfo") if line.startswith(kinds)})
    what = "\0".join((*(source.read_text() for source in (*_SOURCES, *_HEADERS)), *flags, *cpu, str(openmp)))
    digest = hashlib.blake2b(what.encode(), digest_size=16).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rekindle"
    library = cache / f"{digest}.so"
    if library.exists():
        return library
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise NativeUnavailable("no C compiler (cc or gcc) on the PATH")
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        compiled = [Path(folder) / f"{source.stem}.o" for source in _SOURCES]
        commands = [(compiler, *flags, "-c", source, "-o", at) for source, at in zip(_SOURCES, compiled, strict=True)]
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            deque(threads.map(_run, commands), maxlen=0)
        # Without -fopenmp, which would bring the compiler's own runtime instead of torch's.
        linked = Path(folder) / "kernels.so"
        _run((compiler, "-shared", "-Wl,-z,defs", *compiled, openmp, "-lm", "-o", linked))
        linked.replace(library)
    return library


def _run(command: Sequence[str | Path]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S, check=False)
    if done.returncode:
        raise NativeUnavailable(f"{command[0]} failed: {done.stderr.strip()[-500:]}")


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()
