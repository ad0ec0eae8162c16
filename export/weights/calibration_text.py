"""The text on which weights are calibrated: ours, or a file of the user's.

Ours, `calibration_text.txt`, was written for gemma-edge and is under its licence: stories, questions with
answers in Gemma's template, code, tables and a dozen languages, as a general model meets them. Who knows the
texts that a model will meet does better with a file of them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_edge.export.export_families import family_with
from gemma_edge.runtime.errors import FileError, UsageError
from gemma_edge.runtime.families.model_family import TextConfig
from gemma_edge.runtime.files.text_files import read_bytes
from gemma_edge.runtime.prompt.tokenizer import Tokenizer

OURS = Path(__file__).with_name("calibration_text.txt")
AUTO, NONE = "auto", "none"  # what stands for our text, and for no calibration
PIECE = 256  # tokens of a sequence
LEAST, MOST = 64, 2048  # tokens
MAX_BYTES = 64 << 20  # of a file, of which the beginning is used
# What the pass over the text may take for the values of all its tokens: of a wide model, fewer fit.
ACTIVATION_BYTES = 400 << 20
CONTROLS = frozenset(map(chr, range(32))) - frozenset("\t\n\v\f\r\x1b")


@dataclass(frozen=True)
class CalibrationText:
    """A text, and what the manifest says of it."""

    name: str
    text: str
    sha256: str

    def sequences(self, tokenizer: Tokenizer, config: TextConfig) -> list[list[int]]:
        """Token ids of its beginning, in pieces with one bos each.

        Raises:
            UsageError: these are too few to calibrate on.
        """
        bos, *ids = tokenizer.encode(self.text, bos=True)
        if len(ids) < LEAST:
            raise UsageError(
                f"--calibrate {self.name}: {len(ids)} tokens are too few to calibrate on; give a text of at "
                f"least {LEAST}, better {MOST}"
            )
        ids = ids[: token_limit(config)]
        starts = range(0, len(ids), PIECE - 1)
        return [[bos, *ids[start : start + PIECE - 1]] for start in starts]

    def record(self, sequences: list[list[int]]) -> dict[str, Any]:
        """The manifest's `calibration`."""
        return {"text": self.name, "sha256": self.sha256, "tokens": sum(map(len, sequences))}


def token_limit(config: TextConfig) -> int:
    """Tokens whose values fit `ACTIVATION_BYTES`."""
    needed = family_with(config).text.activation_bytes
    a_token = (needed(config, PIECE) - needed(config, 0)) // PIECE
    return max(LEAST, min(MOST, ACTIVATION_BYTES // a_token))


def read_calibration(choice: str) -> CalibrationText | None:
    """The text of `--calibrate`: "auto" for ours, "none" for no calibration, else a file's.

    Raises:
        UsageError: the file cannot be read, is empty, or is no text in UTF-8.
    """
    if choice == NONE:
        return None
    path = OURS if choice == AUTO else Path(choice).expanduser()
    remedy = "Give a file of text, auto for the built-in one, or none."
    try:
        raw = read_bytes(path, FileError, what="a text to calibrate on", limit=MAX_BYTES, remedy=remedy)
    except FileError as error:
        raise UsageError(f"--calibrate: {error}") from None
    if not raw.strip():
        raise UsageError(f"--calibrate {choice}: the file is empty. {remedy}")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        text = "\0"
    if CONTROLS.intersection(text):
        raise UsageError(f"--calibrate {choice}: the file is binary, not text in UTF-8. {remedy}")
    return CalibrationText(AUTO if choice == AUTO else path.name, text, hashlib.sha256(raw).hexdigest())
