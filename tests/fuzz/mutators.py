"""Seeded damage: to bytes, to JSON, to protocol buffers, to safetensors, to templates.

Each mutator takes a `random.Random` and a valid value and returns a damaged one; the same seed gives the
same damage. Values are those that readers get wrong: edges of integers, other types, escapes, depth.
"""

from __future__ import annotations

import hashlib
import json
import marshal
import struct
from collections.abc import Callable
from random import Random
from typing import Any

from gemma_edge.runtime.artifacts.protobuf import varint

INTEGERS = (
    *(0, 1, -1, 2, 127, 128, 255, 256, 32_767, 65_535, 65_536, 99_999, 1_000_000),
    *(2**31 - 1, 2**31, -(2**31), 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63, -(2**63), 2**64),
)
TEXTS = (
    *(
        "",
        " ",
        "\0",
        "a\0b",
        "..",
        "../x",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "\x1b[31mred\x1b[0m",
        "two\nlines",
        "\r",
    ),
    *(
        "\u202eabc",
        "\ud800",
        "\ufffd",
        "é" * 200,
        "x" * 5_000,
        "-1",
        "1e999",
        "NaN",
        "<bos>",
        "{{ 7 * 7 }}",
        "%s%n",
    ),
    *("decoder.onnx", "manifest.json", "BF16", "gelu", "full_attention"),
)
FLOATS = (0.0, -0.0, 1e-320, 1e308, -1e308, 0.5, 1.5, float("nan"), float("inf"), float("-inf"))
HUGE = "@huge@"  # becomes a number of 5,000 digits in the text
DEEP = "@deep@"  # becomes 50,000 brackets


def value(rng: Random) -> Any:
    """A JSON value that a reader may not expect."""
    kind = rng.randrange(12)
    if kind < 4:
        return rng.choice(INTEGERS)
    if kind < 6:
        return rng.choice(TEXTS)
    if kind < 7:
        return rng.choice(FLOATS)
    if kind < 10:
        return rng.choice(
            (None, True, False, [], {}, [[]], [None], {"": None}, [0] * 100, ["x"] * 3, {"a": {"b": 1}})
        )
    return rng.choice((HUGE, DEEP, [1, "two", None], [-1], [2**40], {"content": 5, "id": "x"}))


