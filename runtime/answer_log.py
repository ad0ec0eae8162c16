"""Structured logs of loads and answers, through the logger "gemma_edge".

Nothing is logged until the application sets the logger's level to INFO. A record's message is the event's
name and its fields as JSON; its attribute `fields` holds them as a dict. Texts are never logged: a prompt and
a client appear as hashes, with a key that is new in every process, so that equal ones can be told within a
log and none can be guessed from it.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from functools import cache
from typing import TYPE_CHECKING, Any

from gemma_edge.runtime.console import LOGGER
from gemma_edge.runtime.host.own_memory import own_memory

if TYPE_CHECKING:
    from gemma_edge.runtime.prompt.prompt_builder import Prompt
    from gemma_edge.runtime.usage import GenerationProgress


def logs() -> bool:
    """Whether anybody wants to see records; if so, they have imported `logging`, which this does not."""
    if "logging" not in sys.modules:
        return False
    import logging

    return logging.getLogger(LOGGER).isEnabledFor(logging.INFO)


def log(event: str, fields: dict[str, Any]) -> None:
    """Logs an event, with the memory of this process, if `logs`."""
    if not logs():
        return
    import logging

    anonymous, resident = own_memory()
    fields = {"event": event, **fields, "rss_anon_bytes": anonymous, "rss_bytes": resident}
    logging.getLogger(LOGGER).info("%s %s", event, json.dumps(fields), extra={"fields": fields}, stacklevel=2)


class AnswerLog:
    """Logs the end of one answer.

    Args:
        client: as in `GenerateOptions`.
    """

    def __init__(self, prompt: Prompt, progress: GenerationProgress, client: str) -> None:
        self._prompt, self._progress, self._client = prompt, progress, client

    def ended(self, finish_reason: str, error: BaseException | None = None) -> None:
        """Logs what the answer took: an error with its type alone."""
        if not logs():
            return
        p = self._progress
        fields: dict[str, Any] = {
            "prompt_hash": hashed(",".join(map(str, self._prompt.keys))),
            "client_hash": hashed(self._client) if self._client else None,
            "finish_reason": finish_reason,
            "error": None if error is None else type(error).__name__,
            "prompt_tokens": p.prompt_tokens,
            "cached_tokens": p.cached_tokens,
            "soft_tokens": p.soft_tokens,
            "left_out_tokens": self._prompt.left_out,
            "completion_tokens": p.completion_tokens,
            "restored_from": p.restored_from,
        }
        seconds = ("queued", "tokenize", "restore", "encode", "prefill", "first_token", "decode", "mask")
        fields |= {f"{name}_s": round(getattr(p, f"{name}_s"), 6) for name in seconds}
        log("answer", fields)


def hashed(text: str) -> str:
    """16 hexadecimal digits that tell texts apart within this process."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), key=_key(), digest_size=8).hexdigest()


@cache
def _key() -> bytes:
    return os.urandom(32)
