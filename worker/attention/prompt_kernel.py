"""Our own attention kernel for prompts on CPUs with AMX, called by ctypes.

native/prompt_attention.c says what it does. Where it can't be had (no such CPU, no compiler, a wrong result),
`load_prompt_kernel` says why in the log and gives None: torch's flash attention does the work then.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import structlog
import torch

from worker.attention.paged import Run, Span, exact_attention, slots_of
from worker.native.build import NativeUnavailable, load_native

_log = structlog.get_logger(__name__)

_DEPTH: Final = 32
"""Head dimensions are multiples of this: DEPTH in the source."""
_WIDEST_HEAD: Final = 256
"""WIDEST_HEAD in the source."""
_ROWS: Final = 256
"""Of an item of work, its queries times the heads that share their keys: what they sum up stays in a core's cache."""
_NO_WINDOW: Final = 1 << 62


class _Prompts(ctypes.Structure):
    """`Prompts` in the source."""

    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("runs", "chunks", "shares")],
        *[(name, ctypes.c_int64) for name in ("num_shares", "heads", "kv_heads", "head_dim")],
        *[(name, ctypes.c_int64) for name in ("kv_head_stride", "slot_stride", "window", "num_threads")],
    )


@dataclass(slots=True)
class PromptPlan:
    """The chunks of prompts in a step, as the kernel reads them."""

    runs: npt.NDArray[np.int64]
    """[runs, 3]: position, slot, length."""
    chunks: npt.NDArray[np.int64]
    """[chunks, 3]: row, position of its first query, first run."""
    num_queries: list[int]
    """Of each chunk."""
    window: int | None
    shares: npt.NDArray[np.int64] | None = None
    """[shares, 3]: chunk, and its queries from the second to before the third."""
    step: _Prompts | None = None
    """What points to all this. Both are made at the first layer, which tells the number of heads."""


class PromptKernel:
    """Attends with many queries per sequence, all chunks of a step in one call."""

    def __init__(self, function: Any) -> None:
        """`function` is `prompt_attention` of the loaded library."""
        self._function = function
        function.argtypes = (
            *(ctypes.POINTER(_Prompts), ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64),
            *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_float),
        )
        function.restype = None

    def serves(self, pool: torch.Tensor) -> bool:
        """Whether it can attend over KVCache.data of this dtype and head dimension."""
        head_dim: int = pool.shape[-1]
        return pool.dtype == torch.bfloat16 and head_dim % _DEPTH == 0 and head_dim <= _WIDEST_HEAD

    def plan(self, spans: Sequence[Span], window: int | None) -> PromptPlan:
        """What all layers with this window share."""
        first_runs = accumulate((len(span.runs) for span in spans[:-1]), initial=0)
        chunks = [(span.row, span.start, first_run) for span, first_run in zip(spans, first_runs, strict=True)]
        runs = [run for span in spans for run in span.runs]
        num_queries = [span.num_queries for span in spans]
        return PromptPlan(np.array(runs, np.int64), np.array(chunks, np.int64), num_queries, window)

    def attend(
        self,
        plan: PromptPlan,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        output: torch.Tensor,
        scaling: float,
    ) -> None:
        """Write the chunks' rows of `output` [tokens, heads, head_dim] (contiguous), and nothing else of it.

        query [heads, tokens, head_dim]; keys and values [kv_heads, slots, head_dim], a layer's of the pool.
        """
        assert query.dtype == keys.dtype == values.dtype == output.dtype == torch.bfloat16
        assert keys.stride() == values.stride()
        assert keys.stride(2) == 1
        assert output.is_contiguous()
        if query.stride(2) != 1:
            query = query.contiguous()
        if plan.step is None:
            self.prepare(plan, len(query), keys)
        self._function(
            *(plan.step, query.data_ptr(), query.stride(1), query.stride(0)),
            *(keys.data_ptr(), values.data_ptr(), output.data_ptr(), scaling),
        )

    def prepare(self, plan: PromptPlan, heads: int, keys: torch.Tensor) -> None:
        """Make `plan.shares` and `plan.step`; `keys` are any layer's."""
        kv_heads, _, head_dim = keys.shape
        plan.shares = _shares(plan.num_queries, max(1, _ROWS * kv_heads // heads))
        plan.step = _Prompts(
            *(table.ctypes.data for table in (plan.runs, plan.chunks, plan.shares)),
            *(len(plan.shares), heads, kv_heads, head_dim, keys.stride(0), keys.stride(1)),
            *(plan.window or _NO_WINDOW, torch.get_num_threads()),
        )


def _shares(num_queries: Sequence[int], most: int) -> npt.NDArray[np.int64]:
    """Cut each chunk into shares of up to `most` queries."""
    shares = [
        (chunk, first, min(first + most, count))
        for chunk, count in enumerate(num_queries)
        for first in range(0, count, most)
    ]
    return np.array(shares, np.int64)


def load_prompt_kernel() -> PromptKernel | None:
    """Load the kernel and try it. None if there is none to be had; the log says why."""
    try:
        function = getattr(load_native(), "prompt_attention", None)
        if function is None:
            raise NativeUnavailable("this CPU has no AMX")
        kernel = PromptKernel(function)
        _check(kernel)
    except NativeUnavailable as error:
        _log.info("prompt_kernel_unavailable", reason=str(error), instead="torch's flash attention")
        return None
    return kernel


def _check(kernel: PromptKernel) -> None:
    """Attend to a small random case, in scattered runs, and compare."""
    runs = (Run(0, 200, 30), Run(30, 10, 70))
    spans = [Span(0, 21, 79, runs), Span(21, 3, 0, (Run(0, 150, 3),))]
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 2, 250, 32, generator=generator).bfloat16()
    query = torch.randn(4, 24, 32, generator=generator).bfloat16()
    for window in (None, 40):
        output = torch.full((24, 4, 32), float("nan"), dtype=torch.bfloat16)
        kernel.attend(kernel.plan(spans, window), query, keys, values, output, 0.2)
        for span in spans:
            rows, slots = slice(span.row, span.row + span.num_queries), torch.from_numpy(slots_of(span.runs))
            positions = torch.arange(span.end)
            seen = {"start": span.start, "key_positions": positions, "window": window}
            wanted = exact_attention(
                query[:, rows], keys[:, slots], values[:, slots], scaling=0.2, softcap=None, **seen
            )
            if not torch.allclose(output[rows].float(), wanted.float(), rtol=2e-2, atol=2e-2):
                raise NativeUnavailable("the compiled kernel gives wrong results")
