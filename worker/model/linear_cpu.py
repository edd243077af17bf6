"""Linear layers in bfloat16 on a CPU, with weights in the order that its kernels read them, put so once.

By our own kernel (native/linear.h says how), which reads them at the memory's speed for few rows and for many. Without
it by oneDNN's, or as torch has them.
"""

import ctypes
import mmap
from contextlib import suppress
from typing import Final

import structlog
import torch
import torch.nn.functional as F
from torch import nn

from worker.native.build import NativeUnavailable, load_native

_log = structlog.get_logger(__name__)

PANEL: Final = 16
"""Outputs whose weights stand together: PANEL in the source."""
DEPTH: Final = 32
"""Inputs come in multiples of this: DEPTH in the source."""
_MANY_ROWS: Final = 64
"""As many are worth being put in the order of tiles first: at 512 rows, a third to a half less time was measured."""
_ROWS_HINT: Final = 32
"""Rows of input that oneDNN's layout is chosen for. Measured: it is good from 1 to 1024, layouts for 1 are not."""
_ROWS_OF_PROMPTS: Final = 128
_MOST_TWICE: Final = 4 << 30
"""Weights of up to so many bytes are kept in oneDNN's order too, for steps of many rows, which it runs a fifth to a
third faster; of larger models the memory matters more. By the model alone, so that workers compute alike."""
_HUGE_PAGE: Final = 2 << 20


class Linear(ctypes.Structure):
    """`Linear` in the source."""

    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("panels", "bias")],
        *[(name, ctypes.c_int64) for name in ("inputs", "outputs")],
    )


class LinearKernel:
    """`linear` of the loaded library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._function = library.linear
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._function.argtypes = (ctypes.POINTER(Linear), pointer, number, pointer, pointer, number)
        self._function.restype = None

    def run(self, layer: Linear, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [..., inputs], bfloat16; returns [..., outputs]."""
        hidden = hidden.contiguous()
        output = hidden.new_empty(*hidden.shape[:-1], layer.outputs)
        rows = hidden.numel() // layer.inputs
        scratch = hidden.new_empty(-(-rows // PANEL) * PANEL * layer.inputs) if rows >= _MANY_ROWS else None
        room = None if scratch is None else scratch.data_ptr()
        self._function(layer, hidden.data_ptr(), rows, room, output.data_ptr(), torch.get_num_threads())
        return output


class NativeLinear(nn.Module):  # type: ignore[misc]  # torch is untyped here
    """What `linear` computes: sums in float32, each row's the same alone and in any batch of few rows."""

    def __init__(
        self, linear: nn.Linear, kernel: LinearKernel, memory: torch.Tensor, prompts: nn.Module | None = None
    ) -> None:
        """The weights go into `memory`, of `packed_numel(linear)` elements. `prompts` does the same for many rows."""
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.weight = pack(linear.weight.detach(), memory)
        self._kernel, self._prompts = kernel, prompts
        bias = None if self.bias is None else self.bias.data_ptr()
        self.layer = Linear(self.weight.data_ptr(), bias, self.in_features, self.out_features)
        """As the kernels read it. Holds as long as this module."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._prompts is not None and hidden.numel() >= _ROWS_OF_PROMPTS * self.in_features:
            output: torch.Tensor = self._prompts(hidden)
            return output
        return self._kernel.run(self.layer, hidden)


class PackedLinear(nn.Module):  # type: ignore[misc]  # torch is untyped here
    """What `linear` computes, by oneDNN, with weights in its own order."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.weight: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS_HINT)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(
            hidden, self.weight, self.bias, "none", [], ""
        )
        return output


def packed_numel(linear: nn.Linear) -> int:
    panels: int = -(-linear.out_features // PANEL)
    return panels * PANEL * int(linear.in_features)


def pack(weight: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """Write [outputs, inputs] into `memory` as [ceil(outputs / 16), inputs / 2, 16, 2], which it returns."""
    outputs, inputs = weight.shape
    panels = -(-outputs // PANEL)
    packed = memory.view(panels, inputs // 2, PANEL, 2)
    whole = F.pad(weight, (0, 0, 0, panels * PANEL - outputs)) if outputs % PANEL else weight
    return packed.copy_(whole.view(panels, PANEL, inputs // 2, 2).transpose(1, 2))


def in_huge_pages(numel: int) -> torch.Tensor:
    """Memory for bfloat16, in huge pages where they are to be had: with pages of 4 KiB a third less of the memory's
    speed was measured."""
    num_bytes = numel * torch.bfloat16.itemsize + _HUGE_PAGE
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory has no huge pages
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    unaligned = torch.frombuffer(memory, dtype=torch.bfloat16)
    first = -unaligned.data_ptr() % _HUGE_PAGE // torch.bfloat16.itemsize
    return unaligned[first : first + numel]


def pack_linears(model: nn.Module) -> None:
    """Replace every plain linear layer in bfloat16 by one for this CPU, where it and the build have the kernels."""
    plain = [module for module in model.modules() if _is_plain(module)]
    native = [linear for linear in plain if linear.in_features % DEPTH == 0]
    packed: dict[nn.Module, nn.Module] = {}
    if native and (kernel := load_linear_kernel()) is not None:
        sizes = [packed_numel(linear) for linear in native]
        twice = _has_onednn() and sum(sizes) * torch.bfloat16.itemsize <= _MOST_TWICE
        for linear, memory in zip(native, in_huge_pages(sum(sizes)).split(sizes), strict=True):
            packed[linear] = NativeLinear(linear, kernel, memory, PackedLinear(linear) if twice else None)
            linear.weight = None  # free now, so that a large model needs little more than its own size
    if _has_onednn():
        packed |= {linear: PackedLinear(linear) for linear in plain if linear not in packed}
    for module in list(model.modules()):
        for name, child in module.named_children():
            if child in packed:
                setattr(module, name, packed[child])


def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _is_plain(module: nn.Module) -> bool:
    return type(module) is nn.Linear and module.weight.dtype == torch.bfloat16


def load_linear_kernel() -> LinearKernel | None:
    """Load the kernel and try it. None if there is none to be had; the log says why."""
    try:
        kernel = LinearKernel(load_native())
        _check(kernel)
    except NativeUnavailable as error:
        _log.warning("linear_kernel_unavailable", reason=str(error), instead="oneDNN's, or torch's own")
        return None
    return kernel


def _check(kernel: LinearKernel) -> None:
    """Multiply a small random case and compare."""
    generator = torch.Generator().manual_seed(0)
    for rows, inputs, outputs in ((1, 64, 40), (21, 96, 50), (70, 32, 16), (40, 320, 32)):
        linear = nn.Linear(inputs, outputs, dtype=torch.bfloat16)
        for parameter in linear.parameters():
            parameter.data.normal_(generator=generator)
        hidden = torch.randn(rows, inputs, generator=generator).bfloat16()
        wanted = F.linear(hidden.float(), linear.weight.float(), linear.bias.float())
        native = NativeLinear(linear, kernel, hidden.new_empty(packed_numel(linear)))
        if not torch.allclose(native(hidden).float(), wanted, rtol=1e-2, atol=1e-3):
            raise NativeUnavailable(f"the compiled kernel gives wrong results for {rows} rows")
