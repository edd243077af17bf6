"""What there is to know of a tenant besides its name: how much it may have at once."""

import re
from dataclasses import dataclass
from typing import Final, TypeGuard

DEFAULT_TENANT: Final = "default"
"""Whose all calls are where nobody is asked who calls."""

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantLimits:
    """0 is no limit."""

    max_sessions: int = 0
    max_tokens: int = 0
    """Of all its sessions' histories together, at four bytes a token."""
    max_turns: int = 0
    """Running at once, at one front end."""
    max_banks: int = 0


NO_LIMITS: Final = TenantLimits()


def is_tenant_name(name: object) -> TypeGuard[str]:
    """Whether it is 1 to 64 of A-Z a-z 0-9 . _ -"""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None
