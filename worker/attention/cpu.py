"""Attention over the block pool on a CPU: our kernels for decoding and for prompts, where there are such, and torch's
flash kernel on views of the pool.

Flash attends to each long run where it lies, and the pieces are merged by log-sum-exp.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from worker.attention.decode_kernel import DecodeKernel, DecodePlan
from worker.attention.paged import Run, Span, clip, slots_of
from worker.attention.prompt_kernel import PromptKernel, PromptPlan

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default

_MIN_VIEW_TOKENS = 128
"""Shorter runs are gathered into one piece: a kernel call of their own would cost more than the copy."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Keys that a span attends to with one kernel call: a run of slots (no copy), or gathered ones."""

    slot: int
    length: int
    gathered: torch.Tensor | None = None
    """Slots, int64, when they are not a run."""
    mask: torch.Tensor | None = None
    """[queries, keys], added to the scores: 0 or -inf. Every query sees at least one key."""


@dataclass(frozen=True, slots=True)
class CpuSpan:
    row: int
    num_queries: int
    pieces: tuple[Piece, ...]
    own: bool
    """Whether the step's own keys are attended to from where they are, causally, and not through a piece."""


@dataclass(frozen=True, slots=True)
class CpuPlan:
    decoding: DecodePlan | None
    """The spans that the decode kernel takes, all in one call."""
    prompts: PromptPlan | None
    """Those that the prompt kernel takes, the same."""
    others: list[CpuSpan]


class CpuAttention:
    """No padding, and no copy of the history: long runs are attended to where they lie.

    Decoding queries go to the decode kernel, all in one call, and chunks of prompts to the prompt kernel; without one,
    each attends to the pool's runs by flash. There a chunk of queries attends to the past without a mask, and causally
    to itself; where a sliding window's edge cuts through the chunk, the keys around the edge go with the chunk's own
    into one masked piece.
    """

    def __init__(
        self,
        pool: torch.Tensor,
        decode_kernel: DecodeKernel | None = None,
        prompt_kernel: PromptKernel | None = None,
    ) -> None:
        """`pool` is KVCache.data. Without a kernel, or where it can't serve the pool, flash does its work."""
        self._prompt_kernel = prompt_kernel if prompt_kernel is not None and prompt_kernel.serves(pool) else None
        self._kernel = decode_kernel if decode_kernel is not None and decode_kernel.serves(pool) else None
        self._mask_dtype = pool.dtype
        self._keys = [layer[0][None] for layer in pool]  # [1, kv_heads, slots, head_dim]
        self._values = [layer[1][None] for layer in pool]

    def plan(self, spans: Sequence[Span], window: int | None) -> CpuPlan:
        decoding = [span for span in spans if span.num_queries == 1]
        prompts = [span for span in spans if span.num_queries > 1]
        others = (decoding if self._kernel is None else []) + (prompts if self._prompt_kernel is None else [])
        return CpuPlan(
            self._kernel.plan(decoding, window) if self._kernel is not None and decoding else None,
            self._prompt_kernel.plan(prompts, window) if self._prompt_kernel is not None and prompts else None,
            [self._plan_span(span, window) for span in others],
        )

    def _plan_span(self, span: Span, window: int | None) -> CpuSpan:
        if span.num_queries == 1:
            return CpuSpan(span.row, 1, _pieces(span.visible(window)), own=False)
        if window is None or span.end <= window:
            return CpuSpan(span.row, span.num_queries, _pieces(clip(span.runs, 0, span.start)), own=True)
        first_seen_by_all = min(max(0, span.end - window), span.start)
        past = clip(span.runs, first_seen_by_all, span.start)
        edge = clip(span.runs, max(0, span.start - window + 1), first_seen_by_all)
        own = clip(span.runs, span.start, span.end)
        pieces = (*_pieces(past), self._masked_piece(span, edge + own, window))
        return CpuSpan(span.row, span.num_queries, pieces, own=False)

    def _masked_piece(self, span: Span, runs: Sequence[Run], window: int) -> Piece:
        slots = torch.from_numpy(slots_of(runs))
        keys = torch.cat([torch.arange(run.position, run.position + run.length) for run in runs])
        queries = torch.arange(span.start, span.end)[:, None]
        hidden = (keys > queries) | (keys <= queries - window)
        mask = torch.zeros(hidden.shape, dtype=self._mask_dtype).masked_fill_(hidden, float("-inf"))
        return Piece(0, len(slots), slots, mask)

    def attend(
        self,
        plan: CpuPlan,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        softcap: float | None,
    ) -> torch.Tensor:
        assert softcap is None, "capped scores are ExactAttention's"
        keys, values = self._keys[layer], self._values[layer]
        _, heads, num_tokens, head_dim = query.shape
        attended = query.new_empty(1, num_tokens, heads, head_dim)
        if plan.decoding is not None:
            assert self._kernel is not None
            self._kernel.attend(plan.decoding, query[0], keys[0], values[0], attended[0], scaling)
        if plan.prompts is not None:
            assert self._prompt_kernel is not None
            self._prompt_kernel.attend(plan.prompts, query[0], keys[0], values[0], attended[0], scaling)
        for span in plan.others:
            queries = query.narrow(2, span.row, span.num_queries)
            outputs = [_attend_piece(queries, keys, values, piece, scaling) for piece in span.pieces]
            if span.own:
                own = key.narrow(2, span.row, span.num_queries), value.narrow(2, span.row, span.num_queries)
                outputs.append(_flash(queries, *own, 0.0, True, scale=scaling))
            output = outputs[0][0] if len(outputs) == 1 else _merge(outputs)
            attended.narrow(1, span.row, span.num_queries).copy_(output.transpose(1, 2))
        return attended


def _pieces(runs: Sequence[Run]) -> tuple[Piece, ...]:
    long = [run for run in runs if run.length >= _MIN_VIEW_TOKENS]
    short = [run for run in runs if run.length < _MIN_VIEW_TOKENS]
    if len(short) == 1:
        long, short = [*long, *short], []
    pieces = [Piece(run.slot, run.length) for run in long]
    if short:
        slots = slots_of(short)
        pieces.append(Piece(0, len(slots), torch.from_numpy(slots)))
    return tuple(pieces)


def _attend_piece(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, piece: Piece, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the output [1, heads, queries, head_dim] and its log-sum-exp [1, heads, queries]."""
    if piece.gathered is None:
        seen, content = keys.narrow(2, piece.slot, piece.length), values.narrow(2, piece.slot, piece.length)
    else:
        seen, content = keys.index_select(2, piece.gathered), values.index_select(2, piece.gathered)
    output: tuple[torch.Tensor, torch.Tensor] = _flash(
        queries, seen, content, 0.0, False, attn_mask=piece.mask, scale=scaling
    )
    return output


def _merge(outputs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Join attention over disjoint keys, in float32: each part weighs as much as its share of the softmax's sum."""
    merged, total = outputs[0][0].float(), outputs[0][1]
    for output, log_sum in outputs[1:]:
        share = torch.sigmoid(log_sum - total)[..., None]
        merged.lerp_(output.float(), share)  # in place: fresh memory for every piece would cost as much as the sums
        total = torch.logaddexp(total, log_sum)
    return merged
