"""The device pool's memory: the KV of every block, and whole blocks in and out. Who owns a block is not known here."""

import math
from collections.abc import Iterable
from contextlib import suppress
from queue import SimpleQueue

import numpy as np
import numpy.typing as npt
import structlog
import torch

from cache_store.layout import KVLayout
from worker.ids import BlockId

log = structlog.get_logger(__name__)

_Bytes = npt.NDArray[np.uint8]

_CUDA_COPIES_AT_ONCE = 4


class KVCache:
    """`num_blocks` blocks of `layout` in one tensor, allocated once and touched, so that no step pays for page faults.

    `data` is [layers, 2 (key, value), kv_heads, num_blocks * block_tokens, head_dim]: layer-first, so that
    neighbouring blocks are one plain strided view in every layer; and heads before slots, so that what one head reads
    of a run lies in one piece (measured on a CPU: a third less time for attention than with slots first).

    `read_block` and `write_block` may be called from any thread while the engine's thread runs the model on other
    blocks; the caller sees to it that nobody else writes the block meanwhile.
    """

    def __init__(self, layout: KVLayout, num_blocks: int, device: torch.device) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.device = device
        layers, _, kv_heads, block_tokens, head_dim = layout.block_shape
        shape = (layers, 2, kv_heads, num_blocks * block_tokens, head_dim)
        self.data = torch.empty(shape, dtype=getattr(torch, layout.dtype), device=device).zero_()
        self._blocks: _HostBlocks | _CudaBlocks
        self._blocks = _CudaBlocks(self.data, layout) if device.type == "cuda" else _HostBlocks(self.data, layout)

    def read_block(self, block: BlockId, into: memoryview) -> None:
        """Copy a block's KV into a host buffer of layout.block_bytes, in the order of layout.block_shape."""
        assert into.nbytes == self.layout.block_bytes, f"{into.nbytes} != {self.layout.block_bytes} bytes"
        self._blocks.read(self._first_slot(block), np.frombuffer(into, np.uint8))

    def write_block(self, block: BlockId, payload: memoryview) -> None:
        """Copy what `read_block` gave into a block. On return the model may attend to it."""
        assert payload.nbytes == self.layout.block_bytes, f"{payload.nbytes} != {self.layout.block_bytes} bytes"
        self._blocks.write(self._first_slot(block), np.frombuffer(payload, np.uint8))

    def pin(self, memory: memoryview) -> None:
        """Have whole blocks copied straight between this memory and the device, until `unpin`.

        Nothing changes where the device is the host, nor where the driver refuses: then they go through buffers.
        """
        self._blocks.pin(np.frombuffer(memory, np.uint8))

    def unpin(self) -> None:
        """Before the memory that was pinned goes."""
        self._blocks.unpin()

    def view(self, block: BlockId) -> torch.Tensor:
        """A block where it lies, in layout.block_shape: what a codec reads and writes. From any thread, as above."""
        first = self._first_slot(block)
        return self.data[:, :, :, first : first + self.layout.block_tokens]

    def copy_tokens(self, source: BlockId, target: BlockId, num_tokens: int) -> None:
        """Copy the KV of a block's first `num_tokens` tokens to another (copy on write). Engine's thread only."""
        assert 0 < num_tokens <= self.layout.block_tokens
        assert source != target
        first, other = self._first_slot(source), self._first_slot(target)
        self.data[:, :, :, other : other + num_tokens].copy_(self.data[:, :, :, first : first + num_tokens])

    def poison(self, blocks: Iterable[BlockId]) -> None:
        """Fill blocks with NaN, so that whoever reads what was never written there is found out."""
        for block in blocks:
            self.view(block)[:] = math.nan

    def _first_slot(self, block: BlockId) -> int:
        assert 0 <= block < self.num_blocks, f"block {block} of {self.num_blocks}"
        return block * self.layout.block_tokens


