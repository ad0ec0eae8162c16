"""Where a bundle lies on a model hub: the repository, the revision, the place within it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Self
from urllib.parse import quote, unquote, urlsplit

from gemma_edge.runtime.errors import UsageError

ENDPOINT_VARIABLE = "HF_ENDPOINT"
DEFAULT_ENDPOINT = "https://huggingface.co"
SHORT_HOST = "hf.co"
LITERTLM = ".litertlm"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
REVISION = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")
PLAIN_NAME = re.compile(r"\w[\w.-]*")  # no hidden file, no folder above
PAGES = ("tree", "blob", "resolve")  # of a repository: what stands before the revision in a URL


def endpoint() -> str:
    """The hub's URL, without a slash at its end."""
    return os.environ.get(ENDPOINT_VARIABLE, "").rstrip("/") or DEFAULT_ENDPOINT


@dataclass(frozen=True)
class HubAddress:
    """A place on the hub.

    Attributes:
        id: the repository, `owner/name`.
        revision: a branch, a tag or a commit.
        path: the folder of the bundle or the .litertlm within the repository; "" for its root.
    """

    id: str
    revision: str = "main"
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """An address from `owner/name[/path][@revision]`, or from the URL of a page of the hub.

        Raises:
            UsageError: it is neither, or the URL is of another host than the hub's.
        """
        if "://" in text:
            parts, revision = _of_url(text)
        else:
            name, _, revision = text.partition("@")
            parts = name.rstrip("/").split("/")
        address = cls("/".join(parts[:2]), revision or "main", "/".join(parts[2:]))
        named = all(PLAIN_NAME.fullmatch(part) for part in parts[2:])
        if not HUB_ID.fullmatch(address.id) or not REVISION.fullmatch(address.revision) or not named:
            raise UsageError(
                f"{text}: expected owner/name, owner/name/folder, owner/name@revision, "
                f"or a URL at {endpoint()}"
            )
        return address

    @property
    def name(self) -> str:
        """What a copy of it is called: the last part of the path or of the id."""
        return (self.path or self.id).rpartition("/")[2]

    @property
    def is_file(self) -> bool:
        """Is it a .litertlm?"""
        return self.path.endswith(LITERTLM)

    def within(self, name: str) -> str:
        """The path in the repository of a file of the bundle in a folder."""
        return f"{self.path}/{name}" if self.path else name

    def api_url(self) -> str:
        """What describes the repository at this revision."""
        return f"{endpoint()}/api/models/{self.id}/revision/{quote(self.revision, safe='')}?blobs=true"

    def file_url(self, name: str, commit: str) -> str:
        """The contents of a file of the repository at a commit."""
        return f"{endpoint()}/{self.id}/resolve/{quote(commit, safe='')}/{quote(name)}"

    def __str__(self) -> str:
        return "/".join(filter(None, (self.id, self.path)))


def _of_url(text: str) -> tuple[list[str], str]:
    """The parts of the id and the path, and the revision."""
    url, hub = urlsplit(text), urlsplit(endpoint())
    hosts = {hub.netloc, SHORT_HOST} if endpoint() == DEFAULT_ENDPOINT else {hub.netloc}
    if url.netloc not in hosts or url.scheme not in ("https", hub.scheme):
        raise UsageError(
            f"{text}: bundles come from {endpoint()}; {ENDPOINT_VARIABLE}=https://... names another hub"
        )
    parts = [unquote(part) for part in url.path.strip("/").split("/")]
    if len(parts) > 3 and parts[2] in PAGES:
        return [*parts[:2], *parts[4:]], parts[3]
    return parts, ""
