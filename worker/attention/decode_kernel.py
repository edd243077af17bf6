"""Our own decode kernel for the CPU: built by the system's compiler at first use, kept in a cache, called by ctypes.

native/decode_attention.c says what it does. Where it can't be had (no compiler, another OpenMP than torch's, a wrong
result), `load_decode_kernel` says why in the log and gives None: torch's own kernels do the work then.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import structlog
import torch

from worker.attention.paged import Run, Span, exact_attention

_log = structlog.get_logger(__name__)

_SOURCE: Final = Path(__file__).parent.parent / "native" / "decode_attention.c"
_FLAGS: Final = ("-O3", "-march=native", "-fopenmp", "-fPIC")
_BUILD_TIMEOUT_S: Final = 60.0
_DTYPES: Final = (torch.float32, torch.bfloat16)
_LANES: Final = 16
"""The kernel takes head dimensions of whole vectors only."""
_ITEMS_PER_THREAD: Final = 16
"""Long sequences are cut until each thread has about as many items of work: the last to finish is then not late."""
_MIN_PIECE_TOKENS: Final = 256


class _Unavailable(Exception):
    """There is no kernel to be had here."""


class _Step(ctypes.Structure):
    """`Step` in the source."""

    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("runs", "sequences", "pieces", "attended", "sums")],
        *[(name, ctypes.c_int64) for name in ("num_sequences", "num_pieces", "heads", "kv_heads", "head_dim")],
        *[(name, ctypes.c_int64) for name in ("kv_head_stride", "slot_stride", "bfloat16", "num_threads")],
    )


@dataclass(slots=True)
class DecodePlan:
    """The decoding sequences of a step, as the kernel reads them."""

    runs: npt.NDArray[np.int64]
    """[runs, 3]: position, slot, length."""
    sequences: npt.NDArray[np.int64]
    """[sequences, 5]: row, first run, number of runs, first piece, number of pieces."""
    pieces: npt.NDArray[np.int64]
    """[pieces, 3]: sequence, and its positions from the second to before the third."""
    step: _Step | None = None
    scratch: tuple[torch.Tensor, ...] = ()
    """What `step` points to besides. Both are made at the first layer, which tells the number of heads."""


class DecodeKernel:
    """Attends with one query per sequence, all sequences of a step in one call. Used by one thread."""

    def __init__(self, function: Any) -> None:
        """`function` is `decode_attention` of the loaded library."""
        self._function = function
        function.argtypes = (
            *(ctypes.POINTER(_Step), ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64),
            *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_float),
        )
        function.restype = None

    def serves(self, pool: torch.Tensor) -> bool:
        """Whether it can attend over KVCache.data of this dtype and head dimension."""
        return pool.dtype in _DTYPES and pool.shape[-1] % _LANES == 0

    def plan(self, spans: Sequence[Span], window: int | None, kv_heads: int) -> DecodePlan:
        """What all layers with this window share. The spans have one query each."""
        visible = [span.visible(window) for span in spans]
        begins = [runs[0].position for runs in visible]
        num_tokens = sum(span.end - begin for span, begin in zip(spans, begins, strict=True))
        items = torch.get_num_threads() * _ITEMS_PER_THREAD
        piece_tokens = max(_MIN_PIECE_TOKENS, -(-num_tokens * kv_heads // items))
        sequences: list[tuple[int, ...]] = []
        pieces: list[tuple[int, ...]] = []
        first_run = 0
        for number, (span, runs, begin) in enumerate(zip(spans, visible, begins, strict=True)):
            cuts = range(begin, span.end, piece_tokens)
            sequences.append((span.row, first_run, len(runs), len(pieces), len(cuts)))
            pieces += [(number, cut, min(cut + piece_tokens, span.end)) for cut in cuts]
            first_run += len(runs)
        joined = [run for runs in visible for run in runs]
        return DecodePlan(np.array(joined, np.int64), np.array(sequences, np.int64), np.array(pieces, np.int64))

    def attend(
        self,
        plan: DecodePlan,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        output: torch.Tensor,
        scaling: float,
    ) -> None:
        """Write the sequences' rows of `output` [tokens, heads, head_dim] (contiguous), and nothing else of it.

        query [heads, tokens, head_dim]; keys and values [kv_heads, slots, head_dim], a layer's of the pool.
        """
        assert query.dtype == keys.dtype == values.dtype == output.dtype
        assert keys.stride() == values.stride()
        assert keys.stride(2) == 1
        assert output.is_contiguous()
        if query.stride(2) != 1:
            query = query.contiguous()
        if plan.step is None or plan.step.heads != len(query):
            self._prepare(plan, len(query), keys)
        self._function(
            *(plan.step, query.data_ptr(), query.stride(1), query.stride(0)),
            *(keys.data_ptr(), values.data_ptr(), output.data_ptr(), scaling),
        )

    def _prepare(self, plan: DecodePlan, heads: int, keys: torch.Tensor) -> None:
        kv_heads, _, head_dim = keys.shape
        attended = torch.empty(len(plan.pieces), heads, head_dim)
        sums = torch.empty(len(plan.pieces), heads, 2)
        plan.scratch = attended, sums
        plan.step = _Step(
            *(table.ctypes.data for table in (plan.runs, plan.sequences, plan.pieces)),
            *(attended.data_ptr(), sums.data_ptr(), len(plan.sequences), len(plan.pieces)),
            *(heads, kv_heads, head_dim, keys.stride(0), keys.stride(1)),
            *(keys.dtype == torch.bfloat16, torch.get_num_threads()),
        )


def load_decode_kernel() -> DecodeKernel | None:
    """Build the kernel, unless the cache has it, load and try it. None if that can't be done; the log says why."""
    try:
        openmp = _openmp_of_torch()
        library = _library(openmp)
        kernel = DecodeKernel(ctypes.CDLL(str(library)).decode_attention)
        if _openmp_of_torch() != openmp:  # two teams that wait spinning would starve each other
            raise _Unavailable("it brought another OpenMP runtime than torch's")
        _check(kernel)
    except (_Unavailable, OSError, subprocess.SubprocessError) as error:
        _log.warning("decode_kernel_unavailable", reason=str(error), instead="torch's flash attention")
        return None
    _log.info("decode_kernel_loaded", library=str(library))
    return kernel


