"""A bundle in one file: a .litertlm.

The engine opens files, not parts of them, and so does SentencePiece: the decoder and the tokenizer are taken
out into the cache folder once. The tables of embeddings are read where they lie.

Parts up to `HASH_AT_OPEN` bytes are hashed when the file is opened, larger ones when they are used: both once
for as long as the file stays as it is (`file_digest`).
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_edge.runtime.artifacts.litertlm_reader import (
    AUDIO_ADAPTER,
    AUDIO_ENCODER,
    EMBEDDER,
    END_OF_AUDIO,
    PER_LAYER_EMBEDDER,
    PREFILL_DECODE,
    VISION_ADAPTER,
    VISION_ENCODER,
    Litertlm,
    Section,
    read_litertlm,
)
from gemma_edge.runtime.artifacts.manifest import (
    EXPORT_AGAIN,
    HASH_AT_OPEN,
    FileRecord,
    check_schema,
    choice,
)
from gemma_edge.runtime.artifacts.row_table import RowLayout
from gemma_edge.runtime.artifacts.tflite_check import embedding_table
from gemma_edge.runtime.errors import BundleError
from gemma_edge.runtime.files.abandoned import folder_of_this_process, remove_abandoned_folders
from gemma_edge.runtime.files.cache_folder import CACHE_VARIABLE, cache_folder
from gemma_edge.runtime.files.file_digest import identity, remember, remembered_sha256, sha256
from gemma_edge.runtime.files.kept_files import keep, kept
from gemma_edge.runtime.files.text_files import parse_json

MANIFEST_KEY = "gemma_edge.manifest"  # of the system metadata: what a bundle's manifest.json holds, as JSON
FORMAT = "litertlm"  # in `ARTIFACT_FORMATS`
DECODER, TOKENIZER = "decoder.tflite", "tokenizer.model"
TEMPLATE, GENERATION = "chat_template.jinja", "generation_config.json"
VISION, AUDIO, TOKENS = "vision.tflite", "audio.tflite", "tokens.bin"
SECTIONS = {
    DECODER: ("TFLiteModel", PREFILL_DECODE),
    "embedder.tflite": ("TFLiteModel", EMBEDDER),
    "per_layer_embedder.tflite": ("TFLiteModel", PER_LAYER_EMBEDDER),
    TOKENIZER: ("SP_Tokenizer", ""),
}
# What sees and hears, where there is any.
ENCODER_SECTIONS = {
    VISION: ("TFLiteModel", VISION_ENCODER),
    "vision_adapter.tflite": ("TFLiteModel", VISION_ADAPTER),
    AUDIO: ("TFLiteModel", AUDIO_ENCODER),
    "audio_adapter.tflite": ("TFLiteModel", AUDIO_ADAPTER),
    "end_of_audio.tflite": ("TFLiteModel", END_OF_AUDIO),
    TOKENS: ("GenericBinaryData", ""),
}
BLOCK = 16 << 20


@dataclass(frozen=True)
class LitertlmBundle:
    """See `Container`.

    Attributes:
        path: the file.
        manifest: the one in the file's header, completed by what the sections say themselves.
        files: sections, and texts of the metadata, by the names that they have in a folder.
        litertlm: the parsed file.
    """

    path: Path
    manifest: dict[str, Any]
    files: dict[str, FileRecord]
    litertlm: Litertlm

    @classmethod
    def open(cls, path: Path) -> LitertlmBundle:
        """Reads and checks a .litertlm that `gemma-edge export --format litertlm` made.

        Raises:
            BundleError: it is damaged, or was made by another tool.
        """
        remove_abandoned_folders()  # that parts were taken out to, before a kill
        litertlm = read_litertlm(path)
        manifest = _manifest(litertlm)
        check_schema(path, manifest)
        choice(path, manifest, "kv_cache", ("fp32", "int8"))
        config = litertlm.config
        manifest |= {
            "format": FORMAT,
            "config": config.to_dict(),
            "context": litertlm.signatures.context,
            "chunk": max(litertlm.signatures.prefill),
            "tables": {
                "embedding": embedding_table(litertlm.embedder, config.hidden_size, config.embed_scale),
                "per_layer": embedding_table(
                    litertlm.per_layer_embedder, config.ple_row_size, config.ple_scale
                ),
            },
            "added_tokens": {},  # the tokenizer has a piece for each id
        }
        digests = manifest.get("sha256")
        files = {}
        for name, section in _parts(litertlm).items():
            digest = digests.get(name) if isinstance(digests, dict) else None
            if not isinstance(digest, str):
                raise BundleError(path, f"{MANIFEST_KEY}.sha256", f"the hash of {name}", digest, EXPORT_AGAIN)
            files[name] = FileRecord(section.end - section.begin, digest)
        for name, text in _texts(litertlm, manifest).items():
            files[name] = FileRecord(len(text), hashlib.sha256(text).hexdigest())
        _place_modalities(litertlm, manifest)
        bundle = cls(path, manifest, files, litertlm)
        for name, record in files.items():
            if record.bytes <= HASH_AT_OPEN:
                bundle._check_part(name)
        return bundle

    @property
    def manifest_path(self) -> Path:
        return self.path

    def file(self, name: str) -> Path:
        """A file of its own with this part of the .litertlm; the .litertlm itself for its own name.

        Raises:
            BundleError: there is no such part, or it was altered.
        """
        if name == self.path.name:
            return self.path
        if name not in self.files:
            raise BundleError(self.path, "sections", name, "no such section", EXPORT_AGAIN)
        size, digest = self.files[name].bytes, self.files[name].sha256
        if found := kept("", f"-{name}", digest):
            self._check_part(name)
            return found
        try:
            hashed = identity(self.path)
            path = keep("", f"-{name}", size, lambda target: self._take_out(name, target), digest)
        except OSError as error:
            folder = folder_of_this_process()
            warnings.warn(
                f"{cache_folder()}: {error.strerror}; {name} goes from {self.path.name} into {folder} "
                f"for this process only. Set {CACHE_VARIABLE} to a folder with room for {size:,} bytes",
                stacklevel=2,
            )
            path = folder / name
            self._take_out(name, path)
        got = remembered_sha256(path)
        if got != digest:
            path.unlink()
            raise self._altered(name, got)
        if name in (parts := self._sections()):
            remember(self.path, got, hashed, *parts[name])
        return path

    def hash(self, name: str, progress: Callable[[int], None] | None) -> str:
        if name in (parts := self._sections()):
            return sha256(self.path, progress, *parts[name])
        return hashlib.sha256(_texts(self.litertlm, self.manifest)[name]).hexdigest()

    def _check_part(self, name: str) -> None:
        """Raises BundleError unless a part has the recorded SHA-256. Texts of the metadata have none."""
        if name in (parts := self._sections()):
            digest = remembered_sha256(self.path, *parts[name])
            if digest != self.files[name].sha256:
                raise self._altered(name, digest)

    def _altered(self, name: str, digest: str) -> BundleError:
        remedy = "The file was altered: copy it again."
        return BundleError(self.path, f"sha256 of {name}", self.files[name].sha256, digest, remedy)

    def _sections(self) -> dict[str, tuple[int, int]]:
        """Parts and their ranges of bytes."""
        return {name: (part.begin, part.end) for name, part in _parts(self.litertlm).items()}

    def _take_out(self, name: str, target: Path) -> None:
        """Writes one part to `target`."""
        with open(target, "xb") as out:
            if name in (parts := self._sections()):
                _copy(self.path, *parts[name], out.fileno())
            else:
                out.write(_texts(self.litertlm, self.manifest)[name])


def _texts(litertlm: Litertlm, manifest: dict[str, Any]) -> dict[str, bytes]:
    """The settings of the metadata by their names as files."""
    texts = {TEMPLATE: litertlm.llm.template.encode()}
    if isinstance(generation := manifest.get("generation"), dict):
        texts[GENERATION] = json.dumps(generation).encode()
    return texts


def _parts(litertlm: Litertlm) -> dict[str, Section]:
    """The sections by their names as files."""
    there = {(section.type, section.model_type) for section in litertlm.sections}
    names = SECTIONS | {name: kind for name, kind in ENCODER_SECTIONS.items() if kind in there}
    return {name: litertlm.section(*kind) for name, kind in names.items()}


def _place_modalities(litertlm: Litertlm, manifest: dict[str, Any]) -> None:
    """Makes the manifest's modalities point into the file: to its encoders, and to its tables of tokens."""
    modalities, parts = manifest.get("modalities", {}), _parts(litertlm)
    graphs = {kind: graph for kind, graph in (("vision", VISION), ("audio", AUDIO)) if graph in parts}
    expected = list(graphs)
    if not isinstance(modalities, dict) or set(modalities) != set(expected):
        got = list(modalities) if isinstance(modalities, dict) else modalities
        raise BundleError(litertlm.path, f"{MANIFEST_KEY}.modalities", expected, got, EXPORT_AGAIN)
    for kind in expected:
        entry = modalities[kind]
        tokens = entry.get("tokens") if isinstance(entry, dict) else None
        if TOKENS not in parts or not isinstance(tokens, dict):
            field = f"{MANIFEST_KEY}.modalities.{kind}.tokens"
            raise BundleError(litertlm.path, field, f"a table in {TOKENS}", tokens, EXPORT_AGAIN)
        section = parts[TOKENS]
        layout = {key: value for key, value in tokens.items() if key != "first_id"}
        RowLayout.parse(layout, litertlm.path, section.end - section.begin)
        data = {**tokens["data"], "offset": tokens["data"]["offset"] + section.begin}
        entry["graph"] = graphs[kind]
        entry["tokens"] = {**tokens, "file": litertlm.path.name, "data": data}


def _copy(path: Path, begin: int, end: int, out: int) -> None:
    """Bytes [begin, end) of a file to a descriptor, within the kernel."""
    with path.open("rb") as file:
        while begin < end:
            sent = os.sendfile(out, file.fileno(), begin, min(BLOCK, end - begin))
            if not sent:
                raise BundleError(path, "size", f"{end} bytes", f"{begin}, it became shorter", EXPORT_AGAIN)
            begin += sent


def _manifest(litertlm: Litertlm) -> dict[str, Any]:
    text = litertlm.system.get(MANIFEST_KEY)
    if text is None:
        remedy = (
            "Files of other tools run in LiteRT-LM. `gemma-edge export --format litertlm` makes one for us."
        )
        raise BundleError(litertlm.path, f"system metadata {MANIFEST_KEY}", "a manifest", "nothing", remedy)
    return parse_json(text, litertlm.path, BundleError, field=MANIFEST_KEY, remedy=EXPORT_AGAIN)
