"""Attention over the block pool on CUDA: torch's paged varlen kernel where it serves this model, else gathered SDPA."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from worker.attention.paged import AttentionBackend, ExactAttention, Run, Span, runs_of, slots_of


@dataclass(frozen=True, slots=True)
class VarlenPlan:
    """The arguments that every layer's kernel call shares."""

    first_queries: torch.Tensor
    """[spans + 1], int32: row of each span's first query, then the number of rows."""
    num_keys: torch.Tensor
    """[spans], int32."""
    block_table: torch.Tensor
    """[spans, most blocks], int32."""
    max_queries: int
    max_keys: int
    window_size: tuple[int, int]
    """Keys to the left and right of a query's own position that it sees; -1 for all."""


class VarlenAttention:
    """One kernel call a layer, straight from the pool's blocks.

    Queries are the last positions of their keys, which is how the kernel aligns a causal mask.
    """

    def __init__(self, pool: torch.Tensor, block_tokens: int) -> None:
        """`pool` is KVCache.data."""
        self._varlen: Callable[..., torch.Tensor] = import_module("torch.nn.attention.varlen").varlen_attn
        self._block_tokens = block_tokens
        pages = pool.unflatten(3, (-1, block_tokens)).permute(0, 1, 3, 4, 2, 5)
        self._keys = [layer[0] for layer in pages]  # [blocks, block_tokens, kv_heads, head_dim]
        self._values = [layer[1] for layer in pages]

    def plan(self, spans: Sequence[Span], window: int | None) -> VarlenPlan:
        tables = [_blocks_of(span.runs, self._block_tokens) for span in spans]
        width = max(map(len, tables))
        device = self._keys[0].device
        rows = [*(span.row for span in spans), spans[-1].row + spans[-1].num_queries]
        return VarlenPlan(
            first_queries=_to_device(rows, device),
            num_keys=_to_device([span.end for span in spans], device),
            block_table=_to_device([table + [0] * (width - len(table)) for table in tables], device),
            max_queries=max(span.num_queries for span in spans),
            max_keys=max(span.end for span in spans),
            window_size=(-1 if window is None else window - 1, 0),
        )

    def attend(
        self,
        plan: VarlenPlan,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        softcap: float | None,
    ) -> torch.Tensor:
        assert softcap is None, "capped scores are ExactAttention's"
        attended = self._varlen(
            query[0].transpose(0, 1),
            self._keys[layer],
            self._values[layer],
            plan.first_queries,
            None,
            plan.max_queries,
            plan.max_keys,
            scale=scaling,
            window_size=plan.window_size,
            enable_gqa=query.shape[1] != key.shape[1],
            seqused_k=plan.num_keys,
            block_table=plan.block_table,
        )
        return attended[None]


@dataclass(frozen=True, slots=True)
class GatheredSpan:
    row: int
    num_queries: int
    slots: torch.Tensor
    mask: torch.Tensor | None
    """[queries, keys], True where seen; None where a lone query sees all."""


class GatherAttention:
    """One gather and one kernel call a layer and sequence: what works wherever torch does."""

    def __init__(self, pool: torch.Tensor) -> None:
        self._pool = pool

    def plan(self, spans: Sequence[Span], window: int | None) -> list[GatheredSpan]:
        return [self._plan_span(span, window) for span in spans]

    def _plan_span(self, span: Span, window: int | None) -> GatheredSpan:
        runs = span.visible(window)
        slots = torch.from_numpy(slots_of(runs)).to(self._pool.device)
        if span.num_queries == 1:
            return GatheredSpan(span.row, 1, slots, None)
        keys = torch.arange(runs[0].position, span.end, device=self._pool.device)
        queries = torch.arange(span.start, span.end, device=self._pool.device)[:, None]
        seen = keys <= queries
        if window is not None:
            seen &= keys > queries - window
        return GatheredSpan(span.row, span.num_queries, slots, seen)

    def attend(
        self,
        plan: list[GatheredSpan],
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        softcap: float | None,
    ) -> torch.Tensor:
        assert softcap is None, "capped scores are ExactAttention's"
        attended = []
        for span in plan:
            output = scaled_dot_product_attention(
                query.narrow(2, span.row, span.num_queries),
                self._pool[layer, 0].index_select(1, span.slots)[None],
                self._pool[layer, 1].index_select(1, span.slots)[None],
                attn_mask=span.mask,
                scale=scaling,
                enable_gqa=True,
            )
            attended.append(output.transpose(1, 2))
        return torch.cat(attended, 1)


def choose_cuda_attention(
    pool: torch.Tensor, block_tokens: int, num_heads: int, windows: Sequence[int | None]
) -> VarlenAttention | GatherAttention:
    """The paged kernel if this build has it and, tried on this very pool, it attends as the definition says.

    Kernels differ by build and device in the block sizes, dtypes and windows that they take; trying is the one test
    that cannot be out of date. Writes into the pool: call it before anything is kept there.
    """
    try:
        parameters = inspect.signature(import_module("torch.nn.attention.varlen").varlen_attn).parameters
    except (ImportError, AttributeError):
        return GatherAttention(pool)
    if not {"block_table", "seqused_k", "window_size", "enable_gqa"} <= parameters.keys():
        return GatherAttention(pool)
    paged = VarlenAttention(pool, block_tokens)
    try:
        agrees = all(_agrees(paged, pool, block_tokens, num_heads, window) for window in {None, 3, *windows})
    except (RuntimeError, NotImplementedError, TypeError, ValueError):  # how a kernel says that it doesn't do this
        agrees = False
    return paged if agrees else GatherAttention(pool)


def _agrees(
    paged: AttentionBackend[Any], pool: torch.Tensor, block_tokens: int, num_heads: int, window: int | None
) -> bool:
    """Attend to random KV with a decoding query and a chunk, over scattered blocks, both ways."""
    generator = torch.Generator(pool.device).manual_seed(0)
    shape = pool[0, :, :, : 4 * block_tokens].shape
    pool[0, :, :, : shape[2]] = torch.randn(shape, generator=generator, device=pool.device).to(pool.dtype)
    lengths = (block_tokens + 5, 2 * block_tokens)
    spans = (
        Span(0, 1, lengths[0] - 1, runs_of([2, 0], lengths[0], block_tokens)),
        Span(1, 7, lengths[1] - 7, runs_of([3, 1], lengths[1], block_tokens)),
    )
    query = torch.randn(1, num_heads, 8, shape[-1], generator=generator, device=pool.device).to(pool.dtype)
    own = query[:, : shape[1]]  # the backends read this step's keys from the pool; only the shape matters here
    outputs = [
        backend.attend(backend.plan(spans, window), 0, query, own, own, shape[-1] ** -0.5, None).float()
        for backend in (paged, ExactAttention(pool))
    ]
    return bool(torch.allclose(*outputs, rtol=2e-2, atol=2e-2))


def _blocks_of(runs: Sequence[Run], block_tokens: int) -> list[int]:
    return [slot // block_tokens for run in runs for slot in range(run.slot, run.slot + run.length, block_tokens)]


def _to_device(numbers: list[Any], device: torch.device) -> torch.Tensor:
    """int32, without waiting for the device."""
    return torch.tensor(numbers, dtype=torch.int32, pin_memory=device.type == "cuda").to(device, non_blocking=True)
