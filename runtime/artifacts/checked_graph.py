"""The verdict on a decoder's .tflite, kept in the cache folder: walking its graph takes up to a second.

A verdict belongs to the SHA-256 of the file's content, to the config that the graph was held against, and to
the source of the checks. It is used only where the file is known to have that SHA-256, which
`files.file_digest` says for as long as inode, size and times stay as they are: a file that changed is walked
again, and so is every file when a check is added.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_edge.runtime.artifacts.decoder_signatures import DecoderSignatures
from gemma_edge.runtime.files.cache_folder import cache_folder
from gemma_edge.runtime.files.file_digest import known_sha256
from gemma_edge.runtime.files.kept_files import keep_cheap

if TYPE_CHECKING:
    from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig

SUFFIX = ".graph"
FILE_BYTES = 16 << 10
ALL_BYTES = 1 << 20
_CHECKS = ("flatbuffer.py", "tflite_arity.py", "tflite_check.py", "tflite_reader.py")


class CheckedGraph:
    """A decoder's file, and what it can be called with.

    Args:
        path: the .tflite.
        config: the model's.
    """

    def __init__(self, path: Path, config: Gemma3nConfig) -> None:
        self._path, self._config = path, config

    def decoder(self) -> DecoderSignatures:
        """What the signatures take, from the verdict or from the graph. Raises as `check_decoder`."""
        if found := self._read():
            return found
        # Imported where a graph is walked: with a verdict, nothing of the readers is needed.
        from gemma_edge.runtime.artifacts.tflite_check import check_decoder
        from gemma_edge.runtime.artifacts.tflite_reader import read_tflite

        return check_decoder(read_tflite(self._path), self._config)

    def keep(self, decoder: DecoderSignatures) -> None:
        """Keeps the verdict, if the file's SHA-256 is known by now and there is room."""
        name = self._name()
        if name is None or (cache_folder() / name).exists():
            return
        text = json.dumps(
            {
                "prefill": decoder.prefill,
                "context": decoder.context,
                "lengths": {str(layer): length for layer, length in decoder.lengths.items()},
                "layout": decoder.layout,
                "transposed": sorted(decoder.transposed),
                "verify": decoder.verify,
                "int8": sorted(decoder.int8),
            }
        )

        def make(path: Path) -> None:
            path.write_text(text, encoding="utf-8")

        keep_cheap(name, ALL_BYTES, len(text), make)

    def _read(self) -> DecoderSignatures | None:
        name = self._name()
        if name is None:
            return None
        try:
            with open(cache_folder() / name, "rb") as file:
                return _decoder(json.loads(file.read(FILE_BYTES)))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None

    def _name(self) -> str | None:
        """The verdict's file; None where nobody knows the SHA-256 of the graph's, or its checks."""
        digest, checks = known_sha256(self._path), _checks()
        if digest is None or checks is None:
            return None
        of = f"{digest} {checks} {json.dumps(self._config.to_dict(), sort_keys=True)}"
        return f"{digest[:32]}-{hashlib.sha256(of.encode()).hexdigest()[:16]}{SUFFIX}"


def _decoder(said: Any) -> DecoderSignatures:
    """Raises ValueError, TypeError or KeyError for what `keep` did not write."""
    lengths = {int(layer): _size(length) for layer, length in said["lengths"].items()}
    if said["layout"] not in ("litertlm", "windowed"):
        raise ValueError(said["layout"])
    prefill, verify = _sizes(said["prefill"]), _sizes(said["verify"])
    transposed = frozenset(said["transposed"])
    int8 = frozenset(said["int8"])
    if not transposed | int8 <= set(lengths):
        raise ValueError(said["transposed"], said["int8"])
    return DecoderSignatures(
        prefill, _size(said["context"]), lengths, said["layout"], transposed, verify, int8
    )


def _sizes(values: Sequence[Any]) -> tuple[int, ...]:
    return tuple(map(_size, values))


def _size(value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(value)
    return value


@cache
def _checks() -> str | None:
    """A SHA-256 of the checks' source; None where it cannot be read."""
    try:
        files = [(Path(__file__).parent / name).read_bytes() for name in _CHECKS]
    except OSError:
        return None
    return hashlib.sha256(b"\0".join(files)).hexdigest()
