"""A .litertlm as a bundle: what `Bundle.open` gives for a file.

The engine opens files, not parts of them, and so does SentencePiece: the decoder and the tokenizer are taken
out into the cache folder once, under their hashes. The tables of embeddings are read where they lie.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_edge.runtime.bundle import Bundle, FileRecord, check_schema, choice, sha256
from gemma_edge.runtime.cache_folder import CACHE_VARIABLE, cache_folder
from gemma_edge.runtime.errors import BundleError
from gemma_edge.runtime.litertlm_reader import (
    EMBEDDER,
    PER_LAYER_EMBEDDER,
    PREFILL_DECODE,
    Litertlm,
    Section,
    read_litertlm,
)
from gemma_edge.runtime.tflite_check import embedding_table

MANIFEST_KEY = "gemma_edge.manifest"  # of the system metadata: what a bundle's manifest.json holds, as JSON
EXPORT_AGAIN = "Export the checkpoint again."
DECODER, TOKENIZER = "decoder.tflite", "tokenizer.model"
TEMPLATE, GENERATION = "chat_template.jinja", "generation_config.json"
SECTIONS = {
    DECODER: ("TFLiteModel", PREFILL_DECODE),
    "embedder.tflite": ("TFLiteModel", EMBEDDER),
    "per_layer_embedder.tflite": ("TFLiteModel", PER_LAYER_EMBEDDER),
    TOKENIZER: ("SP_Tokenizer", ""),
}
BLOCK = 16 << 20


@dataclass(frozen=True)
class LitertlmBundle(Bundle):
    """A checked .litertlm; `path` is the file."""

    litertlm: Litertlm | None = None

    @classmethod
    def open(cls, path: str | Path) -> LitertlmBundle:
        """Reads and checks a .litertlm that `gemma-edge export --format litertlm` made.

        Raises:
            BundleError: it is damaged, or was made by another tool.
        """
        path = Path(path)
        litertlm = read_litertlm(path)
        manifest = _manifest(litertlm)
        check_schema(path, manifest)
        config = litertlm.config
        manifest["tables"] = {
            "embedding": embedding_table(litertlm.embedder, config.hidden_size, config.embed_scale),
            "per_layer": embedding_table(litertlm.per_layer_embedder, config.ple_row_size, config.ple_scale),
        }
        manifest["added_tokens"] = {}  # the tokenizer has a piece for each id
        digests = manifest.get("sha256")
        files = {}
        for name, kind in SECTIONS.items():
            section = litertlm.section(*kind)
            digest = digests.get(name) if isinstance(digests, dict) else None
            if not isinstance(digest, str):
                raise BundleError(path, f"{MANIFEST_KEY}.sha256", f"the hash of {name}", digest, EXPORT_AGAIN)
            files[name] = FileRecord(section.end - section.begin, digest)
        texts = {TEMPLATE: litertlm.llm.template.encode()}
        if isinstance(generation := manifest.get("generation"), dict):
            texts[GENERATION] = json.dumps(generation).encode()
        for name, text in texts.items():
            files[name] = FileRecord(len(text), hashlib.sha256(text).hexdigest())
        return cls(
            path,
            manifest,
            config,
            files,
            context=litertlm.signatures.context,
            chunk=max(litertlm.signatures.prefill),
            kv_cache=choice(path, manifest, "kv_cache", ("fp32",)),
            format="litertlm",
            litertlm=litertlm,
        )

    def file(self, name: str) -> Path:
        """A file of its own with this part of the .litertlm; the .litertlm itself for its own name."""
        if name == self.path.name:
            return self.path
        if name not in self.files:
            raise BundleError(self.path, "sections", name, "no such section", EXPORT_AGAIN)
        size, digest = self.files[name].bytes, self.files[name].sha256
        taken_out = cache_folder() / f"{digest[:32]}-{name}"
        if taken_out.is_file() and taken_out.stat().st_size == size:
            return taken_out
        try:
            taken_out.parent.mkdir(parents=True, exist_ok=True)
            return self._take_out(name, taken_out)
        except OSError as error:
            folder = tempfile.mkdtemp(prefix="gemma-edge-")
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            warnings.warn(
                f"{taken_out.parent}: {error.strerror}; {name} goes from {self.path.name} into {folder} "
                f"for this process only. Set {CACHE_VARIABLE} to a folder with room for {size:,} bytes",
                stacklevel=2,
            )
            return self._take_out(name, Path(folder) / name)

    def check_hashes(self, progress: Callable[[int], None] | None = None) -> None:
        """Hashes every section; `progress` is given the bytes done since its last call."""
        for name in SECTIONS:
            section = self._section(name)
            digest = sha256(self.path, progress, section.begin, section.end)
            if digest != self.files[name].sha256:
                remedy = "The file was altered: copy it again."
                raise BundleError(self.path, f"sha256 of {name}", self.files[name].sha256, digest, remedy)

    def _section(self, name: str) -> Section:
        assert self.litertlm is not None
        return self.litertlm.section(*SECTIONS[name])

    def _take_out(self, name: str, target: Path) -> Path:
        """Writes one part to a name beside `target`, then renames it, so that `target` is always whole."""
        assert self.litertlm is not None
        descriptor, building = tempfile.mkstemp(".building", name, target.parent)
        try:
            with os.fdopen(descriptor, "wb") as out:
                if name == TEMPLATE:
                    out.write(self.litertlm.llm.template.encode())
                elif name == GENERATION:
                    out.write(json.dumps(self.manifest["generation"]).encode())
                else:
                    section = self._section(name)
                    _copy(self.path, section.begin, section.end, out.fileno())
            os.replace(building, target)
        except BaseException:
            Path(building).unlink(missing_ok=True)
            raise
        return target


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
    try:
        manifest = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise BundleError(litertlm.path, MANIFEST_KEY, "JSON", str(error), EXPORT_AGAIN) from None
    if not isinstance(manifest, dict):
        raise BundleError(litertlm.path, MANIFEST_KEY, "a JSON object", type(manifest).__name__, EXPORT_AGAIN)
    return manifest
