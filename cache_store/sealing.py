"""Values sealed with AES-256-GCM under keys of their tenants': who lacks the master key can read none, and can change
none, or put one in another's place, without being found out.

Knows keys and bytes. Knows no Redis, no tensors, and not what is sealed.

A tenant's key is HKDF-SHA256 of a master key, of what is sealed (blocks, records or banks) and of the tenant's tag,
which is itself HKDF of master key and tenant: a value bears the tag and no name, and opens by the master key alone.
Nonces are 96 random bits, so that no two writers need to agree on one: up to 2^32 values a tenant, purpose and master
key, the chance that any nonce came twice stays below 2^-32 (NIST SP 800-38D). That is 8 PiB of blocks of 2 MiB.
"""

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import GCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

KEY_BYTES = 32
KEY_ID_BYTES = 16
TAG_BYTES = 16
"""GCM's own, behind what it seals."""

_SEAL = struct.Struct(f"<{KEY_ID_BYTES}s16s12s")
"""The master key's id, the tenant's tag, the nonce: what goes before a sealed value, in the clear."""
SEAL_BYTES = _SEAL.size
_NONCE_BYTES = 12
_AUTHENTICATED = slice(0, KEY_ID_BYTES + 16)
"""Of the seal: a wrong nonce shows by itself."""
_KEYS_KEPT = 4096


class SealBroken(Exception):
    """A value is not what was sealed for this place."""


class KeyUnknown(Exception):
    """A value was sealed under a master key that is not here, or for another tenant."""


class Purpose(Enum):
    """What a key is for: no value of one kind passes for one of the other."""

    BLOCKS = b"blocks"
    RECORDS = b"records"
    BANKS = b"banks"


@dataclass(frozen=True, slots=True)
class MasterKey:
    key_id: str
    """1 to 16 ASCII characters: no secret."""
    secret: bytes = field(repr=False)
    """32 random bytes."""

    def __post_init__(self) -> None:
        assert len(self.secret) == KEY_BYTES, f"a master key of {len(self.secret)} bytes"
        assert 0 < len(self.key_id.encode("ascii")) <= KEY_ID_BYTES, "a key id that fits no seal"


class Keyring:
    """Master keys. The first one seals, all of them open. Shows no secret when it is printed."""

    def __init__(self, keys: Sequence[MasterKey], *, names: bytes, takes_plain: bool = False) -> None:
        """`names` is a secret of 32 bytes that names blocks. It seals nothing, and stays when master keys change.

        With `takes_plain` records that were never sealed are read too.
        """
        assert keys, "a keyring without keys"
        assert len(names) == KEY_BYTES, f"a secret of {len(names)} bytes"
        self._secrets = {key.key_id: key.secret for key in keys}
        self._names = names
        self.first = keys[0].key_id
        """The id of the key that seals."""
        self.takes_plain = takes_plain

    def __repr__(self) -> str:
        return f"Keyring({', '.join(self._secrets)})"

    def sealer(self, purpose: Purpose) -> "Sealer":
        return Sealer(self._secrets, purpose)

    def blinded(self, fingerprint: bytes) -> bytes:
        """A model's fingerprint for names of blocks: without the secret nobody can tell which tokens a name stands
        for, not even by trying those that he thinks likely."""
        return _derived(self._names, b"names", fingerprint)

    @property
    def marks_from(self) -> bytes:
        """What tenants' marks in names of blocks are made with. Stays, as names do, when master keys change."""
        return _derived(self._names, b"marks", b"")

    @property
    def banks_from(self) -> bytes:
        """What names in banks are made with. Stays, as names of blocks do."""
        return _derived(self._names, b"banks", b"")


