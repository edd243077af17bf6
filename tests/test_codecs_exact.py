"""The exact codecs give back every bit of every block, and take less for it where they can."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_store.errors import BlockCorrupt
from tests.codec_blocks import BITS, CPU, CUDA, DTYPES, decode, encode, filled_cache, layout_of, load_tiny, normal_block
from tests.tiny_models import ARCHITECTURES
from worker.ids import BlockId
from worker.tiers.codecs import open_codecs
from worker.tiers.codecs.codec import Codec
from worker.tiers.codecs.exact import LosslessCodec, RawCodec


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    bits = torch.int16 if one.dtype.itemsize == 2 else torch.int32
    return bool(torch.equal(one.view(bits), other.view(bits)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_block_of_every_architecture_comes_back_bit_for_bit(
    architecture: str, dtype: str, tmp_path: Path
) -> None:
    loaded = load_tiny(tmp_path, architecture, dtype=dtype)
    cache = filled_cache(loaded, 5)
    codecs = open_codecs(loaded.layout, loaded.rope, loaded.device)
    for codec in (codecs["raw"], codecs["lossless"]):
        for number in range(5):
            kv = cache.view(BlockId(number))
            payload = encode(codec, kv, first_position=16 * number)
            assert same_bits(decode(codec, payload, kv, first_position=16 * number), kv)


@settings(deadline=None, max_examples=60)
@given(
    dtype=st.sampled_from(DTYPES),
    head_dim=st.sampled_from([1, 12, 64]),
    num_tokens=st.integers(1, 16),
    same_high_bits=st.integers(0, 14),
    seed=st.integers(0, 2**32),
)
def test_any_bits_survive_a_lossless_round_trip(
    dtype: str, head_dim: int, num_tokens: int, same_high_bits: int, seed: int
) -> None:
    """NaNs with their payloads, infinities, subnormals, -0: random bits have them all, of like exponents or not."""
    layout = layout_of(head_dim=head_dim, block_tokens=16, dtype=dtype)
    width = 8 * layout.itemsize
    span = 1 << (width - 1 - same_high_bits)
    bits = torch.randint(-span, span, layout.block_shape, generator=torch.Generator().manual_seed(seed))
    kv = bits.to(BITS[dtype]).view(getattr(torch, dtype))
    codec = LosslessCodec(layout, CPU)
    payload = encode(codec, kv, num_tokens=num_tokens)
    back = decode(codec, payload, kv, num_tokens=num_tokens)
    assert same_bits(back[:, :, :, :num_tokens], kv[:, :, :, :num_tokens])


@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_that_does_not_shrink_is_stored_raw(dtype: str) -> None:
    layout = layout_of(dtype=dtype)
    bits = torch.randint(-(2**31), 2**31, layout.block_shape, generator=torch.Generator().manual_seed(0))
    kv = bits.to(BITS[dtype]).view(getattr(torch, dtype))
    payload = encode(LosslessCodec(layout, CPU), kv)
    assert payload == encode(RawCodec(layout, CPU), kv)
    assert same_bits(decode(LosslessCodec(layout, CPU), payload, kv), kv)


@pytest.mark.parametrize(("dtype", "wanted"), [("bfloat16", 1.48), ("float16", 1.15), ("float32", 1.19)])
def test_numbers_of_like_size_shrink_to_about_their_entropy(dtype: str, wanted: float) -> None:
    kv = normal_block(layout_of(dtype=dtype))
    assert kv.nbytes / encode(LosslessCodec(layout_of(dtype=dtype), CPU), kv).nbytes >= wanted


def test_an_unfull_block_takes_the_room_of_its_tokens() -> None:
    kv = normal_block(layout_of())
    codec = LosslessCodec(layout_of(), CPU)
    assert encode(codec, kv, num_tokens=8).nbytes < 1.1 * encode(codec, kv).nbytes / 8
    spoilt = kv.clone()
    spoilt[:, :, :, 8:] = torch.nan
    assert encode(codec, spoilt, num_tokens=8) == encode(codec, kv, num_tokens=8)


def test_equal_blocks_give_equal_payloads_wherever_they_lie() -> None:
    kv = normal_block(layout_of())
    codec = LosslessCodec(layout_of(), CPU)
    assert encode(codec, kv) == encode(codec, kv.clone())


@pytest.mark.parametrize("codec", [RawCodec(layout_of(), CPU), LosslessCodec(layout_of(), CPU)])
def test_a_payload_of_another_length_is_corrupt(codec: Codec) -> None:
    kv = normal_block(layout_of())
    payload = encode(codec, kv)
    for wrong in (payload[:-1], payload[: kv.nbytes // 4], payload[:0]):
        with pytest.raises(BlockCorrupt):
            decode(codec, wrong, kv)


def test_a_payload_of_fewer_tokens_than_asked_for_is_corrupt() -> None:
    codec = LosslessCodec(layout_of(), CPU)
    kv = normal_block(layout_of())
    payload = encode(codec, kv, num_tokens=8)
    for num_tokens in (7, 9, 64):
        with pytest.raises(BlockCorrupt):
            decode(codec, payload, kv, num_tokens=num_tokens)


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("name", ["raw", "lossless"])
def test_an_accelerator_writes_and_reads_the_same_bytes_as_a_cpu(name: str, device: torch.device) -> None:
    on_cpu, on_device = (open_codecs(layout_of(), None, where)[name] for where in (CPU, device))
    kv = normal_block(layout_of())
    payload = encode(on_device, kv.to(device), num_tokens=64)
    assert payload == encode(on_cpu, kv)
    assert same_bits(decode(on_device, payload, kv.to(device)).cpu(), kv)


_ALONE = """
import os, numpy, torch
torch.set_num_threads(1)
from cache_store.layout import KVLayout
from worker.tiers.codecs import open_codecs
from worker.tiers.codecs.rope import Rope
layout = KVLayout(num_layers=4, num_kv_heads=2, head_dim=128, block_tokens=128, dtype="bfloat16")
kv = torch.randn(layout.block_shape).bfloat16()
buffer = memoryview(bytearray(layout.block_bytes))
torch.set_num_threads(2)
threads = len(os.listdir("/proc/self/task"))
for codec in open_codecs(layout, Rope(0.9 ** numpy.arange(64.0)), kv.device).values():
    num_bytes = codec.encode(kv, buffer, num_tokens=128, first_position=128)
    codec.decode(buffer[:num_bytes], kv, num_tokens=128, first_position=128)
assert len(os.listdir("/proc/self/task")) == threads, "torch's team was woken"
assert torch.get_num_threads() == 2
kv.mul(2.0)
assert len(os.listdir("/proc/self/task")) > threads, "this test would not have seen it"
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux shows them")
def test_no_codec_wakes_the_threads_that_the_models_step_needs() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", _ALONE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
