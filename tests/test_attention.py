"""Every way to attend gives what the definition gives, wherever the keys lie and however a step is cut."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from worker.attention.cpu import CpuAttention
from worker.attention.cuda import GatherAttention, VarlenAttention, choose_cuda_attention
from worker.attention.paged import AttentionBackend, AttentionStep, ExactAttention, Run, Span, clip, runs_of, slots_of

BLOCK_TOKENS = 16
NUM_BLOCKS = 120
LAYERS = 2
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


class Layer(torch.nn.Module):  # type: ignore[misc]  # torch is untyped here
    """All that a step asks of a model's attention module."""

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx


def block_table(numbers: random.Random, free: list[int], num_blocks: int) -> list[int]:
    """Blocks taken from `free` in stretches of neighbours, long and short."""
    table: list[int] = []
    while len(table) < num_blocks:
        length = min(numbers.choice((1, 1, 2, 5, 12)), num_blocks - len(table))
        first = numbers.randrange(len(free))
        table += free[first : first + length]
        del free[first : first + length]
    return table


def ragged_spans(seed: int) -> tuple[Span, ...]:
    """A step of decoding sequences and chunks in a random order, each in blocks of its own."""
    numbers = random.Random(seed)
    free = list(range(NUM_BLOCKS))
    parts = [(0, 1), (255, 1), (30, 1), (0, 37), (0, 1), (300, 45), (16, 16), (200, 3), (77, 1)]
    numbers.shuffle(parts)
    spans, row = [], 0
    for start, num_queries in parts:
        end = start + num_queries
        table = block_table(numbers, free, -(-end // BLOCK_TOKENS))
        spans.append(Span(row, num_queries, start, runs_of(table, end, BLOCK_TOKENS)))
        row += num_queries
    return tuple(spans)


def poisoned_pool(
    spans: Sequence[Span], kv_heads: int, head_dim: int, dtype: torch.dtype, device: str = "cpu"
) -> torch.Tensor:
    """NaN everywhere but where the spans' past lies."""
    shape = (LAYERS, 2, kv_heads, NUM_BLOCKS * BLOCK_TOKENS, head_dim)
    pool = torch.full(shape, float("nan"), dtype=dtype)
    for span in spans:
        if past := clip(span.runs, 0, span.start):
            slots = torch.from_numpy(slots_of(past))
            pool[:, :, :, slots] = torch.randn(LAYERS, 2, kv_heads, len(slots), head_dim).to(dtype)
    return pool.to(device)


def attend(
    backend: AttentionBackend[Any], pool: torch.Tensor, spans: Sequence[Span], qkv: Sequence[torch.Tensor], **how: Any
) -> torch.Tensor:
    slots = torch.cat([torch.from_numpy(slots_of(clip(span.runs, span.start, span.end))) for span in spans])
    step = AttentionStep(backend, pool, spans, slots.to(pool.device))
    return step.attend(Layer(1), *qkv, **{"window": None, "softcap": None, "scaling": 0.3, **how})


def random_qkv(
    spans: Sequence[Span], heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> list[torch.Tensor]:
    tokens = sum(span.num_queries for span in spans)
    return [torch.randn(1, number, tokens, head_dim).to(dtype) for number in (heads, kv_heads, kv_heads)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("backend", [CpuAttention, GatherAttention])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1, 20, 100, 10_000])
@pytest.mark.parametrize("heads", [(4, 4, 16), (6, 2, 24)])
def test_a_ragged_step_over_scattered_blocks_equals_the_definition(
    backend: type[CpuAttention | GatherAttention],
    dtype: torch.dtype,
    window: int | None,
    heads: tuple[int, int, int],
) -> None:
    num_heads, kv_heads, head_dim = heads
    for seed in range(3):
        spans = ragged_spans(seed)
        pool = poisoned_pool(spans, kv_heads, head_dim, dtype)
        qkv = random_qkv(spans, num_heads, kv_heads, head_dim, dtype)
        other = pool.clone()
        ours = attend(backend(pool), pool, spans, qkv, window=window)
        wanted = attend(ExactAttention(other), other, spans, qkv, window=window)
        torch.testing.assert_close(ours, wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_definition_is_what_the_formula_says(window: int | None, softcap: float | None) -> None:
    """One score at a time, in float64."""
    span = Span(0, 3, 9, (Run(0, 48, 12),))
    pool = poisoned_pool([span], 1, 4, torch.float32)
    query, key, value = random_qkv([span], 2, 1, 4, torch.float32)
    ours = attend(ExactAttention(pool), pool, [span], (query, key, value), window=window, softcap=softcap)
    keys, values = pool[1, :, 0, 48:60].double()
    for row, position in enumerate(range(9, 12)):
        first = 0 if window is None else position - window + 1
        for head in range(2):
            scores = [float(query[0, head, row].double() @ keys[k]) * 0.3 for k in range(first, position + 1)]
            if softcap is not None:
                scores = [softcap * float(torch.tensor(score / softcap).tanh()) for score in scores]
            weights = torch.tensor(scores, dtype=torch.float64).softmax(0)
            torch.testing.assert_close(ours[0, row, head].double(), weights @ values[first : position + 1])


def test_a_long_chunk_is_cut_by_its_scores_and_stays_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    spans = ragged_spans(0)
    pool = poisoned_pool(spans, 2, 8, torch.float32)
    qkv = random_qkv(spans, 4, 2, 8, torch.float32)
    whole = attend(ExactAttention(pool), pool, spans, qkv, softcap=3.0)
    monkeypatch.setattr("worker.attention.paged._MAX_SCORES", 4 * 345 * 7)
    torch.testing.assert_close(attend(ExactAttention(pool), pool, spans, qkv, softcap=3.0), whole)


def test_a_step_writes_its_keys_and_values_to_its_slots_and_nowhere_else() -> None:
    spans = ragged_spans(1)
    pool = poisoned_pool(spans, 2, 8, torch.float32)
    before = pool.clone()
    query, key, value = random_qkv(spans, 4, 2, 8, torch.float32)
    attend(CpuAttention(pool), pool, spans, (query, key, value))
    slots = torch.cat([torch.from_numpy(slots_of(clip(span.runs, span.start, span.end))) for span in spans])
    assert torch.equal(pool[1, 0, :, slots], key[0])
    assert torch.equal(pool[1, 1, :, slots], value[0])
    before[1, :, :, slots] = pool[1, :, :, slots]
    torch.testing.assert_close(pool, before, rtol=0, atol=0, equal_nan=True)


def test_neighbouring_blocks_become_one_run_and_the_last_ends_with_the_tokens() -> None:
    assert runs_of([4, 5, 6, 2, 3, 9], 90, 16) == (Run(0, 64, 48), Run(48, 32, 32), Run(80, 144, 10))
    assert runs_of([4, 5, 6], 20, 16) == (Run(0, 64, 20),)
    assert runs_of([6, 5], 32, 16) == (Run(0, 96, 16), Run(16, 80, 16))


def test_a_window_hides_the_runs_before_it() -> None:
    span = Span(0, 1, 39, (Run(0, 64, 32), Run(32, 16, 8)))
    assert span.visible(None) == span.runs
    assert span.visible(10) == (Run(30, 94, 2), Run(32, 16, 8))
    assert span.visible(8) == (Run(32, 16, 8),)


def test_without_a_paged_kernel_cuda_attention_falls_back_to_gathering() -> None:
    """On a CPU the paged kernel is there by name and refuses to run: the choice must be made by trying it."""
    pool = torch.zeros(1, 2, 2, 8 * BLOCK_TOKENS, 16)
    assert isinstance(choose_cuda_attention(pool, BLOCK_TOKENS, 4, [None]), GatherAttention)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("block_tokens", [16, 256])
def test_the_attention_chosen_on_cuda_equals_the_definition(window: int | None, block_tokens: int) -> None:
    spans = ragged_spans(0)
    if block_tokens != BLOCK_TOKENS:  # each sequence in order, in large blocks
        spans = tuple(Span(s.row, s.num_queries, s.start, (Run(0, 512 * i, s.end),)) for i, s in enumerate(spans))
    pool = torch.zeros(LAYERS, 2, 2, 5120, 64, dtype=torch.bfloat16, device="cuda")
    backend = choose_cuda_attention(pool, block_tokens, 4, [window])
    assert isinstance(backend, VarlenAttention | GatherAttention)
    pool.normal_()
    qkv = [tensor.cuda() for tensor in random_qkv(spans, 4, 2, 64, torch.bfloat16)]
    ours = attend(backend, pool, spans, qkv, window=window)
    wanted = attend(ExactAttention(pool), pool, spans, qkv, window=window)
    torch.testing.assert_close(ours, wanted, rtol=2e-2, atol=2e-2)