def places(node: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) below a JSON value."""
    found: list[tuple[Any, Any]] = []
    stack = [node]
    while stack:
        here = stack.pop()
        items = here.items() if isinstance(here, dict) else enumerate(here) if isinstance(here, list) else ()
        for key, child in items:
            found.append((here, key))
            if isinstance(child, (dict, list)):
                stack.append(child)
    return found


def damaged_json(rng: Random, data: Any) -> Any:
    """One to three values replaced, removed, renamed, repeated or added."""
    data = marshal.loads(marshal.dumps(data))  # a copy, ten times as fast as copy.deepcopy
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        spots = places(data)
        if not spots:
            return value(rng)
        where, key = rng.choice(spots)
        change = rng.randrange(10)
        old = where[key]
        if change == 0:
            del where[key]
        elif change == 1 and isinstance(where, dict):
            where[rng.choice(TEXTS)] = where.pop(key)
        elif change == 2 and isinstance(where, dict):
            where[rng.choice(TEXTS)] = value(rng)
        elif change == 3 and isinstance(where, list):
            where.extend([old] * rng.choice((1, 10, 1000)))
        elif change == 4 and isinstance(old, int) and not isinstance(old, bool):
            where[key] = old + rng.choice((-1, 1, 2**31, -old, old))
        elif change == 5 and isinstance(old, str):
            where[key] = damaged_text(rng, old)
        else:
            where[key] = value(rng)
    return data


def json_bytes(rng: Random, data: Any) -> bytes:
    """Damaged JSON as bytes; now and then not quite JSON."""
    text = json.dumps(damaged_json(rng, data))
    text = text.replace(f'"{HUGE}"', "9" * 5_000).replace(f'"{DEEP}"', "[" * 50_000 + "]" * 50_000)
    raw = text.encode()
    return damaged_bytes(rng, raw) if rng.random() < 0.1 else raw


def damaged_text(rng: Random, text: str) -> str:
    at = rng.randrange(len(text) + 1)
    piece = rng.choice(TEXTS)
    return text[:at] + piece + text[at + rng.choice((0, 0, 1, 5, 50)) :]


def damaged_bytes(rng: Random, raw: bytes) -> bytes:
    """One to four changes of bits, numbers, ranges and length, half of them near the beginning."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if not data:
            break
        near = rng.random() < 0.5
        at = rng.randrange(min(len(data), 600) if near else len(data))
        change = rng.randrange(9)
        if change == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif change == 1:
            data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif change == 2:
            width = rng.choice((2, 4, 8))
            at -= at % width
            number = rng.choice(INTEGERS) & (256**width - 1)
            data[at : at + width] = number.to_bytes(width, rng.choice(("little", "little", "big")))[
                : len(data) - at
            ]
        elif change == 3:
            del data[at : at + rng.choice((1, 4, 64, 4096))]
        elif change == 4:
            data[at:at] = rng.randbytes(rng.choice((1, 4, 64)))
        elif change == 5:
            del data[at:]
        elif change == 6:
            data[at:at] = data[at : at + rng.choice((4, 64, 1024))]
        elif change == 7:
            length = min(rng.choice((4, 64, 512)), len(data) - at)
            data[at : at + length] = bytes((rng.choice((0, 0xFF)),)) * length
        else:
            data += rng.randbytes(rng.choice((1, 16, 4096)))
    return bytes(data)


def damaged_words(rng: Random, raw: bytes) -> bytes:
    """Aligned 16 and 32-bit numbers changed by little or much: FlatBuffers, whose offsets these are."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 3))):
        width = rng.choice((1, 2, 4, 4, 8))
        span = min(len(data), rng.choice((256, 4096, 65_536, len(data))))
        at = rng.randrange(max(1, span // width)) * width
        if at + width > len(data):
            continue
        old = int.from_bytes(data[at : at + width], "little")
        new = rng.choice((old + 1, old - 1, old + 4, old - 4, old * 2, old ^ 0x80, rng.choice(INTEGERS)))
        data[at : at + width] = (new & (256**width - 1)).to_bytes(width, "little")
    return bytes(data)


# Protocol buffers, without their schema. ------------------------------------------------------------

Wire = list[tuple[int, int, int | bytes]]  # field, wire type, value


def parsed_wire(raw: bytes) -> Wire | None:
    """The fields of a message, or None where it is none."""
    fields: Wire = []
    at = 0

    def number() -> int:
        nonlocal at
        result = shift = 0
        while True:
            byte = raw[at]
            at += 1
            result |= (byte & 127) << shift
            shift += 7
            if byte < 128 or shift > 63:
                return result

    try:
        while at < len(raw):
            key = number()
            field, kind = key >> 3, key & 7
            if not field or kind not in (0, 1, 2, 5):
                return None
            if kind == 0:
                fields.append((field, kind, number()))
                continue
            length = number() if kind == 2 else 8 if kind == 1 else 4
            if at + length > len(raw):
                return None
            fields.append((field, kind, raw[at : at + length]))
            at += length
    except IndexError:
        return None
    return fields


def wire_bytes(fields: Wire) -> bytes:
    out = bytearray()
    for field, kind, content in fields:
        out += varint(field << 3 | kind)
        if isinstance(content, int):
            out += varint(content)
        else:
            out += (varint(len(content)) if kind == 2 else b"") + content
    return bytes(out)


def damaged_wire(rng: Random, raw: bytes, depth: int = 4) -> bytes:
    """One field changed, dropped, repeated or moved, somewhere in the tree; lengths are right again."""
    fields = parsed_wire(raw)
    if not fields:
        return damaged_bytes(rng, raw)
    index = rng.randrange(len(fields))
    field, kind, content = fields[index]
    if kind == 2 and depth and isinstance(content, bytes) and rng.random() < 0.75:
        fields[index] = field, kind, damaged_wire(rng, content, depth - 1)
        return wire_bytes(fields)
    change = rng.randrange(7)
    if change == 0:
        del fields[index]
    elif change == 1:
        fields[index:index] = [fields[index]] * rng.choice((1, 2, 50))
    elif change == 2:
        fields[index] = rng.randrange(1, 20), kind, content
    elif change == 3:
        other = rng.randrange(len(fields))
        fields[index], fields[other] = fields[other], fields[index]
    elif isinstance(content, int):
        fields[index] = (
            field,
            kind,
            rng.choice((content + 1, content ^ 1, rng.choice(INTEGERS) & (2**64 - 1))),
        )
    elif kind == 2:
        texts = rng.choice(TEXTS).encode("utf-8", "surrogatepass")
        fields[index] = field, kind, rng.choice((texts, b"\xff\xfe", damaged_bytes(rng, content), b""))
    else:
        numbers = (float("nan"), float("inf"), -1e30, 0.0, 1e-40)
        fields[index] = field, kind, struct.pack("<f" if kind == 5 else "<d", rng.choice(numbers))
    return wire_bytes(fields)


def damaged_safetensors(rng: Random, raw: bytes) -> bytes:
    """The header's JSON damaged, with its length put right; or bytes of the file."""
    if rng.random() < 0.25:
        return damaged_bytes(rng, raw)
    length = int.from_bytes(raw[:8], "little")
    header = json_bytes(rng, json.loads(raw[8 : 8 + length]))
    return len(header).to_bytes(8, "little") + header + raw[8 + length :]


