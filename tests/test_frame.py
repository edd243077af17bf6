"""A block's value: what is written is found again, and nothing else passes for it."""

from dataclasses import replace
from typing import Any

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from cache_store.codecs import (
    CODECS,
    INT8,
    LOSSLESS,
    SESSION_CODECS,
    CodecInfo,
    codec_for,
    fidelity_of,
)
from cache_store.errors import BlockCorrupt, BlockForeign
from cache_store.frame import _CHECKSUM, _FIELDS, HEADER_BYTES, Frame, Framer, _header_checksum, check_payload
from cache_store.ids import chain, root_hash
from cache_store.layout import KVLayout
from cache_store.store import Fetch, Store

LAYOUT = KVLayout(num_layers=2, num_kv_heads=1, head_dim=8, block_tokens=16, dtype="bfloat16")
FRAMER = Framer(LAYOUT, b"weights and config")
BLOCK = chain(root_hash(b"model", "tenant"), [1, 2, 3])
PAYLOAD = memoryview(bytes(i % 251 for i in range(LAYOUT.block_bytes)))


def header_of(framer: Framer = FRAMER, **changes: Any) -> bytes:
    return framer.header(replace(Store(BLOCK, 3, PAYLOAD, ttl_s=0), **changes))


def judge(header: bytes, *, value_bytes: int = HEADER_BYTES + LAYOUT.block_bytes, **changes: Any) -> Frame:
    fetch = Fetch(BLOCK, 3, memoryview(bytearray(LAYOUT.block_bytes)))
    return FRAMER.expect(header, replace(fetch, **changes), value_bytes=value_bytes)


def test_header_takes_sixty_four_bytes_and_promises_the_payloads_checksum() -> None:
    header = header_of()
    assert len(header) == HEADER_BYTES == 64
    check_payload(xxhash.xxh3_64_intdigest(PAYLOAD), judge(header).checksum)


def test_a_checksum_that_is_known_is_taken_as_it_is() -> None:
    known = xxhash.xxh3_64_intdigest(PAYLOAD)
    assert header_of(checksum=known) == header_of()
    assert judge(header_of(checksum=known ^ 1)).checksum == known ^ 1


def test_a_partial_block_carries_the_whole_payload() -> None:
    partial, full = (judge(header_of(num_tokens=tokens), num_tokens=tokens) for tokens in (1, 16))
    assert partial.checksum == full.checksum


