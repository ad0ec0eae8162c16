"""`HubReader`: reads a repository of a model hub over HTTP, with the standard library alone.

A board needs no further package, and a download can go on in another process: huggingface_hub begins anew.
The token goes to the hub's own host and to no other that it leads to.
"""

from __future__ import annotations

import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from gemma_edge.runtime.errors import BundleError, GemmaEdgeError, UsageError
from gemma_edge.runtime.files.text_files import MAX_TEXT_BYTES, parse_json
from gemma_edge.runtime.hub.hub_address import ENDPOINT_VARIABLE, HubAddress, endpoint
from gemma_edge.runtime.version import __version__

OFFLINE_VARIABLE, TOKEN_VARIABLE = "HF_HUB_OFFLINE", "HF_TOKEN"
TIMEOUT_S = 30
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class TransientError(Exception):
    """The connection broke, or the hub is busy: the same request may succeed later."""


@dataclass(frozen=True)
class Listing:
    """A repository at one commit.

    Attributes:
        commit: its hash.
        sizes: bytes of each file.
        hashes: SHA-256 of the files that the hub knows it of: the large ones.
    """

    commit: str
    sizes: dict[str, int]
    hashes: dict[str, str]

    def has_checkpoint(self) -> bool:
        """Are there weights that can be exported?"""
        return any(name.endswith(".safetensors") for name in self.sizes)


class HubReader:
    """Reads the repository of `address`.

    Raises:
        UsageError: HF_HUB_OFFLINE is set.
    """

    def __init__(self, address: HubAddress) -> None:
        if os.environ.get(OFFLINE_VARIABLE, "0").lower() in ("1", "true", "yes", "on"):
            raise UsageError(f"{address}: {OFFLINE_VARIABLE} is set, so that the hub is not asked: unset it")
        self.address = address
        self._opener = urllib.request.build_opener(_Redirects)

    def listing(self) -> Listing:
        """The commit of the revision, and its files.

        Raises:
            UsageError: no such repository or revision, or access is refused.
            GemmaEdgeError: the hub cannot be reached, or answers nonsense.
        """
        with _reached(self.address), self._open(self.address.api_url()) as response:
            text = read(response, MAX_TEXT_BYTES)
        # The hub's answer as a file: the same checks, the same error.
        info = parse_json(text, Path(endpoint()), BundleError, field=self.address.id)
        files = info.get("siblings")
        files = [file for file in files if isinstance(file, dict)] if isinstance(files, list) else []
        if not isinstance(commit := info.get("sha"), str):
            raise GemmaEdgeError(f"{endpoint()} does not answer as a model hub: check {ENDPOINT_VARIABLE}")
        sizes = {file["rfilename"]: file["size"] for file in files if _is_sized(file)}
        hashes = {}
        for file in files:
            lfs = file.get("lfs")
            if (
                isinstance(lfs, dict)
                and isinstance(lfs.get("sha256"), str)
                and file.get("rfilename") in sizes
            ):
                hashes[file["rfilename"]] = lfs["sha256"]
        return Listing(commit, sizes, hashes)

    def small_file(self, name: str, commit: str, limit: int = MAX_TEXT_BYTES) -> bytes:
        """A file of at most `limit` bytes.

        Raises:
            BundleError: it is larger.
            UsageError, GemmaEdgeError: as of `listing`.
        """
        with _reached(self.address), self.open(name, commit) as response:
            data = read(response, limit + 1)
        if len(data) > limit:
            raise BundleError(self.address.id, name, f"at most {limit:,} bytes", "more", "Do not use it.")
        return data

    def open(self, name: str, commit: str, start: int = 0) -> http.client.HTTPResponse:
        """A file, for `read`, from byte `start` on; from its beginning if the status is 200 instead of 206.

        Raises:
            TransientError: try again.
            UsageError: access is refused, or the file is not there.
        """
        headers = {"Range": f"bytes={start}-"} if start else {}
        return self._open(self.address.file_url(name, commit), headers)

    def _open(self, url: str, headers: dict[str, str] | None = None) -> http.client.HTTPResponse:
        request = urllib.request.Request(url, headers=headers or {})
        request.add_header("User-Agent", f"gemma-edge/{__version__}")
        request.add_header("Accept-Encoding", "identity")
        if (token := hub_token()) and _is_private(url):
            request.add_unredirected_header("Authorization", f"Bearer {token}")
        with _transient():
            try:
                response: http.client.HTTPResponse = self._opener.open(request, timeout=TIMEOUT_S)
            except urllib.error.HTTPError as error:
                with error:
                    raise self._refusal(error) from None
        return response

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        code, id = error.headers.get("X-Error-Code", ""), self.address.id
        if code == "GatedRepo":
            return gated(id)
        if code == "RevisionNotFound":
            return UsageError(f"{id} has no revision {self.address.revision!r}")
        if code == "EntryNotFound":
            return UsageError(f"{id}: {urlsplit(error.url).path.rpartition('/')[2]} is not there")
        if error.code in (401, 404):
            return not_found(id)
        if error.code in (408, 416, 429) or error.code >= 500:
            return TransientError(f"the hub answers {error.code} {error.reason}")
        return UsageError(
            f"{id}: the hub refuses ({error.code} {error.reason}): hf auth login, or another token"
        )


