"""One entry as a line of JSON, and back. Nothing in a line is believed that no entry can be."""

import base64
import binascii
import json
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from cache_store.banks import Entry, EntryKind, Vector, check_bank_name
from cache_store.errors import InvalidRequest
from server.banks import checks

MAX_LINE_BYTES: Final = 1 << 20
_LATEST_MS: Final = 1 << 48
_MOST_RECALLS: Final = 1_000_000_000
_LEAST_LENGTH: Final = 1e-6


@dataclass(frozen=True, slots=True)
class Line:
    number: int
    """Of the file, from 0."""
    entry: Entry
    """Under the id that it had where it came from."""
    embedder: str
    vector: Vector | None
    """Of unit length; None where the line has none."""

    @property
    def is_chunk(self) -> bool:
        return self.entry.kind is EntryKind.DOCUMENT


def write_line(entry: Entry, embedder: str, vector: Vector | None) -> bytes:
    """Without what is as it is by default."""
    numbers = {"last_recalled_ms": entry.last_recalled_ms, "recalls": entry.recalls, "turn": entry.turn}
    texts = {"superseded_by": entry.superseded_by, "session_id": entry.session_id}
    line: dict[str, Any] = {
        "id": entry.id,
        "kind": entry.kind.name.lower(),
        "text": entry.text,
        "metadata": dict(entry.metadata),
        "importance": entry.importance,
        "created_ms": entry.created_ms,
    }
    line |= {name: value for name, value in (numbers | texts).items() if value}
    if entry.kind is EntryKind.DOCUMENT:
        line |= {"document_id": entry.document_id, "chunk": entry.chunk, "document_digest": entry.document_digest}
    if vector is not None:
        line |= {"embedder": embedder, "vector": base64.b64encode(vector.astype("<f4").tobytes()).decode()}
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"


def read_line(line: bytes, number: int, *, now_ms: int) -> Line:
    """Raises InvalidRequest naming the line and its field. `now_ms` is when an entry was created that doesn't say."""
    at = f"lines[{number}]"
    try:
        content = json.loads(line)
    except ValueError as error:
        raise InvalidRequest(at, "is no JSON in UTF-8") from error
    if not isinstance(content, dict):
        raise InvalidRequest(at, "must be an object")
    fields = _Fields(at, content)
    kind = fields.kind()
    entry = Entry(
        id=fields.text("id", ""),
        text=checks.check_text(fields.text("text", ""), f"{at}.text"),
        kind=kind,
        metadata=fields.metadata(),
        importance=checks.check_importance(fields.number("importance", 0.5), f"{at}.importance"),
        created_ms=fields.count("created_ms", now_ms, _LATEST_MS),
        last_recalled_ms=fields.count("last_recalled_ms", 0, _LATEST_MS),
        recalls=fields.count("recalls", 0, _MOST_RECALLS),
        superseded_by=fields.text("superseded_by", ""),
        session_id=fields.text("session_id", ""),
        turn=fields.count("turn", 0, 1 << 31),
    )
    if kind is EntryKind.DOCUMENT:
        entry = replace(
            entry,
            document_id=check_bank_name(fields.text("document_id", ""), f"{at}.document_id"),
            document_digest=check_bank_name(fields.text("document_digest", ""), f"{at}.document_digest"),
            chunk=fields.count("chunk", 0, 1 << 31),
        )
    return Line(number, entry, fields.text("embedder", ""), fields.vector())


async def whole_lines(chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """Without their ends; the last one needs none. Raises InvalidRequest for one that has none for too long."""
    rest = b""
    number = 0
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line
        number += len(lines)
        if len(rest) > MAX_LINE_BYTES:
            raise InvalidRequest(f"lines[{number}]", f"must have at most {MAX_LINE_BYTES:,} bytes")
    if rest:
        yield rest


class _Fields:
    """Of one line, each of the type that it must have."""

    def __init__(self, at: str, content: dict[str, Any]) -> None:
        self._at, self._content = at, content

    def text(self, name: str, default: str) -> str:
        value = self._content.get(name, default)
        if not isinstance(value, str):
            raise self._refused(name, "must be a string")
        return value

    def number(self, name: str, default: float) -> float:
        value = self._content.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._refused(name, "must be a number")
        return float(value)

    def count(self, name: str, default: int, most: int) -> int:
        value = self._content.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
            raise self._refused(name, f"must be a whole number from 0 to {most}")
        return value

    def kind(self) -> EntryKind:
        name = self.text("kind", "fact")
        if name.upper() not in EntryKind.__members__ or name != name.lower():
            raise self._refused("kind", f"must be one of {', '.join(kind.name.lower() for kind in EntryKind)}")
        return EntryKind[name.upper()]

    def metadata(self) -> dict[str, str]:
        value = self._content.get("metadata", {})
        if not isinstance(value, dict) or not all(isinstance(one, str) for one in value.values()):
            raise self._refused("metadata", "must be an object of strings")
        return checks.check_metadata(value, f"{self._at}.metadata")

    def vector(self) -> Vector | None:
        if "vector" not in self._content:
            return None
        try:
            vector = np.frombuffer(base64.b64decode(self.text("vector", ""), validate=True), "<f4").astype(np.float32)
        except (binascii.Error, ValueError) as error:
            raise self._refused("vector", "must be float32 numbers, little-endian, in base64") from error
        length = float(np.linalg.norm(vector))
        if not np.isfinite(length) or length < _LEAST_LENGTH:
            raise self._refused("vector", "must have a length that is finite and not 0")
        return vector / np.float32(length)

    def _refused(self, name: str, problem: str) -> InvalidRequest:
        return InvalidRequest(f"{self._at}.{name}", problem)
