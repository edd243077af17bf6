"""Blocks go out of the device pool and come back bit for bit, while the pool is in use."""

import threading

import pytest
import torch

from cache_store.host_slab import Slab
from cache_store.layout import KVLayout
from worker.ids import BlockId
from worker.tiers.kv_cache import KVCache

LAYOUT = KVLayout(num_layers=3, num_kv_heads=2, head_dim=8, block_tokens=16, dtype="bfloat16")
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]


@pytest.fixture(params=DEVICES)
def cache(request: pytest.FixtureRequest) -> KVCache:
    cache = KVCache(LAYOUT, 12, torch.device(request.param))
    cache.data.copy_(torch.randn(cache.data.shape))
    return cache


def test_blocks_go_to_and_from_pinned_memory_as_to_and_from_any(cache: KVCache) -> None:
    slab = Slab.private(capacity_bytes=3 * LAYOUT.block_bytes, block_bytes=LAYOUT.block_bytes)
    cache.pin(slab.slots)
    pageable = buffer()
    cache.read_block(BlockId(5), pageable)
    cache.read_block(BlockId(5), slab.slot(1))
    assert slab.slot(1) == pageable
    assert not any(slab.slot(0)), "only its own slot"
    assert not any(slab.slot(2))
    cache.poison([BlockId(7)])
    cache.write_block(BlockId(7), slab.slot(1))
    assert torch.equal(cache.view(BlockId(7)), cache.view(BlockId(5)))
    cache.unpin()
    cache.read_block(BlockId(4), slab.slot(2))
    cache.read_block(BlockId(4), pageable)
    assert slab.slot(2) == pageable


def slots(block: int) -> slice:
    return slice(block * LAYOUT.block_tokens, (block + 1) * LAYOUT.block_tokens)


def buffer() -> memoryview:
    return memoryview(bytearray(LAYOUT.block_bytes))


def test_the_payload_of_a_block_is_its_tensor_in_the_order_of_block_shape(cache: KVCache) -> None:
    payload = buffer()
    cache.read_block(BlockId(5), payload)
    tensor = torch.frombuffer(payload, dtype=torch.bfloat16).view(LAYOUT.block_shape)
    assert torch.equal(tensor, cache.data[:, :, :, slots(5)].cpu())


def test_a_block_comes_back_bit_for_bit_into_a_poisoned_one_and_touches_no_other(cache: KVCache) -> None:
    payload = buffer()
    cache.read_block(BlockId(11), payload)
    before = cache.data.clone()
    cache.poison([BlockId(2)])
    assert bool(cache.data[:, :, :, slots(2)].isnan().all())
    cache.write_block(BlockId(2), payload.toreadonly())
    before[:, :, :, slots(2)] = before[:, :, :, slots(11)]
    assert torch.equal(cache.data, before)


def test_copy_on_write_copies_the_first_tokens_alone(cache: KVCache) -> None:
    before = cache.data.clone()
    cache.copy_tokens(BlockId(1), BlockId(7), 5)
    before[:, :, :, 7 * 16 : 7 * 16 + 5] = before[:, :, :, 16 : 16 + 5]
    assert torch.equal(cache.data, before)


def test_threads_move_different_blocks_at_once(cache: KVCache) -> None:
    before = cache.data.clone()
    moves = [(BlockId(i), BlockId(i + 6)) for i in range(6)]

    def move(source: BlockId, target: BlockId) -> None:
        for _ in range(50):
            payload = buffer()
            cache.read_block(source, payload)
            cache.write_block(target, payload)

    threads = [threading.Thread(target=move, args=pair) for pair in moves]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for source, target in moves:
        assert torch.equal(cache.data[:, :, :, slots(target)], before[:, :, :, slots(source)])


def test_a_pool_starts_without_garbage() -> None:
    assert not KVCache(LAYOUT, 2, torch.device("cpu")).data.any()
