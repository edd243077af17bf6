"""The kernel that decodes quantized blocks gives every bit that torch's operations give."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_store.codecs import INT4, INT8, K8V4, CodecInfo
from tests.codec_blocks import CPU, decode, encode, layout_of, llama_rope, normal_block
from worker.tiers.codecs.dequantize import Dequantizer, load_dequantizer
from worker.tiers.codecs.quantized import QuantizedCodec


@pytest.fixture(scope="module")
def dequantizer() -> Dequantizer:
    dequantizer = load_dequantizer()
    assert dequantizer is not None, "this machine has a compiler"
    return dequantizer


@settings(max_examples=60, deadline=None)
@given(
    codec=st.sampled_from([INT8, K8V4, INT4]),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([8, 12, 64, 80, 128]),
    block_tokens=st.sampled_from([8, 16, 64, 128]),
    first_position=st.sampled_from([0, 128, 100_000]),
    is_turned=st.booleans(),
    spread=st.sampled_from([1.0, 1e-6, 1e6]),
    seed=st.integers(0, 99),
)
def test_the_kernel_and_torch_agree_bit_for_bit(
    dequantizer: Dequantizer,
    codec: CodecInfo,
    heads: int,
    head_dim: int,
    block_tokens: int,
    first_position: int,
    is_turned: bool,
    spread: float,
    seed: int,
) -> None:
    layout = layout_of(num_kv_heads=heads, head_dim=head_dim, block_tokens=block_tokens)
    rope = llama_rope(head_dim) if is_turned else None
    torchs = QuantizedCodec(codec, layout, rope, CPU)
    ours = QuantizedCodec(codec, layout, rope, CPU, dequantizer)
    kv = normal_block(layout, seed) * spread
    payload = encode(torchs, kv, first_position=first_position)
    expected, found = (decode(side, payload, kv, first_position=first_position) for side in (torchs, ours))
    assert not bool(expected.isnan().any())
    assert torch.equal(found.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_dtypes_are_left_to_torch(dequantizer: Dequantizer, dtype: str) -> None:
    kv = normal_block(layout_of(dtype=dtype))
    assert not dequantizer.serves(kv)
    codec = QuantizedCodec(INT8, layout_of(dtype=dtype), None, CPU, dequantizer)
    assert torch.allclose(decode(codec, encode(codec, kv), kv).float(), kv.float(), atol=0.05)


def test_a_view_that_is_not_a_pools_is_left_to_torch(dequantizer: Dequantizer) -> None:
    assert dequantizer.serves(normal_block(layout_of()))
    assert not dequantizer.serves(normal_block(layout_of()).transpose(3, 4))
