"""Run one step of the model: many sequences' tokens in one row, their KV in the block pool, logits out."""

from collections.abc import Sequence
from itertools import compress
from typing import Any

import numpy as np
import torch

from worker.attention.cpu import CpuAttention
from worker.attention.cuda import choose_cuda_attention
from worker.attention.decode_kernel import DecodeKernel, load_decode_kernel
from worker.attention.paged import (
    AttentionBackend,
    AttentionStep,
    ExactAttention,
    Hearer,
    Span,
    clip,
    runs_of,
    slots_of,
)
from worker.attention.prompt_kernel import PromptKernel, load_prompt_kernel
from worker.engine.step import Chunk
from worker.model.fused_step import Rows, load_fused_step
from worker.model.load import LoadedModel
from worker.tiers.kv_cache import KVCache


class ModelRunner:
    """Runs chunks of sequences whose KV lies in `kv_cache`. Used by one thread."""

    def __init__(self, loaded: LoadedModel, kv_cache: KVCache, backend: AttentionBackend[Any] | None = None) -> None:
        """`backend` is chosen by model and device, unless given. Build it before KV that matters is in the cache."""
        assert kv_cache.layout == loaded.layout
        self._loaded, self._kv_cache = loaded, kv_cache
        on_cpu = backend is None and loaded.device.type == "cpu" and not loaded.attends.capped
        kernel = load_decode_kernel() if on_cpu else None
        prompt_kernel = load_prompt_kernel() if on_cpu else None
        self._fused_step = load_fused_step(loaded, kv_cache.data, kernel, prompt_kernel) if on_cpu else None
        self._backend = backend or _choose_backend(loaded, kv_cache, kernel, prompt_kernel)

    def run(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Run the tokens of all chunks and write their KV.

        Returns float32 logits [chunks with wants_logits, vocab] on the device, in the chunks' order. Without any, it
        returns when the KV is written; else whoever reads the logits has waited for it.
        """
        assert chunks, "a step has work"
        with torch.inference_mode():
            if self._fused_step is None:
                return self._run_modules(chunks)
            # What is run by the fused step has the same bits whoever else is in the step.
            # Last: what else there is of its sequence has earlier positions.
            fused = [self._fused_step.takes(len(chunk.token_ids)) for chunk in chunks]
            others = list(compress(chunks, (not is_fused for is_fused in fused)))
            if len(others) == len(chunks):
                return self._run_modules(chunks)
            by_modules = self._run_modules(others) if others else None
            by_fused = list(compress(chunks, fused))
            rows = Rows(*self._inputs(by_fused))
            by_one_call = self._fused_step.run(rows, _hearers(rows.spans, by_fused)).float()
            if by_modules is None or not len(by_modules):
                return by_one_call
            is_fused = torch.tensor(list(compress(fused, (chunk.wants_logits for chunk in chunks))))
            logits = by_one_call.new_empty(len(is_fused), by_one_call.shape[1])
            logits[is_fused], logits[~is_fused] = by_one_call, by_modules
            return logits

    def _run_modules(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        ids, positions, slots, wanted, spans = self._inputs(chunks)
        output = self._loaded.model(
            input_ids=ids[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=wanted,
            step=AttentionStep(self._backend, self._kv_cache.data, spans, slots, _hearers(spans, chunks)),
        )
        if not len(wanted) and self._loaded.device.type == "cuda":
            torch.cuda.current_stream(self._loaded.device).synchronize()
        logits: torch.Tensor = output.logits[0].float()
        return logits

    def _inputs(
        self, chunks: Sequence[Chunk]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, list[Span]]:
        """Ids, positions and slots [rows], the rows that logits are for, and each chunk's span of rows."""
        spans = self._spans(chunks)
        rows = [
            span.row + span.num_queries - 1 for span, chunk in zip(spans, chunks, strict=True) if chunk.wants_logits
        ]
        ids, positions, slots, wanted = self._to_device(
            np.concatenate([np.asarray(chunk.token_ids, dtype=np.int64) for chunk in chunks]),
            np.concatenate([np.arange(span.start, span.end) for span in spans]),
            np.concatenate([slots_of(clip(span.runs, span.start, span.end)) for span in spans]),
            np.asarray(rows, dtype=np.int64),
        )
        return ids, positions, slots, wanted, spans

    def _spans(self, chunks: Sequence[Chunk]) -> list[Span]:
        spans, row = [], 0
        for chunk in chunks:
            num_tokens = len(chunk.token_ids)
            assert num_tokens > 0
            end = chunk.start + num_tokens
            runs = runs_of(chunk.block_table, end, self._kv_cache.layout.block_tokens)
            spans.append(Span(row, num_tokens, chunk.start, runs))
            row += num_tokens
        return spans

    def _to_device(self, *arrays: np.ndarray[Any, np.dtype[np.int64]]) -> Sequence[torch.Tensor]:
        """All in one transfer."""
        joined = torch.from_numpy(np.concatenate(arrays))
        if self._loaded.device.type == "cuda":
            joined = joined.pin_memory().to(self._loaded.device, non_blocking=True)
        parts: Sequence[torch.Tensor] = joined.split([len(array) for array in arrays])
        return parts


def _hearers(spans: Sequence[Span], chunks: Sequence[Chunk]) -> list[tuple[Span, Hearer]]:
    return [(span, chunk.hears) for span, chunk in zip(spans, chunks, strict=True) if chunk.hears is not None]


def _choose_backend(
    loaded: LoadedModel, kv_cache: KVCache, kernel: DecodeKernel | None, prompt_kernel: PromptKernel | None
) -> AttentionBackend[Any]:
    attends = loaded.attends
    if attends.capped:
        return ExactAttention(kv_cache.data)
    if loaded.device.type == "cuda":
        return choose_cuda_attention(
            kv_cache.data, kv_cache.layout.block_tokens, attends.num_heads, sorted(set(attends.windows), key=str)
        )
    return CpuAttention(kv_cache.data, kernel, prompt_kernel)
