"""The bundle on disk: a folder whose manifest.json names every other file with its size and SHA-256.

Whoever reads a bundle goes through `Bundle.open`, which checks it before an engine sees a byte: the
manifest's schema, that every file is there, inside the folder, of the recorded size, and that nothing else
is. Files up to `HASH_AT_OPEN` bytes, among them the graph that the engine parses, are hashed at once; the
large ones by `check_hashes`, which `gemma-edge verify` and `gemma-edge inspect --check` call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from gemma_edge.runtime.artifacts.modalities import AudioModality, Modality, VisionModality, read_modalities
from gemma_edge.runtime.errors import BundleError
from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig
from gemma_edge.runtime.file_digest import sha256
from gemma_edge.runtime.text_files import is_name, read_json

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
FORMATS = ("onnx", "tflite", "litertlm")
HASH_AT_OPEN = 16 << 20
EXPORT_AGAIN = "Export the checkpoint again."

Json = dict[str, Any]


@dataclass(frozen=True)
class FileRecord:
    """What the manifest says of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Bundle:
    """A checked bundle."""

    path: Path
    manifest: Json
    config: Gemma3nConfig
    files: dict[str, FileRecord]
    context: int  # tokens of KV cache that the plan is for
    chunk: int  # tokens of one prefill call
    kv_cache: str  # "fp32" or "int8"
    format: str = "onnx"  # or "tflite": the engine that runs the decoder
    modalities: dict[str, Modality] = field(default_factory=dict)  # what it reads beside text

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Reads and checks the bundle in folder `path`, or the .litertlm that `path` is.

        Raises:
            BundleError: anything is missing, short, altered, extra, or of a newer schema.
        """
        path = Path(path)
        if path.is_file():
            from gemma_edge.runtime.artifacts.litertlm_bundle import LitertlmBundle

            return LitertlmBundle.open(path)
        manifest_path = path / MANIFEST
        manifest = _read_manifest(path, manifest_path)
        check_schema(manifest_path, manifest)
        files = _file_records(manifest_path, manifest)
        config = Gemma3nConfig.from_dict(_member(manifest_path, manifest, "config", dict), manifest_path)
        bundle = cls(
            path,
            manifest,
            config,
            files,
            context=_positive(manifest_path, manifest, "context"),
            chunk=_positive(manifest_path, manifest, "chunk"),
            kv_cache=choice(manifest_path, manifest, "kv_cache", ("fp32", "int8")),
            format=choice(manifest_path, {"format": "onnx", **manifest}, "format", FORMATS[:2]),
        )
        bundle._check_files()
        modalities = read_modalities(manifest_path, manifest, config, bundle.file)
        digests = {bundle.path / name: record.sha256 for name, record in bundle.files.items()}
        modalities = {k: replace(m, digest=digests[m.graph]) for k, m in modalities.items()}
        return replace(bundle, modalities=modalities)

    @property
    def vision(self) -> VisionModality | None:
        """The encoder of images, if the bundle has one."""
        found = self.modalities.get("vision")
        return found if isinstance(found, VisionModality) else None

    @property
    def audio(self) -> AudioModality | None:
        """The encoder of audio, if the bundle has one."""
        found = self.modalities.get("audio")
        return found if isinstance(found, AudioModality) else None

    def file(self, name: str) -> Path:
        """The path of a file that the manifest lists."""
        if name not in self.files:
            raise BundleError(self.path / MANIFEST, "files", name, "no such entry", EXPORT_AGAIN)
        return self.path / name

    def member(self, key: str, kind: type) -> Any:
        """A value of the manifest, checked for its type."""
        return _member(self.path / MANIFEST, self.manifest, key, kind)

    def check_hashes(self, progress: Callable[[int], None] | None = None) -> None:
        """Hashes every file; `progress` is given the bytes done since its last call."""
        for name in self.files:
            self._check_hash(name, progress)

    def _check_files(self) -> None:
        root = self.path.resolve()
        for name, record in self.files.items():
            file = self.path / name
            if not file.resolve().is_relative_to(root):
                raise BundleError(file, "path", "a file inside the bundle", str(file.resolve()), EXPORT_AGAIN)
            if not file.is_file():
                raise BundleError(
                    file, "file", f"{record.bytes} bytes", "no such file", "Copy the bundle again."
                )
            size = file.stat().st_size
            if size != record.bytes:
                raise BundleError(file, "size", f"{record.bytes} bytes", f"{size}", "Copy the bundle again.")
            if size <= HASH_AT_OPEN:
                self._check_hash(name, None)
        found = {p.relative_to(self.path).as_posix() for p in self.path.rglob("*") if not p.is_dir()}
        if extra := sorted(found - set(self.files) - {MANIFEST}):
            raise BundleError(
                self.path / extra[0],
                "file",
                "only files that the manifest lists",
                "an extra file",
                "Move it out.",
            )

    def _check_hash(self, name: str, progress: Callable[[int], None] | None) -> None:
        digest = sha256(self.path / name, progress)
        if digest != self.files[name].sha256:
            raise BundleError(
                self.path / name,
                "sha256",
                self.files[name].sha256,
                digest,
                "The file was altered: copy the bundle again.",
            )


def check_schema(path: Path, manifest: Json) -> None:
    """Raises BundleError unless this version of gemma-edge reads the manifest."""
    version = manifest.get("schema_version")
    if not isinstance(version, int) or version < 1:
        raise BundleError(path, "schema_version", "an integer", repr(version), EXPORT_AGAIN)
    if version > SCHEMA_VERSION:
        raise BundleError(path, "schema_version", f"at most {SCHEMA_VERSION}", version, "Upgrade gemma-edge.")


def _read_manifest(path: Path, manifest_path: Path) -> Json:
    if not is_name(str(path).lstrip("/") or "."):
        raise BundleError(path, "path", "a name in UTF-8, which engines take", "another", "Rename it.")
    if not path.is_dir():
        expected = f"a folder with a {MANIFEST}, or a .litertlm"
        raise BundleError(path, "bundle", expected, "no such file", "Make one with `gemma-edge export`.")
    if not manifest_path.exists():
        remedy = "Make a bundle with `gemma-edge export`."
        if (path / "config.json").exists():
            remedy = f"This is a checkpoint: `gemma-edge export {path} OUT` makes a bundle of it."
        raise BundleError(manifest_path, "file", "a bundle's manifest", "no such file", remedy)
    return read_json(manifest_path, BundleError, remedy=EXPORT_AGAIN)


def _file_records(manifest_path: Path, manifest: Json) -> dict[str, FileRecord]:
    records = {}
    for name, entry in _member(manifest_path, manifest, "files", dict).items():
        posix = PurePosixPath(name)
        if (
            posix.is_absolute()
            or ".." in posix.parts
            or "\\" in name
            or str(posix) != name
            or name == "."
            or not is_name(name)
        ):
            raise BundleError(
                manifest_path, f"files[{name!r}]", "a path inside the bundle", repr(name), EXPORT_AGAIN
            )
        size, digest = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if not isinstance(size, int) or size < 0 or not isinstance(digest, str):
            raise BundleError(
                manifest_path, f"files[{name!r}]", "bytes and sha256", repr(entry), EXPORT_AGAIN
            )
        records[name] = FileRecord(size, digest)
    return records


def _member(path: Path, manifest: Json, key: str, kind: type) -> Any:
    value = manifest.get(key)
    if not isinstance(value, kind):
        raise BundleError(path, key, kind.__name__, repr(value)[:80], EXPORT_AGAIN)
    return value


def _positive(path: Path, manifest: Json, key: str) -> int:
    value = manifest.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BundleError(path, key, "a positive integer", repr(value), EXPORT_AGAIN)
    return value


def choice(path: Path, manifest: Json, key: str, choices: tuple[str, ...]) -> str:
    """A text of the manifest, checked to be one of these."""
    value = manifest.get(key)
    if value not in choices:
        raise BundleError(path, key, " or ".join(choices), repr(value), EXPORT_AGAIN)
    return str(value)
