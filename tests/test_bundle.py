"""`Bundle.open` and `check_hashes`: whatever is wrong with a bundle is named before an engine sees a byte."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma_edge.runtime.artifacts import folder_bundle as bundle_module
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.errors import BundleError, ConfigError
from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig
from gemma_edge.runtime.files.file_digest import sha256
from gemma_edge.runtime.model import Model
from support.random_gemma3n_text import SMALL, Json

FILES = {"decoder.onnx": b"graph", "decoder.onnx.data": b"weights " * 100, "sub/notes.txt": b""}


def record(data: bytes) -> Json:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound bundle, as far as `Bundle` looks."""
    folder = tmp_path / "bundle"
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    manifest = {
        "schema_version": 1,
        "config": SMALL,
        "context": 64,
        "chunk": 16,
        "kv_cache": "int8",
        "files": {name: record(data) for name, data in FILES.items()},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def edit(folder: Path, change: Callable[[Json], object]) -> None:
    """Rewrites the manifest; `change` edits it in place."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def refusal(folder: Path) -> BundleError:
    with pytest.raises(BundleError) as caught:
        Bundle.open(folder)
    assert caught.value.exit_code == 3
    return caught.value


def test_a_sound_bundle_opens(folder: Path) -> None:
    bundle = Bundle.open(folder)
    assert (bundle.context, bundle.chunk, bundle.kv_cache) == (64, 16, "int8")
    assert bundle.config == Gemma3nConfig.from_dict(SMALL)
    assert set(bundle.files) == set(FILES)
    assert bundle.file("decoder.onnx").read_bytes() == b"graph"
    done: list[int] = []
    bundle.check_hashes(done.append)
    assert sum(done) == sum(map(len, FILES.values()))


# Files. -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    error = refusal(folder)
    assert (error.path, error.got) == (folder / name, "no such file")


@pytest.mark.parametrize("content", [b"weights", b"weights " * 101], ids=["short", "long"])
def test_file_of_another_size(folder: Path, content: bytes) -> None:
    (folder / "decoder.onnx.data").write_bytes(content)
    error = refusal(folder)
    assert (error.path.name, error.field) == ("decoder.onnx.data", "size")
    assert (error.expected, error.got) == ("800 bytes", str(len(content)))


def test_altered_file(folder: Path) -> None:
    """Found when the bundle is opened: the engine parses the graph."""
    (folder / "decoder.onnx").write_bytes(b"grapH")
    error = refusal(folder)
    assert (error.path.name, error.field) == ("decoder.onnx", "sha256")
    assert error.got == hashlib.sha256(b"grapH").hexdigest()


def test_altered_large_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by `check_hashes`: hashing gigabytes would double the time to load."""
    monkeypatch.setattr(bundle_module, "HASH_AT_OPEN", 100)
    (folder / "decoder.onnx.data").write_bytes(b"WEIGHTS " * 100)
    bundle = Bundle.open(folder)
    with pytest.raises(BundleError, match=r"decoder\.onnx\.data: sha256: expected .* copy the bundle again"):
        bundle.check_hashes()


@pytest.mark.parametrize(
    "name",
    ["README.md", ".gitattributes", ".cache/huggingface/download/x.lock", ".DS_Store", "._decoder.onnx"],
)
def test_other_files_are_ignored(folder: Path, name: str) -> None:
    """A bundle survives a model hub, a desktop and an archive."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"")
    (folder / "dangling").symlink_to("nowhere")
    bundle = Bundle.open(folder)
    bundle.check_hashes()
    names = [path.relative_to(folder).as_posix() for path in bundle.paths()]
    assert sorted(names) == sorted([*FILES, "manifest.json"])


def test_a_folder_in_place_of_a_file(folder: Path) -> None:
    (folder / "decoder.onnx").unlink()
    (folder / "decoder.onnx").mkdir()
    assert refusal(folder).path.name == "decoder.onnx"


# Paths that leave the bundle. ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../secret",
        "sub/../../secret",
        "sub/../decoder.onnx",
        "..",
        ".",
        "a//b",
        "./a",
        "a\\b",
        "",
    ],
)
def test_path_outside(folder: Path, name: str) -> None:
    (folder.parent / "secret").write_bytes(b"")
    edit(folder, lambda m: m["files"].update({name: record(b"")}))
    error = refusal(folder)
    assert error.field == f"files[{name!r}]"


@pytest.mark.parametrize("where", ["file", "folder"])
def test_symlink_that_leaves_the_bundle(folder: Path, where: str) -> None:
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "notes.txt").write_bytes(b"")
    if where == "file":
        (folder / "sub/notes.txt").unlink()
        (folder / "sub/notes.txt").symlink_to(outside / "notes.txt")
    else:
        shutil.rmtree(folder / "sub")
        (folder / "sub").symlink_to(outside)
    error = refusal(folder)
    assert (error.path.name, error.field, error.got) == ("notes.txt", "path", str(outside / "notes.txt"))


def test_symlink_to_the_bundle_itself_is_fine(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert Bundle.open(tmp_path / "link").path == tmp_path / "link"


# The manifest. ------------------------------------------------------------------------------------


def test_newer_schema(folder: Path) -> None:
    edit(folder, lambda m: m.update(schema_version=2, files="of another shape"))
    error = refusal(folder)
    assert (error.field, error.got, error.remedy) == ("schema_version", 2, "Upgrade gemma-edge.")


@pytest.mark.parametrize("version", [None, "1", 0, -1, 1.0])
def test_a_schema_version_that_is_none(folder: Path, version: Any) -> None:
    edit(folder, lambda m: m.update(schema_version=version))
    assert refusal(folder).field == "schema_version"


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"{", "JSON"), (b"", "JSON"), (b"\xff", "JSON"), (b"[" * 100_000, "JSON"), (b"[]", "a JSON object")],
    ids=["cut", "empty", "not UTF-8", "deep", "a list"],
)
def test_not_json(folder: Path, content: bytes, expected: str) -> None:
    (folder / "manifest.json").write_bytes(content)
    assert refusal(folder).expected == expected


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("files", []),
        ("files", None),
        ("config", None),
        ("config", "e2b"),
        ("context", 0),
        ("context", True),
        ("context", "64"),
        ("chunk", None),
        ("chunk", 1.5),
        ("kv_cache", "fp16"),
        ("kv_cache", None),
        ("kv_cache", ["int8"]),
    ],
)
def test_wrong_types(folder: Path, key: str, value: Any) -> None:
    edit(folder, lambda m: m.update({key: value}))
    assert refusal(folder).field == key


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        {},
        {"bytes": 5},
        {"bytes": "5", "sha256": ""},
        {"bytes": -1, "sha256": ""},
        {"bytes": 5, "sha256": 0},
    ],
)
def test_wrong_records(folder: Path, entry: Any) -> None:
    edit(folder, lambda m: m["files"].update({"decoder.onnx": entry}))
    assert refusal(folder).field == "files['decoder.onnx']"


def test_a_config_that_is_none(folder: Path) -> None:
    edit(folder, lambda m: m["config"].update(head_dim=0))
    with pytest.raises(ConfigError, match=r"manifest\.json: head_dim"):
        Bundle.open(folder)


def test_no_manifest(tmp_path: Path) -> None:
    error = refusal(tmp_path)
    assert error.path == tmp_path / "manifest.json" and "gemma-edge export" in error.remedy


def test_a_checkpoint_is_not_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert refusal(tmp_path).remedy.startswith("This is a checkpoint: `gemma-edge export")


def test_no_folder(tmp_path: Path) -> None:
    assert refusal(tmp_path / "bundle").got == "no such file"


def test_a_file_that_is_no_litertlm(tmp_path: Path) -> None:
    (tmp_path / "bundle").write_bytes(b"GGUF" * 16)
    assert refusal(tmp_path / "bundle").field == "magic"


def test_a_file_that_the_manifest_does_not_list(folder: Path) -> None:
    with pytest.raises(BundleError, match=r"files: expected ple\.bin, got no such entry"):
        Bundle.open(folder).file("ple.bin")


def test_member_is_checked_for_its_type(folder: Path) -> None:
    assert Bundle.open(folder).member("context", int) == 64
    with pytest.raises(BundleError, match="context: expected dict, got 64"):
        Bundle.open(folder).member("context", dict)


def test_sha256_of_a_file(tmp_path: Path) -> None:
    data = os.urandom(3_000_001)
    (tmp_path / "file").write_bytes(data)
    assert sha256(tmp_path / "file") == hashlib.sha256(data).hexdigest()


# A real bundle whose manifest lies about what is inside its files. --------------------------------


@pytest.fixture
def exported(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "exported"))


def set_table(table: str, field: str, value: Any) -> Callable[[Json], object]:
    def change(manifest: Json) -> None:
        target = manifest["tables"][table]
        *parents, last = field.split(".")
        for parent in parents:
            target = target[parent]
        target[last] = value

    return change


@pytest.mark.parametrize("table", ["embedding", "per_layer"])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("file", "missing.bin"),
        ("file", "../secret"),
        ("rows", 10**9),
        ("rows", 10),
        ("rows", -1),
        ("columns", 64),
        ("columns", 10**9),
        ("encoding", "int2"),
        ("group", 7),
        ("scale", 1.5),
        ("scale", "x"),
        ("data.offset", 10**12),
        ("data.stride", 1),
        ("scales.offset", -1),
    ],
)
def test_lying_layout(exported: Path, table: str, field: str, value: Any) -> None:
    edit(exported, set_table(table, field, value))
    with pytest.raises(BundleError):
        Model.load(exported)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", None),
        ("head_dim", 64),
        ("num_key_value_heads", 1),
        ("num_kv_shared_layers", 0),
        ("hidden_size", 64),
        ("vocab_size", 600),
        ("hidden_size_per_layer_input", 16),
    ],
)
def test_a_config_that_is_not_the_graphs(exported: Path, field: str, value: Any) -> None:
    def change(manifest: Json) -> None:
        config = manifest["config"]
        if field == "num_hidden_layers":
            lists = ("intermediate_size", "layer_types", "activation_sparsity_pattern")
            config.update(
                {name: config[name][:-1] for name in lists}, num_hidden_layers=11, num_kv_shared_layers=4
            )
        else:
            config[field] = value

    edit(exported, change)
    with pytest.raises(BundleError):
        Model.load(exported)


def test_another_kv_cache_than_the_graphs(exported: Path) -> None:
    edit(exported, lambda m: m.update(kv_cache={"int8": "fp32", "fp32": "int8"}[m["kv_cache"]]))
    with pytest.raises(BundleError):
        Model.load(exported)


def test_a_smaller_context_than_the_chunk_is_sound(exported: Path) -> None:
    edit(exported, lambda m: m.update(context=32))
    model = Model.load(exported, threads=1)
    assert len(list(model.stream_tokens([2, 5, 6], max_tokens=4))) == 4
