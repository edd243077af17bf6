"""The global name of a KV block: what it holds, whoever computed it and wherever it lies."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import NewType

import numpy as np

from cache_store.codecs import LADDER

BlockHash = NewType("BlockHash", bytes)
"""16 bytes: digest of a block's tokens, of all tokens before it, of the model and of the tenant. A ladder session's has
`LADDER_MARK` after it."""

DIGEST_BYTES = 16
LADDER_MARK = b"\x02"
"""Ageing finds by it what it may look at: to look at a key of Redis is to make it recent."""


def root_hash(fingerprint: bytes, tenant: str, fidelity: str = "") -> BlockHash:
    """Name the empty prefix: the parent of every first block of this model, for this tenant, of this fidelity.

    `fidelity` is what `cache_store.codecs.fidelity_of` says, empty where KV comes back bit for bit: a conversation
    that asked for that shares no name with one that takes less.
    """
    salt = tenant.encode()
    lengths = len(fingerprint).to_bytes(4, "little") + len(salt).to_bytes(4, "little")
    content = lengths + fingerprint + salt + fidelity.encode()
    digest = hashlib.blake2b(content, digest_size=DIGEST_BYTES, person=b"rekindle-root").digest()
    return BlockHash(digest + LADDER_MARK if fidelity == LADDER else digest)


def chain(parent: BlockHash, token_ids: Sequence[int]) -> BlockHash:
    """Name the block that follows `parent` and holds `token_ids` (full or not: the length is part of the name)."""
    tokens = np.asarray(token_ids, dtype="<u4").tobytes()
    return _child(parent, tokens)


def full_block_hashes(root: BlockHash, token_ids: Sequence[int], block_tokens: int) -> Iterator[BlockHash]:
    """Name every full block of `token_ids`, in order. A pure function of the tokens: no manifest is stored."""
    tokens = np.asarray(token_ids, dtype="<u4")
    parent = root
    for start in range(0, len(tokens) - block_tokens + 1, block_tokens):
        parent = _child(parent, tokens[start : start + block_tokens].tobytes())
        yield parent


def _child(parent: BlockHash, tokens: bytes) -> BlockHash:
    digest = hashlib.blake2b(parent + tokens, digest_size=DIGEST_BYTES).digest()
    return BlockHash(digest + parent[DIGEST_BYTES:])
