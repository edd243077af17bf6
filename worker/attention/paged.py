"""How a model's attention reaches the block pool: what a step says to every layer, and the plain way to attend.

Knows no model and no scheduler. The fast ways to attend are in attention_cpu and attention_cuda.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from transformers import AttentionInterface

from worker.errors import ModelRefused

ATTENTION_NAME = "rekindle"
"""What models are told to use as `attn_implementation`. transformers makes no mask for a name it has none for."""

_MAX_SCORES = 1 << 24
"""Most attention scores that `exact_attention` holds at once: 64 MiB of float32."""

_HARMLESS = frozenset(
    {"position_ids", "use_cache", "cache_position", "dropout", "output_attentions", "output_router_logits"}
)
"""Arguments that models pass on and that say nothing about which scores there are."""


class Run(NamedTuple):
    """Positions [position, position + length) of a sequence lie in slots [slot, slot + length) of the pool."""

    position: int
    slot: int
    length: int


@dataclass(frozen=True, slots=True)
class Span:
    """One sequence's share of a step: rows [row, row + num_queries) are its positions from `start` on."""

    row: int
    num_queries: int
    start: int
    runs: tuple[Run, ...]
    """Where its positions [0, end) lie, in order, as few as can be."""

    @property
    def end(self) -> int:
        return self.start + self.num_queries

    def visible(self, window: int | None) -> tuple[Run, ...]:
        """The runs that any of the queries attends to."""
        return clip(self.runs, 0 if window is None else max(0, self.start - window + 1), self.end)


def clip(runs: Sequence[Run], low: int, high: int) -> tuple[Run, ...]:
    """What of the runs lies in positions [low, high)."""
    clipped = []
    for position, slot, length in runs:
        first, last = max(position, low), min(position + length, high)
        if first < last:
            clipped.append(Run(first, slot + first - position, last - first))
    return tuple(clipped)


