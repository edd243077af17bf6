"""The attention kernel for prompts gives what the definition gives, whatever the chunks and wherever blocks lie."""

import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import worker.native
from tests.test_attention import attend, poisoned_pool, ragged_spans, random_qkv
from worker.attention.cpu import CpuAttention
from worker.attention.decode_kernel import load_decode_kernel
from worker.attention.paged import ExactAttention, Run, Span, clip, slots_of
from worker.attention.prompt_kernel import PromptKernel, load_prompt_kernel
from worker.native.build import load_native

NUM_SLOTS = 4000


@pytest.fixture(scope="module")
def kernel() -> PromptKernel:
    loaded = load_prompt_kernel()
    if loaded is None:
        pytest.skip("no compiler here, or a CPU without AMX")
    return loaded


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def scattered(num_tokens: int, block_tokens: int, seed: int) -> tuple[Run, ...]:
    blocks = random.Random(seed).sample(range(NUM_SLOTS // block_tokens), -(-num_tokens // block_tokens))
    return tuple(
        Run(start, block * block_tokens, min(block_tokens, num_tokens - start))
        for start, block in zip(range(0, num_tokens, block_tokens), blocks, strict=True)
    )


def pool_of(spans: Sequence[Span], kv_heads: int, head_dim: int) -> torch.Tensor:
    """A pool of two layers that is NaN but where the spans' past lies."""
    pool = torch.full((2, 2, kv_heads, NUM_SLOTS, head_dim), float("nan"), dtype=torch.bfloat16)
    for span in spans:
        if past := clip(span.runs, 0, span.start):
            slots = torch.from_numpy(slots_of(past))
            pool[:, :, :, slots] = torch.randn(2, 2, kv_heads, len(slots), head_dim).bfloat16()
    return pool


@pytest.mark.parametrize("window", [None, 1, 63, 300, 10_000])
@pytest.mark.parametrize("heads", [(2, 2, 32), (16, 8, 128), (6, 2, 96), (14, 2, 64), (40, 1, 256)])
@pytest.mark.parametrize(("start", "num_queries"), [(0, 2), (0, 300), (130, 33), (1001, 77), (64, 64)])
def test_a_chunk_over_scattered_blocks_equals_the_definition(
    kernel: PromptKernel, heads: tuple[int, int, int], window: int | None, start: int, num_queries: int
) -> None:
    num_heads, kv_heads, head_dim = heads
    spans = [Span(0, num_queries, start, scattered(start + num_queries, 16, seed=start))]
    pool = pool_of(spans, kv_heads, head_dim)
    qkv = random_qkv(spans, num_heads, kv_heads, head_dim, torch.bfloat16)
    how = {"window": window, "scaling": head_dim**-0.5}
    ours = attend(CpuAttention(pool, prompt_kernel=kernel), pool, spans, qkv, **how)
    flash = attend(CpuAttention(pool), pool, spans, qkv, **how)
    wide = pool.float()
    exact = attend(ExactAttention(wide), wide, spans, [tensor.float() for tensor in qkv], **how)
    torch.testing.assert_close(ours.float(), exact, rtol=2e-2, atol=2e-2)
    lost, lost_by_flash = ((other.float() - exact).norm() for other in (ours, flash))
    assert lost <= 1.05 * lost_by_flash


@pytest.mark.parametrize("window", [None, 20])
def test_decoding_sequences_and_chunks_of_one_step_come_out_in_their_rows(
    kernel: PromptKernel, window: int | None
) -> None:
    for seed in range(3):
        spans = ragged_spans(seed)
        pool = poisoned_pool(spans, 2, 32, torch.bfloat16)
        qkv = random_qkv(spans, 4, 2, 32, torch.bfloat16)
        ours = attend(CpuAttention(pool, load_decode_kernel(), kernel), pool, spans, qkv, window=window)
        exact = attend(ExactAttention(pool), pool, spans, qkv, window=window)
        torch.testing.assert_close(ours, exact, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("block_tokens", [1, 16, 64])
def test_where_blocks_lie_does_not_change_a_bit(kernel: PromptKernel, block_tokens: int) -> None:
    together = Span(0, 90, 700, (Run(0, 0, 790),))
    apart = Span(0, 90, 700, scattered(790, block_tokens, seed=1))
    one = pool_of([together], 2, 64)
    other = torch.full_like(one, float("nan"))
    other[:, :, :, slots_of(clip(apart.runs, 0, 700))] = one[:, :, :, :700]
    qkv = random_qkv([together], 4, 2, 64, torch.bfloat16)
    results = [
        attend(CpuAttention(pool, prompt_kernel=kernel), pool, [span], qkv)
        for pool, span in ((one, together), (other, apart))
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("cuts", [(0, 2, 500), (0, 64, 128, 500), (0, 250, 500), (0, 7, 20, 311, 498, 500)])
def test_how_a_prompt_is_cut_into_chunks_does_not_change_a_bit(
    kernel: PromptKernel, cuts: tuple[int, ...], window: int | None
) -> None:
    runs = scattered(500, 16, seed=2)
    whole = Span(0, 500, 0, runs)
    qkv = random_qkv([whole], 4, 2, 64, torch.bfloat16)
    pool = pool_of([], 2, 64)
    wanted = attend(CpuAttention(pool, prompt_kernel=kernel), pool, [whole], qkv, window=window)
    pool = pool_of([], 2, 64)
    backend = CpuAttention(pool, prompt_kernel=kernel)
    for start, end in pairwise(cuts):
        span = Span(0, end - start, start, clip(runs, 0, end))
        part = attend(backend, pool, [span], [tensor[:, :, start:end] for tensor in qkv], window=window)
        assert torch.equal(part, wanted[:, start:end])


def test_the_number_of_threads_and_other_chunks_of_the_step_do_not_change_a_bit(kernel: PromptKernel) -> None:
    alone = Span(0, 200, 300, scattered(500, 16, seed=3))
    beside = Span(200, 50, 0, (Run(0, NUM_SLOTS, 50),))
    pool = pool_of([alone], 2, 64)
    pool = torch.cat([pool, torch.full((2, 2, 2, 64, 64), float("nan"), dtype=torch.bfloat16)], 3)
    qkv = random_qkv([alone, beside], 4, 2, 64, torch.bfloat16)
    own = [tensor[:, :, :200] for tensor in qkv]
    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(attend(CpuAttention(pool, prompt_kernel=kernel), pool, [alone], own))
            together = attend(CpuAttention(pool, prompt_kernel=kernel), pool, [alone, beside], qkv)
            results.append(together[:, :200])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


def test_scores_far_apart_neither_overflow_nor_vanish(kernel: PromptKernel) -> None:
    """One key is thousands above all others, among the first or the last that a query sees."""
    for loud in (0, 400, 699):
        span = Span(0, 4, 700, scattered(704, 16, seed=4))
        pool = pool_of([span], 1, 32)
        query, key, value = random_qkv([span], 1, 1, 32, torch.bfloat16)
        query[:] = query[:, :, :1]
        slot = slots_of(span.runs)[loud]
        pool[1, 0, 0, slot] = query[0, 0, 0] * 1000
        wanted = pool[1, 1, 0, slot].clone()
        ours = attend(CpuAttention(pool, prompt_kernel=kernel), pool, [span], (query, key, value))
        torch.testing.assert_close(ours[0, :, 0], wanted.expand(4, -1))


def test_what_it_cannot_serve_is_left_to_flash(kernel: PromptKernel) -> None:
    for head_dim, dtype in ((64, torch.float32), (80, torch.bfloat16), (288, torch.bfloat16)):
        assert not kernel.serves(torch.zeros(1, 2, 1, 16, head_dim, dtype=dtype))


def test_a_cpu_without_tiles_has_no_such_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("worker.native.build._may_use_amx", lambda: False)
    own_source = Path(worker.native.__file__).with_name("prompt_attention.c")
    monkeypatch.setattr("worker.native.build._SOURCES", [own_source])  # all of them take ten times as long
    assert getattr(load_native(), "prompt_attention", None) is None, "it was built all the same"
    assert load_prompt_kernel() is None