class _HostBlocks:
    """Blocks of a pool in host memory. Copied by numpy: it lets go of the GIL as torch does, but wakes no team of
    kernel threads, which would take the cores from the model's step for a copy that one core does at memory speed."""

    def __init__(self, data: torch.Tensor, layout: KVLayout) -> None:
        # [layers * 2 * kv_heads, bytes of all slots]: a block is one contiguous piece of each row.
        self._rows: _Bytes = data.view(torch.uint8).flatten(3).flatten(0, 2).numpy()
        self._block_shape = (len(self._rows), layout.block_bytes // len(self._rows))
        self._slot_bytes = self._block_shape[1] // layout.block_tokens

    def read(self, first_slot: int, into: _Bytes) -> None:
        np.copyto(into.reshape(self._block_shape), self._block(first_slot))

    def write(self, first_slot: int, payload: _Bytes) -> None:
        np.copyto(self._block(first_slot), payload.reshape(self._block_shape))

    def pin(self, memory: _Bytes) -> None:
        """There is nobody to pin it for."""

    def unpin(self) -> None:
        """Nothing is pinned."""

    def _block(self, first_slot: int) -> _Bytes:
        first = first_slot * self._slot_bytes
        return self._rows[:, first : first + self._block_shape[1]]


class _CudaBlocks:
    """Blocks of a pool on an accelerator, moved on side streams of their own: straight between it and memory that is
    pinned, and through pinned buffers for any other.

    Each copy first waits for what the model's stream had been given by then: the step that wrote the block's KV, or
    the last step that read what lay there before.
    """

    def __init__(self, data: torch.Tensor, layout: KVLayout) -> None:
        self._data = data
        self._layout = layout
        self._pinned: _Bytes | None = None
        self._free: SimpleQueue[tuple[torch.cuda.Stream, torch.Tensor, torch.Tensor]] = SimpleQueue()
        for _ in range(_CUDA_COPIES_AT_ONCE):
            pinned = torch.empty(layout.block_shape, dtype=data.dtype, pin_memory=True)
            on_device = torch.empty(layout.block_shape, dtype=data.dtype, device=data.device)
            self._free.put((torch.cuda.Stream(data.device), pinned, on_device))

    def read(self, first_slot: int, into: _Bytes) -> None:
        stream, pinned, on_device = lane = self._free.get()
        try:
            is_direct = self._is_pinned(into)
            with torch.cuda.stream(stream):
                stream.wait_stream(torch.cuda.default_stream(self._data.device))
                on_device.copy_(self._slots(first_slot))  # gather where memory is fast, then one contiguous transfer
                (self._as_block(into) if is_direct else pinned).copy_(on_device, non_blocking=True)
            stream.synchronize()
            if not is_direct:
                np.copyto(into, pinned.view(torch.uint8).flatten().numpy())
        finally:
            self._free.put(lane)

    def write(self, first_slot: int, payload: _Bytes) -> None:
        stream, pinned, on_device = lane = self._free.get()
        try:
            is_direct = self._is_pinned(payload)
            if not is_direct:
                np.copyto(pinned.view(torch.uint8).flatten().numpy(), payload)
            with torch.cuda.stream(stream):
                on_device.copy_(self._as_block(payload) if is_direct else pinned, non_blocking=True)
                stream.wait_stream(torch.cuda.default_stream(self._data.device))
                self._slots(first_slot).copy_(on_device)
            stream.synchronize()
        finally:
            self._free.put(lane)

    def pin(self, memory: _Bytes) -> None:
        refusal = int(torch.cuda.cudart().cudaHostRegister(memory.ctypes.data, memory.nbytes, 0))
        if refusal:
            log.warning("host memory is not pinned", cuda_error=refusal, num_bytes=memory.nbytes)
            with suppress(RuntimeError):  # the driver reports a refusal again to whoever asks it next
                torch.zeros(1, device=self._data.device)
        else:
            self._pinned = memory

    def unpin(self) -> None:
        memory, self._pinned = self._pinned, None
        if memory is not None:
            torch.cuda.cudart().cudaHostUnregister(memory.ctypes.data)

    def _is_pinned(self, buffer: _Bytes) -> bool:
        return self._pinned is not None and np.may_share_memory(buffer, self._pinned)

    def _as_block(self, buffer: _Bytes) -> torch.Tensor:
        """Memory that is pinned, as a block."""
        return torch.from_numpy(buffer).view(self._data.dtype).view(self._layout.block_shape)

    def _slots(self, first_slot: int) -> torch.Tensor:
        return self._data[:, :, :, first_slot : first_slot + self._layout.block_tokens]
