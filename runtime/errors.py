"""Every user-facing error, with its exit code.

| code | meaning |
|---|---|
| 0 | ok |
| 1 | the system refused: disk full, no permission, not enough memory |
| 2 | usage: an unknown recipe, a bad option, a prompt that does not fit the context |
| 3 | a bad checkpoint, config, tokenizer, bundle or attachment |
| 4 | a device is not available |
| 5 | a memory ceiling, or a bar of `gemma-edge bench --assert-...`, is exceeded |
| 6 | the gate: the export is not what the recipe makes of its checkpoint, or is beyond `--max-kl` |
| 130 | interrupted (Ctrl-C) |
"""

from __future__ import annotations

from pathlib import Path

FOREIGN_CHARACTERS = 200  # of a field's value, or of another program's message, that an error repeats
FIELD_CHARACTERS = 100
OWN_CHARACTERS = 400
MESSAGE_CHARACTERS = 6000  # a path may have 4096


def printable(text: object, limit: int = FOREIGN_CHARACTERS) -> str:
    """`text` on one line of at most `limit` characters: what no terminal should be sent is escaped.

    Control characters, newlines, direction marks and undecodable bytes become escapes such as "\\x1b" and
    "\\udcff"; a cut is marked by "...".
    """
    whole = _digits(text) if isinstance(text, int) else str(text)
    shown = whole[: limit + 1]
    if not shown.isprintable():
        shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in shown)
    return shown if len(shown) <= limit else f"{shown[: limit - 3]}..."


def _digits(number: int) -> str:
    """An integer's digits; Python refuses to write those of a very large one."""
    return str(number) if number.bit_length() <= 1024 else f"an integer of {number.bit_length()} bits"


class GemmaEdgeError(Exception):
    """Base of every error that is reported without a traceback: one printable line, whatever it repeats."""

    exit_code = 1

    def __str__(self) -> str:
        return printable(super().__str__(), MESSAGE_CHARACTERS)


class UsageError(GemmaEdgeError):
    """The request itself cannot be served: an unknown recipe, a prompt longer than the context."""

    exit_code = 2


class BusyError(UsageError):
    """A model answers somebody else, and no more requests may wait for it."""


class FileError(GemmaEdgeError):
    """Something in a file is not what it must be.

    Args:
        path: the file.
        field: the part of it: a key, a tensor name, a byte range.
        expected: what a correct file holds there.
        got: what this one holds.
        remedy: what the user can do about it, as a sentence.
    """

    exit_code = 3

    def __init__(
        self,
        path: str | Path,
        field: str,
        expected: object,
        got: object,
        remedy: str = "",
    ) -> None:
        self.path, self.field, self.expected, self.got = Path(path), field, expected, got
        self.remedy = remedy
        where = f"{printable(path, 4096)}: {printable(field, FIELD_CHARACTERS)}"
        text = f"{where}: expected {printable(expected, OWN_CHARACTERS)}, got {printable(got)}"
        super().__init__(f"{text}. {remedy}" if remedy else text)

    def __reduce__(self) -> tuple[type[FileError], tuple[object, ...]]:
        # Errors cross process borders; the default would rebuild them from the message alone.
        return type(self), (self.path, self.field, self.expected, self.got, self.remedy)


class ConfigError(FileError):
    """config.json is malformed, contradicts itself, or asks for something unsupported."""


class CheckpointError(FileError):
    """A safetensors shard or index is truncated, lies about itself, or misses a tensor."""


class TokenizerError(FileError):
    """tokenizer.model or tokenizer.json cannot be used."""


class BundleError(FileError):
    """A bundle has a missing, short or altered file, or a manifest that cannot be read."""


class MediaError(FileError):
    """An image, a recording or a video cannot be used: damaged, too large, or none of these."""


class SessionError(FileError):
    """A saved conversation is cut short, altered, or of another bundle."""


class DeviceError(GemmaEdgeError):
    """A device is not there, or refuses."""

    exit_code = 4


class CeilingError(GemmaEdgeError):
    """A plan, or a run, needs more memory than it was given."""

    exit_code = 5


class ParityError(GemmaEdgeError):
    """The exported model is not what its recipe makes of the checkpoint, or is further off than allowed."""

    exit_code = 6
