"""`push_bundle`: a bundle published on a model hub, with a model card, through huggingface_hub."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_edge.export.sharing.model_card import MARK
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.artifacts.folder_bundle import file_records
from gemma_edge.runtime.artifacts.manifest import MANIFEST
from gemma_edge.runtime.errors import BundleError, GemmaEdgeError, UsageError, printable
from gemma_edge.runtime.files.text_files import parse_json
from gemma_edge.runtime.hub.hub_address import HUB_ID, HubAddress, endpoint
from gemma_edge.runtime.hub.hub_reader import HubReader, Listing, gated, hub_token
from gemma_edge.runtime.hub.pull_bundle import CARD
from gemma_edge.runtime.install_hint import require


@dataclass(frozen=True)
class Pushed:
    """A bundle that was published.

    Attributes:
        url: its page.
        commit: the hub's hash of what was published.
        card_kept: whether the repository had a card of somebody's own, which stayed.
    """

    url: str
    commit: str
    card_kept: bool


def push_bundle(
    bundle: str | Path,
    address: str | HubAddress,
    card: str,
    *,
    private: bool = False,
    message: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Pushed:
    """Publishes a bundle in one commit: all of it or nothing.

    Files of an earlier bundle there that this one does not have are deleted, others stay. What was uploaded
    before an interruption is not sent again.

    Args:
        address: `owner/name`, or `owner/name/folder` for one of several bundles of a repository.
        card: the model card, from `model_card`; not published over one that somebody else wrote.
        private: make the repository private if there is none yet.
        message: of the commit.
        progress: is given the bytes that were hashed since its last call.

    Raises:
        BundleError: a file has not the hash that the manifest records.
        UsageError: no token, one that may not write there, or huggingface_hub is not installed.
        GemmaEdgeError: the hub cannot be reached, or refuses the files.
    """
    require("huggingface_hub", "hub", "gemma-edge push")
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    if isinstance(address, str):
        address = HubAddress.parse(address)
    opened = Bundle.open(bundle)
    _check_private(opened)
    opened.check_hashes(progress)
    if not hub_token():
        raise UsageError("the hub lets nobody publish without a token: hf auth login, or set HF_TOKEN")
    api = HfApi(endpoint=endpoint())
    files = {address.within(path.relative_to(_root(opened)).as_posix()): path for path in opened.paths()}
    try:
        api.create_repo(address.id, private=private, exist_ok=True)
        reader = HubReader(address)
        listing = reader.listing()
        own = _is_own(reader, listing)
        card_name = address.within(CARD)
        operations: list[Any] = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path)) for name, path in files.items()
        ]
        if not own:
            operations.append(CommitOperationAdd(path_in_repo=card_name, path_or_fileobj=card.encode()))
        for name in _outdated(reader, listing) - {*files, card_name}:
            operations.append(CommitOperationDelete(path_in_repo=name))
        done = api.create_commit(
            address.id,
            operations,
            commit_message=message or f"{opened.path.name}: a bundle of gemma-edge",
            revision=address.revision,
        )
    except GemmaEdgeError:
        raise
    except Exception as error:  # the client's HTTP library, and so its errors, differ between versions
        raise _explained(error, address) from error
    _check_published(reader.listing(), {name: path.stat().st_size for name, path in files.items()}, address)
    return Pushed(f"{endpoint()}/{address.id}", str(done.oid), own)


def _check_private(bundle: Bundle) -> None:
    """Raises UsageError if the manifest has the path of a folder, as versions before this one wrote it."""
    adapters = bundle.manifest.get("adapters")
    source = [] if "base_model" in bundle.manifest else [bundle.member("source", dict).get("name")]
    named = (
        [each.get("name") for each in adapters if isinstance(each, dict)]
        if isinstance(adapters, list)
        else []
    )
    for name in map(str, [*source, *named]):
        if "/" in name and (name in source or not HUB_ID.fullmatch(name)):
            raise UsageError(
                f"{bundle.path}: its manifest names the folder {printable(name)}, which would be published. "
                "Export it again: the manifest then has the name alone"
            )


def _root(bundle: Bundle) -> Path:
    return bundle.path if bundle.path.is_dir() else bundle.path.parent


def _is_own(reader: HubReader, listing: Listing) -> bool:
    """Whether the repository has a card that we did not write."""
    name = reader.address.within(CARD)
    return name in listing.sizes and MARK.encode() not in reader.small_file(name, listing.commit)


def _outdated(reader: HubReader, listing: Listing) -> set[str]:
    """The files of the bundle that is published there now."""
    name = reader.address.within(MANIFEST)
    if name not in listing.sizes:
        return set()
    with suppress(BundleError):  # what is no manifest names no files of ours
        manifest = parse_json(reader.small_file(name, listing.commit), Path(name), BundleError)
        listed = {reader.address.within(file) for file in file_records(Path(name), manifest)}
        return {name, *listed} & set(listing.sizes)
    return set()


def _check_published(listing: Listing, sizes: dict[str, int], address: HubAddress) -> None:
    """Raises GemmaEdgeError unless all files are there: a repository's .gitignore drops some silently."""
    for name, size in sizes.items():
        if listing.sizes.get(name) != size:
            raise GemmaEdgeError(
                f"{address.id}: {name} did not arrive: take it out of the repository's .gitignore"
            )


def _explained(error: Exception, address: HubAddress) -> GemmaEdgeError:
    """An error of huggingface_hub, for people."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, GatedRepoError):
        return gated(address.id)
    if isinstance(error, HfHubHTTPError) and status in (401, 403):
        return UsageError(f"{address.id}: your token may not write there: hf auth login with one that may")
    reason = str(error).partition("\n")[0] or type(error).__name__
    return GemmaEdgeError(
        f"{address.id}: nothing was published: {reason}. Push again: what was uploaded is not sent twice"
    )
