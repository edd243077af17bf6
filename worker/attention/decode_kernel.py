"""Our own decode kernel for the CPU, called by ctypes.

native/decode_attention.c says what it does. Where it can't be had (no compiler, another OpenMP than torch's, a wrong
result), `load_decode_kernel` says why in the log and gives None: torch's own kernels do the work then.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import structlog
import torch

from worker.attention.paged import Run, Span, exact_attention
from worker.native.build import NativeUnavailable, load_native

_log = structlog.get_logger(__name__)

_DTYPES: Final = (torch.float32, torch.bfloat16)
_LANES: Final = 16
"""The kernel takes head dimensions of whole vectors only."""
_PIECE_TOKENS: Final = 512
"""A piece of a sequence, one key head of which is one item of work: PIECE_TOKENS in the source. Cut by position alone,
so that a row's result depends neither on the batch it is in nor on the number of threads."""


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

    def plan(self, spans: Sequence[Span], window: int | None) -> DecodePlan:
        """What all layers with this window share. The spans have one query each."""
        visible = [span.visible(window) for span in spans]
        begins = [runs[0].position for runs in visible]
        sequences: list[tuple[int, ...]] = []
        pieces: list[tuple[int, ...]] = []
        first_run = 0
        for number, (span, runs, begin) in enumerate(zip(spans, visible, begins, strict=True)):
            cuts = [begin, *range(begin - begin % _PIECE_TOKENS + _PIECE_TOKENS, span.end, _PIECE_TOKENS), span.end]
            sequences.append((span.row, first_run, len(runs), len(pieces), len(cuts) - 1))
            pieces += [(number, *ends) for ends in pairwise(cuts)]
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
            self.prepare(plan, len(query), keys)
        self._function(
            *(plan.step, query.data_ptr(), query.stride(1), query.stride(0)),
            *(keys.data_ptr(), values.data_ptr(), output.data_ptr(), scaling),
        )

    def prepare(self, plan: DecodePlan, heads: int, keys: torch.Tensor) -> None:
        """Make `plan.step` and its scratch; `keys` are any layer's."""
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
    """Load the kernel and try it. None if there is none to be had; the log says why."""
    try:
        kernel = DecodeKernel(load_native().decode_attention)
        _check(kernel)
    except NativeUnavailable as error:
        _log.warning("decode_kernel_unavailable", reason=str(error), instead="torch's flash attention")
        return None
    return kernel


def _check(kernel: DecodeKernel) -> None:
    """Attend to a small random case, in pieces and scattered runs, and compare."""
    runs = (Run(0, 700, 30), Run(30, 10, 600))
    spans = [Span(0, 1, 629, runs), Span(1, 1, 12, (Run(0, 650, 13),))]
    generator = torch.Generator().manual_seed(0)
    for dtype, tolerance in zip(_DTYPES, (1e-5, 1e-2), strict=True):
        keys, values = torch.randn(2, 2, 750, 32, generator=generator).to(dtype)
        query = torch.randn(4, 2, 32, generator=generator).to(dtype)
        output = torch.full((2, 4, 32), float("nan"), dtype=dtype)
        kernel.attend(kernel.plan(spans, None), query, keys, values, output, 0.2)
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
                raise NativeUnavailable(f"the compiled kernel gives wrong results in {dtype}")
