"""API keys: made, hashed and recognized; and the file that keeps their hashes and the tenants' limits.

    [tenants.acme]                # optional; what is not named here is as in the settings
    max_sessions = 10_000

    [[keys]]
    id = "5d0c1c3a9f1b2e47"       # the key's public half
    sha256 = "..."                # of the whole key, in hex
    tenant = "acme"
    name = "ci"                   # optional, for people
    expires = 2027-01-31T00:00:00Z  # optional
    operator = true               # optional: sees the whole cluster, and erases any tenant

A key is 256 random bits, so a fast hash is as good as a slow one. Light: `rekindle keys` needs no gRPC.
"""

import hashlib
import hmac
import json
import re
import secrets
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any, NamedTuple

from server.config import ConfigError
from server.tenants import TenantLimits, is_tenant_name

_KEY = re.compile(r"rk_([0-9a-f]{16})_[0-9a-f]{64}")
_ID = re.compile(r"[0-9a-f]{16}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[^\x00-\x1f\x7f]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """What is kept of a key."""

    id: str
    sha256: str
    tenant: str
    name: str = ""
    expires: datetime | None = None
    operator: bool = False

    def __post_init__(self) -> None:
        expires: Any = self.expires  # a file's values can be of any type
        if not _fits(_ID, self.id):
            raise ConfigError("id must be 16 hex digits")
        if not _fits(_SHA256, self.sha256):
            raise ConfigError("sha256 must be 64 hex digits")
        if not is_tenant_name(self.tenant):
            raise ConfigError(f"tenant must be 1 to 64 of A-Z a-z 0-9 . _ -, got {self.tenant!r}")
        if not _fits(_NAME, self.name):
            raise ConfigError("name must be text on one line")
        if expires is not None and not (isinstance(expires, datetime) and expires.tzinfo):
            raise ConfigError("expires must be a date with a time and an offset, such as 2027-01-31T00:00:00Z")
        if type(self.operator) is not bool:
            raise ConfigError("operator must be true or false")


class KeyRing(NamedTuple):
    """A file's content."""

    keys: Mapping[str, ApiKey]
    """By id."""
    limits: Mapping[str, Mapping[str, int]]
    """By tenant: those of `TenantLimits` that the file names."""

    def find(self, key: str) -> ApiKey | None:
        """What is kept of `key`; None where it isn't known, or has expired."""
        match = _KEY.fullmatch(key)
        kept = self.keys.get(match[1]) if match else None
        if kept is None or not hmac.compare_digest(kept.sha256, _digest(key)):
            return None
        return None if kept.expires is not None and datetime.now(UTC) >= kept.expires else kept


def parse_keys(content: bytes) -> KeyRing:
    """Raises ConfigError, which says where and what, and never quotes a hash."""
    try:
        tables = tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"not a TOML file: {error}") from error
    unknown = tables.keys() - {"keys", "tenants"}
    if unknown:
        raise ConfigError(f"unknown: {', '.join(sorted(unknown))}; there are [[keys]] and [tenants.NAME]")
    entries, tenants = tables.get("keys", []), tables.get("tenants", {})
    if not (isinstance(entries, list) and isinstance(tenants, dict)):
        raise ConfigError("there are [[keys]], a list of tables, and [tenants.NAME], tables by name")
    keys: dict[str, ApiKey] = {}
    for number, entry in enumerate(entries, start=1):
        key: ApiKey = _built(ApiKey, entry, f"keys, entry {number}")
        if key.id in keys:
            raise ConfigError(f"keys, entry {number}: id {key.id} is there twice")
        keys[key.id] = key
    return KeyRing(keys, {name: _limits(name, entry) for name, entry in tenants.items()})


def new_key(tenant: str, *, name: str = "", expires: datetime | None = None, operator: bool = False) -> tuple[str, str]:
    """Make a key. Returns it, and the TOML that lets it in. Raises ConfigError."""
    key_id = secrets.token_hex(8)
    key = f"rk_{key_id}_{secrets.token_hex(32)}"
    kept = ApiKey(id=key_id, sha256=_digest(key), tenant=tenant, name=name, expires=expires, operator=operator)
    lines = ["[[keys]]", *(f"{name} = {json.dumps(getattr(kept, name))}" for name in ("id", "sha256", "tenant"))]
    if name:
        lines.append(f"name = {json.dumps(name, ensure_ascii=False)}")
    if expires is not None:
        lines.append(f"expires = {expires.isoformat()}")
    if operator:
        lines.append("operator = true")
    return key, "\n".join(lines) + "\n"


def _limits(tenant: str, entry: Any) -> Mapping[str, int]:
    if not is_tenant_name(tenant):
        raise ConfigError(f"tenants: {tenant!r} must be 1 to 64 of A-Z a-z 0-9 . _ -")
    _built(TenantLimits, entry, f"tenants.{tenant}")
    for name, value in entry.items():
        if type(value) is not int or value < 0:
            raise ConfigError(f"tenants.{tenant}: {name} must be a number, and not negative; got {value!r}")
    limits: Mapping[str, int] = entry
    return limits


def _built(kind: type[Any], entry: Any, where: str) -> Any:
    """An instance of a dataclass from a table of the file."""
    if not isinstance(entry, dict):
        raise ConfigError(f"{where}: must be a table")
    unknown = entry.keys() - {field.name for field in fields(kind)}
    if unknown:
        raise ConfigError(f"{where}: unknown: {', '.join(sorted(unknown))}")
    try:
        return kind(**entry)
    except TypeError as error:  # a field that is missing
        raise ConfigError(f"{where}: {str(error).partition(') ')[2]}") from error
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _fits(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
