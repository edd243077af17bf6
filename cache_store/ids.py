"""The global name of a KV block: what it holds, whoever computed it and wherever it lies."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import NewType

import numpy as np

BlockHash = NewType("BlockHash", bytes)
"""16 bytes: digest of a block's tokens, of all tokens before it, of the model and of the tenant."""

_DIGEST_BYTES = 16


def root_hash(fingerprint: bytes, tenant: str, fidelity: str = "") -> BlockHash:
    """Name the empty prefix: the parent of every first block of this model, for this tenant, of this fidelity.

    `fidelity` is what `cache_store.codecs.fidelity_of` says, empty where KV comes back bit for bit: a conversation
    that asked for that shares no name with one that takes less.
    """
    salt = tenant.encode()
    lengths = len(fingerprint).to_bytes(4, "little") + len(salt).to_bytes(4, "little")
    content = lengths + fingerprint + salt + fidelity.encode()
    return BlockHash(hashlib.blake2b(content, digest_size=_DIGEST_BYTES, person=b"rekindle-root").digest())


def chain(parent: BlockHash, token_ids: Sequence[int]) -> BlockHash:
    """Name the block that follows `parent` and holds `token_ids` (full or not: the length is part of the name)."""
    tokens = np.asarray(token_ids, dtype="<u4").tobytes()
    return BlockHash(hashlib.blake2b(parent + tokens, digest_size=_DIGEST_BYTES).digest())


def full_block_hashes(root: BlockHash, token_ids: Sequence[int], block_tokens: int) -> Iterator[BlockHash]:
    """Name every full block of `token_ids`, in order. A pure function of the tokens: no manifest is stored."""
    tokens = np.asarray(token_ids, dtype="<u4")
    parent = root
    for start in range(0, len(tokens) - block_tokens + 1, block_tokens):
        name = hashlib.blake2b(parent + tokens[start : start + block_tokens].tobytes(), digest_size=_DIGEST_BYTES)
        parent = BlockHash(name.digest())
        yield parent