def read(response: http.client.HTTPResponse, size: int) -> bytes:
    """The next bytes of a file, at most `size`; none at its end, or where the hub stops early.

    Raises:
        TransientError: the connection broke.
    """
    with _transient():
        return response.read(size)


@contextmanager
def _transient() -> Iterator[None]:
    try:
        yield
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise TransientError(str(reason).partition("\n")[0] or type(reason).__name__) from None


@contextmanager
def _reached(address: HubAddress) -> Iterator[None]:
    """Makes a hub that cannot be reached a user's error."""
    try:
        yield
    except TransientError as error:
        raise GemmaEdgeError(
            f"{address}: {endpoint()} cannot be reached: {error}. Check the connection"
        ) from None


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows the hub to where it stores large files: over HTTPS, or on this machine."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if not _is_private(newurl) and urlsplit(newurl).scheme != urlsplit(req.full_url).scheme:
            raise urllib.error.URLError(f"it leads from {req.host} to {urlsplit(newurl).scheme}:")
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        # Unredirected headers do not come along: the token goes only from page to page of one host.
        if new and (new.type, new.host) == (req.type, req.host) and req.has_header("Authorization"):
            new.add_unredirected_header("Authorization", req.get_header("Authorization", ""))
        return new


def _is_private(url: str) -> bool:
    """Whether nobody on the way reads what is sent."""
    parts = urlsplit(url)
    return parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in LOOPBACK)


def _is_sized(file: dict[str, Any]) -> bool:
    size = file.get("size")
    return isinstance(file.get("rfilename"), str) and isinstance(size, int) and not isinstance(size, bool)


def hub_token() -> str:
    """The user's token, from where huggingface_hub keeps it; "" without one."""
    if token := os.environ.get(TOKEN_VARIABLE, "").strip():
        return token
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{cache}/huggingface"
    path = Path(os.environ.get("HF_TOKEN_PATH") or f"{home}/token").expanduser()
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
    return token if token.isascii() and token.isprintable() else ""


def gated(id: str) -> UsageError:
    """The error of a repository whose licence the user has not accepted."""
    return UsageError(f"{id}: access is gated. Accept the licence at {endpoint()}/{id}, then: hf auth login")


def not_found(id: str) -> UsageError:
    """The error of a repository that is not there, or not for this user: a hub does not tell which."""
    return UsageError(
        f"{id}: neither a folder here nor a repository on {urlsplit(endpoint()).hostname} (or log in)"
    )
