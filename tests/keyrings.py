"""Keyrings for tests: one made anew from the same ids is the same."""

import hashlib

from cache_store.sealing import Keyring, MasterKey


def keyring(*key_ids: str, takes_plain: bool = False) -> Keyring:
    """The first of these seals, all open."""
    keys = [MasterKey(key_id, _secret(key_id)) for key_id in key_ids or ("2026",)]
    return Keyring(keys, names=_secret("names"), takes_plain=takes_plain)


def entries(*key_ids: str) -> str:
    """The same as an operator writes it."""
    return "\n".join(f"{key_id}:{_secret(key_id).hex()}" for key_id in (*key_ids, "names"))


def _secret(of: str) -> bytes:
    return hashlib.sha256(of.encode()).digest()