@given(bit=st.integers(0, 8 * HEADER_BYTES - 1))
def test_no_bit_of_the_header_can_flip_unseen(bit: int) -> None:
    header = bytearray(header_of())
    header[bit // 8] ^= 1 << bit % 8
    with pytest.raises((BlockCorrupt, BlockForeign)):
        judge(bytes(header))


@given(bit=st.integers(0, 8 * LAYOUT.block_bytes - 1))
def test_no_bit_of_the_payload_can_flip_unseen(bit: int) -> None:
    payload = bytearray(PAYLOAD)
    payload[bit // 8] ^= 1 << bit % 8
    expected = judge(header_of()).checksum
    with pytest.raises(BlockCorrupt):
        check_payload(xxhash.xxh3_64_intdigest(payload), expected)


@given(junk=st.binary(max_size=HEADER_BYTES))
def test_junk_is_corrupt(junk: bytes) -> None:
    with pytest.raises(BlockCorrupt):
        judge(junk)


BYTE, HALF, WORD = st.integers(0, 255), st.integers(0, 2**16 - 1), st.integers(0, 2**32 - 1)


@given(
    magic=st.sampled_from([b"RKV\x01", b"RKV\x02"]),
    version=st.integers(1, 3),
    codec=st.integers(0, 6) | BYTE,
    shape=st.tuples(BYTE, HALF, HALF, HALF, HALF),
    ours=st.booleans(),
    num_tokens=st.integers(0, 17) | HALF,
    codec_version=st.integers(0, 3),
    kind=st.integers(0, 8) | BYTE,
    num_bytes=st.sampled_from([0, 1, LAYOUT.block_bytes, LAYOUT.block_bytes + 1]) | WORD,
    first=WORD,
)
def test_a_header_that_somebody_made_up_is_refused_or_says_what_it_says(
    magic: bytes,
    version: int,
    codec: int,
    shape: tuple[int, ...],
    ours: bool,
    num_tokens: int,
    codec_version: int,
    kind: int,
    num_bytes: int,
    first: int,
) -> None:
    dtype, *rest, model = FRAMER._model if ours else (*shape, b"another model...")
    fields = _FIELDS.pack(
        magic, version, codec, dtype, *rest, num_tokens, codec_version, kind, num_bytes, model, 7, first
    )
    header = fields + _CHECKSUM.pack(_header_checksum(BLOCK, fields))
    try:
        frame = FRAMER.read(header, block=BLOCK, value_bytes=HEADER_BYTES + num_bytes)
    except (BlockCorrupt, BlockForeign):
        return
    assert ours
    assert num_bytes <= LAYOUT.block_bytes
    assert (frame.codec.id, frame.codec.version, frame.fidelity_kind) == (codec, codec_version, kind)
    assert (frame.num_tokens, frame.first_position, frame.num_bytes) == (num_tokens, first, num_bytes)


@pytest.mark.parametrize("value_bytes", [HEADER_BYTES, HEADER_BYTES + LAYOUT.block_bytes - 1, 1 << 30])
def test_a_value_of_another_length_than_its_header_says_is_corrupt(value_bytes: int) -> None:
    with pytest.raises(BlockCorrupt, match="bytes, expected"):
        judge(header_of(), value_bytes=value_bytes)


def test_another_number_of_tokens_is_corrupt() -> None:
    with pytest.raises(BlockCorrupt, match="holds 3 tokens from 0 on, expected 4"):
        judge(header_of(), num_tokens=4)


def test_a_value_under_another_name_is_corrupt() -> None:
    with pytest.raises(BlockCorrupt):
        judge(header_of(), block=chain(BLOCK, [4]))


@pytest.mark.parametrize(
    "other",
    [
        Framer(LAYOUT, b"other weights"),
        *(
            Framer(
                KVLayout(num_layers=layers, num_kv_heads=heads, head_dim=dim, block_tokens=tokens, dtype=dtype),
                b"weights and config",
            )
            for layers, heads, dim, tokens, dtype in [
                (1, 2, 8, 16, "bfloat16"),
                (2, 2, 4, 16, "bfloat16"),
                (2, 1, 4, 32, "bfloat16"),
                (2, 1, 8, 16, "float16"),
                (2, 1, 4, 16, "float32"),
            ]
        ),
    ],
    ids=["fingerprint", "layers", "heads", "head dim", "dtype", "itemsize"],
)
def test_a_block_of_equal_length_but_another_model_is_foreign(other: Framer) -> None:
    with pytest.raises(BlockForeign):
        judge(header_of(other))


SHORT = PAYLOAD[:-100]
SHORT_BYTES = HEADER_BYTES + len(SHORT)


@pytest.mark.parametrize("codec", CODECS[1:], ids=lambda codec: codec.name)
def test_a_header_says_how_its_payload_is_to_be_read(codec: CodecInfo) -> None:
    header = header_of(payload=SHORT, codec=codec, first_position=48, fidelity="ladder")
    frame = judge(header, value_bytes=SHORT_BYTES, first_position=48, fidelity="ladder")
    assert frame == (codec, 2, 3, 48, len(SHORT), xxhash.xxh3_64_intdigest(SHORT))


@pytest.mark.parametrize("of_another", ["lossless", "int8", "int4", "ladder"])
@pytest.mark.parametrize("session", ["raw", "lossless", "int8", "int4", "ladder"])
def test_a_session_believes_no_payload_that_kept_less_than_it_asked_for(session: str, of_another: str) -> None:
    codec = codec_for(of_another, is_full=True)
    header = header_of(payload=SHORT, codec=codec, fidelity=fidelity_of(of_another))
    if fidelity_of(session) == fidelity_of(of_another):
        assert judge(header, value_bytes=SHORT_BYTES, fidelity=fidelity_of(session)).codec is codec
    else:
        with pytest.raises(BlockForeign):
            judge(header, value_bytes=SHORT_BYTES, fidelity=fidelity_of(session))


@pytest.mark.parametrize("session", SESSION_CODECS)
def test_an_exact_payload_is_good_enough_for_everybody(session: str) -> None:
    fidelity = fidelity_of(session)
    header = header_of(payload=SHORT, codec=LOSSLESS, fidelity=fidelity)
    assert judge(header, value_bytes=SHORT_BYTES, fidelity=fidelity).codec is LOSSLESS


@pytest.mark.parametrize("codec", [replace(INT8, id=200), replace(LOSSLESS, version=9)], ids=["id", "version"])
def test_a_codec_that_is_not_known_here_is_foreign(codec: CodecInfo) -> None:
    with pytest.raises(BlockForeign, match="not known here"):
        judge(header_of(payload=SHORT, codec=codec), value_bytes=SHORT_BYTES)


def test_a_value_from_another_place_in_a_conversation_is_corrupt() -> None:
    with pytest.raises(BlockCorrupt, match="from 16 on, expected 3 from 32 on"):
        judge(header_of(first_position=16), first_position=32)
