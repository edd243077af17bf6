"""What a bank's keys in Redis are called, and how a tenant's index names its banks. Knows strings alone."""

import base64
import binascii
import re
from typing import Final, NamedTuple
from urllib.parse import quote

from cache_store.banks import BankRecord
from cache_store.errors import InvalidRequest

_MEMBER: Final = re.compile(r"([A-Za-z0-9._:-]{1,128}) (\d{15})")  # a blank sorts before all that a name has


class BankKeys(NamedTuple):
    """In the order of the scripts' KEYS."""

    meta: str
    entries: str
    vectors: str
    changes: str
    gone: str
    superseded: str
    losers: str
    documents: str
    staged: str
    recalls: str
    last: str
    next_vectors: str
    near: str
    next_near: str


def keys_of(tenant: str, name: str) -> BankKeys:
    tag = f"rekindle:bank:{{{quote(tenant, safe='')}/{name}}}"
    return BankKeys(*(f"{tag}:{part}" for part in BankKeys._fields))


def index_key(tenant: str) -> str:
    """Of the sorted set of a tenant's banks."""
    return f"rekindle:banks:{quote(tenant, safe='')}"


def member_of(record: BankRecord) -> str:
    """In that set."""
    return f"{record.name} {record.created_ms:015d}"


def parse_member(member: bytes) -> tuple[str, int]:
    """A bank's name, and when it was created."""
    match = _MEMBER.fullmatch(member.decode())
    assert match is not None, f"not a member of ours: {member!r}"
    return match[1], int(match[2])


def token_of(member: str) -> str:
    """For a page that ends with it."""
    return base64.urlsafe_b64encode(member.encode()).decode()


def parse_token(page_token: str) -> str:
    """The member that a page ended with. Raises InvalidRequest."""
    try:
        member = base64.b64decode(page_token, altchars=b"-_", validate=True).decode("ascii")
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest("page_token", "is not one that ListBanks gave") from error
    if not _MEMBER.fullmatch(member):
        raise InvalidRequest("page_token", "is not one that ListBanks gave")
    return member
