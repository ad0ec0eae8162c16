"""Reads a request's body: bounded JSON, and its fields, each checked; what nobody takes is refused."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from starlette.requests import Request

from gemma_edge.runtime.errors import printable
from gemma_edge.runtime.server.api_error import ApiError, refused
from gemma_edge.runtime.server.server_options import Limits

LARGEST = 2**53  # JSON's integers have no bound; JavaScript's do
QUICK_BYTES = 64 << 10  # a larger body is parsed in another thread, so that streams go on
CLOSE = {"Connection": "close"}  # what is left of the body is not read


async def read_body(request: Request, limits: Limits) -> bytes:
    """The body.

    Raises:
        ApiError: it is larger, or slower, than the limits.
    """
    body = bytearray()

    async def collect() -> None:
        async for chunk in request.stream():
            body.extend(chunk)
            check_length(len(body), limits)

    check_length(_stated_length(request), limits)
    try:
        await asyncio.wait_for(collect(), limits.body_seconds)
    except TimeoutError:
        text = f"the body did not arrive within {limits.body_seconds:g} s"
        raise ApiError(408, text, code="timeout", headers=CLOSE) from None
    return bytes(body)


def check_length(length: int, limits: Limits) -> None:
    """Raises ApiError for a body that is too large."""
    if length > limits.body_bytes:
        text = f"the request is larger than {limits.body_bytes:,} bytes"
        raise ApiError(413, text, code="request_too_large", headers=CLOSE)


def is_quick(request: Request) -> bool:
    """Whether a request's body is so small that reading its fields holds up no stream."""
    return 0 < _stated_length(request) <= QUICK_BYTES


def _stated_length(request: Request) -> int:
    stated = request.headers.get("content-length", "0")
    return int(stated) if stated.isdecimal() and len(stated) < 20 else 0


