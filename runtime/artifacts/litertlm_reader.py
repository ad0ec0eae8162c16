"""Reads a .litertlm and checks it before an engine sees it.

    bytes 0..7    "LITERTLM"
    bytes 8..19   major, minor, patch version (u32 each)
    bytes 24..31  where the header ends (u64)
    bytes 32..    the header, a FlatBuffer: system metadata, and the list of sections
    then          the sections, each at a multiple of 16 KiB

LiteRT-LM follows the header without looking: a section beyond the end of the file, or a model type that is
no text, takes the process down. `read_litertlm` checks the container and every model in it.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, NoReturn

from gemma_edge.runtime.artifacts.decoder_signatures import DecoderSignatures
from gemma_edge.runtime.artifacts.flatbuffer import EXPORT_AGAIN, FlatBuffer, Table
from gemma_edge.runtime.artifacts.protobuf import fields, integers
from gemma_edge.runtime.artifacts.tflite_check import (
    EncoderGraph,
    check_audio,
    check_decoder,
    check_embedder,
    check_rows,
    check_vision,
)
from gemma_edge.runtime.artifacts.tflite_reader import TfliteModel, read_tflite
from gemma_edge.runtime.errors import BundleError, ConfigError
from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig
from gemma_edge.runtime.files.text_files import parse_json

MAGIC = b"LITERTLM"
MAJOR_VERSION = 1
HEADER_START = 32
HEADER_LIMIT = 16_384  # LiteRT-LM maps no more than this to read the header
SECTION_ALIGNMENT = 16_384
CONFIG_KEY = "gemma_edge.config"  # of the system metadata: the model's config, as JSON

SECTION_TYPES = {
    **{1: "GenericBinaryData", 3: "TFLiteModel", 4: "SP_Tokenizer", 5: "LlmMetadataProto"},
    **{6: "HF_Tokenizer_Zlib", 7: "TFLiteWeights", 8: "EmbeddingMetadataProto"},
    **{9: "ExecutorMetadataProto", 10: "TtsMetadataProto", 11: "AsrMetadataProto"},
}
PREFILL_DECODE = "tf_lite_prefill_decode"
EMBEDDER = "tf_lite_embedder"
PER_LAYER_EMBEDDER = "tf_lite_per_layer_embedder"
REQUIRED = (
    ("LlmMetadataProto", ""),
    ("SP_Tokenizer", ""),
    ("TFLiteModel", PREFILL_DECODE),
    ("TFLiteModel", EMBEDDER),
    ("TFLiteModel", PER_LAYER_EMBEDDER),
)
# What sees and hears: all of these or none, of either.
VISION_ENCODER, VISION_ADAPTER = "tf_lite_vision_encoder", "tf_lite_vision_adapter"
AUDIO_ENCODER, AUDIO_ADAPTER = "tf_lite_audio_encoder_hw", "tf_lite_audio_adapter"
END_OF_AUDIO = "tf_lite_end_of_audio"
GENERIC, GEMMA3N = 1, 2  # fields of LlmModelType
STRING_VALUE = 9  # of the union of values in the header
# struct format of the other kinds of values, by their number in that union
NUMBERS = {1: "B", 2: "b", 3: "H", 4: "h", 5: "I", 6: "i", 8: "?", 10: "Q", 11: "q"}
FLOATS = (7, 12)


@dataclass(frozen=True)
class Section:
    """Bytes [begin, end) of the file, what they are, and for a model its model type."""

    type: str
    model_type: str
    begin: int
    end: int


@dataclass(frozen=True)
class LlmMetadata:
    """What LiteRT-LM is told about the model: ids, tokens of context, Jinja template ("" for none)."""

    start_ids: tuple[int, ...]
    stop_ids: tuple[tuple[int, ...], ...]
    max_tokens: int
    template: str


@dataclass(frozen=True)
class Litertlm:
    """A checked file."""

    path: Path
    version: tuple[int, int, int]
    sections: tuple[Section, ...]
    system: dict[str, str]
    llm: LlmMetadata
    config: Gemma3nConfig
    decoder: TfliteModel
    signatures: DecoderSignatures
    embedder: TfliteModel
    per_layer_embedder: TfliteModel
    vision: EncoderGraph | None = None
    audio: EncoderGraph | None = None

    def section(self, kind: str, model_type: str = "") -> Section:
        """The section of this type; a required one is always there."""
        return next(s for s in self.sections if (s.type, s.model_type) == (kind, model_type))

    def read(self, section: Section) -> bytes:
        """The bytes of a section; for the small ones."""
        with self.path.open("rb") as file:
            file.seek(section.begin)
            return file.read(section.end - section.begin)

    @cached_property
    def tokenizer_model(self) -> bytes:
        """The SentencePiece model, padded to one piece for each id of the vocabulary."""
        return self.read(self.section("SP_Tokenizer"))


def read_litertlm(path: str | Path, config: Gemma3nConfig | None = None) -> Litertlm:
    """Checks a .litertlm and returns what is in it.

    Args:
        path: the file.
        config: the model it must be of; default: the one that the file says it is of.

    Raises:
        BundleError: the file cannot be read, is damaged, lacks a section, or belongs to another model.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _Reader(file, path, os.fstat(file.fileno()).st_size).read(config)
    except OSError as error:
        raise BundleError(path, "file", "a readable .litertlm", error.strerror) from None


