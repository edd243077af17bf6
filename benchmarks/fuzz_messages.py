"""Random messages of an API: well-formed with strange values, such with bytes changed, and bytes that are none."""

import random
from collections.abc import Callable, Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

_INTEGERS = (0, 1, 2, 7, 100, 4096, 2**31 - 1, 2**31, 2**32 - 1)
_LARGE_INTEGERS = (*_INTEGERS, 2**53, 2**63 - 1, 2**63, 2**64 - 1)
_SIGNED_INTEGERS = (0, 1, -1, 2**31 - 1, -(2**31))
_FLOATS = (0.0, -0.0, 1.0, 0.5, -1.0, 2.5, 1e-45, 3e38, float("nan"), float("inf"), float("-inf"))
_STRINGS = ("", "x", "user", "raw", "ladder", "\0", "é🎉", "../..", "a b", "%s{}", "default", "<|end|>", "\ufffd" * 3)
_LONG = 5000
_DEPTH = 4
_NEEDED = ("session_id", "text", "history", "tenant", "token_ids", "bank", "name", "query")
_NAMES = ("session_id", "bank", "name")


class Messages:
    """`names` are what sessions and banks are called, so that some of them exist."""

    def __init__(self, chance: random.Random, names: Sequence[str]) -> None:
        self._random, self._names = chance, names
        self._unset = 0.5
        self._draw: dict[int, Callable[[], Any]] = {
            FieldDescriptor.CPPTYPE_BOOL: lambda: chance.random() < 0.5,
            FieldDescriptor.CPPTYPE_UINT32: lambda: self._integer(_INTEGERS, 32),
            FieldDescriptor.CPPTYPE_UINT64: lambda: self._integer(_LARGE_INTEGERS, 64),
            FieldDescriptor.CPPTYPE_INT32: lambda: chance.choice(_SIGNED_INTEGERS),
            FieldDescriptor.CPPTYPE_INT64: lambda: chance.choice(_SIGNED_INTEGERS),
            FieldDescriptor.CPPTYPE_ENUM: lambda: chance.choice((0, 1, 2, 3, 99)),
            FieldDescriptor.CPPTYPE_FLOAT: self._float,
            FieldDescriptor.CPPTYPE_DOUBLE: self._float,
        }

    def wire(self, kind: type[Message]) -> bytes:
        """What might be sent where a `kind` is expected."""
        draw = self._random.random()
        if draw < 0.1:
            return self._random.randbytes(self._random.randrange(200))
        whole = self.well_formed(kind).SerializeToString()
        return whole if draw < 0.6 else self._mutated(whole)

    def well_formed(self, kind: type[Message]) -> Message:
        message = kind()
        self._unset = self._random.choice((0.2, 0.6, 0.9))  # where most fields are set, one of them is bad
        self._fill(message, _DEPTH)
        return message

    def _fill(self, message: Any, depth: int) -> None:
        for field in message.DESCRIPTOR.fields:
            if self._random.random() < self._unset and field.name not in _NEEDED:
                continue
            if field.is_repeated:
                many = 300 if self._random.random() < 0.02 else 4
                for _ in range(self._random.randrange(many)):
                    self._append(getattr(message, field.name), field, depth)
            elif field.message_type is None:
                setattr(message, field.name, self._scalar(field))
            elif depth:
                getattr(message, field.name).SetInParent()
                self._fill(getattr(message, field.name), depth - 1)

    def _append(self, values: Any, field: FieldDescriptor, depth: int) -> None:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            key, value = field.message_type.fields
            values[self._scalar(key)] = self._scalar(value)  # maps of this API have plain values
        elif field.message_type is None:
            values.append(self._scalar(field))
        elif depth:
            self._fill(values.add(), depth - 1)

    def _scalar(self, field: FieldDescriptor) -> Any:
        if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
            return self._string(field)
        if field.name == "max_new_tokens" and self._random.random() < 0.8:
            return self._random.randrange(1, 8)  # so that most of the time goes into what is strange
        return self._draw[field.cpp_type]()

    def _string(self, field: FieldDescriptor) -> str | bytes:
        draw = self._random.random()
        if field.type == FieldDescriptor.TYPE_BYTES:
            return self._random.randbytes(self._random.randrange(64))
        if field.name.endswith(_NAMES) and draw < 0.9:
            return self._random.choice(self._names)
        if draw < 0.02:
            return "long " * (_LONG // 5)
        if draw < 0.3:
            return "".join(chr(self._random.choice((97, 32, 10, 0x4E2D, 0x1F600))) for _ in range(8))
        return self._random.choice(_STRINGS)

    def _integer(self, strange: Sequence[int], bits: int) -> int:
        draw = self._random.random()
        if draw < 0.5:
            return self._random.randrange(250)
        return self._random.choice(strange) if draw < 0.9 else self._random.getrandbits(bits)

    def _float(self) -> float:
        return self._random.choice(_FLOATS) if self._random.random() < 0.6 else self._random.uniform(0, 2)

    def _mutated(self, whole: bytes) -> bytes:
        """One to four bytes or pieces changed, lost, doubled or put in."""
        data = bytearray(whole)
        for _ in range(self._random.randrange(1, 5)):
            place = self._random.randrange(len(data) + 1)
            end = min(len(data), place + self._random.randrange(1, 9))
            match self._random.randrange(5):
                case 0 if place < len(data):
                    data[place] ^= 1 << self._random.randrange(8)
                case 1:
                    del data[place:end]
                case 2:
                    data[place:place] = data[place:end]
                case 3:
                    data[place:place] = self._random.randbytes(self._random.randrange(9))
                case _:
                    del data[place:]
        return bytes(data)