def runs_of(block_table: Sequence[int], num_tokens: int, block_tokens: int) -> tuple[Run, ...]:
    """Join neighbouring blocks of a table into runs that hold its first `num_tokens` positions."""
    table = np.asarray(block_table[: -(-num_tokens // block_tokens)], dtype=np.int64)
    firsts = [0, *(np.flatnonzero(np.diff(table) != 1) + 1).tolist(), len(table)]
    return tuple(
        Run(
            first * block_tokens,
            int(table[first]) * block_tokens,
            min(last * block_tokens, num_tokens) - first * block_tokens,
        )
        for first, last in pairwise(firsts)
    )


def slots_of(runs: Sequence[Run]) -> npt.NDArray[np.int64]:
    """The slot of every position of the runs, in order."""
    return np.concatenate([np.arange(run.slot, run.slot + run.length) for run in runs])


PlanT = TypeVar("PlanT")

Hearer = Callable[[int, torch.Tensor], None]
"""Told a layer's number and a span's queries [heads, tokens, head_dim]."""


class AttentionBackend(Protocol[PlanT]):
    """A way to attend over the pool."""

    def plan(self, spans: Sequence[Span], window: int | None) -> PlanT:
        """What all layers with this window share in one step. Made once a step and window."""

    def attend(
        self,
        plan: PlanT,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        softcap: float | None,
    ) -> torch.Tensor:
        """Attend to the pool, into which this step's keys and values are written already.

        query [1, heads, tokens, head_dim]; key and value [1, kv_heads, tokens, head_dim], the step's own.
        Returns [1, tokens, heads, head_dim].
        """


class LayerAttention(Protocol):
    """What a step is to a layer's attention."""

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """query [1, heads, tokens, head_dim], key and value [1, kv_heads, tokens, head_dim], of a step's tokens in
        one row. Returns [1, tokens, heads, head_dim]."""


class AttentionStep:
    """One step's attention over the pool, the same for all layers but for their window."""

    def __init__(
        self,
        backend: AttentionBackend[Any],
        pool: torch.Tensor,
        spans: Sequence[Span],
        slots: torch.Tensor,
        hearers: Sequence[tuple[Span, Hearer]] = (),
    ) -> None:
        """`pool` is KVCache.data; `slots` [tokens], int64, says where each token's key and value go. `hearers` are told
        the queries of their spans."""
        self._backend, self._pool, self._spans, self._slots = backend, pool, spans, slots
        self._hearers = hearers
        self._plans: dict[int | None, Any] = {}

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        layer: int = module.layer_idx
        for span, hear in self._hearers:
            hear(layer, query[0, :, span.row : span.row + span.num_queries])
        self._pool[layer, 0].index_copy_(1, self._slots, key[0])
        self._pool[layer, 1].index_copy_(1, self._slots, value[0])
        if window not in self._plans:
            self._plans[window] = self._backend.plan(self._spans, window)
        return self._backend.attend(self._plans[window], layer, query, key, value, scaling, softcap)


def register_attention() -> None:
    """Make `ATTENTION_NAME` known to transformers. May be called again."""
    AttentionInterface.register(ATTENTION_NAME, _attention)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    step: LayerAttention,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in every layer. Refuses what it would not honour, rather than leave it out."""
    if attention_mask is not None:
        raise ModelRefused(f"{type(module).__name__} makes an attention mask of its own")
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise ModelRefused(f"{type(module).__name__} attends to later tokens too")
    for name, argument in others.items():
        if argument is not None and name not in _HARMLESS:
            raise ModelRefused(f"{type(module).__name__} wants attention with {name}")
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    return step.attend(module, query, key, value, scaling=scaling, window=sliding_window, softcap=softcap), None


def exact_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    start: int,
    key_positions: torch.Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attend by the definition, in float32: every score, mask and sum.

    query [heads, queries, head_dim], of positions from `start` on; key and value [kv_heads, keys, head_dim], of
    `key_positions`. Returns [queries, heads, head_dim] in the query's dtype.
    """
    heads, num_queries, head_dim = query.shape
    kv_heads = key.shape[0]
    keys, values = key.float().transpose(1, 2)[:, None], value.float()[:, None]
    queries = query.float().view(kv_heads, heads // kv_heads, num_queries, head_dim)
    positions = torch.arange(start, start + num_queries, device=query.device)[:, None]
    hidden = key_positions > positions
    if window is not None:
        hidden |= key_positions <= positions - window
    rows = max(1, _MAX_SCORES // (heads * len(key_positions)))
    attended = []
    for few, unseen in zip(queries.split(rows, 2), hidden.split(rows), strict=True):
        scores = torch.matmul(few, keys) * scaling
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        weights = torch.softmax(scores.masked_fill(unseen, float("-inf")), dim=-1)
        attended.append(torch.matmul(weights, values))
    return torch.cat(attended, 2).flatten(0, 1).transpose(0, 1).to(query.dtype)


@dataclass(frozen=True, slots=True)
class ExactSpan:
    """A span and all that its queries can see, as indices."""

    span: Span
    window: int | None
    slots: torch.Tensor
    positions: torch.Tensor


class ExactAttention:
    """Gather and attend by the definition: for models whose scores are capped, which no fast kernel here can do, and
    what the other backends are compared with."""

    def __init__(self, pool: torch.Tensor) -> None:
        self._pool = pool

    def plan(self, spans: Sequence[Span], window: int | None) -> list[ExactSpan]:
        return [self._plan_span(span, window) for span in spans]

    def _plan_span(self, span: Span, window: int | None) -> ExactSpan:
        runs = span.visible(window)
        slots = torch.from_numpy(slots_of(runs)).to(self._pool.device)
        return ExactSpan(span, window, slots, torch.arange(runs[0].position, span.end, device=self._pool.device))

    def attend(
        self,
        plan: list[ExactSpan],
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        softcap: float | None,
    ) -> torch.Tensor:
        attended = [
            exact_attention(
                query[0, :, part.span.row : part.span.row + part.span.num_queries],
                self._pool[layer, 0].index_select(1, part.slots),
                self._pool[layer, 1].index_select(1, part.slots),
                start=part.span.start,
                key_positions=part.positions,
                scaling=scaling,
                window=part.window,
                softcap=softcap,
            )
            for part in plan
        ]
        return torch.cat(attended)[None]