class Sealer:
    """Seals and opens values of one purpose. Any thread may call."""

    def __init__(self, secrets: dict[str, bytes], purpose: Purpose) -> None:
        self._secrets = secrets
        self._purpose = purpose
        self._first = next(iter(secrets))
        self._tag = lru_cache(_KEYS_KEPT)(self._derive_tag)
        self._key = lru_cache(_KEYS_KEPT)(self._derive_key)

    def seal(self, tenant: str, content: bytes | memoryview, into: memoryview, *, about: bytes) -> bytes:
        """Fill `into`, `TAG_BYTES` longer than `content`, with the sealed content. Returns the seal to go before it.

        `about` is not kept: only who says the same opens the value.
        """
        return self._seal(self._first, self._tag(self._first, tenant), content, into, about)

    def seal_like(self, seal: bytes, content: bytes | memoryview, into: memoryview, *, about: bytes) -> bytes:
        """As `seal`, for the tenant of another value and under its master key. Raises KeyUnknown."""
        key_id, tag, _ = self._read(seal)
        return self._seal(key_id, tag, content, into, about)

    def opening(self, seal: bytes, *, tenant: str | None, about: bytes) -> "Opening":
        """Begin to open a value. `tenant` None takes anybody's. Raises KeyUnknown."""
        key_id, tag, nonce = self._read(seal)
        if tenant is not None and tag != self._tag(key_id, tenant):
            raise KeyUnknown(f"for another tenant, or under another master key than the one called {key_id} here")
        return Opening(self._key(key_id, tag), nonce, about + seal[_AUTHENTICATED])

    def sealed(self, tenant: str, content: bytes, *, about: bytes) -> bytes:
        """Seal and content in one."""
        value = bytearray(SEAL_BYTES + len(content) + TAG_BYTES)
        value[:SEAL_BYTES] = self.seal(tenant, content, memoryview(value)[SEAL_BYTES:], about=about)
        return bytes(value)

    def opened(self, tenant: str, value: bytes, *, about: bytes) -> bytes:
        """What `sealed` was given. Raises KeyUnknown, SealBroken."""
        if len(value) < SEAL_BYTES + TAG_BYTES:
            raise SealBroken(f"{len(value)} bytes are no sealed value")
        opening = self.opening(value[:SEAL_BYTES], tenant=tenant, about=about)
        content = bytearray(value[SEAL_BYTES:-TAG_BYTES])
        opening.open(memoryview(content))
        opening.finish(value[-TAG_BYTES:])
        return bytes(content)

    def is_current(self, value: bytes) -> bool:
        """Whether the key that seals now has sealed this value."""
        return value[:KEY_ID_BYTES] == _id_field(self._first)

    def _seal(self, key_id: str, tag: bytes, content: bytes | memoryview, into: memoryview, about: bytes) -> bytes:
        seal = _SEAL.pack(_id_field(key_id), tag, os.urandom(_NONCE_BYTES))
        cipher = AESGCM(self._key(key_id, tag))
        cipher.encrypt_into(seal[-_NONCE_BYTES:], content, about + seal[_AUTHENTICATED], into)
        return seal

    def _read(self, seal: bytes) -> tuple[str, bytes, bytes]:
        """Id of a master key that is here, tenant's tag, nonce."""
        id_field, tag, nonce = _SEAL.unpack(seal)
        key_id = next((known for known in self._secrets if _id_field(known) == id_field), None)
        if key_id is None:
            shown = id_field.rstrip(b"\0").decode("ascii", errors="backslashreplace")
            raise KeyUnknown(f"under a master key called {shown!r}, which is not here")
        return key_id, tag, nonce

    def _derive_tag(self, key_id: str, tenant: str) -> bytes:
        return _derived(self._secrets[key_id], b"tenant", tenant.encode())[:16]

    def _derive_key(self, key_id: str, tag: bytes) -> bytes:
        return _derived(self._secrets[key_id], self._purpose.value, tag)


class Opening:
    """A value that is being opened where it lies, piece by piece. Nothing of it may be believed before `finish`."""

    def __init__(self, key: bytes, nonce: bytes, about: bytes) -> None:
        self._decryptor = Cipher(AES256(key), GCM(nonce)).decryptor()
        self._decryptor.authenticate_additional_data(about)

    def open(self, piece: memoryview) -> None:
        """Put what was sealed in the piece's place."""
        self._decryptor.update_into(piece, piece)

    def finish(self, tag: bytes) -> None:
        """Raises SealBroken unless all pieces, in their order, are what was sealed."""
        try:
            self._decryptor.finalize_with_tag(tag)
        except (InvalidTag, ValueError) as error:  # ValueError: the tag is too short to be one
            raise SealBroken("not what was sealed for this place") from error


def _derived(secret: bytes, what: bytes, of: bytes) -> bytes:
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=b"rekindle/" + what + b"/" + of).derive(secret)


def _id_field(key_id: str) -> bytes:
    return key_id.encode("ascii").ljust(KEY_ID_BYTES, b"\0")
