"""The artifact formats: one line each.

A format is a layout of files and the engine that runs it. `runtime.engines.engine_registry` has the engines,
`export.formats` writes the files. Everything that depends on a format asks the object, never its name.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ArtifactFormat:
    """One artifact format.

    Attributes:
        name: as in manifests, in records and after `--format`.
        engine: the key of its engine in `ENGINES`.
        suffix: of the file that is the whole bundle; "" for a bundle that is a folder.
    """

    name: str
    engine: str
    suffix: str = ""


_ALL = (
    ArtifactFormat("onnx", engine="onnxruntime"),
    ArtifactFormat("tflite", engine="litert"),
    ArtifactFormat("litertlm", engine="litert", suffix=".litertlm"),
)
ARTIFACT_FORMATS = {each.name: each for each in _ALL}
FOLDER_FORMATS = tuple(each.name for each in _ALL if not each.suffix)
FILE_SUFFIXES = tuple(each.suffix for each in _ALL if each.suffix)
