"""The lossy codecs keep to their bounds, give one payload per block, and get smaller without another loss."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_store.codecs import INT4, INT8, K8V4, CodecInfo
from cache_store.errors import BlockCorrupt, BlockForeign
from cache_store.layout import KVLayout
from tests.codec_blocks import (
    CPU,
    CUDA,
    DTYPES,
    decode,
    encode,
    filled_cache,
    layout_of,
    llama_rope,
    load_tiny,
    normal_block,
)
from tests.tiny_models import ARCHITECTURES
from worker.ids import BlockId
from worker.tiers.codecs import open_codecs
from worker.tiers.codecs.form import SINK_TOKENS
from worker.tiers.codecs.quantized import QuantizedCodec, shrink
from worker.tiers.codecs.rope import Rope

LOSSY = (INT8, K8V4, INT4)
STEPS = {INT8: (0.5, 0.5), K8V4: (0.5, 8.0), INT4: (8.0, 8.0)}
"""How far keys and values may be off, in scales."""
LAYOUTS = st.builds(
    layout_of,
    num_layers=st.integers(1, 2),
    num_kv_heads=st.integers(1, 2),
    head_dim=st.sampled_from([8, 12, 48, 64, 80]),
    block_tokens=st.sampled_from([16, 64, 128]),
    dtype=st.sampled_from(DTYPES),
)


def uneven_block(layout: KVLayout, seed: int, spread: float) -> torch.Tensor:
    """Channels and tokens of sizes up to e^spread apart, channels off zero, some of either all zero."""
    generator = torch.Generator().manual_seed(seed)
    layers, _, heads, tokens, dim = layout.block_shape

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(layers, 2, heads, *shape, generator=generator)

    kv = normal(tokens, dim) * (spread * normal(1, dim)).clamp(-9, 9).exp() + 3 * spread * normal(1, dim)
    kv *= (normal(1, dim) > -1.5) * (normal(tokens, 1) > -1.5)
    return kv.clamp(-1e4, 1e4).to(getattr(torch, layout.dtype))


def largest(numbers: torch.Tensor, dim: int, group: int) -> torch.Tensor:
    """Of each group of neighbours along `dim`, in every one of its places."""
    return numbers.abs().unflatten(dim, (-1, group)).amax(dim + 1).repeat_interleave(group, dim)


def bound(kv: torch.Tensor, codec: QuantizedCodec, rope: Rope | None, first_position: int) -> torch.Tensor:
    """From the block alone: the largest error that each number may have."""
    tokens, dim = kv.shape[3:]
    form = codec.form(first_position)
    key_steps, value_steps = STEPS[codec.info]
    dtype, kv = kv.dtype, kv.float().clone()
    sinks = SINK_TOKENS if first_position == 0 else 0
    turn = rope.turn(first_position, tokens, CPU) if rope else None
    keys, values = kv[:, 0].clone(), kv[:, 1]
    if turn:
        turn.undo(keys)
    for numbers in (keys, values):
        numbers[:, :, :sinks] = numbers[:, :, sinks : sinks + 1]
    groups = keys.unflatten(2, (-1, form.key_group))
    half_range = (groups.amax(3) - groups.amin(3)).div(2).repeat_interleave(form.key_group, 2)
    farthest = keys.abs().amax((2, 3), keepdim=True)
    half_range = half_range + farthest / 127  # the middle is rounded, to half of that
    key_error = key_steps * scale_for(half_range)
    if turn and rope:
        pairs, (cos, sin) = rope.num_pairs, (turn.cos.abs(), turn.sin.abs())
        first, second, rest = key_error.split([pairs, pairs, dim - 2 * pairs], 3)
        key_error = torch.cat((first * cos + second * sin, second * cos + first * sin, rest), 3)
    value_error = value_steps * scale_for(largest(values, 3, form.value_group))
    error = torch.stack((key_error, value_error), 1)
    error[:, :, :, :sinks] = 0.0
    rounding = torch.finfo(dtype).eps
    float32 = 1e-6 * torch.stack((farthest.expand_as(keys), largest(values, 3, form.value_group)), 1)
    return error + rounding * (kv.abs() + error) + float32 + 1e-30


def scale_for(half_range: torch.Tensor) -> torch.Tensor:
    """At most a sixteenth more than is needed, and no less than 2^-15 of the head's largest."""
    return torch.maximum(half_range, half_range.amax((2, 3), keepdim=True) * 2.0**-15) / 127 * (1 + 1 / 16)


