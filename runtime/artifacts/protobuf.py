"""Reads and changes protocol buffers without the protobuf package, with every length checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

Value = int | bytes
VARINT, BYTES = 0, 2
FIXED = {1: 8, 5: 4}  # bytes of the other wire types
Fail = Callable[[str, object, object], NoReturn]


def fields(data: bytes, name: str, fail: Fail) -> Iterator[tuple[int, Value]]:
    """Field numbers and values of one message, in order: varints as int, everything else as bytes.

    Args:
        data: the message.
        name: what it is, for errors.
        fail: called as fail(field, expected, got) where the message is malformed.
    """
    position = 0
    while position < len(data):
        key, position = _read_varint(data, position, name, fail)
        number, kind = key >> 3, key & 7
        value, length = 0, FIXED.get(kind, -1)
        if not number:
            fail(name, "field numbers of 1 or more", f"0 at byte {position}")
        if kind == VARINT:
            value, position = _read_varint(data, position, name, fail)
            yield number, value
            continue
        if kind == BYTES:
            length, position = _read_varint(data, position, name, fail)
        if length < 0 or position + length > len(data):
            got = f"field {number} of wire type {kind} at byte {position}"
            fail(name, f"fields that end within {len(data)} bytes", got)
        yield number, data[position : position + length]
        position += length


def replaced(
    message: bytes, path: Sequence[int], change: Callable[[bytes], bytes], name: str, fail: Fail
) -> bytes:
    """A message in which `change` was applied to each value at a path of field numbers.

    Messages along the path must hold no fixed-size numbers, whose wire type `fields` does not tell.

    Args:
        name, fail: as in `fields`.
    """
    wanted, *rest = path
    parts = []
    for number, value in fields(message, name, fail):
        if isinstance(value, int):
            parts.append(varint(number << 3 | VARINT) + varint(value))
            continue
        if number == wanted:
            value = replaced(value, rest, change, name, fail) if rest else change(value)
        parts.append(varint(number << 3 | BYTES) + varint(len(value)) + value)
    return b"".join(parts)


def integers(value: Value, name: str, fail: Fail) -> list[int]:
    """The numbers of one occurrence of a repeated integer field: packed, or a single one."""
    if isinstance(value, int):
        return [value]
    numbers, position = [], 0
    while position < len(value):
        number, position = _read_varint(value, position, name, fail)
        numbers.append(number)
    return numbers


def varint(value: int) -> bytes:
    """A number as protocol buffers write it."""
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def _read_varint(data: bytes, position: int, name: str, fail: Fail) -> tuple[int, int]:
    """The number at `position`, and where it ends."""
    value = 0
    for shift, byte in enumerate(data[position : position + 10]):
        value |= (byte & 127) << 7 * shift
        if byte < 128:
            return value, position + shift + 1
    fail(name, "a protocol buffer", f"a number that does not end, at byte {position}")
