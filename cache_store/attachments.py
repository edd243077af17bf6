"""The banks that are attached to a session, and how its record keeps them."""

import json
from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple


class BankAccess(StrEnum):
    """What a session's turns do with a bank."""

    READ = "read"
    WRITE = "write"
    READ_WRITE = "read_write"

    @property
    def reads(self) -> bool:
        return self is not BankAccess.WRITE

    @property
    def writes(self) -> bool:
        return self is not BankAccess.READ


class BankAttachment(NamedTuple):
    bank: str
    access: BankAccess


def pack_banks(banks: Sequence[BankAttachment]) -> str:
    """Empty where there are none."""
    return json.dumps(banks) if banks else ""


def read_banks(packed: bytes) -> tuple[BankAttachment, ...]:
    """Raises ValueError."""
    if not packed:
        return ()
    try:
        return tuple(BankAttachment(str(bank), BankAccess(access)) for bank, access in json.loads(packed))
    except TypeError as error:
        raise ValueError("a session's banks are pairs of a name and an access") from error
