"""Bundles pulled from a model hub and pushed to one: a stand-in for the hub's HTTP API on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gemma_edge.cli.exported_once import ready_bundle
from gemma_edge.cli.main import main
from gemma_edge.export.checkpoint.side_files import stated_license
from gemma_edge.export.exporter import export_bundle
from gemma_edge.export.sharing.model_card import MARK, model_card
from gemma_edge.export.sharing.push_bundle import push_bundle
from gemma_edge.export.synth.synth_checkpoint import synthesize
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.errors import BundleError, GemmaEdgeError, UsageError
from gemma_edge.runtime.hub import pull_bundle as pulling
from gemma_edge.runtime.hub.hub_address import HubAddress
from gemma_edge.runtime.hub.pull_bundle import CheckpointThereError, pull_bundle
from support.hub_server import TOKEN, Files, Hub, serving_hub
from support.random_gemma3n_text import SMALL

ID, BASE = "alice/tiny", "google/gemma-3n-E2B-it"
LARGE = bytes(range(256)) * 4096  # a MiB: in several blocks, on the hub's other host
CONTENTS = {"decoder.onnx": b"graph", "decoder.onnx.data": LARGE, "tokenizer.model": b"pieces"}


def published(files: Files = CONTENTS, **changes: Any) -> Files:
    """A repository with a bundle, as far as `Bundle` looks; `changes` are of its manifest's "files"."""
    records = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
    }
    manifest = {
        "schema_version": 1,
        "config": SMALL,
        "context": 64,
        "chunk": 16,
        "kv_cache": "int8",
        "example": "What is 2 + 3?",
        "files": {**records, **changes},
    }
    card = {"README.md": b"# A card", ".gitattributes": b"* -text", "train.py": b"import os"}
    return {"manifest.json": json.dumps(manifest).encode(), **card, **files}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pulling, "PAUSES_S", (0, 0))
    with serving_hub(monkeypatch) as hub:
        yield hub


# Addresses. ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "address"),
    {
        "a/b": ("a/b", "main", ""),
        "a/b@v1.0": ("a/b", "v1.0", ""),
        "a/b/int4/onnx@main": ("a/b", "main", "int4/onnx"),
        "https://huggingface.co/a/b": ("a/b", "main", ""),
        "https://hf.co/a/b/": ("a/b", "main", ""),
        "https://huggingface.co/a/b/tree/abc/int4": ("a/b", "abc", "int4"),
        "https://huggingface.co/a/b/blob/main/m.litertlm": ("a/b", "main", "m.litertlm"),
    }.items(),
)
def test_addresses(monkeypatch: pytest.MonkeyPatch, text: str, address: tuple[str, str, str]) -> None:
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert HubAddress.parse(text) == HubAddress(*address)


