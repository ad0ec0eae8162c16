"""Builds the LlmMetadata of a .litertlm: prompts, sampling, images and clips."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.message import DecodeError

from gemma_edge.export.checkpoint.sentencepiece_model import PieceKind, sentencepiece_proto
from gemma_edge.export.export_families import family_with
from gemma_edge.export.model.tower import Tower
from gemma_edge.runtime.artifacts.litertlm_bundle import TOKENIZER
from gemma_edge.runtime.artifacts.modalities import Kind
from gemma_edge.runtime.errors import ConfigError, TokenizerError
from gemma_edge.runtime.families.log_mel import LogMel
from gemma_edge.runtime.families.model_family import TextConfig
from gemma_edge.runtime.prompt.chat_template import ChatTemplate
from gemma_edge.runtime.prompt.tokenizer import BOS_PIECE
from gemma_edge.runtime.sampling import Sampling

NEWLINES = "\n\n"  # around an image or a clip, as the model was trained


@dataclass(frozen=True)
class LlmFacts:
    """A model as LiteRT-LM sees it.

    stop_ids: ids that end an answer.
    max_tokens: tokens of context, the length of the KV caches.
    chat_template: Jinja source; None for the family's own.
    sampling: what LiteRT-LM samples with unless told otherwise.
    """

    config: TextConfig
    stop_ids: Sequence[int]
    max_tokens: int
    chat_template: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    towers: Mapping[Kind, Tower] = field(default_factory=dict)


def llm_metadata(facts: LlmFacts, tokenizer: bytes = b"") -> bytes:
    """The serialized LlmMetadata of a model.

    Args:
        tokenizer: the SentencePiece model that spells the tokens around images and clips.

    Raises:
        ConfigError: the config has no bos token.
    """
    from litert_lm_builder.runtime.proto import llm_metadata_pb2, sampler_params_pb2  # a plan does without

    config, sampling, family = facts.config, facts.sampling, family_with(facts.config)
    if config.bos_token_id is None:
        raise ConfigError("config.json", "bos_token_id", "the id that a prompt begins with", None)
    metadata: Any = llm_metadata_pb2.LlmMetadata()
    metadata.start_token.token_ids.ids.append(config.bos_token_id)
    for stop_id in facts.stop_ids:
        metadata.stop_tokens.add().token_ids.ids.append(stop_id)
    metadata.max_num_tokens = facts.max_tokens
    describe_towers(metadata, family.runtime.name, facts.towers, _pieces(tokenizer))
    # LiteRT-LM puts the start token in front; a template's bos_token is empty there, a literal one a second.
    template = family.runtime.chat_template if facts.chat_template is None else facts.chat_template
    metadata.jinja_prompt_template = template.removeprefix(BOS_PIECE)
    # For sessions that do not render Jinja.
    user, model, end = family.turns
    metadata.prompt_templates.user.prefix, metadata.prompt_templates.user.suffix = user, end
    metadata.prompt_templates.model.prefix, metadata.prompt_templates.model.suffix = model, end
    metadata.supports_thinking = False
    # A generic_model is given tools as they are, but no calls are found in its answers.
    finds_calls = metadata.llm_model_type.WhichOneof("model_type") != "generic_model"
    metadata.supports_function_calling = finds_calls and ChatTemplate(template).renders_tools()
    parameters, kinds = metadata.sampler_params, sampler_params_pb2.SamplerParameters
    parameters.type = kinds.TOP_P if sampling.temperature else kinds.GREEDY
    if sampling.temperature:
        parameters.temperature, parameters.p = sampling.temperature, sampling.top_p
        parameters.k = sampling.top_k or config.vocab_size
    return bytes(metadata.SerializeToString(deterministic=True))


def _pieces(tokenizer: bytes) -> dict[int, str]:
    return {
        i: piece.piece
        for i, piece in enumerate(sentencepiece_proto().ModelProto.FromString(tokenizer).pieces)
    }


def describe_towers(
    metadata: Any, family: str, towers: Mapping[Kind, Tower], pieces: Mapping[int, str]
) -> None:
    """Tells LiteRT-LM how images and clips are prepared and surrounded.

    Without audio the model has the type of its family. With audio it is a `generic_model` that says all there
    is to say: what LiteRT-LM hears for `gemma3n` is normalized by constants that no checkpoint has.

    Args:
        metadata: the LlmMetadata.
        family: the name of the model family, which is LiteRT-LM's too.
        pieces: texts of the tokens around and instead of images and clips, by id.
    """
    if not towers:
        getattr(metadata.llm_model_type, family).SetInParent()
        return
    vision, audio = towers.get("vision"), towers.get("audio")
    if vision and not audio:
        described = getattr(metadata.llm_model_type, family)
        described.image_tensor_height = described.image_tensor_width = vision.size
        described.start_of_image_token.token_str = pieces[vision.begin_id]
        described.end_of_image_token.token_str = pieces[vision.end_id]
        return
    generic = metadata.llm_model_type.generic_model
    generic.delimiter_regex = "(" + "|".join(re.escape(pieces[e.soft_id]) for e in towers.values()) + ")"
    if vision:
        generic.image_enabled = True
        generic.image_token_regex = re.escape(pieces[vision.soft_id])
        generic.image_tensor_height = generic.image_tensor_width = vision.size
        generic.start_of_image_token.token_str = pieces[vision.begin_id]
        generic.end_of_image_token.token_str = pieces[vision.end_id]
        generic.image_prefix = generic.image_suffix = NEWLINES
        generic.add_image_end = False  # it is one of the adapter's rows
    if audio:
        generic.audio_enabled = True
        generic.audio_token_regex = re.escape(pieces[audio.soft_id])
        generic.start_of_audio_token.token_str = pieces[audio.begin_id]
        generic.end_of_audio_token.token_str = pieces[audio.end_id]
        generic.audio_prefix = generic.audio_suffix = NEWLINES
        generic.add_audio_end = True
        _describe_features(generic, LogMel.from_dict(audio.preprocessor))


def _describe_features(generic: Any, log_mel: LogMel) -> None:
    generic.audio_sample_rate_hz, generic.audio_num_channels = log_mel.sampling_rate, 1
    generic.audio_frame_length, generic.audio_hop_length = log_mel.frame_length, log_mel.hop_length
    generic.audio_fft_length = log_mel.fft_length
    generic.audio_input_scale = log_mel.input_scale_factor
    generic.audio_pre_emphasis_factor = log_mel.preemphasis
    generic.audio_num_mel_bins = log_mel.feature_size
    generic.audio_mel_low_hz, generic.audio_mel_high_hz = log_mel.min_frequency, log_mel.max_frequency
    # LiteRT-LM cuts the logarithm, not what it is taken of.
    generic.audio_mel_floor = math.log(log_mel.mel_floor)
    generic.audio_normalize_mel = generic.audio_add_floor_to_mel_before_log = False
    generic.audio_semicausal_padding = generic.audio_non_zero_hanning = False
    generic.audio_periodic_hanning = True
    generic.audio_fft_padding_type = 1  # zeros behind the frame


def pad_tokenizer(source: bytes, added_tokens: Mapping[str, int], vocab_size: int) -> bytes:
    """A serialized SentencePiece model with one piece for each of `vocab_size` ids.

    LiteRT-LM aborts when it samples an id that has none. Added tokens get their text; what is left gets
    control pieces, which no text is encoded to, and which decode to nothing.

    Raises:
        TokenizerError: not a SentencePiece model, or one with more pieces than that.
    """
    model = sentencepiece_proto().ModelProto()
    try:
        model.ParseFromString(source)
    except DecodeError as error:
        raise TokenizerError(TOKENIZER, "file", "a SentencePiece model", error) from None
    count = len(model.pieces)
    if not 0 < count <= vocab_size:
        raise TokenizerError(TOKENIZER, "pieces", f"1 to vocab_size = {vocab_size}", count)
    taken = {piece.piece for piece in model.pieces}
    texts = {index: text for text, index in added_tokens.items() if text not in taken}
    for index in range(count, vocab_size):
        kind = PieceKind.USER_DEFINED if index in texts else PieceKind.CONTROL
        model.pieces.add(piece=texts.get(index, f"<no_piece_{index}>"), score=0.0, type=int(kind))
    model.trainer_spec.vocab_size = vocab_size
    return bytes(model.SerializeToString(deterministic=True))