def damaged_sealed(rng: Random, raw: bytes) -> bytes:
    """A file of `sealed_arrays`: bytes, or the header or the arrays with length and seal put right again."""
    if rng.random() < 0.25:
        return damaged_bytes(rng, raw)
    length = int.from_bytes(raw[8:16], "little")
    header, body = raw[16 : 16 + length], raw[16 + length : -32]
    if rng.random() < 0.8:
        header = json_bytes(rng, json.loads(header))
        header += b" " * (-len(header) % 64)
    else:
        body = damaged_bytes(rng, body) if rng.random() < 0.5 else rng.randbytes(len(body))
    data = raw[:8] + len(header).to_bytes(8, "little") + header + body
    return data + hashlib.sha256(data).digest()


def damaged_weights(rng: Random, raw: bytes) -> bytes:
    """bf16 weights that are NaN, infinite, huge or tiny; the header stays."""
    data, first = bytearray(raw), 8 + int.from_bytes(raw[:8], "little")
    for _ in range(rng.choice((1, 1, 3, 50))):
        at = first + 2 * rng.randrange((len(data) - first) // 2)
        bits = rng.choice(
            (0x7F7F, 0xFF7F, 0x7F80, 0xFF80, 0x7FC0, 0x0001, 0x8000, 0x7E80, 0x4780, 0x5000, 0x0080)
        )
        data[at : at + 2] = bits.to_bytes(2, "little")
    return bytes(data)


# Templates. -----------------------------------------------------------------------------------------

EXPRESSIONS = (
    *(
        "messages",
        "messages[0]['content']",
        "'x' * 1000",
        "'x' * 999999999",
        "range(99999)",
        "x ~ x",
        "x + x",
        "1 / 0",
    ),
    *(
        "[x] * 1000",
        "x | upper",
        "x | replace('x', 'xxxxxxxxxx')",
        "x | indent(99999)",
        "x | list",
        "x | join(x)",
    ),
    *(
        "x | wordwrap(1)",
        "x | tojson(indent=9999)",
        "dict(a=x)",
        "x.__class__",
        "x | attr('__class__')",
        "7 ** 7 ** 7",
    ),
    *(
        "x | batch(1) | list",
        "x | slice(99999) | list",
        "x | urlize",
        "x | escape",
        "x | e | e | e",
        "'%9999d' % 1",
    ),
    *(
        "cycler('a')",
        "lipsum(99)",
        "namespace(a=x)",
        "x | sort",
        "x | groupby('a')",
        "x | map('upper') | list",
    ),
    *(
        "self",
        "caller()",
        "m(x)",
        "m(m(x))",
        "x is divisibleby 0",
        "x | truncate(9999999)",
        "x[::-1]",
        "x | sum",
    ),
    *(
        "x | filesizeformat",
        "x | pprint",
        "x | xmlattr",
        "x | striptags",
        "x | unique | list",
        "x | random",
        "x.format(x)",
    ),
    *(
        "'{:99999999}'.format(1)",
        "x.join(x)",
        "x.splitlines()",
        "x.encode()",
        "x | reverse",
        "x | int ** 9999999",
    ),
    *(
        "strftime_now('%Y')",
        "strftime_now('\0')",
        "strftime_now('%9999999Y')",
        "raise_exception('two\nlines')",
    ),
    *(
        "loop",
        "messages | tojson",
        "range(10) | list",
        "'\x1b[2J'",
        "'\ud800'",
        "(1,) * 99999999",
        "x.__mul__(9)",
    ),
)
BLOCKS = (
    "{{% for y in range(600) %}}{0}{{% endfor %}}",
    "{{% for y in range(40) %}}{{% for z in range(40) %}}{0}{{% endfor %}}{{% endfor %}}",
    "{{% set x %}}{0}{{% endset %}}",
    "{{% set x = {1} %}}{0}",
    "{{% macro m(x) %}}{0}{{% endmacro %}}{{{{ m('a') }}}}",
    "{{% macro m(x) %}}{{{{ caller() }}}}{0}{{% endmacro %}}{{% call m('a') %}}{0}{{% endcall %}}",
    "{{% filter upper %}}{0}{{% endfilter %}}",
    "{{% filter replace('x', 'xxxxxxxxxx') %}}{0}{{% endfilter %}}",
    "{{% if {1} %}}{0}{{% endif %}}",
    "{{% with x = {1} %}}{0}{{% endwith %}}",
    "{{% block b %}}{0}{{% endblock %}}{{{{ self.b() }}}}",
    "{{% generation %}}{0}{{% endgeneration %}}",
    "{{% autoescape true %}}{0}{{% endautoescape %}}",
    "{{% for y in messages recursive %}}{0}{{{{ loop(messages) }}}}{{% endfor %}}",
    "{{% for y in {1} %}}{{% set x = x ~ x %}}{0}{{% endfor %}}",
    "{{% set n = namespace(v='x') %}}{{% for y in range(99) %}}{{% set n.v = n.v ~ n.v %}}{{% endfor %}}{0}",
    "{{% include {1} %}}{0}",
    "{{% raw %}}{0}{{% endraw %}}",
)


def random_template(rng: Random, depth: int = 3) -> str:
    """Constructs within constructs, around expressions that grow, recurse or look where they should not."""
    text = "{{% set x = {} %}}".format(rng.choice(("'x'", "'x' * 1000", rng.choice(EXPRESSIONS))))
    for _ in range(rng.randint(1, 3)):
        inner = "{{ " + rng.choice(EXPRESSIONS) + " }}"
        for _ in range(rng.randint(0, depth)):
            inner = rng.choice(BLOCKS).format(inner, rng.choice(EXPRESSIONS))
        text += inner
    if rng.random() < 0.03:  # loops that only a budget ends, at a second a case
        text = text.replace("range(600)", "range(60000)").replace("range(40)", "range(400)")
    return text


def either(*mutators: Callable[[Random, bytes], bytes]) -> Callable[[Random, bytes], bytes]:
    """One of several mutators, by the seed."""
    return lambda rng, raw: rng.choice(mutators)(rng, raw)