class _Reader:
    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self.file, self.path, self.size = file, path, size

    def fail(self, field: str, expected: object, got: object) -> NoReturn:
        raise BundleError(self.path, field, expected, got, EXPORT_AGAIN)

    def load(self, begin: int, end: int, name: str) -> bytes:
        self.file.seek(begin)
        data = self.file.read(end - begin)
        if len(data) != end - begin:
            self.fail(name, f"{end - begin} bytes", f"{len(data)}, the file is too short")
        return data

    def read(self, config: Gemma3nConfig | None) -> Litertlm:
        head = self.load(0, HEADER_START, "header")
        if head[:8] != MAGIC:
            self.fail("magic", MAGIC, head[:8])
        version = struct.unpack_from("<3I", head, 8)
        if version[0] != MAJOR_VERSION:
            self.fail("version", f"{MAJOR_VERSION}.x", ".".join(map(str, version)))
        (header_end,) = struct.unpack_from("<Q", head, 24)
        if not HEADER_START < header_end <= min(self.size, HEADER_LIMIT):
            self.fail("header end", f"{HEADER_START} to {min(self.size, HEADER_LIMIT)}", header_end)
        root = FlatBuffer(self.file, self.path, HEADER_START, header_end).root()
        system_table, list_table = root.child(0, "system_metadata"), root.child(1, "section_metadata")
        if list_table is None:
            self.fail("section_metadata", "a list of sections", "nothing")
        system = self._items(system_table, 0, "system_metadata") if system_table else {}
        sections = self._sections(list_table, header_end)
        found = {(s.type, s.model_type): s for s in sections}
        for kind, model_type in REQUIRED:
            if (kind, model_type) not in found:
                self.fail("sections", f"{kind} {model_type}".strip(), ", ".join(s.type for s in sections))
        config = config or self._config(system)
        models = [
            read_tflite(self.path, s.begin, s.end)
            for s in (found["TFLiteModel", name] for name in (PREFILL_DECODE, EMBEDDER, PER_LAYER_EMBEDDER))
        ]
        signatures = check_decoder(models[0], config)
        if signatures.layout != "litertlm":
            self.fail(PREFILL_DECODE, "full-length caches and one mask", f"the {signatures.layout} layout")
        check_embedder(models[1], (config.hidden_size,))
        check_embedder(models[2], (config.num_hidden_layers, config.hidden_size_per_layer_input))
        vision, audio = self._encoders(found, config)
        llm = self._llm_metadata(found["LlmMetadataProto", ""], config, GENERIC if audio else GEMMA3N)
        if llm.max_tokens != signatures.context:
            self.fail("max_num_tokens", f"{signatures.context}, the length of the caches", llm.max_tokens)
        self._check_tokenizer(found["SP_Tokenizer", ""], config)
        return Litertlm(
            self.path,
            version,
            sections,
            system,
            llm,
            config,
            models[0],
            signatures,
            models[1],
            models[2],
            vision,
            audio,
        )

    def _encoders(
        self, found: dict[tuple[str, str], Section], config: Gemma3nConfig
    ) -> tuple[EncoderGraph | None, EncoderGraph | None]:
        """Checks the models that see and hear, and that each fits the next."""

        def models(*names: str) -> list[TfliteModel]:
            there = [found["TFLiteModel", name] for name in names if ("TFLiteModel", name) in found]
            if len(there) not in (0, len(names)):
                self.fail("sections", ", ".join(names), ", ".join(s.model_type for s in there))
            return [read_tflite(self.path, s.begin, s.end) for s in there]

        vision = audio = None
        if seen := models(VISION_ENCODER, VISION_ADAPTER):
            vision = check_vision(seen[0])
            check_rows(seen[1], [("float32", (1, vision.soft_tokens, vision.hidden))], config.hidden_size)
        if heard := models(AUDIO_ENCODER, AUDIO_ADAPTER, END_OF_AUDIO):
            audio = check_audio(heard[0])
            if len(audio.frames) != 1:
                self.fail(AUDIO_ENCODER, "one signature", f"{len(audio.frames)}")
            rows = 1, audio.soft_tokens
            check_rows(heard[1], [("bool", rows), ("float32", (*rows, audio.hidden))], config.hidden_size)
            check_rows(heard[2], [], config.hidden_size)
        return vision, audio

    def _config(self, system: dict[str, str]) -> Gemma3nConfig:
        field = f"system metadata {CONFIG_KEY}"
        if CONFIG_KEY not in system:
            self.fail(field, "the model's config", "nothing")
        data = parse_json(system[CONFIG_KEY], self.path, BundleError, field=field, remedy=EXPORT_AGAIN)
        try:
            return Gemma3nConfig.from_dict(data, self.path)
        except ConfigError as error:
            self.fail(f"{field}.{error.field}", error.expected, error.got)

    # The header. ----------------------------------------------------------------------------------

    def _items(self, table: Table, slot: int, name: str) -> dict[str, str]:
        """Keys and values of a vector of KeyValuePair; a value that is no text is checked and left out."""
        items: dict[str, str] = {}
        for pair in table.children(slot, name):
            key = pair.string(0, f"{pair.field}.key")
            kind = pair.number(1, "B")
            value = pair.child(2, f"{pair.field}.value")
            if not key or value is None or key.lower() in items:
                self.fail(pair.field, "a key of its own, and a value", repr(key))
            if kind == STRING_VALUE:
                if not value.has(0):
                    self.fail(pair.field, "a text", "nothing")
                items[key.lower()] = value.string(0, f"{pair.field}.value")
            elif kind in NUMBERS:
                value.number(0, NUMBERS[kind])
            elif kind not in FLOATS:
                self.fail(pair.field, "a kind of value", kind)
        return items

    def _sections(self, table: Table, header_end: int) -> tuple[Section, ...]:
        sections: list[Section] = []
        for item in table.children(0, "sections"):
            kind = item.number(3, "B")
            if kind not in SECTION_TYPES:
                self.fail(f"{item.field}.data_type", "a known type", kind)
            model_type = self._items(item, 0, f"{item.field}.items").get("model_type", "")
            section = Section(SECTION_TYPES[kind], model_type, item.number(1, "Q"), item.number(2, "Q"))
            if any((s.type, s.model_type) == (section.type, section.model_type) for s in sections):
                self.fail(item.field, "one section of a kind", f"{section.type} {model_type} again")
            if section.begin % SECTION_ALIGNMENT or section.begin >= section.end:
                got = f"bytes {section.begin} to {section.end}"
                self.fail(item.field, f"bytes from a multiple of {SECTION_ALIGNMENT} on", got)
            if section.end > self.size:
                self.fail(item.field, f"within {self.size} bytes", f"bytes up to {section.end}")
            sections.append(section)
        end = header_end
        for section in sorted(sections, key=lambda s: s.begin):
            expected = -(-end // SECTION_ALIGNMENT) * SECTION_ALIGNMENT
            if section.begin != expected:
                name = f"section {section.type} {section.model_type}".strip()
                self.fail(name, f"begin at byte {expected}, after its neighbour", section.begin)
            if any(self.load(end, expected, "padding")):
                self.fail(f"bytes from {end} on", "zeros up to the next section", "others")
            end = section.end
        if end != self.size:
            self.fail("file", f"{end} bytes, the end of the last section", self.size)
        return tuple(sections)

    # The small sections. --------------------------------------------------------------------------

    def _llm_metadata(self, section: Section, config: Gemma3nConfig, expected: int) -> LlmMetadata:
        data = self.load(section.begin, section.end, section.type)
        start: tuple[int, ...] = ()
        stops: list[tuple[int, ...]] = []
        max_tokens, template, model_type = 0, "", 0
        for number, value in fields(data, section.type, self.fail):
            if number == 5 and isinstance(value, int):
                max_tokens = value
            elif isinstance(value, bytes):
                if number == 1:
                    start = self._token_ids(value)
                elif number == 2:
                    stops.append(self._token_ids(value))
                elif number == 6:
                    model_type = next((n for n, _ in fields(value, "llm_model_type", self.fail)), 0)
                elif number == 7:
                    template = value.decode("utf-8", "replace")
        if model_type != expected:
            name = "gemma3n" if expected == GEMMA3N else "generic_model"
            self.fail("llm_model_type", f"{name}, field {expected}", model_type)
        if not start or not stops or not all(stops):
            self.fail("start_token, stop_tokens", "token ids", f"{start}, {stops}")
        if (highest := max(*start, *(i for stop in stops for i in stop))) >= config.vocab_size:
            self.fail("start_token, stop_tokens", f"ids below vocab_size = {config.vocab_size}", highest)
        return LlmMetadata(start, tuple(stops), max_tokens, template)

    def _token_ids(self, union: bytes) -> tuple[int, ...]:
        """Ids of a TokenUnion; () if it holds a text."""
        ids: list[int] = []
        for number, inner in fields(union, "token", self.fail):
            if number != 1 or not isinstance(inner, bytes):
                return ()
            for _, value in fields(inner, "token_ids", self.fail):
                ids += integers(value, "token_ids", self.fail)
        return tuple(ids)

    def _check_tokenizer(self, section: Section, config: Gemma3nConfig) -> None:
        """One piece for each id: LiteRT-LM aborts when it samples an id without one."""
        data = self.load(section.begin, section.end, section.type)
        pieces = sum(number == 1 for number, _ in fields(data, section.type, self.fail))
        if pieces != config.vocab_size:
            self.fail(section.type, f"{config.vocab_size} pieces, one for each id", pieces)
