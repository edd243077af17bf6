"""Our own kernel for what queries ask for beyond the window, called by ctypes.

native/recall_shares.c says what it does. Where it can't be had, `load_look` says why in the log, and torch does the
work: with the same numbers up to the rounding of a softmax.
"""

import ctypes

import numpy as np
import structlog
import torch

from worker.attention.recall_choice import Known, Look, Looking, Shares, represent, round_queries, shares
from worker.native.build import NativeUnavailable, load_native

_log = structlog.get_logger(__name__)

_LANES = 16
"""Rows of scores are whole vectors of so many."""


class _Look(ctypes.Structure):
    """`Look` in the source."""

    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("parts", "queries", "query_scales", "scores", "shares", "looking")],
        *[(name, ctypes.c_int64) for name in ("num_parts", "num_looking", "rows", "stride", "units", "each")],
        *[(name, ctypes.c_int64) for name in ("head_dim", "num_threads")],
    )


class RecallKernel:
    """`recall_shares` of the loaded library. Used by one thread."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._function = library.recall_shares
        self._function.argtypes, self._function.restype = (ctypes.POINTER(_Look),), None

    def shares(self, queries: torch.Tensor, known: Known, looking: Looking | None = None) -> Shares:
        """As `recall_choice.shares`."""
        layers, kv_heads, _, each, head_dim = known.parts[0].keys.shape
        rounded, scales = round_queries(queries, kv_heads)
        rounded, scales = rounded.contiguous(), scales.contiguous()
        heads = np.arange(layers * kv_heads) if looking is None else np.flatnonzero(looking)
        rows, stride = rounded.shape[2], -(-known.num_units // _LANES) * _LANES
        scores = torch.empty(layers * kv_heads * rows * stride)
        found = np.zeros((layers, kv_heads, stride), dtype=np.float32)
        look = _Look(
            *(known.table.ctypes.data, rounded.data_ptr(), scales.data_ptr(), scores.data_ptr(), found.ctypes.data),
            *(heads.ctypes.data, len(known.parts), len(heads), rows, stride, known.num_units, each, head_dim),
            torch.get_num_threads(),
        )
        self._function(look)
        return found[..., : known.num_units]


def load_look() -> Look:
    """Load the kernel and try it; torch's way where there is none to be had, and the log says why."""
    try:
        kernel = RecallKernel(load_native())
        _check(kernel)
    except NativeUnavailable as error:
        _log.warning("recall_kernel_unavailable", reason=str(error), instead="torch's matmul")
        return shares
    return kernel.shares


def _check(kernel: RecallKernel) -> None:
    """Look at small random cases, in parts of one and of more units, and compare."""
    generator = torch.Generator().manual_seed(0)
    for head_dim in (32, 128):
        known = Known()
        for units in (1, 70, 2):
            known.add(represent(torch.randn(2, 2, units * 16, head_dim, generator=generator), 16))
        for rows in (1, 9):
            queries = 2 * torch.randn(2, rows, 4, head_dim, generator=generator)
            for looking in (None, np.array([[True, False], [True, True]])):
                found, wanted = kernel.shares(queries, known, looking), shares(queries, known, looking)
                if not np.allclose(found, wanted, rtol=1e-3, atol=1e-6):
                    raise NativeUnavailable("the compiled kernel gives wrong results")
