"""API keys: read from a file, found again in constant time, and cookies for the page that stand for one."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma_edge.runtime.errors import ConfigError, UsageError
from gemma_edge.runtime.files.text_files import read_bytes
from gemma_edge.runtime.server.server_options import Rate

KEY_CHARACTERS = (16, 512)
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
FILE_BYTES = 1 << 20
SESSION_S = 7 * 24 * 3600
_RATE = re.compile(r"([1-9][0-9]{0,8})/([1-9][0-9]{0,5})?(s|m|h)")
_UNITS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class Key:
    """A key, and the limits of whoever has it.

    Attributes:
        rate: None for the server's.
        max_tokens: most tokens of an answer; None for the server's.
    """

    name: str
    secret: str = field(repr=False)
    rate: Rate | None = None
    max_tokens: int | None = None


def parse_rate(text: str) -> Rate:
    """ "60/m" and "5/10s": requests within a time. Raises UsageError."""
    match = _RATE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is no rate: expected requests and a time, such as 60/m or 5/10s")
    return Rate(int(match[1]), int(match[2] or 1) * _UNITS[match[3]])


def one_key(secret: str) -> Key:
    """The key of `--api-key`. Raises UsageError."""
    if problem := _problem(secret):
        raise UsageError(f"--api-key {problem}")
    return Key("default", secret)


def _problem(secret: object) -> str:
    least, most = KEY_CHARACTERS
    if not isinstance(secret, str) or not least <= len(secret) <= most:
        return f"must have {least} to {most} characters; `openssl rand -hex 24` makes one"
    if not secret.isascii() or not secret.isprintable() or " " in secret:
        return "must have ASCII characters alone, without spaces"
    return ""


def read_keys(path: str | Path) -> list[Key]:
    """The keys of a TOML file: a table for each, which has its name.

        [phone]
        key = "..."
        rate = "60/m"
        max_tokens = 512

    Raises:
        ConfigError: the file is malformed, or others may read it.
    """
    path = Path(path)
    data = read_bytes(path, ConfigError, limit=FILE_BYTES)
    if path.stat().st_mode & 0o077:
        raise ConfigError(
            path, "mode", "a file that only its owner may read", "others may", f"chmod 600 {path}"
        )
    try:
        tables = tomllib.loads(data.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(path, "file", "TOML", error) from None
    keys = [_key(path, name, table) for name, table in tables.items()]
    if not keys:
        raise ConfigError(path, "file", 'one table or more, such as [phone] with key = "..."', "none")
    if len({key.secret for key in keys}) < len(keys):
        raise ConfigError(path, "key", "another key for each name", "one of two names")
    return keys


def _key(path: Path, name: str, table: Any) -> Key:
    if not NAME.fullmatch(name) or not isinstance(table, dict):
        raise ConfigError(
            path, name, "a table with a name of letters, digits, '_', '.' and '-'", repr(table)[:40]
        )
    if unknown := table.keys() - {"key", "rate", "max_tokens"}:
        raise ConfigError(path, f"{name}.{min(unknown)}", "key, rate or max_tokens", "another field")
    if problem := _problem(table.get("key")):
        raise ConfigError(path, f"{name}.key", f"a key: it {problem}", "another value")
    most = table.get("max_tokens")
    if most is not None and (not isinstance(most, int) or isinstance(most, bool) or most < 1):
        raise ConfigError(path, f"{name}.max_tokens", "an integer of 1 or more", repr(most))
    rate = table.get("rate")
    try:
        parsed = None if rate is None else parse_rate(str(rate))
    except UsageError as error:
        raise ConfigError(path, f"{name}.rate", "a rate such as 60/m", str(error)) from None
    return Key(name, table["key"], parsed, most)


class Keyring:
    """The keys that are let in. Comparing takes the same time whatever is presented."""

    def __init__(self, keys: Sequence[Key]) -> None:
        self._keys = [(_digest(key.secret.encode()), key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._keys)

    def find(self, presented: bytes) -> Key | None:
        """The key that was presented, if it is one."""
        digest, found = _digest(presented), None
        for known, key in self._keys:
            if hmac.compare_digest(known, digest):
                found = key
        return found

    def cookie(self, key: Key) -> str:
        """A text that stands for a key for a week. It does not tell the key, and outlives a restart."""
        head = f"{key.name}.{int(time.time()) + SESSION_S}"
        return f"{head}.{_seal(key, head)}"

    def find_cookie(self, cookie: str) -> Key | None:
        """The key that a cookie stands for, if it does and has not expired."""
        name, _, rest = cookie.rpartition(".")[0].rpartition(".")
        head, found = f"{name}.{rest}", None
        given = cookie.rpartition(".")[2].encode("utf-8", "replace")
        for _, key in self._keys:
            if hmac.compare_digest(_seal(key, head).encode(), given) and key.name == name:
                found = key
        fresh = rest.isascii() and rest.isdecimal() and len(rest) < 15 and int(rest) > time.time()
        return found if fresh else None


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _seal(key: Key, head: str) -> str:
    sealed = hmac.digest(key.secret.encode(), b"gemma-edge page " + head.encode("utf-8", "replace"), "sha256")
    return base64.urlsafe_b64encode(sealed).decode().rstrip("=")


def presented(headers: Mapping[str, str]) -> bytes | None:
    """The key in a request's headers: `Authorization: Bearer KEY`, or the password of `Basic`."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode("latin-1", "replace")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return None
    return None