async def read_object(request: Request, limits: Limits) -> dict[str, Any]:
    """The JSON object that a request brings.

    Raises:
        ApiError: it brings something else, or too much.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        text = f"Content-Type must be application/json, not {printable(kind) or 'absent'}"
        raise ApiError(415, text, code="unsupported_media_type", headers=CLOSE)
    body = await read_body(request, limits)
    if len(body) <= QUICK_BYTES:
        return parse_object(body, limits)
    return await asyncio.to_thread(parse_object, body, limits)


def parse_object(body: bytes, limits: Limits) -> dict[str, Any]:
    """The JSON object that `body` is. Raises ApiError."""
    # Each member and element has one of these before it, and takes 100 bytes or so once it is parsed.
    if sum(map(body.count, (b"[", b"{", b","))) > limits.values:
        raise ApiError(400, f"the JSON has more than {limits.values:,} values", code="request_too_large")
    try:
        data = json.loads(body.decode(), object_pairs_hook=_once, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8: {error.reason}", code="invalid_json") from None
    except RecursionError:
        raise ApiError(400, "the JSON is nested too deep", code="invalid_json") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ApiError(400, f"the body is no JSON: {error.msg} ({where})", code="invalid_json") from None
    except ValueError as error:  # NaN, a name given twice, a number of thousands of digits
        known = isinstance(error, _JsonError)
        text = str(error) if known else "a number has too many digits"
        raise ApiError(400, f"the body is no JSON: {text}", code="invalid_json") from None
    if not isinstance(data, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    _check_values(data, limits.depth)
    return data


class _JsonError(ValueError):
    pass


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _JsonError(f"{printable(twice)!r} is given twice")
    return made


def _no_constant(name: str) -> NoReturn:
    raise _JsonError(f"{name} is no JSON number")


def _check_values(data: dict[str, Any], most: int) -> None:
    """Refuses values nested deeper than `most`, half characters, and numbers that are not finite."""
    level: list[Any] = [data]
    for _ in range(most + 1):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below += value
                below += value.values()
            elif isinstance(value, list):
                below += value
            elif isinstance(value, str):
                if not value.isascii():
                    _check_text(value)
            elif isinstance(value, float) and not math.isfinite(value):
                raise ApiError(400, "a number is too large", code="invalid_json")
        if not below:
            return
        level = below
    raise ApiError(400, f"the JSON is nested deeper than {most} levels", code="invalid_json")


def _check_text(value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError:
        text = "a text has half a character in it (a surrogate such as \\ud800)"
        raise ApiError(400, text, code="invalid_json") from None


class RequestFields:
    """The fields of one JSON object, taken one by one; `end` refuses those that were not.

    A field that is null counts as absent, as in OpenAI's API.

    Args:
        where: the object's place in the request: "messages[0]"; "" for the request itself.
    """

    def __init__(self, data: Any, where: str = "") -> None:
        if not isinstance(data, dict):
            raise refused(where or "body", "must be an object", "invalid_type")
        self.where = where
        self._left = {name: value for name, value in data.items() if value is not None}

    def name(self, field: str) -> str:
        """A field's full name: "messages[0].content"."""
        return f"{self.where}.{field}" if self.where else field

    def take(self, field: str) -> Any:
        """A field's value, whatever it is; None if it is absent."""
        return self._left.pop(field, None)

    def has(self, field: str) -> bool:
        return field in self._left

    def end(self) -> None:
        """Raises ApiError if a field is left."""
        for field in self._left:
            name = printable(self.name(field))
            raise ApiError(400, f"{name} is not supported", param=name, code="unsupported_parameter")

    def only(self, field: str, *values: Any, why: str = "") -> None:
        """A field of OpenAI's that may have no other than these values, which mean what is done anyway."""
        value = self.take(field)
        if value is None or any(type(value) is type(v) and value == v for v in values):
            return
        if isinstance(value, int | float) and not isinstance(value, bool) and value in values:
            return
        name = self.name(field)
        allowed = " or ".join(map(json.dumps, values))
        raise ApiError(
            400,
            f"{name} is not supported"
            + (f", other than as {allowed}" if values else "")
            + (why and f": {why}"),
            param=name,
            code="unsupported_parameter",
        )

    def _checked(
        self, field: str, ok: Callable[[Any], bool], expected: str, code: str = "invalid_type"
    ) -> Any:
        value = self.take(field)
        if value is not None and not ok(value):
            raise refused(self.name(field), f"must be {expected}", code)
        return value

    def text(self, field: str) -> str | None:
        value: str | None = self._checked(field, lambda v: isinstance(v, str), "a text")
        return value

    def flag(self, field: str, default: bool = False) -> bool:
        value = self._checked(field, lambda v: isinstance(v, bool), "true or false")
        return default if value is None else bool(value)

    def integer(self, field: str, least: int, most: int = LARGEST) -> int | None:
        def ok(value: Any) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

        expected = (
            f"an integer from {least} to {most}" if most < LARGEST else f"an integer of {least} or more"
        )
        value: int | None = self._checked(field, ok, expected, "invalid_value")
        return value

    def number(self, field: str, least: float, most: float) -> float | None:
        def ok(value: Any) -> bool:
            return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most

        value: float | None = self._checked(
            field, ok, f"a number from {least:g} to {most:g}", "invalid_value"
        )
        return value

    def choice(self, field: str, names: Sequence[str]) -> str | None:
        expected = "one of " + ", ".join(names)
        value: str | None = self._checked(
            field, lambda v: isinstance(v, str) and v in names, expected, "invalid_value"
        )
        return value

    def items(self, field: str, most: int, least: int = 0) -> list[Any] | None:
        value: list[Any] | None = self._checked(field, lambda v: isinstance(v, list), "a list")
        if value is not None and not least <= len(value) <= most:
            expected = f"must have {least} to {most} elements, not {len(value)}"
            raise refused(
                self.name(field), expected, "array_above_max_length" if len(value) > most else "empty_array"
            )
        return value

    def fields(self, field: str) -> RequestFields | None:
        """The fields of an object within this one."""
        value = self.take(field)
        return None if value is None else RequestFields(value, self.name(field))

    def mapping(self, field: str) -> Mapping[str, Any] | None:
        value: Mapping[str, Any] | None = self._checked(field, lambda v: isinstance(v, dict), "an object")
        return value

    def needed(self, field: str, value: Any) -> Any:
        """`value`, which must be there."""
        if value is None:
            raise refused(self.name(field), "is missing", "missing_required_parameter")
        return value
