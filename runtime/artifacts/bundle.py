"""`Bundle`: an artifact, opened and checked before an engine sees a byte.

A bundle is a folder or a .litertlm. `Bundle.open` checks the manifest's schema and that every file is there,
inside the folder, of the recorded size; other files there are ignored. It hashes files up to `HASH_AT_OPEN`
bytes at once, among them the graph that the engine parses; `check_hashes` hashes the large ones, as
`gemma-edge verify` and `gemma-edge inspect --check` ask it to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from gemma_edge.runtime.artifacts.artifact_formats import ARTIFACT_FORMATS
from gemma_edge.runtime.artifacts.folder_bundle import Container, FolderBundle, check_hash
from gemma_edge.runtime.artifacts.manifest import FileRecord, Json, choice, member, positive
from gemma_edge.runtime.artifacts.modalities import AudioModality, Modality, VisionModality, read_modalities
from gemma_edge.runtime.errors import BundleError
from gemma_edge.runtime.families.family_registry import family_of
from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig
from gemma_edge.runtime.families.model_family import ModelFamily
from gemma_edge.runtime.files.text_files import read_text


def _container(path: Path) -> Container:
    """The files of the bundle at `path`, opened and checked."""
    if not path.is_file():
        return FolderBundle.open(path)
    # It brings the readers of FlatBuffers, which other bundles do without.
    from gemma_edge.runtime.artifacts.litertlm_bundle import LitertlmBundle

    return LitertlmBundle.open(path)


@dataclass(frozen=True)
class Bundle:
    """A checked bundle.

    Attributes:
        container: its files.
        config: the text model's.
        context: tokens of KV cache that the plan is for.
        chunk: tokens of one prefill call.
        kv_cache: "fp32" or "int8".
        format: a key of `ARTIFACT_FORMATS`.
        modalities: "vision" and "audio", for those that it takes beside text.
    """

    container: Container
    config: Gemma3nConfig
    context: int
    chunk: int
    kv_cache: str
    format: str
    modalities: dict[str, Modality] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Reads and checks the bundle in folder `path`, or the .litertlm that `path` is.

        Raises:
            BundleError: anything is missing, short, altered, or of a newer schema.
        """
        container = _container(Path(path))
        where, manifest = container.manifest_path, container.manifest
        config = member(where, manifest, "config", dict)
        family = family_of(config, where)
        bundle = cls(
            container,
            family.text_config(config, where),
            context=positive(where, manifest, "context"),
            chunk=positive(where, manifest, "chunk"),
            kv_cache=choice(where, manifest, "kv_cache", ("fp32", "int8")),
            format=choice(where, manifest, "format", tuple(ARTIFACT_FORMATS)),
        )
        return replace(bundle, modalities=read_modalities(container, family, bundle.config))

    @property
    def path(self) -> Path:
        """The folder, or the .litertlm."""
        return self.container.path

    @property
    def manifest(self) -> Json:
        return self.container.manifest

    @property
    def files(self) -> dict[str, FileRecord]:
        """The record of each file by its name."""
        return self.container.files

    @property
    def family(self) -> ModelFamily:
        """The model's."""
        return family_of(self.member("config", dict), self.container.manifest_path)

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

    def paths(self) -> list[Path]:
        """What the bundle consists of on disk: its manifest and the files that it lists, or the .litertlm."""
        where = self.container.manifest_path
        return [where] if where == self.path else [where, *(self.path / name for name in self.files)]

    @cached_property
    def identity(self) -> str:
        """A SHA-256, as hex, of the files and the config: bundles that share it compute the same."""
        said = {
            "files": {name: record.sha256 for name, record in self.files.items()},
            "config": self.config.to_dict(),
            "settings": [self.context, self.chunk, self.kv_cache, self.format],
        }
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    def file(self, name: str) -> Path:
        """The path of a file that `files` lists; a part of a .litertlm is copied out of it first."""
        return self.container.file(name)

    def text(self, name: str) -> str:
        """The contents of a file that `files` lists.

        Raises:
            BundleError: it is no UTF-8 text.
        """
        return read_text(self.file(name), BundleError)

    def member(self, key: str, kind: type) -> Any:
        """A value of the manifest, checked for its type."""
        return member(self.container.manifest_path, self.manifest, key, kind)

    def check_hashes(self, progress: Callable[[int], None] | None = None) -> None:
        """Hashes every file; `progress` is given the bytes done since its last call.

        Raises:
            BundleError: a file has not the recorded SHA-256.
        """
        for name in self.files:
            check_hash(self.container, name, progress)
