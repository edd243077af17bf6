"""The decode kernel gives what the definition gives, and where it can't be had, decoding goes on without it."""

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.test_attention import attend, poisoned_pool, ragged_spans, random_qkv
from worker.attention.cpu import CpuAttention
from worker.attention.decode_kernel import DecodeKernel, load_decode_kernel
from worker.attention.paged import ExactAttention, Run, Span, clip, slots_of

NUM_SLOTS = 12_000
LONGEST = 2000


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the kernel of these tests is built."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def kernel(cache: Path) -> DecodeKernel:
    if shutil.which("cc") is None and shutil.which("gcc") is None:
        pytest.skip("no C compiler to build the decode kernel with")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        loaded = load_decode_kernel()
    assert loaded is not None
    return loaded


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def decoding_spans(numbers: random.Random, lengths: Sequence[int]) -> list[Span]:
    """One query each, over runs short and long: the pool's slots in stretches, dealt out in a random order."""
    stretches, slot = [], 0
    while slot < NUM_SLOTS:
        length = min(numbers.choice((1, 7, 16, 16, 100, 700)), NUM_SLOTS - slot)
        stretches.append((slot, length))
        slot += length
    numbers.shuffle(stretches)
    spans = []
    for row, num_tokens in enumerate(lengths):
        runs: list[Run] = []
        position = 0
        while position < num_tokens:
            slot, length = stretches.pop()
            runs.append(Run(position, slot, min(length, num_tokens - position)))
            position += length
        spans.append(Span(row, 1, num_tokens - 1, tuple(runs)))
    return spans


def poisoned(spans: Sequence[Span], kv_heads: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """A pool of two layers that is NaN but where the spans' past lies."""
    pool = torch.full((2, 2, kv_heads, NUM_SLOTS, head_dim), float("nan"), dtype=dtype)
    for span in spans:
        if past := clip(span.runs, 0, span.start):
            slots = torch.from_numpy(slots_of(past))
            pool[:, :, :, slots] = torch.randn(2, 2, kv_heads, len(slots), head_dim).to(dtype)
    return pool


def error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours.double() - exact.double()).abs().mean())


@pytest.mark.parametrize("window", [None, 1, 300, 10_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(2, 2, 32), (4, 2, 64), (6, 2, 80), (8, 2, 128), (7, 1, 48)])
def test_a_ragged_batch_over_scattered_runs_equals_the_definition(
    kernel: DecodeKernel, heads: tuple[int, int, int], dtype: torch.dtype, window: int | None
) -> None:
    num_heads, kv_heads, head_dim = heads
    numbers = random.Random(num_heads * head_dim)
    spans = decoding_spans(numbers, [1, LONGEST, 2, 17, 64, 65, 1500, *(numbers.randint(1, 900) for _ in range(4))])
    pool = poisoned(spans, kv_heads, head_dim, dtype)
    query, key, value = random_qkv(spans, num_heads, kv_heads, head_dim, dtype)
    scaling = head_dim**-0.5
    ours = attend(CpuAttention(pool, kernel), pool, spans, (query, key, value), window=window, scaling=scaling)
    flash = attend(CpuAttention(pool), pool, spans, (query, key, value), window=window, scaling=scaling)
    wide = pool.float()
    exact = attend(
        ExactAttention(wide), wide, spans, (query.float(), key.float(), value.float()), window=window, scaling=scaling
    )
    assert ours.dtype == dtype
    if dtype == torch.float32:
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=2e-6)
    else:  # all that is lost is the last rounding, as if the definition's result were rounded once
        torch.testing.assert_close(ours.float(), exact, rtol=2**-8, atol=1e-6)
        assert error(ours, exact) <= error(flash, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 20])
def test_decoding_sequences_and_chunks_of_one_step_come_out_in_their_rows(
    kernel: DecodeKernel, dtype: torch.dtype, window: int | None
) -> None:
    for seed in range(3):
        spans = ragged_spans(seed)
        pool = poisoned_pool(spans, 2, 32, dtype)
        qkv = random_qkv(spans, 4, 2, 32, dtype)
        ours = attend(CpuAttention(pool, kernel), pool, spans, qkv, window=window)
        exact = attend(ExactAttention(pool), pool, spans, qkv, window=window)
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(ours, exact, rtol=tolerance, atol=tolerance)


def test_scores_far_apart_neither_overflow_nor_vanish(kernel: DecodeKernel) -> None:
    """The largest score is in the last piece, and thousands above all others, or it is in the first."""
    for loud in (0, 1999):
        spans = decoding_spans(random.Random(0), [LONGEST])
        pool = torch.randn(2, 2, 1, NUM_SLOTS, 32)
        query, key, value = random_qkv(spans, 1, 1, 32, torch.float32)
        pool[1, 0, 0, slots_of(spans[0].runs)[loud]] = query[0, 0, 0] * 1000
        if loud == 1999:
            key = query * 1000
        wanted = value[0, 0, 0] if loud == 1999 else pool[1, 1, 0, slots_of(spans[0].runs)[loud]].clone()
        ours = attend(CpuAttention(pool, kernel), pool, spans, (query, key, value))
        torch.testing.assert_close(ours[0, 0, 0], wanted)


