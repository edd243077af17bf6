"""The global name of a KV block: what it holds, whoever computed it and wherever it lies."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import NewType

import numpy as np

from cache_store.codecs import LADDER

BlockHash = NewType("BlockHash", bytes)
"""24 bytes: digest (16) of a block's tokens, of all tokens before it, of the model and of the tenant; then the tenant's
mark. A ladder session's has `LADDER_MARK` after it."""

TenantMark = NewType("TenantMark", bytes)
"""8 bytes of the name of each of a tenant's blocks, of whatever model and fidelity: whoever has names can tell which
are its own. That two of a million tenants have one mark is as likely as 1 in 37 million, and costs a miss."""

DIGEST_BYTES = 16
MARK_BYTES = 8
LADDER_MARK = b"\x02"
"""Ageing finds by it what it may look at: to look at a key of Redis is to make it recent."""


def tenant_mark(tenant: str, secret: bytes = b"") -> TenantMark:
    """What a tenant's blocks are known by. With a `secret` (up to 64 bytes) nobody else can tell whose mark it is."""
    content = tenant.encode()
    return TenantMark(hashlib.blake2b(content, digest_size=MARK_BYTES, key=secret, person=b"rekindle-tenant").digest())


def mark_of(name: BlockHash) -> TenantMark:
    return TenantMark(name[DIGEST_BYTES : DIGEST_BYTES + MARK_BYTES])


def root_hash(fingerprint: bytes, tenant: str, fidelity: str = "", marks_from: bytes = b"") -> BlockHash:
    """Name the empty prefix: the parent of every first block of this model, for this tenant, of this fidelity.

    `fidelity` is what `cache_store.codecs.fidelity_of` says, empty where KV comes back bit for bit: a conversation
    that asked for that shares no name with one that takes less. `marks_from` is `tenant_mark`'s secret, and has no part
    in the digest.
    """
    salt = tenant.encode()
    lengths = len(fingerprint).to_bytes(4, "little") + len(salt).to_bytes(4, "little")
    content = lengths + fingerprint + salt + fidelity.encode()
    digest = hashlib.blake2b(content, digest_size=DIGEST_BYTES, person=b"rekindle-root").digest()
    marks = tenant_mark(tenant, marks_from) + (LADDER_MARK if fidelity == LADDER else b"")
    return BlockHash(digest + marks)


def chain(parent: BlockHash, token_ids: Sequence[int], salt: bytes = b"") -> BlockHash:
    """Name the block that follows `parent` and holds `token_ids` (full or not: the length is part of the name).

    `salt` is what its KV depends on beside the tokens, where it does.
    """
    tokens = np.asarray(token_ids, dtype="<u4").tobytes()
    return _child(parent, tokens, salt)


def full_block_hashes(root: BlockHash, token_ids: Sequence[int], block_tokens: int) -> Iterator[BlockHash]:
    """Name every full block of `token_ids`, in order. A pure function of the tokens: no manifest is stored."""
    tokens = np.asarray(token_ids, dtype="<u4")
    parent = root
    for start in range(0, len(tokens) - block_tokens + 1, block_tokens):
        parent = _child(parent, tokens[start : start + block_tokens].tobytes())
        yield parent


def _child(parent: BlockHash, tokens: bytes, salt: bytes = b"") -> BlockHash:
    content, kind = parent[:DIGEST_BYTES] + tokens, b""
    if salt:
        content, kind = content + salt + len(salt).to_bytes(4, "little"), b"rekindle-salted"
    digest = hashlib.blake2b(content, digest_size=DIGEST_BYTES, person=kind).digest()
    return BlockHash(digest + parent[DIGEST_BYTES:])