@settings(deadline=None, max_examples=80)
@given(
    info=st.sampled_from(LOSSY),
    layout=LAYOUTS,
    block=st.integers(0, 40),
    has_rope=st.booleans(),
    spread=st.floats(0.0, 3.0),
    seed=st.integers(0, 2**32),
)
def test_no_number_is_off_by_more_than_half_a_step(
    info: CodecInfo, layout: KVLayout, block: int, has_rope: bool, spread: float, seed: int
) -> None:
    rope = llama_rope(layout.head_dim) if has_rope else None
    codec = QuantizedCodec(info, layout, rope, CPU)
    kv = uneven_block(layout, seed, spread)
    first_position = block * layout.block_tokens
    payload = encode(codec, kv, first_position=first_position)
    assert payload.nbytes < kv.nbytes
    back = decode(codec, payload, kv, first_position=first_position)
    error = (back.float() - kv.float()).abs()
    assert bool((error <= bound(kv, codec, rope, first_position)).all())


@settings(deadline=None, max_examples=40)
@given(layout=LAYOUTS, block=st.integers(0, 3), has_rope=st.booleans(), seed=st.integers(0, 2**32))
def test_a_smaller_payload_is_the_same_from_the_original_and_from_any_larger_one(
    layout: KVLayout, block: int, has_rope: bool, seed: int
) -> None:
    codecs = [QuantizedCodec(info, layout, llama_rope(layout.head_dim) if has_rope else None, CPU) for info in LOSSY]
    kv = uneven_block(layout, seed, 1.0)
    first_position = block * layout.block_tokens
    payloads = [encode(codec, kv, first_position=first_position) for codec in codecs]
    into = memoryview(bytearray(layout.block_bytes))
    forms = [codec.form(first_position) for codec in codecs]
    for larger, smaller in ((0, 1), (1, 2), (0, 2)):
        num_bytes = shrink(payloads[larger], forms[larger], forms[smaller], into)
        assert into[:num_bytes] == payloads[smaller]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_coming_down_from_lossless_gives_what_the_models_own_block_gives(architecture: str, tmp_path: Path) -> None:
    loaded = load_tiny(tmp_path, architecture)
    codecs = open_codecs(loaded.layout, loaded.rope, loaded.device)
    cache = filled_cache(loaded, 3)
    for number in range(3):
        kv, first = cache.view(BlockId(number)), 16 * number
        restored = decode(codecs["lossless"], encode(codecs["lossless"], kv, first_position=first), kv)
        for name in ("int8", "k8v4", "int4"):
            assert encode(codecs[name], restored, first_position=first) == encode(
                codecs[name], kv, first_position=first
            )


@pytest.mark.parametrize("info", LOSSY)
def test_the_conversations_first_tokens_are_kept_as_they_are(info: CodecInfo) -> None:
    layout = layout_of()
    kv = normal_block(layout)
    kv[:, :, :, :SINK_TOKENS] *= 1000
    codec = QuantizedCodec(info, layout, llama_rope(64), CPU)
    back = decode(codec, encode(codec, kv, first_position=0), kv, first_position=0)
    assert torch.equal(back[:, :, :, :SINK_TOKENS], kv[:, :, :, :SINK_TOKENS])
    rest = (back - kv)[:, :, :, SINK_TOKENS:].float().abs().max()
    assert rest < 0.7, "the first tokens' size spoils no scale of the others"


@pytest.mark.parametrize("info", LOSSY)
def test_a_conversations_first_block_loses_no_more_than_another(info: CodecInfo) -> None:
    layout, rope = layout_of(dtype="float32"), llama_rope(64)
    codec = QuantizedCodec(info, layout, rope, CPU)
    errors = []
    for first_position in (0, 64):
        kv = normal_block(layout)
        kv[:, 0] = kv[:, 0] / 10 + torch.linspace(0.2, 4, 64)  # channels that differ more than tokens do
        rope.turn(first_position, layout.block_tokens, CPU).apply(kv[:, 0])
        back = decode(codec, encode(codec, kv, first_position=first_position), kv, first_position=first_position)
        errors.append(float((back - kv)[:, 0, :, SINK_TOKENS:].norm()))
    first, later = errors
    assert first == pytest.approx(later, rel=0.1)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("info", LOSSY)