@pytest.mark.parametrize("block_tokens", [1, 16, 64, 256])
def test_where_blocks_lie_does_not_change_a_bit(kernel: DecodeKernel, block_tokens: int) -> None:
    """A restored conversation lies elsewhere than it did: its next token must not depend on that."""
    num_tokens, num_blocks = 1500, NUM_SLOTS // block_tokens
    together = Span(0, 1, num_tokens - 1, (Run(0, 0, num_tokens),))
    blocks = random.Random(0).sample(range(num_tokens // block_tokens + 1, num_blocks), -(-num_tokens // block_tokens))
    starts = range(0, num_tokens, block_tokens)
    scattered = [
        Run(start, block * block_tokens, min(block_tokens, num_tokens - start))
        for start, block in zip(starts, blocks, strict=True)
    ]
    pool = torch.randn(2, 2, 2, NUM_SLOTS, 64)
    pool[:, :, :, slots_of(scattered)] = pool[:, :, :, :num_tokens]
    qkv = random_qkv([together], 4, 2, 64, torch.float32)
    one = attend(CpuAttention(pool, kernel), pool, [together], qkv)
    other = attend(CpuAttention(pool, kernel), pool, [Span(0, 1, num_tokens - 1, tuple(scattered))], qkv)
    assert torch.equal(one, other)


def test_neither_the_number_of_threads_nor_the_batch_changes_a_bit(kernel: DecodeKernel) -> None:
    spans = decoding_spans(random.Random(1), [LONGEST, 3, 800])
    pool = poisoned(spans, 2, 64, torch.float32)
    qkv = random_qkv(spans, 4, 2, 64, torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(attend(CpuAttention(pool, kernel), pool, spans, qkv))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[1], results[0])
    assert torch.equal(results[2], results[0])
    for span in spans:
        own = tuple(part[:, :, span.row : span.row + 1] for part in qkv)
        alone = Span(0, 1, span.start, span.runs)
        for window in (None, 100):
            together = attend(CpuAttention(pool, kernel), pool, spans, qkv, window=window)
            by_itself = attend(CpuAttention(pool, kernel), pool, [alone], own, window=window)
            assert torch.equal(by_itself[0, 0], together[0, span.row])


@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float16, 32), (torch.float32, 24)])
def test_what_the_kernel_cannot_serve_is_left_to_flash(kernel: DecodeKernel, dtype: torch.dtype, head_dim: int) -> None:
    spans = ragged_spans(0)
    pool = poisoned_pool(spans, 2, head_dim, dtype)
    assert not kernel.serves(pool)
    qkv = random_qkv(spans, 4, 2, head_dim, dtype)
    ours = attend(CpuAttention(pool, kernel), pool, spans, qkv)
    assert torch.equal(ours, attend(CpuAttention(pool), pool, spans, qkv))


def test_it_is_built_once_and_leaves_nothing_else_in_the_cache(
    kernel: DecodeKernel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (library,) = (cache / "rekindle").iterdir()
    built_at = library.stat().st_mtime_ns
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("PATH", "")  # no compiler is needed any more
    assert load_decode_kernel() is not None
    assert library.stat().st_mtime_ns == built_at


def test_without_a_compiler_there_is_no_kernel_and_decoding_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    assert load_decode_kernel() is None
    spans = ragged_spans(0)
    pool = poisoned_pool(spans, 2, 32, torch.float32)
    qkv = random_qkv(spans, 4, 2, 32, torch.float32)
    exact = attend(ExactAttention(pool), pool, spans, qkv)
    torch.testing.assert_close(attend(CpuAttention(pool, load_decode_kernel()), pool, spans, qkv), exact)


def test_a_compiler_that_fails_means_no_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho unknown flag >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert load_decode_kernel() is None
    assert not list((tmp_path / "cache" / "rekindle").iterdir())


def test_a_wrong_library_in_the_cache_is_refused(
    kernel: DecodeKernel, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process of its own: here the right one may be loaded under the same name already."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (right,) = (cache / "rekindle").iterdir()
    library = tmp_path / "rekindle" / right.name
    library.parent.mkdir()
    source = tmp_path / "wrong.c"
    source.write_text("void decode_attention(void) {}\n")
    subprocess.run([shutil.which("cc") or "gcc", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    asks = (
        "from worker.attention.decode_kernel import load_decode_kernel\n"
        "raise SystemExit(load_decode_kernel() is not None)"
    )
    done = subprocess.run([sys.executable, "-c", asks], env={**os.environ}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "wrong results" in done.stdout