@pytest.mark.parametrize(
    "text",
    ["", "a", "../b", "a/../b", "a/b/../c", "a/b/.git", "a/b@../main", "a/b@", "a/b c", "https://evil.example/a/b",
     "http://huggingface.co/a/b", "file:///etc/passwd", "https://huggingface.co/a"],
)  # fmt: skip
def test_no_addresses(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    if text == "a/b@":
        assert HubAddress.parse(text).revision == "main"
    else:
        with pytest.raises(UsageError, match=r"expected owner/name|another hub"):
            HubAddress.parse(text)


# Pull. --------------------------------------------------------------------------------------------


def test_a_bundle_comes_with_its_card_and_nothing_else(hub: Hub, tmp_path: Path) -> None:
    commit = hub.add(ID, published())
    shown: list[tuple[int, int]] = []
    done = pull_bundle(ID, progress=lambda there, total: shown.append((there, total)))
    assert done.path == tmp_path / "tiny" and done.commit == commit and done.example == "What is 2 + 3?"
    assert {path.name for path in done.path.iterdir()} == {"manifest.json", "README.md", *CONTENTS}
    assert (done.path / "decoder.onnx.data").read_bytes() == LARGE
    total = sum(map(len, CONTENTS.values()))
    assert done.fetched == total and shown[-1] == (total, total)
    assert not any(os.access(path, os.X_OK) for path in done.path.iterdir())
    assert list(tmp_path.iterdir()) == [done.path]
    hub.requests.clear()
    assert pull_bundle(ID).fetched == 0  # it is there
    assert hub.downloads() == ["manifest.json"]


def test_an_interrupted_download_goes_on_within_a_process(hub: Hub) -> None:
    hub.add(ID, published())
    hub.break_after = [300_000, 0, 0, 500_000]
    assert pull_bundle(ID).fetched == sum(map(len, CONTENTS.values()))
    ranges = [headers.get("Range") for _, path, headers in hub.requests if path.startswith("cdn")]
    assert ranges == [None, *["bytes=300000-"] * 3, "bytes=800000-"]


def test_an_interrupted_download_goes_on_in_the_next_process(hub: Hub, tmp_path: Path) -> None:
    hub.add(ID, published())
    hub.break_after = [300_000, 0, 0, 0]
    with pytest.raises(GemmaEdgeError, match=r"stopped after .* of 1 MiB.*the same command again"):
        pull_bundle(ID)
    assert not (tmp_path / "tiny").exists()
    assert pull_bundle(ID).fetched == len(LARGE) - 300_000 + len(CONTENTS["tokenizer.model"])
    assert (tmp_path / "tiny" / "decoder.onnx.data").read_bytes() == LARGE


def test_a_hub_without_ranges_sends_all_again(hub: Hub, tmp_path: Path) -> None:
    hub.add(ID, published())
    hub.no_ranges, hub.break_after = True, [300_000]
    pull_bundle(ID)
    assert (tmp_path / "tiny" / "decoder.onnx.data").read_bytes() == LARGE


def test_a_beginning_of_another_revision_is_dropped(hub: Hub, tmp_path: Path) -> None:
    hub.add(ID, published({**CONTENTS, "decoder.onnx.data": LARGE[::-1], "old.bin": b"1"}))
    hub.break_after = [300_000, 0, 0, 0]
    with pytest.raises(GemmaEdgeError, match="stopped"):
        pull_bundle(ID)
    hub.add(ID, published())
    pull_bundle(ID)
    assert (tmp_path / "tiny" / "decoder.onnx.data").read_bytes() == LARGE
    assert not (tmp_path / "tiny" / "old.bin").exists()


def test_a_revision_is_pinned(hub: Hub) -> None:
    first = hub.add(ID, published({**CONTENTS, "decoder.onnx": b"first"}))
    hub.add(ID, published())
    assert (pull_bundle(f"{ID}@{first}", "one").path / "decoder.onnx").read_bytes() == b"first"
    assert (pull_bundle(f"{hub.url}/{ID}", "two").path / "decoder.onnx").read_bytes() == b"graph"
    with pytest.raises(UsageError, match="has no revision 'v9'"):
        pull_bundle(f"{ID}@v9")


def test_one_of_several_bundles(hub: Hub) -> None:
    hub.add(ID, {f"{name}/{file}": data for name in ("int4", "int8") for file, data in published().items()})
    with pytest.raises(UsageError, match=f"several bundles: name one, such as {ID}/int4"):
        pull_bundle(ID)
    assert Bundle.open(pull_bundle(f"{ID}/int8").path).context == 64


def test_the_token_stays_with_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(ID, published())
    hub.private.add(ID)
    with pytest.raises(UsageError, match=r"neither a folder here nor a repository .* \(or log in\)"):
        pull_bundle(ID)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    pull_bundle(ID)
    with_token = {path.startswith("cdn") for _, path, headers in hub.requests if "Authorization" in headers}
    assert with_token == {False}


def test_refusals_of_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("alice/gated", published())
    hub.gated.add("alice/gated")
    with pytest.raises(UsageError, match=r"Accept the licence at .*alice/gated, then: hf auth login"):
        pull_bundle("alice/gated")
    hub.add("alice/weights", {"config.json": b"{}", "model.safetensors": b""})
    with pytest.raises(CheckpointThereError, match=r"gemma-edge export alice/weights OUT"):
        pull_bundle("alice/weights")
    hub.add("alice/prose", {"README.md": b""})
    with pytest.raises(UsageError, match="not a bundle: it has neither"):
        pull_bundle("alice/prose")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE is set"):
        pull_bundle(ID)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(GemmaEdgeError, match=r"cannot be reached: .*refused.* Check the connection"):
        pull_bundle(ID)


def test_nothing_is_replaced(hub: Hub, tmp_path: Path) -> None:
    hub.add(ID, published())
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for target in ("tiny", "file"):
        with pytest.raises(UsageError, match="is there and is not this bundle"):
            pull_bundle(ID, target)
    assert (tmp_path / "tiny" / "mine").read_text() == (tmp_path / "file").read_text() == "mine"


def test_two_processes_do_not_pull_to_one_place(hub: Hub, tmp_path: Path) -> None:
    hub.add(ID, published())

    def again(there: int, total: int) -> None:
        with pytest.raises(UsageError, match="another process pulls to it"):
            pull_bundle(ID)

    pull_bundle(ID, progress=again)


# A hub's publisher as an adversary. ---------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../x.bin", "/etc/x.bin", "a/../../x.bin", "x\\y.bin", ".git/hooks/x.bin", ".x.bin", "run.sh",
     "x.py", "x.so", "sitecustomize.py", "manifest.json", "a\0.bin", "x" * 300 + ".bin", "C:.bin", "-rf.bin"],
)  # fmt: skip
def test_names_that_no_bundle_has(hub: Hub, tmp_path: Path, name: str) -> None:
    bad = b"bad"
    record = {"bytes": len(bad), "sha256": hashlib.sha256(bad).hexdigest()}
    hub.add(ID, {name: bad, **published(**{name: record})})
    with pytest.raises(BundleError, match="files"):
        pull_bundle(ID)
    assert hub.downloads() == ["manifest.json"] and list(tmp_path.iterdir()) == []