@pytest.mark.parametrize("which", [0, 1])
def test_a_block_with_a_number_beyond_every_scale_comes_back_bit_for_bit(
    odd: float, info: CodecInfo, which: int
) -> None:
    kv = normal_block(layout_of()).clone()
    kv[1, which, 0, 33, 5] = odd
    codec = QuantizedCodec(info, layout_of(), llama_rope(64), CPU)
    payload = encode(codec, kv)
    assert payload.nbytes == kv.nbytes
    assert torch.equal(decode(codec, payload, kv).view(torch.int16), kv.view(torch.int16))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("block_tokens", [64, 128, 256])
def test_full_blocks_shrink_by_what_is_promised(block_tokens: int, head_dim: int) -> None:
    layout = layout_of(head_dim=head_dim, block_tokens=block_tokens)
    kv = normal_block(layout)
    ratios = [
        kv.nbytes / encode(QuantizedCodec(info, layout, llama_rope(head_dim), CPU), kv, first_position=256).nbytes
        for info in LOSSY
    ]
    assert all(ratio >= wanted for ratio, wanted in zip(ratios, (2.0, 2.6, 3.6), strict=True)), ratios


def test_smaller_codecs_lose_more() -> None:
    kv = normal_block(layout_of())
    codecs = [QuantizedCodec(info, layout_of(), llama_rope(64), CPU) for info in LOSSY]
    errors = [float((decode(codec, encode(codec, kv), kv) - kv).float().norm()) for codec in codecs]
    assert errors[0] > 0
    assert all(before < after for before, after in pairwise(errors))


def test_equal_blocks_give_equal_payloads_wherever_they_lie() -> None:
    kv = normal_block(layout_of())
    codec = QuantizedCodec(INT4, layout_of(), llama_rope(64), CPU)
    assert encode(codec, kv) == encode(codec, kv.clone())


@pytest.mark.parametrize("info", LOSSY)
def test_a_payload_of_another_length_is_corrupt(info: CodecInfo) -> None:
    kv = normal_block(layout_of())
    codec = QuantizedCodec(info, layout_of(), None, CPU)
    payload = encode(codec, kv)
    for wrong in (payload[:-1], payload[:100], payload[:0]):
        with pytest.raises(BlockCorrupt):
            decode(codec, wrong, kv)
    with pytest.raises(BlockCorrupt, match="expected"):
        decode(codec, payload, kv, first_position=0)


def test_keys_taken_back_by_a_rotation_unknown_here_are_foreign() -> None:
    kv = normal_block(layout_of())
    payload = encode(QuantizedCodec(INT8, layout_of(), llama_rope(64), CPU), kv)
    with pytest.raises(BlockForeign):
        decode(QuantizedCodec(INT8, layout_of(), None, CPU), payload, kv)


def test_keys_stored_as_they_are_can_be_read_by_who_knows_the_rotation() -> None:
    kv = normal_block(layout_of())
    unknown, known = (QuantizedCodec(INT8, layout_of(), rope, CPU) for rope in (None, llama_rope(64)))
    payload = encode(unknown, kv)
    assert torch.equal(decode(known, payload, kv), decode(unknown, payload, kv))


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("info", LOSSY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_accelerator_writes_and_reads_the_same_bytes_as_a_cpu(
    info: CodecInfo, dtype: str, device: torch.device
) -> None:
    layout = layout_of(dtype=dtype)
    on_cpu, on_device = (QuantizedCodec(info, layout, llama_rope(64), where) for where in (CPU, device))
    for first_position in (0, 64):
        kv = uneven_block(layout, 3, 1.0)
        payload = encode(on_device, kv.to(device), first_position=first_position)
        assert payload == encode(on_cpu, kv, first_position=first_position)
        back = decode(on_device, payload, kv.to(device), first_position=first_position).cpu()
        assert torch.equal(back, decode(on_cpu, payload, kv, first_position=first_position))
