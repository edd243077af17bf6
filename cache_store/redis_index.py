"""A tenant's index of sessions in Redis: a sorted set whose members, creation time and id, sort by age."""

import base64
import binascii
import re
from typing import NamedTuple
from urllib.parse import quote

from cache_store.errors import InvalidRequest

_MEMBER = re.compile(r"(\d{15}):([A-Za-z0-9._:-]{1,128})")  # created_ms, session_id


class Entry(NamedTuple):
    created_ms: int
    session_id: str


def index_key(tenant: str) -> str:
    return f"rekindle:sessions:{quote(tenant, safe='')}"


def member(created_ms: int, session_id: str) -> str:
    return f"{created_ms:015d}:{session_id}"


def parse_member(member: bytes) -> Entry:
    match = _MEMBER.fullmatch(member.decode())
    assert match is not None, f"not an entry of ours: {member!r}"
    return Entry(int(match[1]), match[2])


def token_of(member: str) -> str:
    return base64.urlsafe_b64encode(member.encode()).decode()


def cursor(page_token: str) -> str:
    """The member that a page ended with. Raises InvalidRequest."""
    try:
        member = base64.b64decode(page_token, altchars=b"-_", validate=True).decode("ascii")
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest("page_token", "is not one that ListSessions gave") from error
    if not _MEMBER.fullmatch(member):
        raise InvalidRequest("page_token", "is not one that ListSessions gave")
    return member
