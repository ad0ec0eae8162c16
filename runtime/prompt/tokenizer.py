"""Text to token ids and back, over SentencePiece.

SentencePiece needs 50 MB for the 262,144-piece vocabulary, where `tokenizers` needs 288 MB. It does not map
special tokens that are written in the text, such as `<bos>`; this module does, as the Hugging Face tokenizer
does.
"""

from __future__ import annotations

import codecs
import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import compress
from pathlib import Path

from gemma_edge.runtime.errors import TokenizerError, UsageError

BOS_PIECE = "<bos>"
# User-defined pieces that steer the model. Gemma's other user-defined pieces are text: "\n\n", "<table>".
SPECIAL_PIECES = (
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
    "<start_of_audio>",
    "<end_of_audio>",
    "<audio_soft_token>",
)
SPACE = "\u2581"  # how a piece spells a space
REPLACE_FILE = "Export the bundle again from a checkpoint with Gemma's tokenizer.model."


class Tokenizer:
    """A SentencePiece model plus the special tokens whose ids lie beyond its pieces.

    Args:
        model_path: tokenizer.model.
        added_tokens: text -> id of special tokens that the model file does not hold.
        vocab_size: rows of the model's vocabulary; ids below it that have no piece decode to "". Default:
            just past the last known id.

    Raises:
        TokenizerError: the file is missing or malformed, or changes spaces in the text.
    """

    def __init__(
        self,
        model_path: str | Path,
        added_tokens: Mapping[str, int] | None = None,
        vocab_size: int | None = None,
    ) -> None:
        from sentencepiece import SentencePieceProcessor

        self.path = Path(model_path)
        if not self.path.is_file():
            raise TokenizerError(self.path, "file", "a SentencePiece model", "no such file", REPLACE_FILE)
        try:
            self._pieces = SentencePieceProcessor(model_file=str(self.path))
        except (RuntimeError, OSError, UnicodeDecodeError) as error:  # its messages may not be UTF-8
            raise TokenizerError(self.path, "file", "a SentencePiece model", error, REPLACE_FILE) from None
        with self._utf8_pieces():
            spaces = self._pieces.normalize(" a  b ")
        if spaces != " a  b ".replace(" ", SPACE):
            raise TokenizerError(
                self.path,
                "normalizer_spec",
                "spaces kept as they are",
                f"' a  b ' -> {spaces!r}",
                REPLACE_FILE,
            )
        self.n_pieces: int = self._pieces.get_piece_size()
        added = dict(added_tokens or {})
        self._added = {token_id: text for text, token_id in added.items()}
        self.vocab_size = max([self.n_pieces, vocab_size or 0, *(i + 1 for i in self._added)])
        self._special = {**self._special_pieces(), **added}
        self._skipped = frozenset(self._special.values())
        longest_first = sorted(self._special, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    @contextlib.contextmanager
    def _utf8_pieces(self) -> Iterator[None]:
        """Pieces are decoded when they are asked for: one that is no UTF-8 is an error of the file."""
        try:
            yield
        except UnicodeDecodeError as error:
            raise TokenizerError(self.path, "pieces", "UTF-8 text", error, REPLACE_FILE) from None

    def _special_pieces(self) -> dict[str, int]:
        """Control and unknown pieces, and the user-defined ones that steer the model, by their text."""
        every = range(self.n_pieces)
        ids = set(compress(every, self._pieces.is_control(list(every))))
        ids |= {i for i in (self._pieces.unk_id(),) if i >= 0}  # there is one at most
        # The id of an absent piece is that of the unknown piece.
        ids |= {i for i in map(self._pieces.piece_to_id, SPECIAL_PIECES) if i in every}
        with self._utf8_pieces():
            return {text: i for i in ids if (text := self._pieces.id_to_piece(i))}

    @property
    def bos_id(self) -> int | None:
        """Id of the beginning-of-sequence token, if there is one."""
        bos: int = self._pieces.bos_id()
        return bos if bos >= 0 else self._special.get(BOS_PIECE)

    @property
    def eos_id(self) -> int | None:
        eos: int = self._pieces.eos_id()
        return eos if eos >= 0 else self._special.get("<eos>")

    def encode(self, text: str, bos: bool) -> list[int]:
        """Ids of `text`; special tokens written in it become their single ids.

        With `bos` the result starts with exactly one bos, whether the text begins with `<bos>` or not.

        Raises:
            UsageError: the text is not valid Unicode (a lone surrogate).
            TokenizerError: `bos` is asked of a tokenizer that has none.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError(
                f"the text is not valid Unicode at character {error.start}: {text[error.start]!r}. "
                "Pass UTF-8 text."
            ) from None
        ids: list[int] = []
        for index, part in enumerate(self._split.split(text)):
            if index % 2:
                ids.append(self._special[part])
            elif part:
                ids.extend(self._pieces.encode(part))
        if not bos:
            return ids
        if self.bos_id is None:
            raise TokenizerError(self.path, "bos_id", "a beginning-of-sequence piece", "none", REPLACE_FILE)
        start = 0
        while start < len(ids) and ids[start] == self.bos_id:
            start += 1
        return [self.bos_id, *ids[start:]]

    def without_special(self, text: str) -> str:
        """`text` with a space for every special token written in it, so that it cannot end a turn."""
        return " ".join(self._split.split(text)[::2])

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD.

        Raises:
            UsageError: an id is not in the vocabulary.
        """
        stream = StreamDecoder(self, skip_special)
        return "".join([stream.push(token_id) for token_id in ids]) + stream.flush()

    def token_text(self, token_id: int) -> str:
        """The token as the vocabulary spells it, with spaces as U+2581; "" for an id without a piece."""
        self._check(token_id)
        if token_id < self.n_pieces:
            with self._utf8_pieces():
                return str(self._pieces.id_to_piece(token_id))
        return self._added.get(token_id, "")

    def token_bytes(self, token_id: int, skip_special: bool = True) -> bytes:
        """What the token adds to the text, in UTF-8; a byte-fallback piece adds its one byte.

        Raises:
            UsageError: the id is not in the vocabulary.
        """
        text = self.token_text(token_id)
        if token_id in self._skipped:
            return b"" if skip_special else text.encode("utf-8")
        if token_id < self.n_pieces and self._pieces.is_byte(token_id):
            return bytes((int(text[1:-1], 16),))  # "<0xE2>", as SentencePiece checks
        return text.replace(SPACE, " ").encode("utf-8")

    def _check(self, token_id: int) -> None:
        if not 0 <= token_id < self.vocab_size:
            raise UsageError(f"token id {token_id} is not in the vocabulary of {self.vocab_size}")


class StreamDecoder:
    """Decodes one id at a time and never hands out half a character.

    The pieces that `push` and `flush` return join to `Tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that is complete now; "" while the bytes of a character are still coming."""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id, self._skip_special))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an unfinished character, otherwise ""."""
        return self._utf8.decode(b"", final=True)
