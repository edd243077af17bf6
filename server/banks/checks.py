"""Refuse what no bank takes, naming the field."""

import math
from collections.abc import Mapping
from typing import Final

from cache_store.errors import InvalidRequest

MAX_TEXT_BYTES: Final = 65_536
MAX_DOCUMENT_BYTES: Final = 16 << 20
MAX_DOCUMENTS: Final = 1000
MAX_CHUNKS: Final = 50_000
"""Of a document: they come in sight together, for which the store stops for a second or two."""
MAX_K: Final = 100
_MAX_PAIRS: Final = 32
_MAX_KEY_BYTES: Final = 64
_MAX_VALUE_BYTES: Final = 1024


def check_text(text: str, field: str = "text", *, most: int = MAX_TEXT_BYTES) -> str:
    if not text.strip():
        raise InvalidRequest(field, "must not be empty")
    if len(text) > most or _num_bytes(text, field) > most:
        raise InvalidRequest(field, f"must have at most {most:,} bytes of UTF-8")
    return text


def check_metadata(metadata: Mapping[str, str], field: str = "metadata") -> dict[str, str]:
    if len(metadata) > _MAX_PAIRS:
        raise InvalidRequest(field, f"must have at most {_MAX_PAIRS} pairs, got {len(metadata)}")
    for key, value in metadata.items():
        if not 1 <= _num_bytes(key, field) <= _MAX_KEY_BYTES:
            raise InvalidRequest(field, f"each key must have 1 to {_MAX_KEY_BYTES} bytes")
        if _num_bytes(value, field) > _MAX_VALUE_BYTES:
            raise InvalidRequest(f"{field}[{key}]", f"must have at most {_MAX_VALUE_BYTES:,} bytes")
    return dict(metadata)


def flat(metadata: Mapping[str, str]) -> list[str]:
    """Keys and values, in an order that is always the same."""
    return [part for pair in sorted(metadata.items()) for part in pair]


def check_importance(importance: float, field: str = "importance") -> float:
    if not (math.isfinite(importance) and 0.0 <= importance <= 1.0):
        raise InvalidRequest(field, f"must be 0 to 1, got {importance}")
    return importance


def check_chunks(chunks: int, field: str) -> None:
    if chunks > MAX_CHUNKS:
        raise InvalidRequest(field, f"has {chunks:,} chunks, and a document may have {MAX_CHUNKS:,}")


def check_k(k: int) -> int:
    if not 1 <= k <= MAX_K:
        raise InvalidRequest("k", f"must be 1 to {MAX_K}, got {k}")
    return k


def _num_bytes(text: str, field: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise InvalidRequest(field, "has a lone surrogate, which is no text") from error