def test_sizes_that_lie(hub: Hub, tmp_path: Path) -> None:
    hub.add(ID, published())
    hub.sizes["decoder.onnx.data"] = 10**15
    with pytest.raises(BundleError, match="1,000,000,000,000,000"):
        pull_bundle(ID)
    hub.add(ID, published(**{"decoder.onnx.data": {"bytes": 10**15, "sha256": "0" * 64}}))
    with pytest.raises(GemmaEdgeError, match="more bytes of disk"):
        pull_bundle(ID)
    hub.sizes.clear()
    hub.add(ID, published(**{"decoder.onnx.data": {"bytes": 10, "sha256": "0" * 64}}))
    with pytest.raises(BundleError, match="10 bytes"):
        pull_bundle(ID)
    hub.add(ID, published(**{"other.bin": {"bytes": 10, "sha256": "0" * 64}}))
    with pytest.raises(BundleError, match="no such file"):
        pull_bundle(ID)
    assert not (tmp_path / "tiny").exists() and hub.downloads() == ["manifest.json"] * 4


def test_more_bytes_than_the_hub_said_are_not_read(hub: Hub) -> None:
    record = {"bytes": 1000, "sha256": hashlib.sha256(LARGE[:1000]).hexdigest()}
    hub.add(ID, published(**{"decoder.onnx.data": record}))
    hub.sizes["decoder.onnx.data"] = 1000
    assert (pull_bundle(ID).path / "decoder.onnx.data").read_bytes() == LARGE[:1000]


def test_bytes_of_another_hash_leave_nothing(hub: Hub, tmp_path: Path) -> None:
    hub.add(ID, published(**{"decoder.onnx.data": {"bytes": len(LARGE), "sha256": "0" * 64}}))
    with pytest.raises(BundleError, match="sha256 of decoder"):
        pull_bundle(ID)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "manifest",
    [b"", b"[]", b"{", b"{}", b'{"schema_version": 99}', b'{"schema_version": 1, "format": "exe"}',
     b'{"schema_version": 1, "files": []}', b"[" * 100_000, b" " * (17 << 20)],
)  # fmt: skip
def test_manifests_that_are_none(hub: Hub, tmp_path: Path, manifest: bytes) -> None:
    hub.add(ID, {**published(), "manifest.json": manifest})
    with pytest.raises(BundleError):
        pull_bundle(ID)
    assert list(tmp_path.iterdir()) == []


