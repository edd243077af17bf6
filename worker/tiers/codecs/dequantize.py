"""Quantized blocks decoded on the CPU in one pass, by a kernel of our own: bit for bit what torch's operations give.

native/dequantize.c says what it does. Where it can't be had, the log says why, and the codec works as on any device.
"""

import ctypes
from typing import Any, Final

import structlog
import torch

from worker.native.build import NativeUnavailable, load_native
from worker.tiers.codecs.form import Form, Parts
from worker.tiers.codecs.rope import Turn

_MAX_DIM: Final = 512
_PARTS: Final = (
    *("sinks", "key_bases", "value_bases", "key_units", "key_scales", "key_middles", "value_scales", "keys", "values"),
)

_log = structlog.get_logger(__name__)


class _Block(ctypes.Structure):
    """`Block` in the source."""

    _fields_ = (
        *[(name, ctypes.c_void_p) for name in (*_PARTS, "cos", "sin", "out")],
        *[(name, ctypes.c_int64) for name in ("layer_stride", "kind_stride", "head_stride")],
        *[(name, ctypes.c_int64) for name in ("layers", "heads", "tokens", "dim", "key_group", "value_group")],
        *[(name, ctypes.c_int64) for name in ("num_sinks", "pairs", "nibble_keys", "nibble_values")],
    )


class Dequantizer:
    """Any thread may call, on different blocks; lets go of the GIL meanwhile."""

    def __init__(self, function: Any) -> None:
        """`function` is `dequantize` of the loaded library."""
        self._function = function
        function.argtypes = (ctypes.POINTER(_Block),)
        function.restype = None

    def serves(self, kv: torch.Tensor) -> bool:
        """Whether it can write such a block: [layers, 2, heads, tokens, dim] of a pool."""
        dim = kv.shape[4]
        is_whole: bool = kv.stride()[3:] == (dim, 1)
        return kv.device.type == "cpu" and kv.dtype == torch.bfloat16 and is_whole and dim <= _MAX_DIM

    def decode(self, parts: Parts, form: Form, turn: Turn | None, kv: torch.Tensor) -> None:
        """Write what the parts of a block of this form stand for into `kv`, which it serves."""
        layers, _, heads, tokens, dim = kv.shape
        pairs = 0 if turn is None else turn.cos.shape[1]
        tables = (0, 0) if turn is None else (turn.cos.data_ptr(), turn.sin.data_ptr())
        nibbles = [parts[name].shape[2] != tokens for name in ("keys", "values")]
        self._function(
            _Block(
                *(parts[name].data_ptr() for name in _PARTS),
                *(*tables, kv.data_ptr(), *kv.stride()[:3], layers, heads, tokens, dim),
                *(form.key_group, form.value_group, form.num_sinks, pairs, *nibbles),
            )
        )


def load_dequantizer() -> Dequantizer | None:
    """Load the kernel. None if there is none to be had; the log says why."""
    try:
        return Dequantizer(load_native().dequantize)
    except NativeUnavailable as error:
        _log.warning("dequantizer_unavailable", reason=str(error), instead="torch's operations")
        return None
