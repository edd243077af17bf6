"""A block's value: what is written is found again, and nothing else passes for it."""

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from cache_store.errors import BlockCorrupt, BlockForeign
from cache_store.frame import HEADER_BYTES, Framer, check_payload
from cache_store.ids import BlockHash, chain, root_hash
from cache_store.layout import KVLayout

LAYOUT = KVLayout(num_layers=2, num_kv_heads=1, head_dim=8, block_tokens=16, dtype="bfloat16")
FRAMER = Framer(LAYOUT, b"weights and config")
BLOCK = chain(root_hash(b"model", "tenant"), [1, 2, 3])
PAYLOAD = memoryview(bytes(i % 251 for i in range(LAYOUT.block_bytes)))


def judge(
    header: bytes, framer: Framer = FRAMER, *, block: BlockHash = BLOCK, num_tokens: int = 3, value_bytes: int = 0
) -> int:
    return framer.expect(
        header, block=block, num_tokens=num_tokens, value_bytes=value_bytes or HEADER_BYTES + LAYOUT.block_bytes
    )


def test_header_takes_sixty_four_bytes_and_promises_the_payloads_checksum() -> None:
    header = FRAMER.header(BLOCK, 3, PAYLOAD)
    assert len(header) == HEADER_BYTES == 64
    assert FRAMER.value_bytes == HEADER_BYTES + LAYOUT.block_bytes
    check_payload(xxhash.xxh3_64_intdigest(PAYLOAD), judge(header))


def test_a_partial_block_carries_the_whole_payload() -> None:
    assert judge(FRAMER.header(BLOCK, 1, PAYLOAD), num_tokens=1) == judge(
        FRAMER.header(BLOCK, 16, PAYLOAD), num_tokens=16
    )


@given(bit=st.integers(0, 8 * HEADER_BYTES - 1))
def test_no_bit_of_the_header_can_flip_unseen(bit: int) -> None:
    header = bytearray(FRAMER.header(BLOCK, 3, PAYLOAD))
    header[bit // 8] ^= 1 << bit % 8
    with pytest.raises((BlockCorrupt, BlockForeign)):
        judge(bytes(header))


@given(bit=st.integers(0, 8 * LAYOUT.block_bytes - 1))
def test_no_bit_of_the_payload_can_flip_unseen(bit: int) -> None:
    payload = bytearray(PAYLOAD)
    payload[bit // 8] ^= 1 << bit % 8
    expected = judge(FRAMER.header(BLOCK, 3, PAYLOAD))
    with pytest.raises(BlockCorrupt):
        check_payload(xxhash.xxh3_64_intdigest(payload), expected)


@given(junk=st.binary(max_size=HEADER_BYTES))
def test_junk_is_corrupt(junk: bytes) -> None:
    with pytest.raises(BlockCorrupt):
        judge(junk)


@pytest.mark.parametrize("value_bytes", [HEADER_BYTES, HEADER_BYTES + LAYOUT.block_bytes - 1, 1 << 30])
def test_a_value_of_another_length_than_its_header_says_is_corrupt(value_bytes: int) -> None:
    with pytest.raises(BlockCorrupt, match="bytes, expected"):
        judge(FRAMER.header(BLOCK, 3, PAYLOAD), value_bytes=value_bytes)


def test_another_number_of_tokens_is_corrupt() -> None:
    with pytest.raises(BlockCorrupt, match="holds 3 tokens, expected 4"):
        judge(FRAMER.header(BLOCK, 3, PAYLOAD), num_tokens=4)


def test_a_value_under_another_name_is_corrupt() -> None:
    with pytest.raises(BlockCorrupt):
        judge(FRAMER.header(BLOCK, 3, PAYLOAD), block=chain(BLOCK, [4]))


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
        judge(other.header(BLOCK, 3, PAYLOAD))