def test_thousands_of_files(hub: Hub) -> None:
    files = {f"{n}.bin": b"" for n in range(100)}
    hub.add(ID, published(files))
    with pytest.raises(BundleError, match="at most 64 files"):
        pull_bundle(ID)


def test_a_link_in_the_place_of_a_download_is_not_followed(hub: Hub, tmp_path: Path) -> None:
    hub.add(ID, published())
    (tmp_path / "victim").write_text("mine")
    (tmp_path / ".tiny.pulling").mkdir()
    (tmp_path / ".tiny.pulling" / "decoder.onnx").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic links"):
        pull_bundle(ID)
    assert (tmp_path / "victim").read_text() == "mine"


# The command line. --------------------------------------------------------------------------------


def test_pull_as_it_is_typed(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    commit = hub.add(ID, published())
    assert main(["pull", ID, "out"]) == 0
    said = capsys.readouterr()
    assert said.out == "out: ready. Next: gemma-edge run out 'What is 2 + 3?'\n" and commit in said.err
    assert main(["pull", "alice/none"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_bundles_id_in_the_place_of_a_bundle(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GEMMA_EDGE_CACHE", str(tmp_path / "cache"))
    hub.add(ID, published())
    with pytest.raises(UsageError, match=f"add --yes, or run gemma-edge pull {ID}, or gemma-edge export"):
        ready_bundle(ID, yes=False)
    assert hub.requests == []  # nobody agreed yet
    path = ready_bundle(ID, yes=True)
    assert Bundle.open(path).context == 64
    hub.requests.clear()
    assert ready_bundle(ID, yes=False) == path and hub.requests == []
    assert f"gemma-edge pull {ID}" in capsys.readouterr().err


# Push. --------------------------------------------------------------------------------------------


@pytest.fixture
def writable(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    # Xet, the newer way of large files, has a protocol of its own.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    return hub


def metadata(card: str) -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load(card.split("---")[1])


def test_what_is_pushed_can_be_pulled(
    writable: Hub, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(tiny_bundle), ID, "--license", "gemma", "--base-model", BASE]) == 0
    assert f"published {tiny_bundle}. Others get it by: gemma-edge pull {ID}" in capsys.readouterr().out
    files = writable.files(ID)
    assert files is not None
    card = files["README.md"].decode()
    assert metadata(card) == {
        "library_name": "gemma-edge",
        "license": "gemma",
        "base_model": BASE,
        "base_model_relation": "quantized",
        "pipeline_tag": "text-generation",
        "tags": ["gemma-edge", "onnx", "gemma3n", "int4", "on-device"],
    }
    for part in ("predicted", "| decoder layers | 4 | 64 |", "top-1", f"gemma-edge pull {ID}"):
        assert part in card
    pulled = Bundle.open(pull_bundle(ID, "again").path)
    pulled.check_hashes()
    assert pulled.identity == Bundle.open(tiny_bundle).identity


def test_a_push_that_broke_sends_only_the_rest(writable: Hub, tiny_bundle: Path) -> None:
    pytest.importorskip("huggingface_hub")
    card = model_card(Bundle.open(tiny_bundle), ID, license="gemma")
    writable.broken_uploads = 1
    with pytest.raises(GemmaEdgeError, match=r"nothing was published: .* Push again"):
        push_bundle(tiny_bundle, ID, card)
    assert set(writable.files(ID) or ()) == {".gitattributes"}
    sent = {path for method, path, _ in writable.requests if method == "PUT"}
    writable.requests.clear()
    push_bundle(tiny_bundle, ID, card)
    again = {path for method, path, _ in writable.requests if method == "PUT"}
    assert again < sent or len(sent) == 1


def test_a_newer_bundle_takes_the_place_of_an_older_one(writable: Hub, tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    writable.add(ID, {**published(), "README.md": f"{MARK} old".encode(), "notes.txt": b"mine"})
    assert not push_bundle(tiny_bundle, ID, model_card(bundle, ID, license="gemma")).card_kept
    files = writable.files(ID) or {}
    assert "decoder.onnx" in files and "notes.txt" in files and b"old" not in files["README.md"]
    assert set(files) - {"README.md", ".gitattributes", "notes.txt", "train.py"} == {
        "manifest.json", *bundle.files
    }  # fmt: skip
    writable.add(ID, {**files, "README.md": b"my own words"})
    assert push_bundle(tiny_bundle, ID, model_card(bundle, ID, license="gemma")).card_kept
    assert (writable.files(ID) or {})["README.md"] == b"my own words"


def test_refusals_of_a_push(
    writable: Hub,
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    card = model_card(Bundle.open(tiny_bundle), ID, license="gemma")
    writable.ignored.add("decoder.onnx.data")
    with pytest.raises(GemmaEdgeError, match=r"decoder.onnx.data did not arrive: .*\.gitignore"):
        push_bundle(tiny_bundle, ID, card)
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(UsageError, match="your token may not write there"):
        push_bundle(tiny_bundle, "alice/other", card)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UsageError, match="hf auth login, or set HF_TOKEN"):
        push_bundle(tiny_bundle, ID, card)
    assert main(["push", str(tiny_bundle)]) == main(["push", str(tiny_bundle), "no id"]) == 2
    writable.requests.clear()
    assert main(["push", str(tiny_bundle), ID, "--dry-run", "--license", "a b"]) == 2
    assert "add --license gemma" in capsys.readouterr().err
    assert main(["push", str(tiny_bundle), ID, "--dry-run", "--license", "mit"]) == 0
    assert 'license: "mit"' in capsys.readouterr().out and writable.requests == []
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match=r'pip install ".\[hub\]"'):
        push_bundle(tiny_bundle, ID, card)


def test_a_damaged_bundle_is_not_pushed(writable: Hub, tiny_bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))
    data = bytearray((copy / "decoder.onnx.data").read_bytes())
    data[0] ^= 1
    (copy / "decoder.onnx.data").write_bytes(data)
    with pytest.raises(BundleError, match="sha256"):
        push_bundle(copy, ID, "card")
    assert writable.requests == []


@pytest.mark.parametrize("name", ["/home/alice/secret/ckpt", "secret/ckpt", "../ckpt"])
def test_a_path_is_not_published(writable: Hub, tiny_bundle: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))
    manifest = json.loads((copy / "manifest.json").read_text())
    assert "/" not in manifest["source"]["name"]
    manifest["source"]["name"] = name
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match=f"names the folder {name}, .* Export it again"):
        push_bundle(copy, ID, "card")
    assert writable.requests == []


@pytest.mark.parametrize(
    ("card", "license"),
    [("---\nlicense: gemma\n---\n", "gemma"), ('---\nlicense: "apache-2.0"\n---', "apache-2.0"),
     ("license: mit", None), ("---\nlicense:\n- mit\n---", None), ("", None)],
)  # fmt: skip
def test_licences_that_cards_state(tmp_path: Path, card: str, license: str | None) -> None:
    (tmp_path / "README.md").write_text(card)
    assert stated_license(tmp_path) == license


@pytest.mark.slow
def test_a_litertlm_is_pushed_and_pulled(writable: Hub, tmp_path: Path) -> None:
    pytest.importorskip("litert_lm_builder")
    checkpoint = synthesize(tmp_path / "checkpoint", "tiny", progress=False).path
    (checkpoint / "README.md").write_text("---\ntags: [a]\nlicense: gemma\n---\nlicense: none\n")
    made = export_bundle(checkpoint, tmp_path / "tiny.litertlm", recipe="int8", context=64, verify=False).path
    push_bundle(made, ID, model_card(Bundle.open(made), ID))
    writable.break_after = [20_000, 0, 0, 0]
    with pytest.raises(GemmaEdgeError, match="again to go on"):
        pull_bundle(ID, "copy.litertlm")
    assert 'license: "gemma"' in (writable.files(ID) or {})["README.md"].decode()
    done = pull_bundle(ID, "copy.litertlm")
    assert done.path.read_bytes() == made.read_bytes() and done.fetched == made.stat().st_size - 20_000
    assert pull_bundle(f"{ID}/tiny.litertlm", "copy.litertlm").fetched == 0