def _openmp_of_torch() -> Path:
    """The OpenMP runtime in this process."""
    mapped = {line.split(maxsplit=5)[5].strip() for line in _lines("/proc/self/maps") if "/" in line}
    runtimes = [path for path in mapped if any(name in Path(path).name for name in ("libgomp", "libomp", "libiomp"))]
    if len(runtimes) != 1 or "libgomp" not in Path(runtimes[0]).name:
        raise _Unavailable(f"needs one GNU OpenMP runtime in the process, found {runtimes or 'none'}")
    return Path(runtimes[0])


def _library(openmp: Path) -> Path:
    """The kernel for this source and machine, from the cache or built. Processes may race: the last one's stays."""
    cpu = sorted({line for line in _lines("/proc/cpuinfo") if line.startswith(("model name", "flags"))})
    what = "\0".join((_SOURCE.read_text(), *_FLAGS, *cpu, str(openmp)))
    digest = hashlib.blake2b(what.encode(), digest_size=16).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rekindle"
    library = cache / f"{digest}.so"
    if library.exists():
        return library
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise _Unavailable("no C compiler (cc or gcc) on the PATH")
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        compiled, linked = Path(folder) / "kernel.o", Path(folder) / "kernel.so"
        _run(compiler, *_FLAGS, "-c", _SOURCE, "-o", compiled)
        # Without -fopenmp, which would bring the compiler's own runtime instead of torch's.
        _run(compiler, "-shared", "-Wl,-z,defs", compiled, openmp, "-lm", "-o", linked)
        linked.replace(library)
    return library


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S, check=False)
    if done.returncode:
        raise _Unavailable(f"{command[0]} failed: {done.stderr.strip()[-500:]}")


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def _check(kernel: DecodeKernel) -> None:
    """Attend to a small random case, in pieces and scattered runs, and compare."""
    runs = (Run(0, 700, 30), Run(30, 10, 600))
    spans = [Span(0, 1, 629, runs), Span(1, 1, 12, (Run(0, 650, 13),))]
    generator = torch.Generator().manual_seed(0)
    for dtype, tolerance in zip(_DTYPES, (1e-5, 1e-2), strict=True):
        keys, values = torch.randn(2, 2, 750, 32, generator=generator).to(dtype)
        query = torch.randn(4, 2, 32, generator=generator).to(dtype)
        output = torch.full((2, 4, 32), float("nan"), dtype=dtype)
        kernel.attend(kernel.plan(spans, None, 2), query, keys, values, output, 0.2)
        for span in spans:
            slots = torch.cat([torch.arange(run.slot, run.slot + run.length) for run in span.runs])
            wanted = exact_attention(
                query[:, span.row : span.row + 1],
                keys[:, slots],
                values[:, slots],
                start=span.start,
                key_positions=torch.arange(span.end),
                scaling=0.2,
                window=None,
                softcap=None,
            )
            if not torch.allclose(output[span.row], wanted[0], rtol=tolerance, atol=tolerance):
                raise _Unavailable(f"the compiled kernel gives wrong results in {dtype}")
