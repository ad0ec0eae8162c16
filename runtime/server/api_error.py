"""`ApiError`: what a client is told, as OpenAI's API tells it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from gemma_edge.runtime.errors import (
    BundleError,
    BusyError,
    GemmaEdgeError,
    MediaError,
    UsageError,
    printable,
)

KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that gets an error instead of an answer.

    Args:
        status: of HTTP.
        message: one line for people.
        param: the field of the request that is wrong.
        code: a word for programs.
        headers: further headers, such as Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, printable(message, 2000), param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's JSON: message, type, param and code."""
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def to_json(self) -> bytes:
        """`body` as bytes."""
        return json.dumps(self.body).encode()


def refused(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """A field that is not what it must be; `message` continues its name: "must be a number"."""
    return ApiError(400, f"{printable(param)} {message}", param=printable(param), code=code)


def too_many(message: str, code: str, seconds: float) -> ApiError:
    """A client that asks too often, or a queue that is full; `seconds` until trying again makes sense."""
    wait = str(max(1, round(seconds)))
    return ApiError(429, message, code=code, headers={"Retry-After": wait})


def as_api_error(error: BaseException) -> ApiError:
    """What a client is told of any error; of one that is not ours, nothing but that it happened."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BusyError):
        return too_many(str(error), "queue_full", 2)
    if isinstance(error, MediaError):  # its path is a name that we gave
        where = f"{error.field}: expected {printable(error.expected)}, got {printable(error.got)}"
        return ApiError(400, f"{error.path}: {where}", param=str(error.path), code="invalid_attachment")
    if isinstance(error, BundleError) and error.field == "modalities":
        message = f"this model takes no such attachment: {printable(error.expected)} is needed"
        return ApiError(400, message, code="unsupported_modality")
    if isinstance(error, UsageError):
        long = "the context of" in str(error)
        return ApiError(400, str(error), code="context_length_exceeded" if long else "invalid_request")
    if isinstance(error, MemoryError):
        return ApiError(503, "not enough memory for this request", code="out_of_memory")
    if isinstance(error, GemmaEdgeError):
        return ApiError(500, "the model failed; the server's log says how", code="model_error")
    return ApiError(500, "the server failed; its log says how", code="internal_error")
